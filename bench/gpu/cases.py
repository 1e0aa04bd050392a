"""What the stages bench-* measure, in groups that fit a ten-minute slot each, best first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from bench.gpu.shapes import HEAD_DIMS, PeerCase, decode, decode_cases, prefill, rope_cases
from bench.gpu.sm80 import SM80

PAGE_SIZE = 64
OURS = ("cuda", SM80, "triton", "reference")  # the last in dry runs


@dataclass(frozen=True)
class GpuCase:
    """rope: our call rotates inside, peers have a rotary kernel in front. Pages: decode only."""

    shape: PeerCase
    rope: bool = False
    page_size: int | None = None

    @property
    def label(self) -> str:
        parts = [self.shape.label]
        parts += ["rope"] if self.rope else []
        parts += [f"pages {self.page_size}"] if self.page_size is not None else []
        return " ".join(parts)


def is_ours(row: dict[str, Any]) -> bool:
    return row["contender"].removesuffix("_no_rope") in OURS


def of(shapes: list[PeerCase]) -> list[GpuCase]:
    return [GpuCase(shape) for shape in shapes]


def quick() -> list[GpuCase]:
    """The milestones' shapes: forward and backward at three lengths, one decode a head_dim."""
    cases = of([prefill(length, dim) for length, dim in product((4096, 1024, 16_384), HEAD_DIMS)])
    cases += of([decode(16 * 128 // dim, 8192, dim, 8) for dim in HEAD_DIMS])
    return [*cases, GpuCase(prefill(4096, 128), rope=True)]


def lengths() -> list[GpuCase]:
    """The other lengths, grouped heads, no mask, and the head_dims of the sm_80 family."""
    cases = [prefill(length, dim) for dim, length in product(HEAD_DIMS, (8192, 2048, 512, 32_768))]
    cases += [
        prefill(length, dim, kv_group=4) for dim, length in product(HEAD_DIMS, (4096, 16_384))
    ]
    cases += [prefill(4096, dim, causal=False) for dim in HEAD_DIMS]
    return of([*cases, prefill(4096, 256), prefill(4096, 96, num_heads=16)])


def long() -> list[GpuCase]:
    """131072 tokens with gradients, 1048576 without."""
    cases = [prefill(131_072, dim, num_heads=4) for dim in HEAD_DIMS]
    return of(cases + [prefill(1_048_576, dim, num_heads=1, backward=False) for dim in HEAD_DIMS])


def decoding() -> list[GpuCase]:
    """Caches of 256 MiB and more; each in one piece, then some in pages and some rotary."""
    cases = of(decode_cases())
    paged = [replace(case, page_size=PAGE_SIZE) for case in cases if case.shape.batch > 1]
    rotary = [replace(case, rope=True) for case in cases if case.shape.num_heads_kv == 8]
    return cases + paged[:4] + rotary[:2]


def rotary() -> list[GpuCase]:
    """Rotation inside the call, the pass over k included; beside it the same call without."""
    shapes = [*rope_cases(), *[prefill(16_384, dim) for dim in HEAD_DIMS]]
    return [GpuCase(shape, rope=True) for shape in shapes]


GROUPS = {
    "quick": quick(),
    "decode": decoding(),
    "lengths": lengths(),
    "rope": rotary(),
    "long": long(),
    "flex": quick()[:6],
}


@dataclass(frozen=True)
class Part:
    """Some contenders at the shapes of a group: ours and, of the peers, those named or all."""

    group: str
    backends: tuple[str, ...]
    peers: tuple[str, ...] | None = None


# What a visit of minutes measures first, and what waits until Triton has compiled.
PARTS = {
    "cuda": Part("quick", ("cuda", SM80)),
    "triton": Part("quick", ("triton",), ("sdpa_flash",)),
}
DRY_SHAPES = [
    GpuCase(PeerCase(1, 4, 2, 48, 48, 16, causal=True, backward=True)),
    GpuCase(PeerCase(1, 2, 2, 40, 40, 16, causal=True, backward=True), rope=True),
    GpuCase(PeerCase(2, 4, 2, 1, 128, 16, causal=False, backward=False), rope=True, page_size=64),
]


def cases_of(name: str) -> list[GpuCase]:
    """Of a group or a part of one."""
    return GROUPS[PARTS[name].group if name in PARTS else name]


def find(name: str, label: str) -> GpuCase:
    known = DRY_SHAPES if name == "dry" else cases_of(name)
    return next(case for case in known if case.label == label)
