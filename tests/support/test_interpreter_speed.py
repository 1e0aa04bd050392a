"""What the interpreter keeps from one operation to the next is what it would have made anew."""

from __future__ import annotations

import numpy as np
import pytest
import triton.language as tl
from interpreter_speed import ALIKE, NUMPY_TYPE
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

SCALARS = (*(tl.int1, tl.int8, tl.uint8, tl.int32, tl.int64, tl.uint64), tl.float16, tl.bfloat16)


@pytest.mark.parametrize("scalar", [*SCALARS, tl.float32, tl.float64, tl.float8e5], ids=str)
def test_types_of_numpy(scalar: tl.dtype) -> None:
    pointer = tl.pointer_type(scalar)
    for one in (scalar, pointer, tl.block_type(scalar, [2, 4]), tl.block_type(pointer, [8])):
        assert interpreter._get_np_dtype(one) == NUMPY_TYPE(one)


def test_shapes_and_names() -> None:
    block = tl.block_type(tl.float32, [core.constexpr(4), 2])
    assert (block.shape.values, block.numel, block.name) == ([4, 2], 8, "<[4, 2], fp32>")
    assert block == tl.block_type(tl.float32, [4, 2])
    assert block != tl.block_type(tl.float32, [2, 4])
    assert block != tl.block_type(tl.int32, [4, 2])
    one = tl.tensor(interpreter.TensorHandle(np.zeros((4, 2), np.float32), tl.float32), block)
    assert [size.value for size in one.shape.values] == [4, 2]
    assert one.numel.value == 8
    assert one.dtype == tl.float32
    scalar = tl.tensor(interpreter.TensorHandle(np.zeros(1, np.float32), tl.float32), tl.float32)
    assert (scalar.shape.values, scalar.numel.value) == ([], 1)


@pytest.mark.parametrize(
    ("shape", "error"), [([3], ValueError), ([2, 0.5], TypeError), ([], TypeError)], ids=str
)
def test_blocks_that_are_not_possible(shape: list[float], error: type[Exception]) -> None:
    with pytest.raises(error):
        tl.block_type(tl.float32, shape)


def test_an_overflow_was_never_reported() -> None:
    """Were the assertion on, leaving its condition out would lose a check."""
    assert not interpreter.interpreter_builder.options.debug


def tensor_of(scalar: tl.dtype, shape: tuple[int, ...]) -> tl.tensor:
    data = np.ones(shape, interpreter._get_np_dtype(scalar))
    return tl.tensor(interpreter.TensorHandle(data, scalar), tl.block_type(scalar, [*shape]))


@pytest.mark.parametrize("is_quotient", [False, True], ids=["sum", "quotient"])
@pytest.mark.parametrize("other", [*SCALARS, tl.float32, 2, 2.5], ids=str)
@pytest.mark.parametrize("one", [*SCALARS, tl.float32], ids=str)
def test_operands_of_one_type(one: tl.dtype, other: object, is_quotient: bool) -> None:
    """And of two: the same types, shapes and numbers, or the same refusal."""

    def result(alike: object) -> object:
        left = tensor_of(one, (2, 4))
        right = tensor_of(other, (1, 4)) if isinstance(other, tl.dtype) else other
        semantic = TritonSemantic(interpreter.interpreter_builder)
        try:
            both = alike(semantic, left, right, div_or_mod=is_quotient)
        except (TypeError, AttributeError) as error:  # a number as a bfloat16 has no name
            return str(error)
        return [(x.type, x.dtype, x.handle.dtype, x.handle.data.tolist()) for x in both]

    assert result(TritonSemantic.binary_op_type_checking_impl) == result(ALIKE)
