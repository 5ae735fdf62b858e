"""The record's shapes on a CPU: every stage at full size, with little text. Minutes long.

No tokenizer and no download: shards are synthetic and the rooms are called directly.
"""

import dataclasses
import math

import numpy as np
import pytest
import shards
import torch

import train_gpt

pytestmark = pytest.mark.slow

SETTINGS = dict(DEVICE="cpu", TRAIN_BATCH_TOKENS=8192, MICRO_BATCH_TOKENS=4096, STAGE="train",
                GPTQ_CALIBRATION_BATCHES=2, MAX_WALLCLOCK_SECONDS=0, ITERATIONS=1)
PARAMETERS = 37_022_812
TOKENIZER_SHA256 = "0" * 64  # no text is tokenized here


def structured_tokens(count, vocab_size, seed):
    """Return tokens (count,), unevenly frequent, of which half follow from the one before."""
    generator = np.random.default_rng(seed)
    fresh = (vocab_size ** generator.random(count)).astype(np.int64) - 1
    repeats = generator.random(count) < 0.5
    tokens = fresh.copy()
    for i in range(1, count):
        if repeats[i]:
            tokens[i] = (tokens[i - 1] * 31 + 7) % vocab_size
    return tokens


def session_of(env, folder, run_id):
    """Return a Session as the script makes it, without its preflight."""
    config = train_gpt.load_config({name: str(value) for name, value in env.items()})
    files = train_gpt.RunFiles(run_id)
    log = train_gpt.Log(True, files.events, files.text_log)
    inputs = train_gpt.Inputs("", 200_000, "", TOKENIZER_SHA256)
    return train_gpt.Session(config, train_gpt.Runtime({}, config), log, train_gpt.Clock(), files,
                             inputs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to run in, with shards."""
    path = tmp_path_factory.mktemp("default_shapes")
    (path / "shards").mkdir()
    shards.write_shard(path / "shards" / "fineweb_train_000000.bin",
                       structured_tokens(60_000, 8192, seed=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


@pytest.fixture(scope="module")
def text():
    """One window of validation text, two bytes a token."""
    tokens = structured_tokens(2049, 8192, seed=2).astype(np.uint16)
    return train_gpt.Validation(tokens, np.full(2048, 2, np.uint16), 4096, "table", 2048, 2048, "")


@pytest.fixture(scope="module")
def trained(folder):
    """One optimizer step, weights and statistics in files: (session, model, layout, losses).

    The step is a twentieth of a real first one, which overshoots as in the published logs. Losses
    are those of its batch before and after.
    """
    env = {**SETTINGS, "DATA_PATH": folder / "shards"}
    session = session_of(env, folder, "step")
    config, runtime = session.config, session.runtime
    trainer = train_gpt.start_training(session)
    state, layout = trainer.state, trainer.phases[1].layout
    shards = train_gpt.ShardSet(train_gpt.find_shards(config.shard_dir, "train"),
                                config.train_seq_len)
    loader = train_gpt.Loader(shards, config, runtime)
    state.average = train_gpt.Average(state.optimizers.bank, config)
    rates = dataclasses.replace(train_gpt.schedule(config, 0, 0.0), lr_multiplier=0.05)
    batch = loader.batch(0)
    losses = [trainer.update(batch, layout, rates).item()]
    with torch.inference_mode():
        parts = [state.model.mean_loss(row, layout) for row in batch.split(1)]
        losses.append(torch.stack(parts).mean().item())
    calibration = train_gpt.Calibration(state.model, config, runtime)
    hessians = calibration.run(layout, loader, session.clock, session.log)
    loader.close()
    header = dict(config=train_gpt.artifact_config(config), order=list(layout.order), steps=1,
                  tokenizer_sha256=TOKENIZER_SHA256,
                  train_sha256=train_gpt.fingerprint(
                      train_gpt.find_shards(config.shard_dir, "train")))
    weights = {name: p.detach().float() for name, p in state.model.named_parameters()}
    train_gpt.write_tensors(session.files.weights, dict(header, kind="weights"), weights)
    train_gpt.write_tensors(session.files.stats, dict(header, kind="stats"), hessians)
    return session, state.model, layout, losses


def loss_of(model, layout, text, runtime):
    """Return the loss of the one window."""
    windows = (2048, 2048, 1)
    return train_gpt.score(lambda batch: model.token_losses(batch, layout), text, windows,
                           runtime).loss


def quantize(folder, run_id, source, **settings):
    """Quantise the weights of run `source` as run `run_id`; return sizes and steps."""
    env = {"DEVICE": "cpu", "STAGE": "quantize", "INPUT_PATH": f"runs/{source}", **settings}
    return train_gpt.quantize_stage(session_of(env, folder, run_id))


def reload(folder, run_id):
    env = {"DEVICE": "cpu", "STAGE": "evaluate", "INPUT_PATH": f"runs/{run_id}"}
    return train_gpt.load_artifact(session_of(env, folder, f"{run_id}-read"))


def test_one_step_learns_from_an_even_guess(trained):
    _, model, layout, (before, after) = trained
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS
    assert layout.order == (0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10)
    assert abs(before - math.log(8192)) < 0.1
    assert after < before - 0.05


def test_the_stepped_model_survives_its_round_trip(trained, folder, text):
    """Quantised at a given k, packed, read back and scored: every weight keeps its meaning."""
    session, model, layout, _ = trained
    facts = quantize(folder, "given", "step", SDCLIP_K=6, SDCLIP_K_EMBED=10)
    reloaded_session, reloaded, read_layout, _ = reload(folder, "given")
    assert read_layout == layout
    assert facts["total_bytes"] == facts["artifact_bytes"] + facts["code_bytes"]
    before = loss_of(model, layout, text, session.runtime)
    after = loss_of(reloaded, read_layout, text, reloaded_session.runtime)
    assert abs(after - before) < 0.02
    for (name, p), (_, q) in zip(model.named_parameters(), reloaded.named_parameters(),
                                 strict=True):
        if p.role is not train_gpt.Role.CONTROL and p.detach().std() > 0:
            error = (p.detach() - q.detach()).norm() / p.detach().norm()
            assert error < 0.15, name


def trained_like(model):
    """Return weights by name as training leaves them: a spread per row, tails above Gaussian."""
    generator, out = np.random.default_rng(3), {}
    for name, p in model.named_parameters():
        if p.role is train_gpt.Role.CONTROL:
            out[name] = p.detach().clone()
            continue
        spread = 0.08 * np.exp(0.3 * generator.standard_normal((p.shape[0], 1)))
        tails = generator.standard_t(8, size=tuple(p.shape)) / math.sqrt(8 / 6)
        out[name] = torch.from_numpy((spread * tails).astype(np.float32))
    return out


def test_a_trained_models_total_lands_under_the_cap_by_itself(trained, folder, text):
    session, model, layout, _ = trained
    header, _ = train_gpt.read_tensors(session.files.weights, "weights")
    source = train_gpt.RunFiles("like")
    train_gpt.write_tensors(source.weights, header, trained_like(model))
    header, hessians = train_gpt.read_tensors(session.files.stats, "stats")
    train_gpt.write_tensors(source.stats, header, hessians)
    facts = quantize(folder, "searched", "like")
    assert 15_900_000 <= facts["total_bytes"] <= 16_000_000
    low, high = train_gpt.MULTIPLIER_RANGE
    assert low < facts["multiplier"] < high
    reloaded_session, reloaded, read_layout, _ = reload(folder, "searched")
    assert math.isfinite(loss_of(reloaded, read_layout, text, reloaded_session.runtime))
