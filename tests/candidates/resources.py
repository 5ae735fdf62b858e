"""Compile every candidate for Hopper without a GPU: what registers and instructions tell.

    PYTHONPATH=tests python -m candidates.resources

Prints per kernel launch at full size: registers a thread, spilled bytes, shared memory, and
whether matrix products became Hopper's own instruction (HGMMA).
"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch

from candidates import loss, mlp, qk, xsa
from candidates._triton import triton

TOKENS, DIM, VOCAB, HIDDEN, HEADS, KV_HEADS, WIDTH, LENGTH = 98304, 512, 8192, 2048, 8, 4, 64, 2048


class NoDevice:
    """A Triton driver that knows its target and cannot launch."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def launches():
    """Yield (name, call that launches one kernel at full size on tensors without memory)."""
    hidden, head = empty(TOKENS, DIM), empty(VOCAB, DIM)
    targets = empty(TOKENS, dtype=torch.int64)
    loss_function = loss.softcap_loss._init_fn
    yield "loss", lambda: loss_function(hidden, head, targets, 30.0, True)
    yield "loss, no gradient", lambda: loss_function(hidden, head, targets, 30.0, False)
    up, down, pre = empty(HIDDEN, DIM), empty(DIM, HIDDEN), empty(TOKENS, HIDDEN)
    for tile in mlp.TILES:
        def with_tile(call, tile=tile):
            before, mlp.TILES = mlp.TILES, [tile]
            try:
                return call()
            finally:
                mlp.TILES = before
        name = f"{tile.rows}x{tile.columns}, {tile.warps} warps"
        yield f"mlp forward {name}", lambda: with_tile(lambda: mlp.launch(hidden, up.T, None))
        yield f"mlp backward {name}", lambda: with_tile(lambda: mlp.launch(hidden, down, pre))
    batch = TOKENS // LENGTH
    q, v = empty(batch, LENGTH, HEADS, WIDTH), empty(batch, LENGTH, KV_HEADS, WIDTH)
    turn = empty(HEADS), empty(LENGTH, 8), empty(LENGTH, 8)
    yield "qk forward", lambda: qk.launch(q, *turn, None)
    yield "qk backward", lambda: qk.launch(q, *turn, q)
    yield "xsa forward", lambda: xsa.launch(q, v, None)
    yield "xsa backward", lambda: xsa.launch(q, v, q)


def describe(kernel) -> str:
    """Return registers, spills, shared memory and matrix instructions of a compiled kernel."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage, sass = (subprocess.run([tools / "cuobjdump", option, cubin], text=True, check=True,
                                      capture_output=True).stdout
                       for option in ("--dump-resource-usage", "--dump-sass"))
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[0]) for key in ("REG", "STACK"))
    products = {name: len(re.findall(rf"\b{name}\.", sass)) for name in ("HGMMA", "HMMA", "FFMA")}
    wide = sum(sass.count(f"{kind}.E.128") for kind in ("LDG", "STG"))
    return (f"registers {registers} stack {stack} shared {kernel.metadata.shared} "
            f"HGMMA {products['HGMMA']} HMMA {products['HMMA']} 16-byte accesses {wide}")


def main():
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
    driver.set_active(NoDevice())
    compiled = []
    JITFunction.__getitem__ = lambda self, grid: (
        lambda *args, **options: compiled.append(self.warmup(*args, grid=grid, **options)))
    for name, launch in launches():
        launch()
        print(f"{name:32} {describe(compiled[-1])}", flush=True)


if __name__ == "__main__":
    main()
