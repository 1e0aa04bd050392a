"""attention_varlen, attention_decode and merge_attention against plain `attention` calls."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from checker import BACKENDS
from torch import Tensor

import drope_kernels as dk

on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
HQ, HKV, D = 4, 2, 16


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# --- packed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", [False, True])
@on_every_backend
def test_packed_equals_batched(backend: str, rope: bool) -> None:
    """Sequences of one length are a batch."""
    batch, rows = 3, 20
    q, k, v = (
        normal(batch, rows, HQ, D),
        normal(batch, rows, HKV, D, seed=1),
        normal(batch, rows, HKV, D, seed=2),
    )
    ends = torch.arange(0, batch * rows + 1, rows, dtype=torch.int32)
    options: dict[str, Any] = {"rope": rope, "window": 7, "return_lse": True, "backend": backend}
    out, lse = dk.attention_varlen(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), ends, ends, **options
    )
    expected, expected_lse = dk.attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)
    torch.testing.assert_close(out.unflatten(0, (batch, rows)).transpose(1, 2), expected)
    torch.testing.assert_close(lse.unflatten(1, (batch, rows)).transpose(0, 1), expected_lse)


@on_every_backend
def test_packed_sequences_do_not_see_each_other(backend: str) -> None:
    ends = ints(0, 9, 9, 30)
    q, k, v = normal(30, HQ, D), normal(30, HKV, D, seed=1), normal(30, HKV, D, seed=2)
    options: dict[str, Any] = {"causal": False, "rope": True, "backend": backend}
    before = dk.attention_varlen(q, k, v, ends, ends, **options)
    k[:9], v[:9] = 100.0, float("inf")
    after = dk.attention_varlen(q, k, v, ends, ends, **options)
    assert torch.equal(before[9:], after[9:])
    assert not torch.equal(before[:9], after[:9])


@on_every_backend
def test_packed_positions_default_to_each_sequences_own(backend: str) -> None:
    ends_q, ends_k = ints(0, 4, 11), ints(0, 10, 17)
    q, k, v = normal(11, HQ, D), normal(17, HKV, D, seed=1), normal(17, HKV, D, seed=2)
    call = (q, k, v, ends_q, ends_k)
    positions = torch.tensor([*range(6, 10), *range(7)])  # the last query sits at the last key
    kv_positions = torch.tensor([*range(10), *range(7)])
    default = dk.attention_varlen(*call, rope=True, backend=backend)
    given = dk.attention_varlen(
        *call, rope=True, positions=positions, kv_positions=kv_positions, backend=backend
    )
    torch.testing.assert_close(default, given)
    shifted = dk.attention_varlen(
        *call, rope=True, positions=positions + 1, kv_positions=kv_positions, backend=backend
    )
    assert not torch.allclose(default, shifted, atol=1e-3)


# --- decode --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decode:
    """One attention_decode call: what is appended to caches of which fill and shape."""

    name: str
    lengths: tuple[int, ...] = (5, 0, 17)
    num_new: int = 1
    num_queries: int = 1
    capacity: int = 24
    page_size: int | None = None
    rope: bool | dk.Rope = False
    cache: str = "raw"
    window: int | None = None
    softcap: float | None = None
    kv_start: tuple[int, ...] | None = None
    row_scale: bool = False


PARTIAL = dk.Rope(dim=8, interleaved=True, attention_factor=1.2)
DECODES = (
    Decode("one_token"),
    Decode("one_token_rope", rope=True),
    Decode("one_token_rotated", rope=True, cache="rotated"),
    Decode("chunk", num_new=4, num_queries=4),
    Decode("chunk_rope", num_new=4, num_queries=4, rope=True),
    Decode("chunk_rotated_partial", num_new=4, num_queries=4, rope=PARTIAL, cache="rotated"),
    Decode("chunk_fills_the_cache", num_new=7, num_queries=7, rope=True),
    Decode("more_keys_than_queries", num_new=5, num_queries=2, rope=PARTIAL),
    Decode("more_queries_than_keys", num_new=1, num_queries=3),
    Decode("nothing_appended", num_new=0, rope=True),
    Decode("window_softcap", num_new=2, num_queries=2, window=4, softcap=3.0),
    Decode("left_padded", lengths=(5, 9, 17), kv_start=(0, 6, 17), rope=True),
    Decode("scale_per_row", num_new=2, num_queries=2, row_scale=True),
    Decode("pages", page_size=8, rope=True),
    Decode("pages_chunk", page_size=4, num_new=6, num_queries=6),
    Decode("pages_rotated", page_size=4, num_new=3, num_queries=3, rope=True, cache="rotated"),
    Decode("pages_of_one", page_size=1, num_new=2, num_queries=2, window=6),
)


class Setup:
    """Caches filled to `lengths` with NaN beyond, and the same keys as plain tensors per row."""

    def __init__(self, case: Decode, dtype: torch.dtype = torch.float32) -> None:
        self.case, batch = case, len(case.lengths)

        def heads(num_heads: int, rows: int, seed: int) -> Tensor:
            return normal(batch, num_heads, rows, D, seed=seed).to(dtype)

        self.q = heads(HQ, case.num_queries, 3)
        self.k, self.v = heads(HKV, case.num_new, 4), heads(HKV, case.num_new, 5)
        self.history = [heads(HKV, case.capacity, seed) for seed in (6, 7)]
        self.lengths = ints(*case.lengths)
        stored = [self.history[0], self.history[1]]
        if case.cache == "rotated" and case.rope:
            stored[0] = rotated(self.history[0], case.rope)
        unused = torch.arange(case.capacity)[None, :] >= self.lengths[:, None]
        self.dense = [x.masked_fill(unused[:, None, :, None], torch.nan) for x in stored]
        self.page_table = None
        if case.page_size is not None:
            self.page_table = self.deal_pages(batch, case.capacity // case.page_size)

    def deal_pages(self, batch: int, pages_per_row: int) -> Tensor:
        """Moves each row's keys into pages in a shuffled order, with some pages left over."""
        order = torch.randperm(
            batch * pages_per_row + 3, generator=torch.Generator().manual_seed(1)
        )
        table = order[: batch * pages_per_row].reshape(batch, pages_per_row)
        for n, cache in enumerate(self.dense):
            pages = cache.new_full((len(order), HKV, self.case.page_size, D), torch.nan)
            pages[table] = cache.unflatten(2, (pages_per_row, -1)).transpose(1, 2)
            self.dense[n] = pages
        return table.int()

    def options(self) -> dict[str, Any]:
        case = self.case
        options: dict[str, Any] = {"rope": case.rope, "return_lse": True}
        options |= {"window": case.window, "softcap": case.softcap}
        if case.row_scale:
            options["scale"] = normal(*self.q.shape[:3], seed=8).abs() + 0.1
        return options

    def decode(self, backend: str) -> tuple[Tensor, Tensor]:
        new = {"k": self.k, "v": self.v} if self.case.num_new else {}
        options = self.options() | new
        if self.case.kv_start is not None:
            options["kv_start"] = ints(*self.case.kv_start)
        return dk.attention_decode(
            self.q,
            *self.dense,
            cache_seqlens=self.lengths,
            page_table=self.page_table,
            cache=self.case.cache,
            backend=backend,
            **options,
        )

    def expected(self) -> tuple[Tensor, Tensor]:
        """`attention` of each row alone over its history and its new keys."""
        rows = [self.expected_row(row) for row in range(len(self.case.lengths))]
        return torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])

    def expected_row(self, row: int) -> tuple[Tensor, Tensor]:
        one, length = slice(row, row + 1), self.case.lengths[row]
        k = torch.cat([self.history[0][one, :, :length], self.k[one]], dim=2)
        v = torch.cat([self.history[1][one, :, :length], self.v[one]], dim=2)
        options = self.options()
        if self.case.kv_start is not None:
            options["kv_start"] = ints(self.case.kv_start[row])
        if "scale" in options:
            options["scale"] = options["scale"][one]
        return dk.attention(self.q[one], k, v, backend="reference", **options)

    def plain(self) -> list[Tensor]:
        """The caches as (B, Hkv, capacity, D), whatever holds them."""
        if self.page_table is None:
            return [cache.clone() for cache in self.dense]
        return [c[self.page_table.long()].transpose(1, 2).flatten(2, 3) for c in self.dense]


