"""Laws of sample and export: what is shown and written is the artifact's own model."""

import json

import artifact as artifact_module
import export
import pytest
import sample
import torch

import records
import train_gpt


@pytest.fixture(scope="module")
def artifact(tiny_run):
    return tiny_run.folder / "final_model.int6.ptz"


def call(capsys, *argv):
    code = records.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def read_alone(rows):
    """Return rows of tokens as a batch whose every place is asked for."""
    rows = torch.as_tensor(rows)
    return train_gpt.Batch(rows, rows)


def texts(capsys, *argv):
    code, out, err = call(capsys, "sample", "--json", *argv)
    assert code == 0, err
    return json.loads(out)["texts"]


def test_the_same_seed_writes_the_same_text_and_another_seed_another(artifact, capsys):
    how = (artifact, "--prompt", "The ", "--tokens", "12", "--temperature", "1")
    first, again = texts(capsys, *how), texts(capsys, *how)
    assert first == again and len(set(first)) == 3
    shifted = texts(capsys, *how, "--seed", "1")
    assert shifted[:2] == first[1:]  # a text's seed decides it, whatever stands beside it
    page = call(capsys, "sample", *how)[1]
    assert all(f"The {text}" in page for text in first)


def test_temperature_zero_takes_the_likeliest_token_each_time(artifact):
    opened = artifact_module.open_artifact(artifact)
    found = sample.write_tokens(opened, [1, 40, 50], 2, 30, 0.0, 0)
    assert found[0] == found[1]
    model, layout = opened.model()
    row = [1, 40, 50]
    for token in found[0]:
        assert int(model.logits(read_alone([row]), layout)[0, -1].argmax()) == token
        row.append(token)


@torch.inference_mode()
def test_what_is_kept_of_earlier_tokens_changes_no_logit(artifact):
    opened, memory = artifact_module.open_artifact(artifact), sample.Memory()
    model, layout = opened.model()
    keeping, _ = opened.model(attend=memory.attend)
    rows = torch.arange(2, 62).view(2, 30) * 7 % 500
    for end in (5, 6, 7, 12, 13, 30):
        expected = model.logits(read_alone(rows[:, :end]), layout)[:, -1]
        assert torch.allclose(memory.logits(keeping, layout, rows[:, :end]), expected, atol=1e-4)


def test_a_text_may_be_longer_than_the_window(artifact):
    opened = artifact_module.open_artifact(artifact)
    (text,) = sample.write_tokens(opened, [1, 40, 50], 1, 150, 1.0, 3)
    whole = sample.write_tokens(opened, [1, 40, 50], 1, 40, 1.0, 3)[0]
    assert text[:len(whole)] == whole and len(text) <= 150


def test_draws_follow_the_models_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(4000, 3)
    generator = torch.Generator().manual_seed(0)
    drawn = sample.next_tokens(logits, 0.5, [generator] * 4000)
    shares = torch.tensor(drawn).bincount(minlength=3) / 4000
    assert torch.allclose(shares, (logits[0] * 2).softmax(0), atol=0.03)


def test_a_text_ends_where_another_document_begins(artifact, monkeypatch):
    opened = artifact_module.open_artifact(artifact)
    rows = iter([[7, 7], [1, 8], [9, 9], [9, 1], [5, 5]])
    monkeypatch.setattr(sample, "next_tokens", lambda *_: next(rows))
    assert sample.write_tokens(opened, [1, 40], 2, 9, 1.0, 0) == [[7], [7, 8, 9]]


def test_export_is_read_back_as_the_artifacts_weights(artifact, tiny_data, capsys, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    out = tmp_path / "deep" / "model.safetensors"
    assert call(capsys, "export", artifact, "--to", out)[0] == 0
    opened = artifact_module.open_artifact(artifact)
    stored, expected = safetensors.load_file(out), opened.weights()
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in expected)
    with safetensors.safe_open(out, "pt") as file:
        meta = file.metadata()
    assert json.loads(meta["config"])["model_dim"] == opened.config.model_dim
    assert tuple(json.loads(meta["layer_order"])) == opened.model()[1].order
    assert meta["tokenizer"] == str(tiny_data.tokenizer)
    assert "steps" not in meta  # an artifact's header does not say
    assert meta["tokenizer_sha256"] == opened.header["tokenizer_sha256"]
    code, _, err = call(capsys, "export", artifact, "--to", out)
    assert code == 2 and "exists" in err


@pytest.mark.parametrize("seed", sample.SEEDS)
def test_the_outermost_seeds_write(seed, artifact, capsys):
    assert len(texts(capsys, artifact, "--seed", seed, "--number", "64", "--tokens", "1")) == 64


def test_an_export_that_cannot_be_written_is_one_line_and_leaves_nothing(artifact, capsys, tmp_path,
                                                                         monkeypatch):
    torch_files = pytest.importorskip("safetensors.torch")
    errors = pytest.importorskip("safetensors")
    (tmp_path / "file").write_text("x")

    def fill_up(weights, path, meta):
        path.write_bytes(b"half")
        raise errors.SafetensorError("No space left on device")

    code, out, err = call(capsys, "export", artifact, "--to", tmp_path / "file" / "x.safetensors")
    assert code == 2 and err.count("\n") == 1 and "cannot be written" in err
    monkeypatch.setattr(torch_files, "save_file", fill_up)
    code, out, err = call(capsys, "export", artifact, "--to", tmp_path / "x.safetensors")
    assert code == 2 and err.count("\n") == 1 and "cannot be written (No space" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_mistakes_end_in_one_line_naming_the_remedy(artifact, capsys, tmp_path):
    other = tmp_path / "other.model"
    other.write_bytes(b"x")
    alone = tmp_path / artifact.name
    alone.write_bytes(artifact.read_bytes())
    for argv, said in (
            (["sample", tmp_path / "none"], "no such file"), (["sample", other], "other.model"),
            (["sample", artifact, "--tokenizer", other], "another one"),
            (["sample", alone], "give --tokenizer"),
            (["sample", artifact, "--temperature", "-1"], "--temperature -1.0: must be from 0"),
            (["sample", artifact, "--tokens", "0"], "--tokens 0: must be from 1"),
            (["sample", artifact, "--temperature", "1e-320"], "must be 0 or at least 1e-06"),
            (["sample", artifact, "--temperature", "nan"], "--temperature nan: must be from 0"),
            (["sample", artifact, "--seed", str(2 ** 64)], "must be from -9223372036854775808"),
            (["sample", artifact, "--prompt", "\udcff"], "--prompt '\\udcff': is no UTF-8 text"),
            (["export", artifact, "--to", tmp_path / "x.bin"], "must end in .safetensors")):
        code, _, err = call(capsys, *argv)
        assert code == 2 and err.count("\n") == 1 and said in err, argv
    assert export.metadata(artifact_module.open_artifact(alone), None)["tokenizer"] == ""
