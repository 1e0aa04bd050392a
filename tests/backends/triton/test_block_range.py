"""The Triton kernels' intervals of visible keys and queries, against the reference's mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from drope_kernels.backends import reference
from drope_kernels.backends.triton.block_range import (
    count_blocks,
    keys_of,
    keys_of_tile,
    kv_blocks,
    nth_block,
    q_blocks,
    queries_of,
    queries_of_tile,
)
from drope_kernels.backends.triton.params import (
    every_key_is_seen,
    mask_params,
    range_params,
    shape_params,
)
from drope_kernels.backends.triton.schedule import scheduled_tile, tile_schedule
from drope_kernels.backends.triton.sequence import batch_row
from drope_kernels.spec.spec import AttentionInputs

INT32 = 2**31
BLOCK = 16  # of queries and of keys: the lengths below end inside of one


@triton.jit
def store_range(target, index, rows, seen):
    tl.store(target + 2 * (index + rows), seen.begin)
    tl.store(target + 2 * (index + rows) + 1, seen.end)


@triton.jit
def store_blocks(full, masked, blocks):
    for n in tl.range(count_blocks(blocks, False)):
        tl.atomic_add(full + nth_block(blocks, n, False), 1)
    for n in tl.range(count_blocks(blocks, True)):
        tl.atomic_add(masked + nth_block(blocks, n, True), 1)


@triton.jit
def intervals_kernel(
    rows,
    tiles,
    full,
    masked,
    shape,
    mask,
    ranges,
    num_tiles,
    num_blocks,
    OF_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile: the interval of each of its rows, that of all, and the blocks it passes."""
    batch, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    sequence = batch_row(shape, mask, ranges, batch)
    row = tile * BLOCK + tl.arange(0, BLOCK)
    counts = tl.program_id(0) * num_blocks
    first_row = batch * num_tiles * BLOCK
    if OF_KEYS:
        store_range(rows, first_row, row, queries_of(sequence, mask, row))
        some = queries_of_tile(sequence, mask, tile * BLOCK, BLOCK)
        blocks = q_blocks(sequence, mask, tile * BLOCK, BLOCK, BLOCK)
    else:
        store_range(rows, first_row, row, keys_of(sequence, mask, row))
        some = keys_of_tile(sequence, mask, tile * BLOCK, BLOCK)
        blocks = kv_blocks(sequence, mask, tile * BLOCK, BLOCK, BLOCK)
    store_range(tiles, tl.program_id(0), 0, some)
    store_blocks(full + counts, masked + counts, blocks)


def call(seqlen_q: int, seqlen_kv: int, **given: Any) -> AttentionInputs:
    """A call of which only the mask matters."""
    batch = next((x.shape[0] for x in given.values() if isinstance(x, Tensor)), 1)
    k = torch.zeros(batch, 1, seqlen_kv, 16)
    plain = {"causal": True, "window": None, "q_start": 0, "kv_start": None, "kv_end": None}
    return AttentionInputs(
        q=torch.zeros(batch, 1, seqlen_q, 16),
        k=k,
        v=k,
        scale=1.0,
        softcap=None,
        rotation=None,
        **(plain | given),
    )


