"""Triton's interpreter, quicker: `hasten()` keeps what it would make anew at every operation.

Most of its time goes into types: of each tensor a shape that is a tuple with a type with a name
spelled out, of each block a check that its sizes are powers of two, for each conversion a table of
NumPy's types. For every two operands it asks a dozen questions, though most are of one type, and
for every argument whether it is a constant. And it computes in int64 whether an integer overflowed,
seven operations for each, to hand the answer to an assertion that is off
(`InterpreterOptions.debug`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

NUMPY_TYPE, BLOCK_SHAPE = interpreter._get_np_dtype, core.validate_block_shape
SAME_TYPE, BROADCAST = core.dtype.__eq__, TritonSemantic.broadcast_impl_value
UNWRAP, TYPE_OF = core._unwrap_if_constexpr, TritonSemantic.computation_type_impl
ALIKE = TritonSemantic.binary_op_type_checking_impl
Sizes = tuple[int, ...]


def hasten() -> None:
    """For the whole process; a second call changes nothing."""
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = numpy_type
    core.validate_block_shape = lambda shape: num_elements(tuple(shape))
    core.block_type.__init__ = init_block_type
    core.block_type.name = property(lambda block: f"<{list(block.sizes)}, {block.element_ty}>")
    core.tensor.__init__ = init_tensor
    core.dtype.__eq__ = same_type
    core._unwrap_if_constexpr = unwrap
    interpreter._patch_attr = patch_attr
    TritonSemantic.broadcast_impl_value = broadcast
    TritonSemantic.binary_op_type_checking_impl = alike
    TritonSemantic.computation_type_impl = lambda self, *given: common_type(*given)


@cache
def shapes_of(sizes: Sizes) -> tuple[Any, Any]:
    """The shape of a block's type, of integers, and that of a tensor, of the language's own."""
    return core.tuple(sizes), core.tuple([core.constexpr(size) for size in sizes])


@cache
def num_elements(sizes: Sizes) -> int:
    """A ValueError or TypeError where a block of these sizes is not possible."""
    return int(BLOCK_SHAPE(sizes))


@cache
def numel_of(sizes: Sizes) -> Any:
    return core.constexpr(math.prod(sizes))


def init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    sizes = sizes_of(type)
    self.shape, self.numel = shapes_of(sizes)[1], numel_of(sizes)


def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """Its name, which is for messages, is spelled when asked for."""
    sizes = shape.values if isinstance(shape, core.tuple) else core._unwrap_if_constexpr(shape)
    self.sizes = tuple(size.value if isinstance(size, core.constexpr) else size for size in sizes)
    if not self.sizes:
        raise TypeError("0d block_type is forbidden")
    self.element_ty, self.numel = element_ty, num_elements(self.sizes)
    self.shape = shapes_of(self.sizes)[0]


def sizes_of(type: Any) -> Sizes:
    return type.sizes if type.is_block() else ()


def same_type(self: Any, other: Any) -> bool:
    return self is other or SAME_TYPE(self, other)


def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
    return (lhs, rhs) if sizes_of(lhs.type) == sizes_of(rhs.type) else BROADCAST(self, lhs, rhs)


def alike(
    self: Any,
    lhs: Any,
    rhs: Any,
    allow_lhs_ptr: bool = False,
    allow_rhs_ptr: bool = False,
    arithmetic_check: bool = True,
    div_or_mod: bool = False,
) -> Any:
    """Both operands of an operation in one type and shape. Two tensors of one type keep it, but
    for quotients, which are never of 16 bits, and pointers, which few operations take.
    """
    both = type(lhs) is core.tensor and type(rhs) is core.tensor
    if both and lhs.dtype is rhs.dtype and not div_or_mod and not lhs.dtype.is_ptr():
        return broadcast(self, lhs, rhs)
    return ALIKE(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)


@cache
def common_type(*given: Any) -> Any:
    """Of two types, either of them perhaps that of a number, in a quotient or not."""
    return TYPE_OF(TritonSemantic(interpreter.interpreter_builder), *given)


def unwrap(given: Any) -> Any:
    return given if type(given) is core.tensor else UNWRAP(given)


def patch_attr(of: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """A name of the language, for as long as kernels run: they say nothing of the semantic."""
    semantic = TritonSemantic(builder)

    def meaning(*arguments: Any, **named: Any) -> Any:
        named["_semantic"] = semantic
        return member(*arguments, **named)

    scope.set_attr(of, name, meaning)


@cache
def numpy_scalar(name: str) -> np.dtype[Any]:
    return NUMPY_TYPE(getattr(tl, name))


def numpy_type(of: Any) -> np.dtype[Any]:
    element = of.element_ty if isinstance(of, tl.block_type) else of
    if isinstance(element, tl.pointer_type):
        return np.dtype(np.uint64)
    return numpy_scalar(repr(element).rpartition(".")[2])