def rotated(x: Tensor, rope: bool | dk.Rope) -> Tensor:
    """x (B, H, S, D) rotated at 0, 1, 2, ...; half-split or interleaved pairs."""
    rope = dk.Rope() if rope is True else rope
    assert isinstance(rope, dk.Rope)
    dim = rope.dim or D
    angle = torch.arange(x.shape[2])[:, None] * rope.theta ** -(torch.arange(0, dim, 2) / dim)
    cos, sin = (rope.attention_factor * table(angle) for table in (torch.cos, torch.sin))
    turning, still = x[..., :dim], x[..., dim:]
    pairs = turning.unflatten(-1, (-1, 2) if rope.interleaved else (2, -1))
    if not rope.interleaved:
        pairs = pairs.transpose(-1, -2)
    x1, x2 = pairs.unbind(-1)
    turned = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    if not rope.interleaved:
        turned = turned.transpose(-1, -2)
    return torch.cat([turned.flatten(-2), still], dim=-1).to(x.dtype)


@pytest.mark.parametrize("case", DECODES, ids=lambda case: case.name)
@on_every_backend
def test_decode_is_attention_over_the_history(backend: str, case: Decode) -> None:
    setup = Setup(case)
    before, lengths = setup.plain(), setup.lengths.clone()
    out, lse = setup.decode(backend)
    expected, expected_lse = setup.expected()
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=2e-6, rtol=1e-5)
    assert torch.equal(setup.lengths, lengths), "cache_seqlens is the caller's"
    check_only_new_rows_changed(setup, before)


