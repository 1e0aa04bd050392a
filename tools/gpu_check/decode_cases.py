"""attention_decode on the device, held to the same yardstick as the named cases.

A decode call is a dense call with one key range and one query start a row; the caches hold NaN
wherever a row has no key yet.
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
from oracle import cos_sin, rotate
from tolerance import check_tensor
from torch import Tensor

import drope_kernels as dk

from .accelerator import StandIn
from .device_calls import moved, run_in


@dataclass(frozen=True)
class DecodeCase:
    """lengths: keys of each row before num_new are appended; the queries are the last tokens."""

    name: str
    lengths: tuple[int, ...]
    num_new: int = 1
    num_queries: int = 1
    num_heads_q: int = 8
    num_heads_kv: int = 2
    head_dim: int = 128
    page_size: int | None = None
    rope: RopeCase | None = None
    cache: str = "raw"
    window: int | None = None
    scale: str = "default"
    spare: int = 70  # keys that a cache could still take

    @property
    def capacity(self) -> int:
        most = max(self.lengths) + self.num_new + self.spare
        page = self.page_size or 1
        return -(-most // page) * page

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
            window=self.window,
            rope=self.rope,
            scale=self.scale,
            q_start=tuple(end - self.num_queries for end in ends),
            kv_end=ends,
            lse_grad=False,
        )


PLAIN = RopeCase()
PAIRS = RopeCase(dim=32, interleaved=True, attention_factor=1.2)
CASES = (
    DecodeCase("decode", (1000, 0, 4097, 63)),
    DecodeCase("decode_mha", (777, 4096), num_heads_kv=8, head_dim=64),
    DecodeCase("decode_mqa_256", (300, 2049), num_heads_kv=1, head_dim=256),
    DecodeCase("decode_long_row", (70_000,), num_heads_q=4, num_heads_kv=1),
    DecodeCase("decode_rope", (1000, 1, 4097), rope=PLAIN),
    DecodeCase("decode_rotated", (1000, 1, 4097), rope=PLAIN, cache="rotated"),
    DecodeCase("decode_pairs", (130, 517), num_new=3, num_queries=3, rope=PAIRS),
    DecodeCase("decode_chunk", (511, 64), num_new=16, num_queries=16, head_dim=64),
    DecodeCase("decode_window", (3000, 40), window=256),
    DecodeCase("decode_rows", (200, 300), num_new=2, num_queries=2, scale="row"),
    DecodeCase("decode_nothing_new", (128, 1), num_new=0),
    DecodeCase("decode_pages", (1000, 0, 4097, 63), page_size=16, rope=PLAIN),
    DecodeCase("decode_pages_64", (640, 4095), page_size=64, num_new=5, num_queries=5),
    DecodeCase("decode_pages_rotated", (99, 700), page_size=16, rope=PAIRS, cache="rotated"),
)
BY_NAME = {case.name: case for case in CASES}


@cache
def expectation(name: str, dtype: torch.dtype) -> tuple[Call, dict[str, Tensor], dict[str, Tensor]]:
    """The dense call, its float64 results and the same-precision peer's: out and lse."""
    call = make_call(BY_NAME[name].dense(), dtype)
    exact, like = call.to(torch.float64), call
    with torch.no_grad():
        ref = exact.outputs(exact.leaves(), "reference")
        peers = peer.attend(like, like.leaves())
    return call, *(dict(zip(("out", "lse"), pair, strict=True)) for pair in (ref, peers))


def stored_keys(case: DecodeCase, call: Call) -> Tensor:
    """What the cache holds of k: as it is, or rotated in float64 and rounded once."""
    if case.cache == "raw" or case.rope is None:
        return call.k
    where = oracle.rotation_positions(call)[1]
    tables = cos_sin(call.case, where, case.num_heads_kv)
    return rotate(call.k.double(), *tables, case.rope.interleaved).to(call.k.dtype)


def in_pages(case: DecodeCase, caches: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    """The caches dealt into shuffled pages with spare ones between them, and the page table."""
    if case.page_size is None:
        return caches, None
    batch, pages = len(case.lengths), case.capacity // case.page_size
    order = torch.randperm(batch * pages + 3, generator=torch.Generator().manual_seed(1))
    table = order[: batch * pages].view(batch, pages)
    paged = []
    for dense in caches:
        shape = (len(order), dense.shape[1], case.page_size, dense.shape[3])
        pool = dense.new_full(shape, torch.nan)
        pool[table] = dense.unflatten(2, (pages, case.page_size)).transpose(1, 2)
        paged.append(pool)
    return paged, table.int()


def arguments(case: DecodeCase, call: Call) -> dict[str, Any]:
    """Keyword arguments of attention_decode for the dense call's numbers."""
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    index = torch.arange(case.capacity)
    kept = (index < lengths[:, None])[:, None, :, None]
    caches = [x.masked_fill(~kept, torch.nan) for x in (stored_keys(case, call), call.v)]
    (k_cache, v_cache), table = in_pages(case, caches)
    found: dict[str, Any] = {"q": call.q, "k_cache": k_cache, "v_cache": v_cache}
    if case.num_new:
        fresh = (lengths[:, None] + torch.arange(case.num_new))[:, None, :, None].long()
        for name, dense in (("k", call.k), ("v", call.v)):
            at = fresh.expand(-1, dense.shape[1], -1, dense.shape[3])
            found[name] = dense.gather(2, at)
    found |= {"cache_seqlens": lengths, "page_table": table, "cache": case.cache}
    found |= {"rope": call.options.get("rope", False), "window": case.window, "scale": call.scale}
    return found


def check(backend: str, dtype: torch.dtype, mode: str, name: str, where: StandIn) -> dict[str, Any]:
    """{} when out and lse pass; MismatchError when they do not."""
    case = BY_NAME[name]
    call, ref, peers = expectation(name, dtype)
    there = {key: moved(value, where.device) for key, value in arguments(case, call).items()}

    def decode() -> dict[str, Tensor]:
        with torch.no_grad():
            out, lse = dk.attention_decode(**there, return_lse=True, backend=backend)
        return {"out": out, "lse": lse}

    ours = run_in(mode, where, decode)
    for key, unit in (("out", 0.0), ("lse", 10.0)):
        check_tensor(key, ours[key], peers[key], ref[key], unit=unit)
    return {}
