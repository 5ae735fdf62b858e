"""Start the script in forked processes, so that a run costs no import of torch.

A `Nursery` is one subprocess that has imported train_gpt and computed nothing; it forks a child
for each run. A child may first carry out some lines of Python (`before`), in which `train_gpt` is
the script's module and the functions of this file's second half are at hand: they stop, kill or
starve the run at a named point, the same one each time.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

SCRIPT = Path(__file__).resolve().parents[1] / "train_gpt.py"


class Ended(NamedTuple):
    """What a forked run left: exit code (-9 when killed), output, seconds it took."""

    rc: int
    stdout: str
    stderr: str
    seconds: float


class Child:
    """A running fork of a Nursery."""

    def __init__(self, nursery, pid: int, out: Path):
        self.nursery, self.pid, self.out, self.since = nursery, pid, out, time.monotonic()

    def poll(self) -> int | None:
        return self.nursery.ask(poll=self.pid)

    def kill(self, number=signal.SIGKILL):
        """Send a signal unless the child has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def output(self) -> tuple[str, str]:
        return tuple(self.out.with_suffix(end).read_text(encoding="utf-8", errors="replace")
                     for end in (".out", ".err"))

    def wait(self, timeout=120.0) -> Ended:
        """Wait for the end; a child that takes longer is killed and AssertionError raised."""
        while (rc := self.poll()) is None:
            if time.monotonic() - self.since > timeout:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"no end after {timeout} s:\n" + "\n".join(self.output()))
            time.sleep(0.01)
        return Ended(rc, *self.output(), time.monotonic() - self.since)


class Nursery:
    """A process with train_gpt imported, ready to fork runs."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        env = {"PATH": os.environ.get("PATH", ""), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, cwd=folder, env=env)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, env, cwd, before="", args=(), script=SCRIPT) -> Child:
        self.count += 1
        out = self.folder / str(self.count)
        settings = {name: str(value) for name, value in env.items()}
        pid = self.ask(env=settings, cwd=str(cwd), before=before, args=list(args), out=str(out),
                       script=str(script))
        return Child(self, pid, out)

    def run(self, env, cwd, before="", timeout=120.0, **more) -> Ended:
        return self.start(env, cwd, before, **more).wait(timeout)

    def start_ranks(self, envs, cwd, befores=("", ""), scripts=(SCRIPT, SCRIPT)) -> list[Child]:
        """Start one rank for each environment; they may differ in all that is given."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [dict(env, RANK=r, LOCAL_RANK=r, WORLD_SIZE=len(envs), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=port) for r, env in enumerate(envs)]
        return [self.start(env, cwd, before, script=script)
                for env, before, script in zip(ranks, befores, scripts)]

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=10)


# ---- inside the nursery ------------------------------------------------------------------------


def load_script(path: str):
    spec = importlib.util.spec_from_file_location("train_gpt", path)
    module = sys.modules["train_gpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def be_child(request, module):
    """Become a run of the script, as its last lines do it; never returns."""
    for number, end in ((1, ".out"), (2, ".err")):
        file = os.open(request["out"] + end, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
    rc = 70
    # a shell's background job ignores Ctrl-C, and what it starts inherits that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        if request["script"] != module.__file__:
            module = load_script(request["script"])
        exec(request["before"], dict(globals(), train_gpt=module))
        rc = module.main(request["args"], os.environ)
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none
            stream.flush()
    os._exit(rc)


def serve():
    import torch._dynamo  # noqa: F401  the preflight's forecast needs it: a second in each run
    module, ended = load_script(str(SCRIPT)), {}
    answers, requests = os.dup(1), os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    with open(requests, encoding="utf-8") as lines, open(answers, "w", encoding="utf-8") as reply:
        for line in lines:
            request = json.loads(line)
            if pid := request.get("poll"):
                if pid not in ended:
                    found, status = os.waitpid(pid, os.WNOHANG)
                    ended.update({pid: os.waitstatus_to_exitcode(status)} if found else {})
                answer = ended.get(pid)
            elif not (answer := os.fork()):
                be_child(request, module)
            print(json.dumps(answer), file=reply, flush=True)


# ---- for use in `before` -----------------------------------------------------------------------


def at_event(kind: str, action, nth=1):
    """Do `action` as the script logs its nth event of a kind (on every rank)."""
    module, seen = sys.modules["train_gpt"], []
    event = module.Log.event

    def hooked(self, found, *args, **fields):
        event(self, found, *args, **fields)
        seen.append(found)
        if found == kind and seen.count(kind) == nth:
            action()

    module.Log.event = hooked


def at_call(owner, name: str, action, nth=1):
    """Do `action` before the nth call of a function."""
    function, calls = getattr(owner, name), []

    def hooked(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            action()
        return function(*args, **kwargs)

    setattr(owner, name, hooked)


def signal_self(number=signal.SIGKILL):
    """Return an action that sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


def fail(error):
    """Return an action that raises."""
    def action():
        raise error
    return action


def limit_file_bytes(most: int):
    """Let no file grow beyond so many bytes: a write then fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def obey_permissions():
    """Let the modes of files and folders bind this process, also when it is root's."""
    if os.geteuid() == 0:
        libc, header = ctypes.CDLL(None, use_errno=True), struct.pack("<Ii", 0x20080522, 0)
        assert libc.capset(header, bytes(24)) == 0, os.strerror(ctypes.get_errno())


if __name__ == "__main__":
    serve()
