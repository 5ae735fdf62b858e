"""Make Triton's interpreter treat bf16 as a GPU does: round to nearest, multiply values.

The interpreter keeps bf16 as bit patterns: as of Triton 3.9 a cast to bf16 cuts bits off and
`tl.dot` multiplies the patterns as integers. Both are mended by going through PyTorch.
"""

import numpy as np
import torch
from triton.runtime import interpreter

from candidates._triton import tl


def bits_of(values):
    """Return fp32 numbers as bf16 bit patterns, rounded to nearest, ties to even."""
    rounded = torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16)


def values_of(handle):
    """Return the numbers of a tensor handle, bf16 as fp32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def mend():
    """Replace the two faulty operations of the interpreter in this process."""
    builder = interpreter.InterpreterBuilder
    plain_cast, plain_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def rounds(source, kind):
        return source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16

    def cast(self, source, kind):
        if rounds(source, kind):
            return interpreter.TensorHandle(bits_of(source.data), kind.scalar)
        return plain_cast(self, source, kind)

    def fp_to_fp(self, source, kind, rounding):
        if rounds(source, kind):
            return cast(self, source, kind)
        return plain_fp_to_fp(self, source, kind, rounding)

    def dot(self, a, b, total, input_precision, max_num_imprecise_acc):
        product = np.matmul(values_of(a), values_of(b), dtype=total.data.dtype)
        return interpreter.TensorHandle(product + total.data, total.dtype.scalar)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast, fp_to_fp, dot
