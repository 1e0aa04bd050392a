"""The room `softmax` and the merging of parts, on scores of any size, against float64.

Scores are given, not multiplied: what is left of them is the softmax's own work.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from drope_kernels.backends.triton import softmax
from drope_kernels.backends.triton.merge import merge_kernel
from drope_kernels.backends.triton.params import ScaleParams, rows_of
from drope_kernels.backends.triton.softmax import (
    LOG2_E,
    cap_scores,
    exponent,
    finish,
    new_softmax,
    update,
)

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # of exponents, to -inf

ROWS = CHANNELS = BLOCK = 16
HIDDEN = float("-inf")
# Of the scores of a row; neighbours differ in the last bits, which at 3e6 are quarters.
LOWEST = torch.finfo(torch.float32).min
SIZES = (0.0, 1.0, -1.0, 1e5, -3e6, 3e6, 1e9, -1e30, 3e38, -3e38, LOWEST)


class Attended(NamedTuple):
    out: Tensor  # (ROWS, CHANNELS)
    row_max: Tensor  # (ROWS,)
    row_sum: Tensor
    log2_sum: Tensor
    lse: Tensor


@triton.jit
def attend_kernel(
    scores, values, scales, out, states, num_blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    scale = tl.load(scales + row)
    state = new_softmax(ROWS)
    acc_o = tl.zeros((ROWS, BLOCK), tl.float32)
    for block in range(num_blocks):
        key = block * BLOCK + column
        t = tl.load(scores + row[:, None] * num_blocks * BLOCK + key[None, :])
        p, row_scale, state = update(state, t, scale * LOG2_E)
        v = tl.load(values + key[:, None] * BLOCK + column[None, :])
        acc_o = tl.dot(p, v, acc_o * row_scale[:, None], input_precision="ieee")
    end = finish(state, scale)
    tl.store(out + row[:, None] * BLOCK + column[None, :], acc_o * end.inverse[:, None])
    tl.store(states + row, end.row_max)
    tl.store(states + ROWS + row, state.row_sum)
    tl.store(states + 2 * ROWS + row, end.log2_sum)
    tl.store(states + 3 * ROWS + row, end.lse)


def attend(scores: Tensor, values: Tensor, scales: Tensor) -> Attended:
    out, states = torch.empty(ROWS, CHANNELS), torch.empty(4, ROWS)
    num_blocks = scores.shape[1] // BLOCK
    operands = scores.contiguous(), values.contiguous(), scales
    attend_kernel[(1,)](*operands, out, states, num_blocks, ROWS=ROWS, BLOCK=BLOCK)
    return Attended(out, *states)


def exact(scores: Tensor, values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse in float64; zeros and -inf where a row sees no key."""
    s = scales.double()[:, None] * scores.double()
    p = s.softmax(-1).nan_to_num(0.0)  # unlike exp(s - lse) right where lse cannot tell ties apart
    return p @ values.double(), s.logsumexp(-1)


