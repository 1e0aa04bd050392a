"""attention_decode by name: its calls, and one check of results and caches for every backend.

A decode call is a dense call with one key range and one query start a row, so the oracle and the
peer of the named cases say what comes out. The caches hold NaN wherever a row has no key yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import oracle
import peer
import torch
from calls import Call, make_call
from cases import Case, RopeCase
from checker import lse_unit
from tolerance import check_tensor
from torch import Tensor

import drope_kernels as dk

SPARE_PAGES = 3


@dataclass(frozen=True)
class DecodeCase:
    """lengths: keys of each row before num_new are appended; the queries are the last tokens."""

    name: str
    lengths: tuple[int, ...] = (5, 0, 17)
    num_new: int = 1
    num_queries: int = 1
    num_heads_q: int = 4
    num_heads_kv: int = 2
    head_dim: int = 16
    head_dim_v: int | None = None  # None: head_dim
    capacity: int = 24  # keys that a row can hold; a multiple of page_size
    page_size: int | None = None
    rope: RopeCase | None = None
    cache: str = "raw"
    window: int | None = None
    softcap: float | None = None
    kv_start: tuple[int, ...] | None = None
    scale: str = "default"
    magnitude: str = "normal"

    def dense(self) -> Case:
        """The same numbers as one `attention` call."""
        ends = tuple(length + self.num_new for length in self.lengths)
        return Case(
            self.name,
            batch=len(ends),
            num_heads_q=self.num_heads_q,
            num_heads_kv=self.num_heads_kv,
            seqlen_q=self.num_queries,
            seqlen_kv=self.capacity,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v,
            window=self.window,
            softcap=self.softcap,
            rope=self.rope,
            scale=self.scale,
            magnitude=self.magnitude,
            q_start=tuple(end - self.num_queries for end in ends),
            kv_start=self.kv_start,
            kv_end=ends,
            lse_grad=False,
        )


PLAIN = RopeCase()
PARTIAL = RopeCase(dim=8, interleaved=True, attention_factor=1.2)
PER_HEAD = RopeCase("per_head")
DECODES = (
    DecodeCase("one_token"),
    DecodeCase("one_token_rope", rope=PLAIN),
    DecodeCase("one_token_rotated", rope=PLAIN, cache="rotated"),
    DecodeCase("chunk", num_new=4, num_queries=4),
    DecodeCase("chunk_rope", num_new=4, num_queries=4, rope=PLAIN),
    DecodeCase("chunk_rotated_partial", num_new=4, num_queries=4, rope=PARTIAL, cache="rotated"),
    DecodeCase("chunk_fills_the_cache", num_new=7, num_queries=7, rope=PER_HEAD),
    DecodeCase("more_keys_than_queries", num_new=5, num_queries=2, rope=PARTIAL),
    DecodeCase("more_queries_than_keys", num_new=1, num_queries=3),
    DecodeCase("nothing_appended", num_new=0, rope=PLAIN),
    DecodeCase("window", num_new=2, num_queries=2, window=4),
    DecodeCase("softcap", num_new=2, num_queries=2, softcap=3.0, rope=PLAIN),
    DecodeCase("left_padded", kv_start=(0, 0, 17), lengths=(5, 9, 17), rope=PLAIN),
    DecodeCase("row_without_keys", kv_start=(6, 2, 19), num_new=2, num_queries=2),
    DecodeCase("scale_per_row", num_new=2, num_queries=2, scale="row", rope=PLAIN),
    DecodeCase("scale_per_head", num_new=2, num_queries=2, scale="head"),
    DecodeCase("pages", page_size=8, rope=PLAIN),
    DecodeCase("pages_chunk", page_size=4, num_new=6, num_queries=6),
    DecodeCase("pages_of_three", page_size=3, num_new=7, num_queries=7, rope=PER_HEAD),
    DecodeCase("pages_rotated", page_size=4, num_new=3, num_queries=3, rope=PLAIN, cache="rotated"),
    DecodeCase("pages_of_one", page_size=1, num_new=2, num_queries=2, window=6),
)
LONGER = (
    DecodeCase(
        "long_rows", (700, 233), num_heads_q=8, head_dim=64, capacity=720, rope=PLAIN, scale="row"
    ),
    DecodeCase(
        "long_rows_of_one_head",
        (300, 1),
        num_heads_q=16,
        num_heads_kv=1,
        head_dim=128,
        capacity=301,
    ),
    DecodeCase("long_rows_80", (130, 64), num_heads_kv=4, head_dim=80, capacity=140, rope=PARTIAL),
    DecodeCase("long_rows_256", (290, 3), head_dim=256, capacity=300, rope=PLAIN),
    DecodeCase("narrow_values", (90, 31), head_dim=64, head_dim_v=24, capacity=96),
    DecodeCase(
        "long_rows_in_pages", (300, 555), head_dim=64, capacity=640, page_size=64, rope=PLAIN
    ),
    DecodeCase(
        "window_in_pages",
        (300, 555, 40),
        num_new=3,
        num_queries=3,
        capacity=560,
        page_size=16,
        window=100,
    ),
    DecodeCase("prompt_70", (0, 37), 70, 70, capacity=112, page_size=16, rope=PLAIN),
    DecodeCase("prompt_256", (0, 37), 256, 256, capacity=320, page_size=64, rope=PLAIN),
    DecodeCase("prompt_256_rotated", (0, 37), 256, 256, capacity=300, rope=PLAIN, cache="rotated"),
)
LARGE_SCORES = (
    DecodeCase("near_ties", magnitude="near_ties"),
    DecodeCase("near_ties_chunk", num_new=4, num_queries=4, magnitude="near_ties_below"),
    DecodeCase(
        "near_ties_long_rows",
        (700, 233),
        num_heads_q=8,
        head_dim=32,
        capacity=720,
        magnitude="near_ties",
        scale="row",
    ),
    DecodeCase(
        "released_in_pages",
        (300, 555),
        head_dim=128,
        capacity=640,
        page_size=64,
        magnitude="released",
    ),
    DecodeCase("ties_long_rows", (700, 3), head_dim=8, capacity=720, magnitude="ties"),
    DecodeCase("sentinels", (40, 3), head_dim=8, capacity=48, magnitude="sentinels"),
    DecodeCase("hundred_thousands", (5, 24), capacity=40, magnitude="hundred_thousands"),
)
PROMPTS = (
    DecodeCase("prompt_1000", (0, 531), 1000, 1000, 2, 1, capacity=1600, page_size=16, rope=PLAIN),
    DecodeCase("prompt_4096", (100,), 4096, 4096, 1, 1, capacity=4200, rope=PLAIN),
    DecodeCase("prompt_4096_in_pages", (60,), 4096, 4096, 1, 1, capacity=4224, page_size=64),
)


class DecodeCall:
    """A case made real: `arguments` are those of attention_decode."""

    def __init__(self, case: DecodeCase, dtype: torch.dtype) -> None:
        self.case = case
        self.dense = make_call(case.dense(), dtype)
        self.lengths = torch.tensor(case.lengths, dtype=torch.int32)
        kept = (torch.arange(case.capacity) < self.lengths[:, None])[:, None, :, None]
        stored = (stored_keys(case, self.dense), self.dense.v)
        caches = [x.masked_fill(~kept, torch.nan) for x in stored]
        self.page_table = None
        if case.page_size is not None:
            caches, self.page_table = in_pages(case, caches)
        self.k_cache, self.v_cache = caches
        self.new = self.new_rows()

    def new_rows(self) -> dict[str, Tensor]:
        """k and v to append, of the dense call's numbers."""
        if self.case.num_new == 0:
            return {}
        rows = (self.lengths[:, None] + torch.arange(self.case.num_new))[:, None, :, None].long()
        pairs = {"k": self.dense.k, "v": self.dense.v}
        return {
            name: x.gather(2, rows.expand(-1, x.shape[1], -1, x.shape[3]))
            for name, x in pairs.items()
        }

    def arguments(self) -> dict[str, Any]:
        options = self.dense.options
        return self.new | {
            "q": self.dense.q,
            "k_cache": self.k_cache,
            "v_cache": self.v_cache,
            "cache_seqlens": self.lengths,
            "page_table": self.page_table,
            "cache": self.case.cache,
            "rope": options.get("rope", False),
            "kv_start": options.get("kv_start"),
            "window": self.case.window,
            "softcap": self.case.softcap,
            "scale": self.dense.scale,
        }

    def run(self, backend: str, **changes: Any) -> dict[str, Tensor]:
        given = {**self.arguments(), **changes}
        out, lse = dk.attention_decode(**given, return_lse=True, backend=backend)
        return {"out": out, "lse": lse}

    def plain_caches(self) -> list[Tensor]:
        """Copies of the caches as (B, Hkv, capacity, D), whatever holds them."""
        caches = (self.k_cache, self.v_cache)
        if self.page_table is None:
            return [one.clone() for one in caches]
        return [one[self.page_table.long()].transpose(1, 2).flatten(2, 3) for one in caches]


