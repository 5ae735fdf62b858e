"""Laws of inspect: what it says of an artifact adds up to the file, and its measures are known."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("scipy")
import inspect_artifact  # noqa: E402

import records  # noqa: E402
import train_gpt  # noqa: E402
from train_gpt import (  # noqa: E402
    class_counts,
    counted_bytes,
    element_classes,
    entropy_bytes,
    size_classes,
)

codes = st.lists(st.integers(-31, 31), min_size=1, max_size=200)


@pytest.fixture(scope="module")
def artifact(tiny_run):
    return tiny_run.folder / "final_model.int6.ptz"


def seen(artifact, capsys, *more):
    assert records.main(["inspect", str(artifact), "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_bytes_add_up_to_the_file(artifact, capsys):
    found = seen(artifact, capsys)
    size = artifact.stat().st_size
    assert found["bytes"] == size
    assert 0 < size - sum(t["bytes"] for t in found["tensors"]) < 0.05 * size  # header, checksum
    for tensor in found["tensors"]:
        if tensor["kind"] != "shared":
            assert tensor["weights"] == math.prod(tensor["shape"])
            assert tensor["bits"] == 8 * tensor["bytes"] / tensor["weights"]


def test_mean_entropies_are_those_the_run_logged(artifact, tiny_run, capsys):
    logged = tiny_run.events("bits")[-1]
    for kind, name in (("int6", "matrix_bits"), ("int8", "embed_bits")):
        parts = [t for t in seen(artifact, capsys)["tensors"] if t["kind"] == kind]
        mean = sum(t["entropy_bits"] * t["weights"] for t in parts) / sum(t["weights"]
                                                                          for t in parts)
        assert abs(mean - logged[name]) < 1e-9


def test_errors_need_the_weights_and_are_those_of_each_kind(artifact, tiny_run, capsys, tmp_path):
    errors = {t["name"]: (t["kind"], t["error"]) for t in seen(artifact, capsys)["tensors"]
              if t["kind"] != "shared"}
    assert all(error is not None for _, error in errors.values())
    assert all(error == 0 for kind, error in errors.values() if kind == "float32")
    assert all(0 < error < 1e-3 for kind, error in errors.values() if kind == "float16")
    # where a weight hardly acts, codes are coarse and may be farther from it than zero is
    assert all(1e-3 < error < 10 for kind, error in errors.values() if kind.startswith("int"))
    alone = tmp_path / artifact.name
    alone.write_bytes(artifact.read_bytes())
    assert all(t["error"] is None for t in seen(alone, capsys)["tensors"])
    weights = str(tiny_run.folder / "final_model.weights")
    again = {t["name"]: t["error"] for t in seen(alone, capsys, "--weights", weights)["tensors"]}
    assert all(again[name] == error for name, (_, error) in errors.items())


def test_page_names_every_tensor_and_draws_both_kinds(artifact, capsys):
    assert records.main(["inspect", str(artifact)]) == 0
    page = capsys.readouterr().out
    assert all(t["name"] in page for t in seen(artifact, capsys)["tensors"])
    assert "codes of int6" in page and "codes of int8" in page


def toy(values):
    """Return a weight of these codes, one byte each."""
    tensor = torch.tensor(values, dtype=torch.int8)
    return inspect_artifact.Stored(
        "w", "int6", (len(values),), len(values), len(values),
        8 * entropy_bytes(tensor) / len(values), 0.0, None, inspect_artifact.histogram(tensor))


@given(codes)
def test_histogram_counts_every_code(values):
    assert toy(values).histogram == {v: values.count(v) for v in set(values)}


@given(st.lists(st.lists(st.integers(-127, 127), min_size=8, max_size=8), min_size=2, max_size=9))
def test_ideal_bytes_are_those_of_the_classes_histograms(rows):
    codes = {"a": torch.tensor(rows, dtype=torch.int8), "b": torch.tensor([rows[0]]).to(torch.int8)}
    classes = torch.cat([element_classes(*size_classes(c)) for c in codes.values()])
    together = torch.cat([c.flatten() for c in codes.values()])
    assert abs(sum(inspect_artifact.ideal_bytes(codes).values())
               - counted_bytes(class_counts(together, classes))) < 1e-6


@given(codes, codes)
def test_merging_keeps_bytes_codes_and_mean_entropy(first, second):
    a, b = toy(first), toy(second)
    both = inspect_artifact.merged([a, b], "all")
    assert both.bytes == a.bytes + b.bytes and both.weights == len(first) + len(second)
    assert both.histogram == {v: (first + second).count(v) for v in {*first, *second}}
    total = a.entropy_bits * a.weights + b.entropy_bits * b.weights
    assert abs(both.entropy_bits * both.weights - total) < 1e-6


@given(codes)
def test_bars_share_out_the_whole(values):
    lines = inspect_artifact.bars(toy(values))[1:]
    assert len(lines) <= inspect_artifact.HISTOGRAM_ROWS
    assert abs(sum(float(line.split()[1]) for line in lines) - 100) < 0.001 * len(lines)


def test_error_is_relative_to_the_weights():
    assert inspect_artifact.relative_error(torch.tensor([3.0, 0]), torch.tensor([0.0, 4])) == 1.25
    assert inspect_artifact.relative_error(torch.zeros(2), torch.zeros(2)) == 0


def test_weights_that_are_none_or_of_another_model_are_one_line(artifact, tmp_path, capsys,
                                                                monkeypatch):
    for path in (tmp_path, tmp_path / "none"):
        assert records.main(["inspect", str(artifact), "--weights", str(path)]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert f"--weights {path}: no such file; give a run's final_model.weights" in message
    read = train_gpt.read_tensors

    def wider(path, kind):
        header, tensors = read(path, kind)
        tensors["tok_emb.weight"] = tensors["tok_emb.weight"][:1]  # would be broadcast
        return header, tensors

    opened = inspect_artifact.open_artifact(artifact)
    monkeypatch.setattr(inspect_artifact, "open_artifact", lambda _: opened)
    monkeypatch.setattr(train_gpt, "read_tensors", wider)
    assert records.main(["inspect", str(artifact)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "weights of another model: tok_emb.weight is (1, " in message


def test_what_is_no_artifact_is_one_line(tiny_run, tmp_path, capsys):
    junk = tmp_path / "junk"
    junk.write_bytes(b"junk")
    for path in (junk, tmp_path / "none", tiny_run.folder / "final_model.weights"):
        assert records.main(["inspect", str(path)]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
