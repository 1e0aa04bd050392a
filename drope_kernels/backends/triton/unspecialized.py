"""Numbers that a kernel is not compiled again for.

Triton compiles a kernel once more where an int is 1, and where it is a multiple of 16. Its
do_not_specialize prevents that for arguments, but not for what is in a NamedTuple (3.6 to 3.9). So
these numbers travel as 4 x + 2, which is never either, and a kernel's first line takes them back.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import triton

from drope_kernels.backends.triton.params import MaskParams, ShapeParams
from drope_kernels.backends.triton.schedule import TileSchedule

Numbers = TypeVar("Numbers", bound=NamedTuple)


def unspecialized(numbers: Numbers) -> Numbers:
    """The argument of a kernel that says `numbers`, all of them ints."""
    return numbers._replace(**{name: 4 * x + 2 for name, x in numbers._asdict().items()})


@triton.jit
def plain_shape(shape):
    return ShapeParams(
        shape.batch >> 2,
        shape.num_heads_q >> 2,
        shape.num_heads_kv >> 2,
        shape.seqlen_q >> 2,
        shape.seqlen_kv >> 2,
        shape.num_seqs >> 2,
    )


@triton.jit
def plain_mask(mask):
    return MaskParams(mask.behind >> 2, mask.ahead >> 2, mask.q_offset >> 2)


@triton.jit
def plain_schedule(schedule):
    return TileSchedule(
        schedule.num_tiles >> 2,
        schedule.group >> 2,
        schedule.heads_per_section >> 2,
        schedule.num_larger_sections >> 2,
    )