def check_tiles(inputs: AttentionInputs, *, of_keys: bool) -> None:
    """Intervals are those of the mask; each visible pair is in one block, full ones are full."""
    mask = reference.visible(inputs).expand(inputs.q.shape[0], -1, -1)
    visible = mask.transpose(1, 2) if of_keys else mask
    batch, num_rows, num_columns = visible.shape
    num_tiles, num_blocks = -(-num_rows // BLOCK), -(-num_columns // BLOCK)
    rows = torch.zeros(batch, num_tiles * BLOCK, 2, dtype=torch.int32)
    tiles = torch.zeros(batch, num_tiles, 2, dtype=torch.int32)
    full = torch.zeros(batch, num_tiles, num_blocks, dtype=torch.int32)
    masked = torch.zeros_like(full)
    intervals_kernel[(batch * num_tiles,)](
        rows,
        tiles,
        full,
        masked,
        shape_params(inputs),
        mask_params(inputs),
        range_params(inputs),
        num_tiles,
        num_blocks,
        OF_KEYS=of_keys,
        BLOCK=BLOCK,
    )
    column = torch.arange(num_columns)
    inside = (column >= rows[:, :num_rows, :1]) & (column < rows[:, :num_rows, 1:])
    assert torch.equal(inside, visible)

    padded = torch.zeros(batch, num_tiles * BLOCK, num_blocks * BLOCK, dtype=torch.bool)
    padded[:, :num_rows, :num_columns] = visible
    by_block = padded.unflatten(1, (num_tiles, BLOCK)).unflatten(3, (num_blocks, BLOCK))
    sees = by_block.any(4).any(2)  # (batch, num_tiles, num_blocks)
    of_tile = padded.unflatten(1, (num_tiles, BLOCK)).any(2)[..., :num_columns]
    in_tile = (column >= tiles[..., :1]) & (column < tiles[..., 1:])
    assert not (of_tile & ~in_tile).any()
    assert torch.equal(in_tile.any(-1), of_tile.any(-1))

    # Rows past the last hide nothing: what they compute is not stored.
    padded[:, num_rows:] = True
    by_block = padded.unflatten(1, (num_tiles, BLOCK)).unflatten(3, (num_blocks, BLOCK))
    assert ((full == 0) | by_block.all(4).all(2)).all()
    assert (full + masked <= 1).all()
    assert ((full + masked == 1) | ~sees).all()


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def random_call(seed: int) -> AttentionInputs:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    seqlen_q, seqlen_kv = draw(1, 70, 2).tolist()
    options: dict[str, Any] = {"causal": bool(draw(0, 2, 1))}
    if draw(0, 2, 1):
        options["window"] = int(draw(1, 60, 1))
    starts = draw(-40, 90, 3)
    options["q_start"] = starts if draw(0, 2, 1) else int(starts[0])
    if draw(0, 2, 1):
        options["kv_start"] = draw(0, seqlen_kv + 1, 3)
    if draw(0, 2, 1):
        options["kv_end"] = draw(0, seqlen_kv + 1, 3)
    return call(seqlen_q, seqlen_kv, **options)


@pytest.mark.parametrize("of_keys", [False, True], ids=["keys_of_queries", "queries_of_keys"])
@pytest.mark.parametrize("seed", range(20))
def test_intervals_are_those_of_the_mask(seed: int, of_keys: bool) -> None:
    check_tiles(random_call(seed), of_keys=of_keys)


EXTREMES = {
    "start_far_behind_keys": {"q_start": 10**12},
    "start_far_before_keys": {"q_start": -(10**12), "causal": False},
    "start_far_before_keys_causal": {"q_start": -(10**12)},
    "window_as_far_as_start": {"q_start": 10**12, "window": 10**12 + 5},
    "window_nearly_as_far_as_start": {"q_start": 10**12, "window": 10**12 - 20},
    "full_window_as_far_as_start": {"q_start": -(10**12), "window": 10**12, "causal": False},
    "wide_window": {"window": 2**62},
    "wide_full_window": {"window": 2**62, "causal": False},
    "int32_window": {"window": INT32 - 1, "q_start": 12},
    "window_of_an_int32_at_its_end": {"window": INT32, "q_start": INT32 - 1},
    "full_window_of_an_int32_at_its_end": {
        "window": INT32,
        "q_start": INT32 - 1,
        "causal": False,
    },
    "windows_past_starts_of_int32": {
        "q_start": int32(INT32 - 1, INT32 - 9, -INT32),
        "window": INT32 + 1,
    },
    "full_windows_past_starts_of_int32": {
        "q_start": int32(INT32 - 1, -INT32, 30 - INT32),
        "window": INT32 + 1,
        "causal": False,
    },
    "starts_of_int32": {"q_start": int32(INT32 - 1, -INT32, 0)},
    "full_starts_of_int32": {"q_start": int32(INT32 - 1, -INT32, 0), "causal": False},
    "windows_at_starts_of_int32": {
        "q_start": int32(INT32 - 1, INT32 - 30, -INT32),
        "window": INT32 - 10,
    },
    "windows_of_an_int32_at_its_ends": {"q_start": int32(INT32 - 1, 0, -INT32), "window": INT32},
    "full_windows_at_starts_of_int32": {
        "q_start": int32(-INT32 + 30, 30 - INT32 // 2, INT32 - 1),
        "window": INT32 - 10,
        "causal": False,
    },
    "window_of_half_an_int32": {"q_start": int32(2**30, 2**30 + 20), "window": 2**30 + 7},
}


@pytest.mark.parametrize("of_keys", [False, True], ids=["keys_of_queries", "queries_of_keys"])
@pytest.mark.parametrize("name", EXTREMES)
def test_far_starts_and_wide_windows_are_exact(name: str, of_keys: bool) -> None:
    check_tiles(call(37, 45, **EXTREMES[name]), of_keys=of_keys)


@pytest.mark.parametrize("seed", range(200))
def test_a_key_said_to_be_seen_is_seen(seed: int) -> None:
    inputs = random_call(seed)
    if every_key_is_seen(inputs):
        assert reference.visible(inputs).any(1).all()


def test_ordinary_calls_are_known_to_see_every_key() -> None:
    assert every_key_is_seen(call(40, 40))
    assert every_key_is_seen(call(40, 70, q_start=30))
    assert every_key_is_seen(call(40, 70, causal=False))
    assert every_key_is_seen(call(40, 40, window=8))
    assert not every_key_is_seen(call(40, 70))
    assert not every_key_is_seen(call(40, 70, q_start=30, window=8))


@triton.jit
def schedule_kernel(heads, tiles, schedule):
    program = tl.program_id(0)
    head, tile = scheduled_tile(schedule, program)
    tl.store(heads + program, head)
    tl.store(tiles + program, tile)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("num_groups", [1, 3, 7])
@pytest.mark.parametrize("group_mib", [0, 7, 100])
def test_every_tile_is_taken_once_and_long_ones_first(
    group: int, num_groups: int, group_mib: int
) -> None:
    schedule = tile_schedule(5, group, num_groups, group_mib << 20)
    count = 5 * group * num_groups
    heads, tiles = torch.empty(2, count, dtype=torch.int32)
    schedule_kernel[(count,)](heads, tiles, schedule)
    assert sorted(zip(heads.tolist(), tiles.tolist(), strict=True)) == [
        (head, tile) for head in range(group * num_groups) for tile in range(5)
    ]
    for head in range(group * num_groups):
        assert tiles[heads == head].tolist() == [4, 3, 2, 1, 0]
