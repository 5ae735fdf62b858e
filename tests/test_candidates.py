"""Waiting kernels equal their plain twins, and the twins are the script's own functions.

Kernels run under Triton's interpreter, on the CPU, in a process of their own: the interpreter is
chosen when Triton is imported. Without Triton only the twins are compared.
"""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from candidates import loss, mlp, qk, xsa
from candidates.table import CANDIDATES, ODD, swapped
from toys import (
    asked,
    layouts_of,
    random_model,
    steady,  # noqa: F401
    toy_config,
)

import train_gpt

FOLDER = Path(__file__).parent / "candidates"
KERNELS = [loss, mlp, qk, xsa]
MAX_CODE_LINES = 110


# ---- the plain forms -----------------------------------------------------------------------


def random_inputs(name, sizes, dtype):
    generator = torch.Generator().manual_seed(1)
    return CANDIDATES[name].inputs(
        sizes, lambda *shape: torch.randn(shape, generator=generator).to(dtype))


def product_of(name):
    """Return the script's own arithmetic with the signature of a candidate."""
    def whole_mlp(x, up, down):
        module = train_gpt.MLP(toy_config(model_dim=x.shape[-1], mlp_mult=len(up) / x.shape[-1]))
        module.up.weight.data, module.down.weight.data = up, down
        return module(x)

    def norm_and_turn(x, gain, cos, sin):
        turned = train_gpt.rotate(train_gpt.rms_norm(x), cos, sin)
        return turned * gain.to(x.dtype)[:, None]

    return {"loss": train_gpt.softcap_cross_entropy, "mlp": whole_mlp, "qk": norm_and_turn,
            "xsa": lambda out, v: train_gpt.exclude_self(out, v).to(out.dtype)}[name]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("name", CANDIDATES)
def test_plain_form_is_the_scripts(name, dtype):
    for sizes in ODD:
        args = random_inputs(name, sizes, dtype)
        expected = product_of(name)(*args)
        found = CANDIDATES[name].plain(*args)
        assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("name", CANDIDATES)
def test_swapped_candidates_are_called_and_leave_no_trace(name):
    """On CPU tensors, outside the interpreter, no kernel can start: calling one fails."""
    batch = asked(torch.zeros(1, 8, dtype=torch.int64))
    layout = layouts_of(toy_config())[1]
    before = {path: _at(path) for path in CANDIDATES[name].patches}
    with swapped(train_gpt, [name]):
        with pytest.raises((TypeError, AttributeError, RuntimeError, ValueError)):
            random_model(toy_config()).mean_loss(batch, layout)
    assert {path: _at(path) for path in before} == before
    assert random_model(toy_config()).mean_loss(batch, layout).isfinite()


def _at(path):
    found = train_gpt
    for part in path.split("."):
        found = getattr(found, part)
    return found


def test_every_kernel_file_is_in_the_table():
    used = {form.fused.__module__ for form in CANDIDATES.values()}
    assert used == {module.__name__ for module in KERNELS}
    holding = {path.stem for path in FOLDER.glob("*.py") if "@jit" in path.read_text()}
    assert {f"candidates.{stem}" for stem in holding} == used


@pytest.mark.parametrize("module", KERNELS, ids=lambda m: m.__name__)
def test_kernels_with_wrappers_stay_short(module):
    tree = ast.parse(Path(module.__file__).read_text())
    documented = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef,
                                                              ast.Module))]
    quiet = {line for n in documented if ast.get_docstring(n)
             for line in range(n.body[0].lineno, n.body[0].end_lineno + 1)}
    lines = Path(module.__file__).read_text().splitlines()
    code = [i for i, line in enumerate(lines, 1)
            if line.strip() and not line.strip().startswith("#") and i not in quiet]
    assert len(code) <= MAX_CODE_LINES


# ---- the kernels, interpreted --------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted():
    """The rows of candidates/check.py under the interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton: pip install triton")
    root = FOLDER.parents[1]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
           "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    done = subprocess.run([sys.executable, "-m", "candidates.check", "odd"], env=env, text=True,
                          capture_output=True, timeout=300)
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("name", CANDIDATES)
def test_kernel_equals_its_plain_form_in_value_and_gradients(interpreted, name, dtype):
    rows = [row for row in interpreted[0] if (row["candidate"], row["dtype"]) == (name, dtype)]
    assert [row["sizes"] for row in rows] == [list(sizes) for sizes in ODD]
    for row in rows:
        assert len(row["fused"]) == 1 + CANDIDATES[name].learned
        assert row["agrees"], row


def test_all_kernels_in_the_script_train_alike_in_one_graph(interpreted):
    rows, done = interpreted
    assert rows[-1]["candidate"] == "in the script", done.stderr
    assert rows[-1]["agrees"] and done.returncode == 0, rows[-1]