def check_only_new_rows_changed(setup: Setup, before: list[Tensor]) -> None:
    case = setup.case
    index = torch.arange(case.capacity)[None, :]
    new = (index >= setup.lengths[:, None]) & (index < setup.lengths[:, None] + case.num_new)
    for was, now, given in zip(before, setup.plain(), (setup.k, setup.v), strict=True):
        old = ~new[:, None, :, None].expand_as(was)
        assert torch.equal(was[old].nan_to_num(7.0), now[old].nan_to_num(7.0))
        written = (
            now.transpose(1, 2)[new].unflatten(0, (-1, case.num_new)) if case.num_new else None
        )
        if written is not None and (given is setup.v or case.cache == "raw" or not case.rope):
            assert torch.equal(written, given.transpose(1, 2))
    if setup.page_table is not None:
        spare = torch.ones(setup.dense[0].shape[0], dtype=torch.bool)
        spare[setup.page_table.flatten().long()] = False
        assert setup.dense[0][spare].isnan().all()


@pytest.mark.parametrize("cache", ["raw", "rotated"])
@on_every_backend
def test_token_by_token_equals_the_whole_prompt(backend: str, cache: str) -> None:
    batch, rows = 2, 12
    q = normal(batch, HQ, rows, D)
    k, v = normal(batch, HKV, rows, D, seed=1), normal(batch, HKV, rows, D, seed=2)
    caches = [torch.zeros(batch, HKV, rows, D) for _ in range(2)]
    outs = []
    for row in range(rows):
        at = slice(row, row + 1)
        outs.append(
            dk.attention_decode(
                q[:, :, at],
                *caches,
                k=k[:, :, at],
                v=v[:, :, at],
                cache_seqlens=torch.full((batch,), row, dtype=torch.int32),
                rope=True,
                cache=cache,
                backend=backend,
            )
        )
    expected = dk.attention(q, k, v, rope=True, backend="reference")
    torch.testing.assert_close(torch.cat(outs, dim=2), expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(caches[1], v)
    assert torch.equal(caches[0], k) == (cache == "raw")


# --- merge ---------------------------------------------------------------------------------------

SPLITS = ((0, 10, 10, 31, 40), (0, 40), (0, 0, 40, 40))


@pytest.mark.parametrize("bounds", SPLITS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_joins_disjoint_keys(bounds: tuple[int, ...], dtype: torch.dtype) -> None:
    """Parts over ranges of the keys, some empty, some with rows that see nothing, are the whole."""
    q = normal(2, HQ, 20, D, dtype=dtype).requires_grad_()
    k = normal(2, HKV, 40, D, seed=1, dtype=dtype).requires_grad_()
    v = normal(2, HKV, 40, D, seed=2, dtype=dtype).requires_grad_()
    options: dict[str, Any] = {"window": 9, "return_lse": True, "backend": "reference"}
    parts = [
        dk.attention(q, k, v, kv_start=ints(low, low), kv_end=ints(high, high), **options)
        for low, high in pairwise(bounds)
    ]
    out, lse = dk.merge_attention(*zip(*parts, strict=True))
    whole, whole_lse = dk.attention(q, k, v, **options)
    assert out.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    seeds = normal(*out.shape, seed=3, dtype=dtype), normal(*lse.shape, seed=4, dtype=lse.dtype)
    ours = torch.autograd.grad((out, lse), (q, k, v), seeds)
    expected = torch.autograd.grad((whole, whole_lse), (q, k, v), seeds)
    for got, want in zip((out, lse, *ours), (whole, whole_lse, *expected), strict=True):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_merge_of_empty_parts_is_empty() -> None:
    outs = [torch.zeros(1, 2, 3, 4, requires_grad=True) for _ in range(2)]
    lses = [torch.full((1, 2, 3), -torch.inf).requires_grad_() for _ in range(2)]
    out, lse = dk.merge_attention(outs, lses)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    grads = torch.autograd.grad(out.sum(), [*outs, *lses])
    assert all((grad == 0).all() for grad in grads)


def test_merge_gradients_are_derivatives() -> None:
    outs = [normal(1, 2, 3, 2, seed=n, dtype=torch.float64).requires_grad_() for n in range(3)]
    lses = [normal(1, 2, 3, seed=9 + n, dtype=torch.float64).requires_grad_() for n in range(3)]

    def merged(*parts: Tensor) -> tuple[Tensor, Tensor]:
        return dk.merge_attention(list(parts[:3]), list(parts[3:]))

    assert torch.autograd.gradcheck(merged, (*outs, *lses))