def drawn(size: float, num_blocks: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores near `size`, many of them tied, some hidden; the last rows see little or nothing."""
    generator = torch.Generator().manual_seed(seed)
    shape = ROWS, num_blocks * BLOCK
    steps = torch.randint(-6, 7, shape, generator=generator)
    scores = size * (1 + steps * 2.0**-23) + (steps / 4 if size == 0 else 0)
    scores = scores.clamp(LOWEST, -LOWEST)
    hidden = torch.rand(shape, generator=generator) < 0.2
    hidden[:, :BLOCK] |= torch.arange(ROWS)[:, None] % 2 == 0  # these begin with a hidden block
    hidden[-3:] = True
    hidden[-3, -1] = hidden[-2, 0] = False  # single keys
    scales = 2.0 ** -(torch.arange(ROWS) % 4)
    values = torch.randn(shape[1], CHANNELS, generator=generator)
    return scores.float().masked_fill(hidden, HIDDEN), values, scales.float()


def check(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(ours[0].double(), expected[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours[1].double(), expected[1], rtol=2e-7, atol=2e-6)


@pytest.mark.parametrize("size", SIZES)
def test_softmax_is_exact_at_any_size(size: float) -> None:
    scores, values, scales = drawn(size, 3)
    got = attend(scores, values, scales)
    check((got.out, got.lse), exact(scores, values, scales))


@triton.jit
def fused_exponent(t, row_max, scale_log2):
    return tl.fma(t, scale_log2, -scale_log2 * row_max)


def test_a_fused_exponent_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, values, scales = drawn(1e10, 3)
    monkeypatch.setattr(softmax, "exponent", fused_exponent)
    got = attend(scores, values, scales * 0.7)
    with pytest.raises(AssertionError):
        check((got.out, got.lse), exact(scores, values, scales * 0.7))


@pytest.mark.parametrize("size", SIZES)
def test_saved_numbers_give_probabilities_that_sum_to_1(size: float) -> None:
    scores, values, scales = drawn(size, 3)
    got = attend(scores, values, scales)
    seen = (scores > HIDDEN).any(-1)
    assert torch.equal(got.row_max[seen], scores.amax(-1)[seen])
    assert (got.row_max[~seen] == 0).all()
    assert (got.log2_sum[~seen] == float("inf")).all()
    exponents = (scales * LOG2_E.value)[:, None] * (scores - got.row_max[:, None])
    assert exponents.max() == 0
    p = (exponents - got.log2_sum[:, None]).exp2()
    torch.testing.assert_close(p.sum(-1)[seen], torch.ones(int(seen.sum())), rtol=1e-6, atol=0)
    assert (p[~seen] == 0).all()


@pytest.mark.parametrize("num_parts", [2, 19])  # more than a block of parts, too
@pytest.mark.parametrize("size", SIZES)
def test_merged_parts_are_the_whole(size: float, num_parts: int) -> None:
    """Of rows with scales of their own, some parts without keys."""
    scores, values, scales = drawn(size, num_parts)
    outs, states = torch.empty(num_parts, ROWS, CHANNELS), torch.empty(2, num_parts, ROWS)
    for n in range(num_parts):
        keys = slice(n * BLOCK, (n + 1) * BLOCK)
        part = attend(scores[:, keys], values[keys], scales)
        outs[n], states[0, n], states[1, n] = part.out, part.row_max, part.row_sum
        outs[n, part.row_sum == 0] = torch.nan  # as memory that nobody wrote
    check(merge(outs, states, scales), exact(scores, values, scales))


def test_a_part_that_is_nan_makes_its_row_nan() -> None:
    outs, states = torch.ones(3, ROWS, CHANNELS), torch.ones(2, 3, ROWS)
    states[1, 2, 5] = torch.nan
    out, lse = merge(outs, states, torch.ones(ROWS))
    lost = torch.arange(ROWS) == 5
    assert torch.equal(lse.isnan(), lost)
    assert torch.equal(out.isnan(), lost[:, None].expand_as(out))


def merge(outs: Tensor, states: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The rows as queries of one head."""
    out, lse = torch.empty(1, 1, ROWS, CHANNELS), torch.empty(ROWS)
    merge_kernel[(ROWS,)](
        outs,
        states,
        rows_of(out),
        lse,
        ScaleParams(0.0, scales, 0, 0, 1, 0.0),
        1,
        ROWS,
        ROWS,
        len(outs),
        HEAD_DIM_V=CHANNELS,
        BLOCK_DIM_V=CHANNELS,
        HAS_SOFTCAP=False,
        BLOCK_PARTS=16,
    )
    return out[0, 0], lse


@triton.jit
def cap_kernel(scores, target, scale, softcap, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    t = cap_scores(tl.load(scores + column)[None, :], tl.full((1, 1), scale, tl.float32), softcap)
    last = tl.full((1,), 0.0, tl.float32)
    capped = exponent(t, last[:, None], tl.full((1, 1), softcap, tl.float32))
    tl.store(target + column[None, :], capped)


@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e30, 2.0**126, 2.0**127])
def test_softcap_of_any_size(softcap: float) -> None:
    scores = torch.tensor([0.0, 1e-3, -0.7, 1.5, -20.0, 300.0, -700.0, 1e3] * 2)
    capped = torch.empty(BLOCK)
    cap_kernel[(1,)](scores, capped, 0.125, softcap, BLOCK=BLOCK)
    expected = softcap * torch.tanh(0.125 * scores.double() / softcap)
    # t ends at 2^-149, of which the largest softcap makes 2^-22.
    torch.testing.assert_close(capped.double(), expected, rtol=1e-6, atol=softcap * 2.0**-149)
