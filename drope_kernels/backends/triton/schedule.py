"""The order in which programs take tiles, as csrc/cuda/heuristics.h has it.

Section by section of heads, so that what a section reads again and again stays in the L2 cache;
inside a section the longest tiles first, so that the last programs to start are short ones.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# 5/8 of the 50 MB of an H100; most of the 40 MB of an A100.
_SECTION_BYTES = 32 << 20


class TileSchedule(NamedTuple):
    """Sections differ by one kv head at most: a small last one would leave most SMs idle."""

    num_tiles: int  # of one head
    group: int  # heads that read the same
    heads_per_section: int  # of any batch row
    num_larger_sections: int  # come first and have one group more


def tile_schedule(num_tiles: int, group: int, num_groups: int, group_bytes: int) -> TileSchedule:
    """group_bytes: what the tiles of the heads of one group read again and again."""
    fitting = max(1, _SECTION_BYTES // max(1, group_bytes))
    num_sections = max(1, -(-num_groups // fitting))
    return TileSchedule(
        num_tiles, group, num_groups // num_sections * group, num_groups % num_sections
    )


@triton.jit
def scheduled_tile(schedule, program):
    """The tile that a program takes: its head (of any batch row) and which of the head's own."""
    larger = schedule.heads_per_section + schedule.group
    heads_in_larger = schedule.num_larger_sections * larger
    is_in_larger = program < heads_in_larger * schedule.num_tiles
    num_heads = tl.where(is_in_larger, larger, schedule.heads_per_section)
    first_head = tl.where(is_in_larger, 0, heads_in_larger)
    rest = program - first_head * schedule.num_tiles
    section = rest // (num_heads * schedule.num_tiles)
    rest -= section * num_heads * schedule.num_tiles
    head = first_head + section * num_heads + rest % num_heads
    return head, schedule.num_tiles - 1 - rest // num_heads
