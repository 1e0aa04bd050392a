"""Triton's interpreter, mended. `mend()` is called before any kernel runs.

In 3.6 to 3.9 the interpreter keeps a bfloat16 as its bits, a uint16, and is silently wrong with
it: a dot multiplies the bits as integers, and a cast from float32 truncates where the GPU rounds to
nearest even. Before 3.9 a fused multiply-add rounds its product too, which leaves the angles of far
positions no digits. What else kernels may do with bfloat16 is right: load, store, select, cast to
float32.

Mended, it also refuses to touch memory outside the tensors of a launch, and does not search
triton.language for what to replace at every call of a function, replaced or not: half of its time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

MENDED = ("create_dot", "cast_impl", "create_fma", "create_masked_load", "create_masked_store")
UNMENDED = {name: getattr(InterpreterBuilder, name) for name in MENDED}
PATCH_LANG, INIT_ARGS = interpreter._patch_lang, GridExecutor._init_args_hst


def mend() -> None:
    """Replaces what is wrong, for the whole process; a second call changes nothing."""
    for name in MENDED:
        setattr(InterpreterBuilder, name, globals()[name])
    GridExecutor._init_args_hst = init_args
    interpreter._patch_lang = patch_lang


# ---- arithmetic --------------------------------------------------------------------------------
def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    return UNMENDED["create_dot"](self, widened(a), widened(b), d, *options)


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
    return UNMENDED["cast_impl"](self, src, dst_type)


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


# ---- memory ------------------------------------------------------------------------------------
class OutsideError(IndexError):
    """An access to memory that belongs to no tensor of the launch."""


class Reach:
    """The storages of the launch that runs, as sorted addresses [begin, end)."""

    begin = end = np.zeros(0, np.uint64)


def init_args(self: Any, arguments: Any, named: Any) -> Any:
    here = INIT_ARGS(self, arguments, named)
    storages = sorted({(x.data_ptr(), x.nbytes()) for x in storages_of(here) if x.nbytes()})
    Reach.begin = np.array([address for address, _ in storages], np.uint64)
    Reach.end = np.array([sum(one) for one in storages], np.uint64)
    return here


def storages_of(arguments: Any) -> Iterator[Any]:
    if isinstance(arguments, Tensor):
        yield arguments.untyped_storage()
    elif isinstance(arguments, TensorDescriptor):
        yield arguments.base.untyped_storage()
    elif isinstance(arguments, dict | list | tuple):
        for one in arguments.values() if isinstance(arguments, dict) else arguments:
            yield from storages_of(one)


def create_masked_load(self: Any, ptrs: Any, mask: Any, *options: Any, **named: Any) -> Any:
    check_access(ptrs, mask)
    return UNMENDED["create_masked_load"](self, ptrs, mask, *options, **named)


def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *options: Any) -> Any:
    check_access(ptrs, mask)
    return UNMENDED["create_masked_store"](self, ptrs, value, mask, *options)


def check_access(ptrs: Any, mask: Any) -> None:
    size = ptrs.get_element_ty().primitive_bitwidth // 8
    wanted = mask if isinstance(mask, np.ndarray) else mask.data  # descriptors hand over an array
    first = ptrs.data[wanted.astype(bool)]
    owner = np.searchsorted(Reach.begin, first, side="right")
    if first.size and (owner == 0).any():
        raise OutsideError(f"{(owner == 0).sum()} elements before every tensor")
    beyond = first + np.uint64(size) > Reach.end[owner - 1]
    if beyond.any():
        raise OutsideError(f"{beyond.sum()} elements of {size} bytes beyond their tensor")


# ---- language ----------------------------------------------------------------------------------
def patch_lang(function: Any) -> Any:
    """What the language's names mean while `function` runs; within another one nothing new."""
    used = [one for one in function.__globals__.values() if one is tl or one is tl.core]
    if any(tl.core.is_builtin(one.load) for one in used):
        return PATCH_LANG(function)
    return interpreter._LangPatchScope()