def stored_keys(case: DecodeCase, call: Call) -> Tensor:
    """What a full cache holds of k: as it is, or rotated in float64 and rounded once."""
    if case.cache == "raw" or case.rope is None:
        return call.k
    where = oracle.rotation_positions(call)[1]
    tables = oracle.cos_sin(call.case, where, case.num_heads_kv)
    return oracle.rotate(call.k.double(), *tables, case.rope.interleaved).to(call.k.dtype)


def in_pages(case: DecodeCase, caches: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The caches dealt into shuffled pages with spare ones between them, and the page table."""
    assert case.page_size is not None
    batch, pages = len(case.lengths), case.capacity // case.page_size
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(batch * pages + SPARE_PAGES, generator=generator)
    table = order[: batch * pages].view(batch, pages)
    paged = []
    for dense in caches:
        shape = (len(order), dense.shape[1], case.page_size, dense.shape[3])
        pool = dense.new_full(shape, torch.nan)
        pool[table] = dense.unflatten(2, (pages, case.page_size)).transpose(1, 2)
        paged.append(pool)
    return paged, table.int()


@cache
def expectation(case: DecodeCase, dtype: torch.dtype) -> tuple[dict[str, Tensor], ...]:
    """out and lse: the oracle's in float64 and the same-precision peer's."""
    call = make_call(case.dense(), dtype)
    with torch.no_grad():
        pairs = [attend(call, call.leaves()) for attend in (oracle.attend, peer.attend)]
    return tuple(dict(zip(("out", "lse"), pair, strict=True)) for pair in pairs)


def check_decode(case: DecodeCase, dtype: torch.dtype, backend: str) -> None:
    """Raises AssertionError if results are further off than allowed, or the caches are wrong."""
    call = DecodeCall(case, dtype)
    before, lengths = call.plain_caches(), call.lengths.clone()
    ours = call.run(backend)
    check_results(call, ours)
    assert torch.equal(call.lengths, lengths), "cache_seqlens is the caller's"
    check_caches(call, before)


def check_results(call: DecodeCall, ours: dict[str, Tensor]) -> None:
    exact, like = expectation(call.case, call.dense.q.dtype)
    for name, unit in (("out", 0.0), ("lse", lse_unit(call.dense))):
        check_tensor(name, ours[name], like[name], exact[name], unit=unit)


def check_caches(call: DecodeCall, before: list[Tensor]) -> None:
    """The new rows are there, rotated in a rotated cache, and nothing else was written."""
    case = call.case
    index = torch.arange(case.capacity)
    is_new = (index >= call.lengths[:, None]) & (index < call.lengths[:, None] + case.num_new)
    full = (stored_keys(case, call.dense), call.dense.v)
    for name, was, now, stored in zip("kv", before, call.plain_caches(), full, strict=True):
        old = ~is_new[:, None, :, None].expand_as(was)
        assert torch.equal(bits(was)[old], bits(now)[old]), f"{name}_cache: old rows changed"
        if name == "k" and case.cache == "rotated":
            eps = torch.finfo(now.dtype).eps
            torch.testing.assert_close(now[~old], stored[~old], rtol=eps, atol=eps + 1e-6)
        else:
            assert torch.equal(now[~old], stored[~old]), f"{name}_cache: new rows"
    if call.page_table is not None:
        spare = torch.ones(call.k_cache.shape[0], dtype=torch.bool)
        spare[call.page_table.flatten().long()] = False
        assert call.k_cache[spare].isnan().all(), "k_cache: pages of nobody changed"
        assert call.v_cache[spare].isnan().all(), "v_cache: pages of nobody changed"


def bits(x: Tensor) -> Tensor:
    """Comparable where x is NaN."""
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])
