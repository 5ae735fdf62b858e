"""Attention is tried at a run's start as the run will call it: lengths, modes, masks, ranks."""

import contextlib

import pytest
import torch
from toys import (
    Rank,
    on_ranks,
    steady,  # noqa: F401
    toy_config,
)

import train_gpt
from train_gpt import ConfigError, attention_math, attention_sdpa, choose_attention


def backends(**refusals):
    """Return a table of backends, each refusing what its predicate of (q, k) says."""
    def form(refuses):
        def attend(q, k, v):
            if refuses(q, k):
                raise RuntimeError("No available kernel. Aborting execution.")
            return attention_sdpa(q, k, v)
        return attend, lambda *names: contextlib.nullcontext()
    return lambda config, runtime: {name: form(refuses) for name, refuses in refusals.items()}


def never(q, k):
    return False


REFUSALS = {
    "the training length": lambda q, k: k.shape[1] == 48,
    "the evaluation length": lambda q, k: k.shape[1] == 64,
    "the last queries alone": lambda q, k: q.shape[1] == 3,
    "backward": lambda q, k: q.requires_grad and k.shape[1] == 48,
    "inference": lambda q, k: q.is_inference(),
    "everything": lambda q, k: True}
CONFIG = dict(train_seq_len=48, train_batch_tokens=96, micro_batch_tokens=96, eval_seq_len=64,
              eval_stride=3)


@pytest.mark.parametrize("refuses", REFUSALS.values(), ids=REFUSALS)
def test_a_backend_that_refuses_what_the_run_needs_is_passed_over(monkeypatch, refuses):
    monkeypatch.setattr(train_gpt, "attention_backends", backends(first=refuses, second=never))
    name, *_, error = choose_attention(toy_config(**CONFIG), Rank())
    assert name == "second" and error < 1e-5
    monkeypatch.setattr(train_gpt, "attention_backends", backends(first=refuses))
    with pytest.raises(ConfigError, match="ATTENTION_BACKEND=auto: not usable here: No available"):
        choose_attention(toy_config(**CONFIG), Rank())


def test_a_lone_evaluation_does_not_ask_for_gradients_at_the_training_length(monkeypatch):
    monkeypatch.setattr(train_gpt, "attention_backends",
                        backends(first=REFUSALS["the training length"], second=never))
    assert choose_attention(toy_config(**CONFIG, stage="evaluate"), Rank())[0] == "first"


def test_a_wrong_result_is_no_backend(monkeypatch):
    def table(config, runtime):
        def wrong(q, k, v):
            return attention_sdpa(q, k, v) * 1.2
        return dict(first=(wrong, lambda *names: contextlib.nullcontext()))
    monkeypatch.setattr(train_gpt, "attention_backends", table)
    with pytest.raises(ConfigError, match="off by 0.44"):
        choose_attention(toy_config(), Rank())


def test_the_windowed_form_of_a_stream_is_tried_too(monkeypatch):
    """As flash on a GPU, which takes no mask: it failed in evaluation, after training."""
    calls = []

    def refusing(name, window):
        def attend(q, k, v):
            calls.append((window, k.shape[1]))
            raise RuntimeError("no kernel takes this mask")
        return attend
    monkeypatch.setattr(train_gpt, "windowed_form", refusing)
    choose_attention(toy_config(), Rank())
    assert not calls
    with pytest.raises(ConfigError, match="no kernel takes this mask"):
        choose_attention(toy_config(eval_mode="stream"), Rank())


def test_a_windowed_form_that_ignores_its_window_is_found(monkeypatch):
    monkeypatch.setattr(train_gpt, "windowed_form", lambda name, window: attention_sdpa)
    with pytest.raises(ConfigError, match="off by"):
        choose_attention(toy_config(eval_mode="stream"), Rank())


@pytest.mark.parametrize("window", (1, 5, 12))
def test_the_yardstick_has_a_window(window):
    q, k, v = torch.randn(2, 12, 4, 6), torch.randn(2, 12, 2, 6), torch.randn(2, 12, 2, 6)
    expected = train_gpt.windowed_attention(window)(q, k, v)
    torch.testing.assert_close(attention_math(q, k, v, window), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention_math(q[:, -3:], k, v, window), expected[:, -3:],
                               rtol=1e-4, atol=1e-5)


def test_ranks_that_come_to_different_backends_are_told(monkeypatch):
    def table(config, runtime):
        names = ("first", "second") if runtime.rank == 0 else ("second",)
        return {name: (attention_sdpa, lambda *names: contextlib.nullcontext()) for name in names}
    monkeypatch.setattr(train_gpt, "attention_backends", table)

    def choose(runtime):
        with pytest.raises(ConfigError, match="rank 0 comes to first, rank 1 to second") as raised:
            choose_attention(toy_config(), runtime)
        return raised.value.shared
    assert on_ranks(2, choose) == [True, True]


def test_fa3_without_its_package_says_what_it_needs():
    with pytest.raises(ConfigError, match="ATTENTION_BACKEND=fa3: .*flash_attn_3"):
        choose_attention(toy_config(attention_backend="fa3"), Rank())
    with pytest.raises(ConfigError, match="ATTENTION_BACKEND=cudnn: .*CUDA"):
        choose_attention(toy_config(attention_backend="cudnn"), Rank())
