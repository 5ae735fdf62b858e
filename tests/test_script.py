"""Laws of the submission form: the same program, smaller, that runs as it is shipped."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
from conftest import REPO, SCRIPT, TINY_ARTIFACT_BYTES
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("python_minifier")
import script  # noqa: E402

import records  # noqa: E402

GOAL_BYTES = 32_000  # packed script; not met since Fisher steps, resuming, a coder, a trellis
MOST_BYTES = 52_500  # until it is: lower this whenever the script shrinks
SOURCE = SCRIPT.read_text(encoding="utf-8")

# A program with everything that wants source text: functions, classes, a worker process.
TOY = '''
"""A docstring."""
from __future__ import annotations
import dataclasses, inspect, json, multiprocessing, os, sys, time, typing

@dataclasses.dataclass
class Settings:
    """A docstring."""
    width: int = 3
    name: str = "é ' \\\\ \\r\\n"

def answer(x: int, *rest: float, **more: dict) -> int:
    """A docstring."""
    y: int = x + 1  # a comment
    return y

def in_worker(function):
    return inspect.getsource(function) + inspect.getsource(Settings)

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(in_worker, (answer,))
    print(json.dumps(dict(file=__file__, bytes=os.path.getsize(__file__), worker=there,
                          here=in_worker(answer), ran=answer.__code__.co_filename)))
'''


@pytest.fixture(scope="module")
def stripped():
    return script.strip_source(SOURCE)


@pytest.fixture(scope="module")
def packed(stripped, tmp_path_factory):
    """The submission form of train_gpt.py in a folder of its own."""
    path = tmp_path_factory.mktemp("packed") / "train_gpt.py"
    path.write_bytes(script.pack_text(stripped))
    return path


def pack_toy(folder, source=TOY):
    path = folder / "toy.py"
    path.write_bytes(script.pack_text(script.strip_source(source)))
    return path


def start(path, cwd, **changes):
    """Run a script with a temporary folder of its own: (exit code, stdout, stderr)."""
    env = {**conftest.base_env(cwd), "TMPDIR": str(cwd), **changes}
    done = subprocess.run([sys.executable, str(path)], env=env, cwd=cwd, capture_output=True,
                          text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def bare(source):
    """Return the dump of a program without docstrings and without annotations outside classes."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", 0), str):
                node.body = node.body[1:]
            node.body = node.body or [ast.Expr(ast.Constant(0))]
        for block in ("body", "orelse", "finalbody"):  # of a loop or a branch, too
            statements = getattr(node, block, None)
            if isinstance(statements, list) and not isinstance(node, ast.ClassDef):
                setattr(node, block, [
                    ast.Assign([s.target], s.value) if isinstance(s, ast.AnnAssign) and s.value
                    else s for s in statements])
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
    return ast.dump(tree)


def test_unpacked_program_is_the_source_without_docstrings_and_annotations(packed):
    assert bare(script.unpack_script(packed.read_bytes())) == bare(SOURCE)


@pytest.mark.xfail(strict=True, reason="the script has outgrown the goal; MOST_BYTES holds it")
def test_packed_script_reaches_the_goal(packed):
    assert packed.stat().st_size <= GOAL_BYTES


def test_packed_script_is_small(packed):
    assert packed.stat().st_size <= MOST_BYTES


def test_same_source_gives_the_same_bytes(packed, tmp_path, capsys):
    out = tmp_path / "again.py"
    assert records.main(["script", "--out", str(out)]) == 0
    assert out.read_bytes() == packed.read_bytes()
    assert f"{out.stat().st_size} bytes" in capsys.readouterr().out
    assert records.main(["script", "--source", str(out), "--out", str(tmp_path / "b.py")]) == 0
    assert script.unpack_script((tmp_path / "b.py").read_bytes()) \
        == script.unpack_script(packed.read_bytes())


def test_packed_script_is_inert_and_imports_by_path(packed, monkeypatch):
    spec = importlib.util.spec_from_file_location("packed_train_gpt", packed)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.__file__ == str(packed)
    inputs, _ = module.take_inputs(module.load_config({"STAGE": "quantize"}))
    assert inputs.code_bytes == packed.stat().st_size
    assert inputs.source == script.unpack_script(packed.read_bytes())
    assert Path(module.main.__code__.co_filename).read_text(encoding="utf-8") \
        == script.unpack_script(packed.read_bytes())


@given(st.binary() | st.lists(st.sampled_from([b"'", b"\0", b"\r", b"\n", b"\\", b"0", b"\xff"]))
       .map(b"".join))
def test_python_reads_any_bytes_back_from_the_string(data):
    file = script.MARK + b"s='''" + script.string_body(data) + b"'''"
    names: dict = {}
    exec(compile(file, "toy", "exec"), names)
    assert names["s"].encode("latin-1") == data


@given(st.text("ab_ 19+é▁\n'", max_size=60))
def test_any_string_constant_survives(value):
    names: dict = {}
    text = script.strip_source(f"value, value_a = {value!r} + f\"{{'…×'[:2]}}\"[2:], 1")
    exec(script.unpack_script(script.pack_text(text)), names)
    assert names["value"] == value


