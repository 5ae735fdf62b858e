"""Laws of every reader under hostile input, in short; fuzz_readers.py is the long form.

Hypothesis draws the random choices of the same mutations, so it can shrink what fails.
"""

import shutil
import signal
import tracemalloc
import zlib
from hashlib import sha256

import pytest
import toys
from fuzz_readers import (
    Containers,
    Journals,
    Logs,
    Settings,
    Shards,
    as_case,
    attempt,
    too_slow,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_faults import errors

import train_gpt
from train_gpt import ContainerError


@pytest.fixture(scope="module", params=[Containers, Shards, Logs, Journals, Settings])
def target(request, tmp_path_factory):
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(str(train_gpt.Path(train_gpt.__file__).parent / "data"))
    folder, kind = tmp_path_factory.mktemp("readers"), request.param
    monkeypatch.chdir(folder)
    before = signal.signal(signal.SIGALRM, too_slow)
    yield kind(train_gpt, toys) if kind is Containers else kind(folder, train_gpt)
    signal.signal(signal.SIGALRM, before)
    monkeypatch.undo()


@given(st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None, database=None, derandomize=True,
          suppress_health_check=list(HealthCheck))
def test_mutated_input_is_read_or_refused_in_the_readers_own_words(target, rng):
    attempt(target, as_case(target.make(rng)))


@pytest.mark.parametrize("kind, name", [
    (kind, name) for kind, (_, fields) in train_gpt.KINDS.items() for name in fields])
def test_a_header_that_lacks_something_is_refused_naming_it_and_the_file(kind, name):
    header = {field: form() for field, form in train_gpt.KINDS[kind][1].items()}
    data = train_gpt.pack_tensors(dict(header, kind=kind), {})
    assert train_gpt.open_container(data, kind, "some/file")[1] == {}
    for wrong in ({}, {name: None}, {name: ["x"] if header[name] != [] else "x"}):
        changed = {**{field: v for field, v in header.items() if field != name}, **wrong}
        data = train_gpt.pack_tensors(dict(changed, kind=kind), {})
        with pytest.raises(ContainerError, match=f"some/file: .*{name}"):
            train_gpt.open_container(data, kind, "some/file")


def rewritten(path, change):
    """Write a container again, its header and tensors changed by `change`, checksum right."""
    kind = {".weights": "weights", ".stats": "stats", ".ptz": "artifact"}[path.suffix]
    header, tensors = train_gpt.read_tensors(path, kind)
    codec, raw = header.pop("codec"), header.pop("tensors")
    assert raw
    change(header, tensors)
    train_gpt.write_file(path, train_gpt.pack_tensors(header, tensors, codec))


def set_config(**changes):
    return lambda header, tensors: header["config"].update(changes)


def cut_first(header, tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name].flatten()[:1]


@pytest.mark.parametrize("stage, file, change, words", [
    ("evaluate", "final_model.int6.ptz", set_config(num_layers=300, model_dim=16_384), "tensor"),
    ("evaluate", "final_model.int6.ptz", set_config(seed="x"), "seed='x'"),
    ("evaluate", "final_model.int6.ptz", lambda header, _: header.update(order=[0, 0, 0, 0]),
     "layer order"),
    ("quantize", "final_model.weights", cut_first, "tensor"),
    ("quantize", "final_model.stats", cut_first, "tensor"),
    ("quantize", "final_model.stats", lambda _, tensors: tensors.clear(), "lacks inputs."),
    ("quantize", "final_model.stats", lambda _, tensors: tensors.popitem(), "lacks inputs.")])
def test_files_with_a_right_checksum_that_fit_nothing_are_refused_in_one_line(
        nursery, small_env, small_run, tmp_path, stage, file, change, words):
    source = tmp_path / "source"
    shutil.copytree(small_run / "runs/x", source)
    rewritten(source / file, change)
    env = {name: value for name, value in small_env.items() if name in
           ("DATA_PATH", "TOKENIZER_PATH", "DEVICE", "ARTIFACT_MAX_BYTES")}
    run = nursery.run({**env, "STAGE": stage, "INPUT_PATH": source}, tmp_path)
    (cause,) = errors(run)
    assert run.rc == 1 and file in cause and words in cause and len(cause) < 500
    assert run.seconds < 20


def test_a_header_of_many_empty_lists_takes_little_memory():
    """Three bytes of text make a list of 56: the largest header must stay affordable."""
    count = train_gpt.MAX_HEADER_BYTES // 3 - 20
    text = b'{"codec": "raw", "tensors": [' + b",".join([b"[]"] * count) + b"]}"
    head = zlib.compress(text)
    body = train_gpt.MAGIC + len(head).to_bytes(4, "little") + head
    tracemalloc.start()
    with pytest.raises(ContainerError):
        train_gpt.unpack_tensors(body + sha256(body).digest(), "file")
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
