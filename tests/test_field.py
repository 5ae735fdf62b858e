"""What the field does to a run: odd launches, two writers, other endings, narrow streams."""

import errno
import io
import os
import signal
import subprocess
import sys

import pytest
from conftest import SCRIPT, base_env
from toys import toy_config

import train_gpt
from train_gpt import ConfigError, RunFiles, Runtime, claimed, launched_as, load_config

WHOLE = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="29500")


# ---- launch variables are judged as a set ----------------------------------------------------


@pytest.mark.parametrize("changes, found", [
    ({}, (0, 0, 1)), (dict(RANK="3", LOCAL_RANK="1", WORLD_SIZE="4"), (3, 1, 4)),
    (dict(RANK="00"), (0, 0, 1)), (dict(RANK=" 0"), (0, 0, 1))])
def test_a_whole_set_of_launch_variables_is_taken(changes, found):
    assert launched_as(WHOLE | changes) == found
    assert train_gpt.is_main_rank(WHOLE | changes) == (found[0] == 0)


@pytest.mark.parametrize("env", [{}, dict(MASTER_ADDR="x", MASTER_PORT="1"),
                                 dict(SLURM_NTASKS="8")])
def test_without_them_a_run_is_alone(env):
    assert launched_as(env) == (0, 0, 1)


@pytest.mark.parametrize("env", [
    dict(WORLD_SIZE="8"), dict(RANK="0"), dict(LOCAL_RANK="0"), dict(RANK="0", WORLD_SIZE="1"),
    WHOLE | dict(WORLD_SIZE="0"), WHOLE | dict(WORLD_SIZE="-1"), WHOLE | dict(RANK="0\r1"),
    WHOLE | dict(RANK=""), WHOLE | dict(RANK="1"), WHOLE | dict(RANK="-1"),
    WHOLE | dict(LOCAL_RANK="1"), WHOLE | dict(WORLD_SIZE="2.0"), WHOLE | dict(MASTER_ADDR=""),
    WHOLE | dict(MASTER_PORT="x"), WHOLE | dict(MASTER_PORT="70000"),
    {name: value for name, value in WHOLE.items() if name != "MASTER_PORT"}], ids=str)
def test_other_launch_variables_end_in_one_line_that_shows_them(env, capsys):
    assert train_gpt.main(["--check"], {**env, "DEVICE": "cpu", "NUM_LAYERS": "0"}) == 1
    capsys.readouterr()
    assert train_gpt.main(["--check"], {**env, "DEVICE": "cpu"}) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "start with torchrun, or unset them" in line
    assert all(f"{name}={value!r}" in line for name, value in env.items())


@pytest.mark.parametrize("rank", ["0\r", "00", "0"])
def test_a_bad_setting_is_told_however_rank_zero_is_written(rank, capsys):
    assert train_gpt.main(["--check"], {**WHOLE, "RANK": rank, "NUM_LAYERS": "0"}) == 1
    assert "NUM_LAYERS=0" in capsys.readouterr().err


def test_a_rank_that_finds_no_others_says_where_it_looked():
    env = WHOLE | dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_PORT="1")
    config = load_config(dict(DEVICE="cpu", DIST_TIMEOUT_SECONDS="2"))
    with pytest.raises(ConfigError, match="MASTER_ADDR=localhost MASTER_PORT=1: rank 1 of 2"):
        Runtime(env, config)


# ---- one folder, one writer ------------------------------------------------------------------


def test_a_folder_in_use_is_refused_and_free_again_afterwards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = RunFiles("x")
    with claimed(files):
        with pytest.raises(ConfigError, match=f"RUN_ID=x: .*process {os.getpid()} on .* since"):
            with claimed(RunFiles("x")):
                pass
        with claimed(RunFiles("y")):
            pass
    with claimed(files):
        pass
    assert list(files.folder.iterdir()) == []


def test_a_claim_dies_with_its_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = RunFiles("x")
    if not (child := os.fork()):
        claim = claimed(files)
        claim.__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (files.folder / "claim").exists()
    with claimed(files):
        pass


def test_a_second_start_of_a_run_is_refused_while_the_first_goes_on(nursery, small_env, tmp_path):
    first = nursery.start({**small_env, "ITERATIONS": 100_000}, tmp_path)
    while not (tmp_path / "runs/x/run.json").exists():
        assert first.poll() is None
    second = nursery.run(small_env, tmp_path)
    first.kill(signal.SIGTERM)
    assert first.wait().rc == 128 + signal.SIGTERM
    assert second.rc == 1 and "runs/x is in use by process" in second.stderr
    assert f"process {first.pid} on" in second.stderr


# ---- other endings ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_what_terminals_and_schedulers_send_ends_a_run_in_order(nursery, small_env, tmp_path, name):
    number = getattr(signal, name)
    run = nursery.run(small_env, tmp_path, before=f"at_event('train', signal_self({number}), 4)")
    assert run.rc == 128 + number and f"stopped by {name}" in run.stdout
    assert (tmp_path / "runs/x/checkpoint").exists()


def test_nohup_keeps_a_run_going(nursery, small_env, tmp_path):
    ignore = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    hang_up = f"at_event('train', signal_self({signal.SIGHUP}), 4)"
    assert nursery.run(small_env, tmp_path, before=ignore + hang_up).rc == 0


# ---- streams that are absent or narrow ---------------------------------------------------------


def started(redirection, args="--help", **env):
    command = f"{sys.executable} {SCRIPT} {args} {redirection}"
    return subprocess.run(["sh", "-c", command], capture_output=True, cwd="/", timeout=120,
                          env={**base_env("/"), **env})


