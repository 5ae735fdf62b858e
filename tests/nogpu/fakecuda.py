"""Let a CPU-only torch run autograd over fake "cuda" tensors: guard.cpp, built once and loaded."""

import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path


def torch_folder() -> Path:
    """Return where torch lies, which need not be imported yet."""
    return Path(importlib.util.find_spec("torch").origin).parent


def needs_guard() -> bool:
    """Return whether this torch is a CPU build; one for CUDA has such a guard of its own."""
    return not (torch_folder() / "lib" / "libtorch_cuda.so").exists()


def build(folder: Path) -> Path:
    """Return the library, built into a folder; raises OSError where that cannot be."""
    base, library = torch_folder(), folder / "guard.so"
    if not (compiler := shutil.which("g++")):
        raise OSError("no g++ to build the guard with")
    done = subprocess.run(
        [compiler, "-std=c++20", "-shared", "-fPIC", "-O0", f"-I{base}/include",
         f"-I{base}/include/torch/csrc/api/include", str(Path(__file__).with_name("guard.cpp")),
         "-o", str(library), f"-L{base}/lib", "-lc10", "-ltorch_cpu"],
        capture_output=True, text=True)
    if done.returncode:
        faults = [line for line in done.stderr.splitlines() if "error" in line]
        raise OSError("; ".join(faults[:2]) or done.stderr[-200:])
    return library


def load(library: str):
    """Load the library and what it stands on; to be called before torch is imported."""
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL).install()
