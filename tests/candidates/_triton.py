"""Triton where it is installed; without it the kernels import all the same and never start."""

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def jit(function):
    """Return a kernel ready to be launched, or the bare function where there is no Triton."""
    return triton.jit(function) if triton else function
