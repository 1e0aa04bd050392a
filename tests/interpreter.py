"""Triton's interpreter, mended. `mend()` is called before any kernel runs.

In 3.6 to 3.9 the interpreter keeps a bfloat16 as its bits, a uint16, and is silently wrong with
it: a dot multiplies the bits as integers, and a cast from float32 truncates where the GPU rounds to
nearest even. A fused multiply-add rounds its product too, which leaves the angles of far positions
no digits. What else kernels may do with bfloat16 is right: load, store, select, cast to float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

BROKEN = {name: getattr(InterpreterBuilder, name) for name in ("create_dot", "cast_impl")}


def mend() -> None:
    """Replaces what is wrong, for the whole process; a second call changes nothing."""
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fma = create_fma


def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    return BROKEN["create_dot"](self, widened(a), widened(b), d, *options)


def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """float32: the product is exact in float64, so one rounding of the sum is all that is left."""
    exact = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
    source, target = src.dtype.scalar, dst_type.scalar
    if (source, target) == (tl.bfloat16, tl.float32):
        return widened(src)
    if (source, target) == (tl.float32, tl.bfloat16):
        return TensorHandle(rounded(src.data), target)
    return BROKEN["cast_impl"](self, src, dst_type)


def widened(handle: Any) -> Any:
    """bfloat16 as float32, anything else as it is."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def rounded(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bits of float32 numbers rounded to bfloat16, to nearest, ties to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), nearest)
