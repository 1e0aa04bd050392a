"""The named cases that every backend answers, forward and backward. Numbers only: no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RopeCase:
    """A rotation in plain numbers. `oracle.frequencies` reads the same numbers without our code."""

    kind: str = "plain"  # plain, pi, ntk, dynamic_ntk, yarn, llama3, table, per_head, pythagorean
    theta: float = 10_000.0
    dim: int | None = None  # None: the whole head
    interleaved: bool = False
    attention_factor: float = 1.0

    # What the scaled kinds stretch; small, so that every frequency band occurs within a short case.
    factor: float = 8.0
    original_length: int = 64
    length: int = 256  # dynamic NTK's current length


@dataclass(frozen=True)
class Case:
    """One attention call by name. Defaults are the plainest call that still has several heads."""

    name: str
    batch: int = 2
    num_heads_q: int = 2
    num_heads_kv: int = 2
    seqlen_q: int = 48
    seqlen_kv: int = 48
    head_dim: int = 32
    head_dim_v: int | None = None  # None: head_dim
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    rope: RopeCase | None = None
    scale: str = "default"  # default, float, call, head, batch, query, row
    q_start: int | tuple[int, ...] | None = None  # None: seqlen_kv - seqlen_q
    kv_start: tuple[int, ...] | None = None
    kv_end: tuple[int, ...] | None = None
    positions: str | None = None  # from_kv_start, million, fractional, plus_minus_one
    layout: str = "bhsd"  # bhsd, bshd, fused, expanded_heads, expanded_batch
    magnitude: str = "normal"  # a name of magnitudes.MAGNITUDES
    lse_grad: bool = True
    seqlens_q: tuple[int, ...] | None = None  # packed calls: one length per sequence
    seqlens_kv: tuple[int, ...] | None = None

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    @property
    def packed(self) -> bool:
        return self.seqlens_q is not None

    def query_starts(self) -> tuple[int, ...]:
        """The key index of query 0, for each batch row."""
        if self.q_start is None:
            return (self.seqlen_kv - self.seqlen_q,) * self.batch
        return self.q_start if isinstance(self.q_start, tuple) else (self.q_start,) * self.batch


REGULAR = (
    Case("regular", num_heads_q=4, num_heads_kv=4, seqlen_q=64, seqlen_kv=64, head_dim=64),
    Case("regular_full", seqlen_q=64, seqlen_kv=64, head_dim=64, causal=False),
    Case("no_lse_gradient", lse_grad=False),
    Case("length_1", batch=3, num_heads_q=4, num_heads_kv=4, seqlen_q=1, seqlen_kv=1),
    Case("length_63", seqlen_q=63, seqlen_kv=63),
    Case("length_111", seqlen_q=111, seqlen_kv=111, head_dim=64),
    Case("length_111_full", seqlen_q=111, seqlen_kv=111, head_dim=64, causal=False),
    Case("length_1521", batch=1, num_heads_q=2, seqlen_q=1521, seqlen_kv=1521, head_dim=64),
    Case("tail_of_queries", seqlen_q=65, seqlen_kv=128),
    Case("tail_of_keys", seqlen_q=64, seqlen_kv=130),
    Case("tail_of_keys_full", seqlen_q=33, seqlen_kv=131, causal=False),
    Case("more_queries_than_keys", seqlen_q=81, seqlen_kv=48),
    Case("more_queries_than_keys_full", seqlen_q=81, seqlen_kv=48, causal=False),
    Case("gqa_4_to_1", num_heads_q=8, num_heads_kv=2),
    Case("gqa_3_to_1_full", num_heads_q=9, num_heads_kv=3, causal=False),
    Case("mqa", num_heads_q=6, num_heads_kv=1, seqlen_q=40, seqlen_kv=56),
    Case("single_query", batch=3, num_heads_q=8, num_heads_kv=2, seqlen_q=1, seqlen_kv=77),
    Case("single_key", num_heads_q=4, seqlen_q=9, seqlen_kv=1, causal=False),
)

HEAD_DIMS = (
    Case("head_dim_7", head_dim=7),
    Case("head_dim_33", head_dim=33, causal=False),
    Case("head_dim_40", head_dim=40, rope=RopeCase()),
    Case("head_dim_80", head_dim=80, rope=RopeCase()),
    Case("head_dim_96", head_dim=96),
    Case("head_dim_128", seqlen_q=70, seqlen_kv=70, head_dim=128, rope=RopeCase()),
    Case("head_dim_256", head_dim=256, rope=RopeCase()),
    Case("narrow_values", head_dim=64, head_dim_v=24),
    Case("wide_values", head_dim=24, head_dim_v=80, rope=RopeCase(), num_heads_q=4),
)

MASKS = (
    Case("window_1", window=1),
    Case("window_16", seqlen_q=100, seqlen_kv=100, window=16),
    Case("window_16_full", seqlen_q=100, seqlen_kv=100, window=16, causal=False),
    Case("window_wider_than_keys", window=500),
    Case("window_more_keys", seqlen_q=20, seqlen_kv=90, window=7),
    Case("window_static_cache", seqlen_q=12, seqlen_kv=96, q_start=50, kv_end=(62, 62), window=9),
    Case("right_padded", batch=4, kv_end=(48, 31, 1, 0)),
    Case("right_padded_full", batch=4, kv_end=(48, 31, 1, 0), causal=False),
    Case("left_padded", batch=3, kv_start=(0, 17, 48)),
    Case(
        "left_padded_positions",
        batch=3,
        kv_start=(0, 17, 40),
        positions="from_kv_start",
        rope=RopeCase(),
    ),
    Case("padded_both_sides_full", batch=2, kv_start=(5, 0), kv_end=(40, 17), causal=False),
    Case("static_cache_chunk", seqlen_q=16, seqlen_kv=128, q_start=40, kv_end=(56, 50)),
    Case("static_cache_rope", seqlen_q=16, seqlen_kv=128, q_start=(40, 90), rope=RopeCase()),
    Case("q_start_negative", q_start=(-9, 3)),
    Case("q_start_negative_rope", q_start=-9, rope=RopeCase(), causal=False),
    Case("q_start_beyond_keys", seqlen_q=10, seqlen_kv=40, q_start=60, window=32),
    Case("every_row_empty", q_start=-200),
    Case("ranges_that_miss_the_window", kv_start=(40, 0), kv_end=(48, 8), window=4),
)

LAYOUTS = (
    Case("transposed", layout="bshd", num_heads_q=4, num_heads_kv=2),
    Case("transposed_rope", layout="bshd", rope=RopeCase()),
    Case("fused_projection", layout="fused", num_heads_q=4, num_heads_kv=2),
    Case("fused_projection_rope", layout="fused", rope=RopeCase(interleaved=True)),
    Case("expanded_heads", layout="expanded_heads", num_heads_q=4, num_heads_kv=4),
    Case("expanded_batch", layout="expanded_batch", batch=3, rope=RopeCase()),
)

MAGNITUDES = (
    Case("huge_entries", head_dim=128, magnitude="huge"),
    Case("huge_entries_full", head_dim=128, magnitude="huge", causal=False),
    Case("softcap", softcap=5.0),
    Case("softcap_full", softcap=2.0, causal=False, scale="float"),
    Case("softcap_rope_rows", softcap=3.0, rope=RopeCase(), scale="row", num_heads_q=4),
)

SCALES = (
    Case("scale_float", scale="float"),
    Case("scale_per_call", scale="call"),
    Case("scale_per_head", scale="head", num_heads_q=4),
    Case("scale_per_batch", scale="batch"),
    Case("scale_per_query", scale="query"),
    Case("scale_per_row", scale="row", num_heads_q=4),
    Case("scale_per_row_full", scale="row", causal=False),
    Case("scale_per_row_ranges", scale="row", batch=3, kv_end=(48, 20, 0), window=16),
    Case("scale_per_row_rope", scale="row", rope=RopeCase(attention_factor=1.2)),
)

ROTATIONS = (
    Case("rope", rope=RopeCase(), seqlen_q=64, seqlen_kv=64, head_dim=64),
    Case("rope_full", rope=RopeCase(), causal=False),
    Case("rope_gqa", rope=RopeCase(), num_heads_q=8, num_heads_kv=2),
    Case("rope_more_queries", rope=RopeCase(), seqlen_q=70, seqlen_kv=40),
    Case("rope_window", rope=RopeCase(), seqlen_q=100, seqlen_kv=100, window=16),
    Case("rope_single_query", rope=RopeCase(), seqlen_q=1, seqlen_kv=77, num_heads_q=8),
    Case("rope_interleaved", rope=RopeCase(interleaved=True)),
    Case("rope_partial", rope=RopeCase(dim=20), head_dim=64),
    Case("rope_partial_interleaved", rope=RopeCase(dim=12, interleaved=True)),
    Case("rope_attention_factor", rope=RopeCase(attention_factor=1.3)),
    Case("rope_attention_factor_partial", rope=RopeCase(attention_factor=0.7, dim=16)),
    Case("rope_theta_500000", rope=RopeCase(theta=500_000.0)),
    Case("rope_table", rope=RopeCase("table")),
    Case("rope_per_head", rope=RopeCase("per_head"), num_heads_q=6, num_heads_kv=3),
    Case("rope_per_head_interleaved", rope=RopeCase("per_head", interleaved=True)),
    Case("rope_pi", rope=RopeCase("pi")),
    Case("rope_ntk", rope=RopeCase("ntk")),
    Case("rope_dynamic_ntk", rope=RopeCase("dynamic_ntk")),
    Case("rope_yarn", rope=RopeCase("yarn")),
    Case("rope_llama3", rope=RopeCase("llama3")),
    Case(
        "rope_without_rounding",
        rope=RopeCase("pythagorean"),
        positions="plus_minus_one",
        magnitude="pythagorean",
    ),
    Case("rope_million", rope=RopeCase(), positions="million"),
    Case("rope_million_interleaved", rope=RopeCase(interleaved=True), positions="million"),
    Case("rope_fractional_positions", rope=RopeCase(), positions="fractional"),
)

EMPTY = (
    Case("no_keys", seqlen_kv=0),
    Case("no_keys_rope_rows", seqlen_kv=0, rope=RopeCase(), scale="row", causal=False),
    Case("no_queries", seqlen_q=0, scale="row"),
    Case("no_queries_rope", seqlen_q=0, rope=RopeCase()),
    Case("no_batch", batch=0, rope=RopeCase()),
)


def packed(name: str, seqlens_q: tuple[int, ...], seqlens_kv: tuple[int, ...], **rest: Any) -> Case:
    """A packed case: one batch row that holds every sequence."""
    return Case(
        name,
        batch=1,
        seqlen_q=sum(seqlens_q),
        seqlen_kv=sum(seqlens_kv),
        seqlens_q=seqlens_q,
        seqlens_kv=seqlens_kv,
        **rest,
    )


PACKED = (
    packed("packed", (17, 40, 1), (17, 40, 1)),
    packed("packed_full_gqa", (17, 40, 1), (17, 40, 1), causal=False, num_heads_q=4),
    packed("packed_empty_sequences", (0, 23, 0, 9, 0), (0, 23, 5, 9, 0)),
    packed("packed_queries_without_keys", (12, 8), (0, 20)),
    packed("packed_cross_lengths", (3, 30, 16), (40, 12, 16)),
    packed("packed_rope", (17, 40, 1), (17, 40, 5), rope=RopeCase()),
    packed("packed_window_rows", (17, 40), (30, 40), window=8, scale="row"),
    packed("packed_nothing", (0, 0), (0, 0)),
)

# Scores from 1e6 to the end of float32.
LARGE_SCORES = (
    Case("near_ties", magnitude="near_ties"),
    Case("near_ties_full_gqa", magnitude="near_ties", causal=False, num_heads_q=6),
    Case("near_ties_below", magnitude="near_ties_below", seqlen_q=65, seqlen_kv=111),
    Case("near_ties_rows", magnitude="near_ties", scale="row", kv_start=(5, 0), window=16),
    packed("near_ties_packed", (17, 40, 1), (17, 40, 5), magnitude="near_ties"),
    Case("released", magnitude="released", head_dim=128, num_heads_q=4),
    Case("released_full", magnitude="released", head_dim=128, head_dim_v=64, causal=False),
    Case("ties", magnitude="ties", head_dim=8, scale="float"),
    Case("ties_full", magnitude="ties", head_dim=8, seqlen_kv=12, causal=False, scale="row"),
    Case("sentinels", magnitude="sentinels", head_dim=8, scale="float"),
    Case("ten_thousands", magnitude="ten_thousands"),
    Case("hundred_thousands", magnitude="hundred_thousands", seqlen_kv=24, causal=False),
)
OUT_OF_FLOAT16 = ("sentinels", "hundred_thousands")

DENSE_CASES = REGULAR + HEAD_DIMS + MASKS + LAYOUTS + MAGNITUDES + SCALES + ROTATIONS + EMPTY
CASES = DENSE_CASES + PACKED
BY_NAME = {case.name: case for case in CASES + LARGE_SCORES}
assert len(BY_NAME) == len(CASES + LARGE_SCORES), "case names must be unique: they seed the tensors"
