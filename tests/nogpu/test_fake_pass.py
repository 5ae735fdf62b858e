"""What train_gpt.py does on a GPU, told from fake tensors: see fake_pass.py.

No operation mixes devices, what crosses between host and device does so in functions listed here,
and so does what the host asks of values (on a GPU it then waits for them).
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import base_env
from nogpu import fake_pass, fakecuda

# Part -> (functions that ask for values, functions that copy between host and device).
CODING = {"factor_hessians", "__init__"}, {"__init__", "stack", "factor_hessians", "codes_at"}
BY_FISHER = CODING[0] | {"plan"}, CODING[1] | {"steps_from_codes"}
BY_TRELLIS = BY_FISHER[0], BY_FISHER[1] | {"couple_rows", "trellis_tables"}
LISTED = dict(
    build=(set(), {"init_weights"}), trainer=(set(), set()), read=(set(), {"batch_of_rows"}),
    step=(set(), set()), report=({"report", "check_gradients"}, {"report"}),
    checkpoint=(set(), {"load"}), warm_up=(set(), {"batch_of_rows"}),
    score=({"add_up"}, {"on_device", "read_batch"}),
    stream=({"add_up"}, {"on_device", "read_batch"}),
    attention=({"attention_error"}, {"attention_inputs", "trial_cut"}),
    collect_fisher=({"collect_fisher"}, set()), collect_inputs=(set(), set()),
    quantize_trellis=BY_TRELLIS, quantize_scalar=BY_FISHER,
    quantize_plain_tables=(BY_FISHER[0], BY_FISHER[1] | {"codes", "trellis_tables"}),
    quantize_sdclip=(CODING[0] | {"step_sizes"}, CODING[1]))
KNOWN = "2.13"  # of torch: here the guard must fit


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """The path of the built guard, "" where torch has its own."""
    if not fakecuda.needs_guard():
        return ""
    try:
        return str(fakecuda.build(tmp_path_factory.mktemp("guard")))
    except OSError as error:
        if torch.__version__.startswith(KNOWN) and "no g++" not in str(error):
            raise
        pytest.skip(f"no guard for fake CUDA tensors: {error}")


def rows_of(guard, folder, *names):
    """Return the rows of passes and mutants, worked out in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "nogpu", guard, *names], env=base_env(folder),
                          cwd=Path(fake_pass.__file__).parents[1], capture_output=True, text=True)
    if not done.stdout and not torch.__version__.startswith(KNOWN):
        reason = " ".join(done.stderr.split("\n")[:2])
        pytest.skip(f"torch {torch.__version__} takes no fake CUDA tensors here: {reason}")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()][1:]


def faults_of(row):
    """Return what a part did that it must not."""
    asks, copies = LISTED[row["part"]]
    return [*([row["fault"]] if row["fault"] else []),
            *(f"{name} asks for a value" for name in sorted(set(row["asked"]) - asks)),
            *(f"{name} copies" for name in sorted(set(row["copied"]) - copies))]


def assert_clean(rows, name):
    settings, ranks, parts = fake_pass.PASSES[name]
    assert [row["part"] for row in rows if row["kind"] == name] == [*parts]
    assert [(row["part"], faults_of(row)) for row in rows if faults_of(row)] == []
    assert all(row["operators"] for row in rows), "each part works on the GPU"


@pytest.fixture(scope="module")
def small(guard, tmp_path_factory):
    return rows_of(guard, tmp_path_factory.mktemp("small"), "record", "frontier", "ranks")


@pytest.mark.parametrize("name", ("record", "frontier", "ranks"))
def test_devices_meet_where_listed_and_values_are_asked_for_where_listed(small, name):
    assert_clean([row for row in small if row["kind"] == name], name)


def test_the_list_names_nothing_else(small):
    found = {row["part"]: (set(row["asked"]), set(row["copied"])) for row in small
             if row["kind"] == "record"}
    assert found == LISTED


@pytest.mark.slow
def test_devices_meet_where_listed_at_full_size(guard, tmp_path):
    assert_clean(rows_of(guard, tmp_path, "full"), "full")


# What the host then does, or the words of the error.
SEEN = {
    "a table on the host": "device", "a mask on the host": "device",
    "an identity on the host": "device", "sums on the host": "device",
    "results on the host": "not on cuda",
    "a step that asks for its norm": "reduce_and_clip asks for a value",
    "a step that looks at its loss": "update asks for a value",
    "a step that picks by a mask": "update asks for a value",
    "a step that copies there and back": "reduce_and_clip copies",
    "an index from the host": "update copies",
}


def test_planted_faults_are_seen(guard, tmp_path):
    assert set(SEEN) == set(fake_pass.MUTANTS)
    rows = rows_of(guard, tmp_path, *SEEN)
    for name, words in SEEN.items():
        mine = [row for row in rows if row["kind"] == name]
        last = mine[-1]
        assert last["part"] == fake_pass.MUTANTS[name][0], (name, last)
        assert [faults_of(row) for row in mine[:-1] if faults_of(row)] == [], name
        assert any(words in fault for fault in faults_of(last)), (name, last)