def test_annotations_that_something_reads_stay():
    text = script.strip_source('''
class Fields:
    a: int = 1
    b: "str"
@torch.library.custom_op("a::b", mutates_args=())
def operator(x: Tensor, *, n: int = 2) -> Tensor: return x
@triton.jit
def kernel(p, BLOCK: tl.constexpr): pass
@property
@torch.no_grad()
def plain(x: Tensor) -> Tensor:
    y: int = 1
    z: int
    return x
''')
    for kept in ("a:int=1", "b:'str'", "x:Tensor,*,n:int=2)->Tensor", "BLOCK:tl.constexpr",
                 "z:int"):
        assert kept in text
    assert "def plain(x):" in text and "y=1" in text


def test_docstring_stays_where_the_program_reads_it():
    assert "'words'" in script.strip_source('"words"\nprint(__doc__)')
    assert "words" not in script.strip_source('"words"\nprint(1)')
    with pytest.raises(script.ScriptError, match="line 2: reads a docstring"):
        script.strip_source('def f(): "words"\nprint(f.__doc__)')


def test_fstrings_are_written_for_python_310():
    text = script.strip_source("""print(f"{a['b']} {','.join(f'{d}' for d in e)}")""")
    assert '["' not in text and '","' not in text


def test_source_text_is_there_in_process_and_in_workers(tmp_path):
    path = pack_toy(tmp_path)
    rc, out, err = start(path, tmp_path)
    assert rc == 0, err
    told = json.loads(out)
    assert told["file"] == str(path) and told["bytes"] == path.stat().st_size
    assert told["here"] == told["worker"]
    assert "def answer(x" in told["here"] and "class Settings" in told["here"]
    assert Path(told["ran"]).read_text(encoding="utf-8") == script.unpack_script(path.read_bytes())


def test_many_starts_at_once_leave_one_whole_file(tmp_path):
    path = pack_toy(tmp_path, "import inspect\ndef f():return 1\nprint(inspect.getsource(f))")
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, str(path)], env=env, stdout=subprocess.PIPE)
               for _ in range(8)]
    assert all(process.communicate(timeout=60)[0] == b"def f():return 1\n\n"
               for process in started)
    assert len(list(tmp_path.glob("train_gpt_*.py"))) == 1
    assert len(list(tmp_path.iterdir())) == 2  # nothing half-written stays


def test_missing_brotli_is_one_line(tmp_path):
    path, blocked = pack_toy(tmp_path), tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "brotli.py").write_text("raise ImportError")
    rc, _, err = start(path, tmp_path, PYTHONPATH=str(blocked))
    assert rc == 1 and err == 'error: brotli is not installed: pip install "brotli>=1.2"\n'


def test_a_full_temporary_folder_is_one_line_that_names_the_setting(tmp_path):
    resource = pytest.importorskip("resource")
    path = pack_toy(tmp_path, f"print({[*range(4000)]})")

    def narrow():  # files end at 8 KiB, as on a disk that fills
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, preexec_fn=narrow, text=True,
                          env={**conftest.base_env(tmp_path), "TMPDIR": str(tmp_path)},
                          capture_output=True, timeout=120)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: temporary folder: ") and "set TMPDIR" in done.stderr
    assert done.stderr.count("\n") == 1


def test_triton_kernels_find_their_source(tmp_path):
    pytest.importorskip("triton")
    path = pack_toy(tmp_path, "import triton, triton.language as tl\n@triton.jit\n"
                    "def kernel(p, N: tl.constexpr):\n    tl.store(p, N)\nprint(kernel.src)")
    rc, out, err = start(path, tmp_path)
    assert rc == 0 and "N:tl.constexpr" in out, err


@pytest.mark.parametrize("data", [b"\xff\xfe", script.MARK + b"s='''x'''", script.MARK + b"(",
                                  script.MARK])
def test_what_is_no_script_is_refused(data, tmp_path, capsys):
    path = tmp_path / "odd.py"
    path.write_bytes(data)
    assert records.main(["script", "--source", str(path), "--out", str(tmp_path / "o.py")]) == 2
    assert "make it again with records.py script" in capsys.readouterr().err


def test_packed_run_scores_as_the_readable_one_and_logs_its_text(packed, tiny_env, tiny_run):
    cap = packed.stat().st_size + TINY_ARTIFACT_BYTES
    done = conftest.run_script({**tiny_env, "ARTIFACT_MAX_BYTES": cap, "RUN_ID": "one"},
                               packed.parent, script=packed)
    assert done.rc == 0, done.stderr
    # the artifact's header holds the cap, so its size and the multiplier found differ a little
    assert done.result["prequant_sliding_bpb"] == tiny_run.outcome.result["prequant_sliding_bpb"]
    assert done.result["code_bytes"] == packed.stat().st_size
    log = (packed.parent / "logs" / "one.txt").read_text(encoding="utf-8")
    assert log.startswith(script.unpack_script(packed.read_bytes()))


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [0, 1])
def test_packed_script_runs_under_torchrun(packed, tiny_env, compiled):
    env = {**tiny_env, "RUN_ID": f"two{compiled}", "COMPILE_ENABLED": compiled,
           "ARTIFACT_MAX_BYTES": packed.stat().st_size + TINY_ARTIFACT_BYTES}
    done = conftest.run_script(env, packed.parent, nproc=2, script=packed)
    assert done.rc == 0, done.stderr
    assert done.result["code_bytes"] == packed.stat().st_size


def test_repository_tool_names_shadow_nothing():
    for module in (REPO / "records").glob("*.py"):
        assert module.stem not in sys.stdlib_module_names