@pytest.mark.parametrize("redirection", ["1>&-", "2>&-", "1>&- 2>&-", "1>/dev/full"])
def test_help_ends_well_without_a_stream(redirection):
    done = started(redirection)
    assert done.returncode == 0 and b"Traceback" not in done.stderr


def test_a_console_that_is_not_utf8_gets_what_it_can_hold():
    done = started("", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"usage: NAME=value" in done.stdout
    done = started("", args="Grüße", PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and b"unknown arguments Gr" in done.stderr


def test_a_run_whose_console_is_closed_finishes(nursery, small_env, tmp_path):
    run = nursery.run(small_env, tmp_path, before="os.close(1)\nsys.stdout = None")
    assert run.rc == 0, run.stderr
    assert (tmp_path / "runs/x/scores.json").exists()


# ---- no check of the world is an assert; outside programs have limits --------------------------


def test_the_coder_is_tried_under_python_o_too(tmp_path):
    code = ("import train_gpt\ntrain_gpt.decompress = lambda *args: b''\n"
            "print(train_gpt.package_faults(train_gpt.Config(stage='quantize')))")
    env = {**base_env(tmp_path), "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True,
                          env=env)
    assert "round trip failed (other bytes come back)" in done.stdout, done.stderr


def test_brotli_is_asked_for_wherever_it_packs(monkeypatch):
    monkeypatch.setattr(train_gpt, "brotli", None)
    for coder, needed in (("rans", True), ("brotli", True), ("lzma", False)):
        found = train_gpt.package_faults(toy_config(compressor=coder))
        assert any("brotli is not installed" in fault for fault in found) == needed, coder


@pytest.mark.parametrize("failure", [
    FileNotFoundError(), subprocess.TimeoutExpired("nvidia-smi", 5), PermissionError(),
    b"\xff\xfe"])
def test_nvidia_smi_may_hang_fail_or_print_bytes(monkeypatch, failure):
    asked = {}

    def run(command, **options):
        asked.update(options)
        if isinstance(failure, BaseException):
            raise failure
        return subprocess.CompletedProcess(command, 0, failure, b"")

    class Head(Exception):
        pass

    class Log(train_gpt.Log):
        def event(self, kind, console=True, **fields):
            if kind == "config":
                raise Head
            asked[kind] = fields

    monkeypatch.setattr(subprocess, "run", run)
    config = toy_config()
    runtime = Runtime({}, config)
    monkeypatch.setattr(runtime, "describe", dict)
    monkeypatch.setattr(runtime, "device", type("Device", (), {"type": "cuda"})())
    session = train_gpt.Session(config, runtime, Log(False), None, None,
                                train_gpt.Inputs("", 0, ""))
    with pytest.raises(Head):
        train_gpt.log_head(session, {}, {})
    assert asked["timeout"] <= 5 and "environment" in asked


# ---- what is typed beats what a preset implies --------------------------------------------------


@pytest.mark.parametrize("typed, special, beaten", [
    ("DATA_DIR=/d", "data_path", ""), ("DATA_DIR=/d", "tokenizer_path", ""),
    ("RECUR_START_STEP=9", "recur_start_frac", None),
    ("MUON_MOMENTUM_WARMUP_STEPS=9", "muon_momentum_warmup_frac", None)])
def test_a_typed_general_setting_beats_a_presets_special_one(typed, special, beaten):
    name, value = typed.split("=")
    assert getattr(load_config({"PRESET": "demo"}), special) != beaten
    assert getattr(load_config({"PRESET": "demo", name: value}), special) == beaten
    both = load_config({"PRESET": "demo", name: value, special.upper(): "0.25"})
    assert getattr(both, special) == type(getattr(both, special))("0.25"), "typed, too"


def test_a_progress_line_needs_no_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    train_gpt.Log(True).progress("x", 1, 2, 0.0)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    sys.stdout.close()
    train_gpt.Log(True).show("line")


# ---- writes are tried, and tried again -----------------------------------------------------------


def failing(monkeypatch, name, errors):
    """Let the first calls of an os function fail, one error each."""
    real, left = getattr(os, name), list(errors)

    def call(*args):
        if left:
            raise OSError(left.pop(0), "so it is")
        return real(*args)
    monkeypatch.setattr(os, name, call)
    return left


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_write_that_fails_once_is_tried_again(tmp_path, monkeypatch, name):
    left = failing(monkeypatch, name, [errno.EIO, errno.ESTALE])
    assert train_gpt.write_file(tmp_path / "file", b"data", waits=(0.0, 0.0)) == 4
    assert not left and (tmp_path / "file").read_bytes() == b"data"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_that_keeps_failing_leaves_the_old_file_and_says_why(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")
    failing(monkeypatch, "replace", [errno.EIO] * 9)
    with pytest.raises(OSError, match="not written .so it is.; .*whole: go on with RESUME=1"):
        train_gpt.write_file(tmp_path / "file", b"data", waits=(0.0, 0.0))
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_only_a_full_disk_or_quota_asks_for_room_and_at_once(tmp_path, monkeypatch, error):
    left = failing(monkeypatch, "replace", [error] * 9)
    with pytest.raises(OSError, match="make room"):
        train_gpt.write_file(tmp_path / "file", b"data")
    assert len(left) == 8, "no second try"


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_fsync_is_no_fault(tmp_path, monkeypatch, error):
    failing(monkeypatch, "fsync", [error] * 9)
    assert train_gpt.write_file(tmp_path / "file", b"data", waits=()) == 4
