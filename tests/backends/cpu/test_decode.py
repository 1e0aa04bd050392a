"""attention_decode on the CPU: every instruction set, any number of threads, few and many queries.

The named decode calls that all backends share are in test_decode.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import oracle
import peer
import pytest
import torch
from calls import Call, make_call
from cases import Case, RopeCase
from checker import compare
from torch import Tensor

import drope_kernels as dk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARTIAL = RopeCase(dim=24, interleaved=True, attention_factor=1.2)


# --- a decode call as a case of attention --------------------------------------------------------


def decode_case(name: str, lengths: tuple[int, ...], seqlen_q: int, **changes: Any) -> Case:
    """Rows that hold `lengths` keys after the call, its queries the last `seqlen_q` of them."""
    sizes = {"num_heads_q": 4, "seqlen_kv": max(lengths) + 13, **changes}
    starts = tuple(length - seqlen_q for length in lengths)
    return Case(
        name, batch=len(lengths), seqlen_q=seqlen_q, q_start=starts, kv_end=lengths, **sizes
    )


class Caches:
    """The keys and values of a call in caches, with NaN wherever no key has been appended yet."""

    def __init__(
        self, call: Call, num_new: int, *, cache: str = "raw", page_size: int | None = None
    ) -> None:
        self.call, self.cache, self.num_new = call, cache, num_new
        ends = torch.tensor(call.case.kv_end)
        self.lengths = (ends - num_new).int()
        index = self.lengths[:, None, None, None].long() + torch.arange(num_new)[:, None]
        self.new = [x.gather(2, index.expand(*x.shape[:2], -1, x.shape[3])) for x in self.kv()]
        stored = self.kv()
        if cache == "rotated":
            stored[0] = rotated_keys(call)
        unused = torch.arange(call.case.seqlen_kv)[None, :] >= self.lengths[:, None]
        self.caches = [x.masked_fill(unused[:, None, :, None], torch.nan) for x in stored]
        self.page_table = None
        if page_size is not None:
            self.deal_pages(page_size)

    def kv(self) -> list[Tensor]:
        return [self.call.k, self.call.v]

    def deal_pages(self, page_size: int) -> None:
        """Each row's keys in pages of a shuffled order; entries that nobody needs are invalid."""
        pages_per_row = -(-self.call.case.seqlen_kv // page_size)
        batch = len(self.lengths)
        order = torch.randperm(batch * pages_per_row, generator=torch.Generator().manual_seed(1))
        table = order.reshape(batch, pages_per_row)
        for n, cache in enumerate(self.caches):
            padding = pages_per_row * page_size - cache.shape[2]
            rows = torch.nn.functional.pad(cache, (0, 0, 0, padding), value=torch.nan)
            self.caches[n] = torch.empty(0)
            pages = rows.unflatten(2, (pages_per_row, page_size)).transpose(1, 2).flatten(0, 1)
            self.caches[n] = pages[order.argsort()].contiguous()
        in_use = torch.arange(pages_per_row) * page_size < (self.lengths + self.num_new)[:, None]
        self.page_table = table.masked_fill(~in_use, -7).int()

    def decode(self) -> tuple[Tensor, Tensor]:
        options = {
            name: value
            for name, value in self.call.options.items()
            if name in ("rope", "window", "softcap", "kv_start")
        }
        if self.num_new:
            options |= {"k": self.new[0], "v": self.new[1]}
        return dk.attention_decode(
            self.call.q,
            *self.caches,
            cache_seqlens=self.lengths,
            page_table=self.page_table,
            cache=self.cache,
            scale=self.call.scale,
            return_lse=True,
            backend="cpu",
            **options,
        )


def rotated_keys(call: Call) -> Tensor:
    """k rotated at 0, 1, 2, ... in float32, rounded once."""
    case = call.case
    assert case.rope is not None
    _, positions = oracle.rotation_positions(call)
    tables = (table.float() for table in oracle.cos_sin(case, positions, case.num_heads_kv))
    return oracle.rotate(call.k.float(), *tables, case.rope.interleaved).to(call.k.dtype)


def check(call: Call, results: tuple[Tensor, Tensor]) -> None:
    """out and lse against float64, by the rule of tests/support/tolerance.py."""
    leaves = {"q": call.q, "k": call.k, "v": call.v}
    if isinstance(call.scale, Tensor):
        leaves["scale"] = call.scale
    ref, peers = oracle.attend(call, leaves), peer.attend(call, leaves)
    names = ("out", "lse")
    compare(call, *(dict(zip(names, x, strict=True)) for x in (results, ref, peers)))


# --- instruction sets ----------------------------------------------------------------------------

LONG = (700, 1, 333)
CASES: tuple[tuple[Case, dict[str, Any]], ...] = (
    (decode_case("decode_64", LONG, 1, head_dim=64), {}),
    (decode_case("decode_mha_rope", LONG, 1, num_heads_q=2, rope=RopeCase()), {}),
    (decode_case("decode_rope_80", LONG, 1, head_dim=80, rope=RopeCase()), {}),
    (decode_case("decode_rotated", LONG, 1, rope=RopeCase()), {"cache": "rotated"}),
    (decode_case("decode_partial", LONG, 3, rope=PARTIAL, head_dim=40), {}),
    (decode_case("decode_per_head", LONG, 2, rope=RopeCase("per_head")), {}),
    (decode_case("decode_7", LONG, 2, head_dim=7, num_heads_q=6), {}),
    (decode_case("decode_33_256", LONG, 1, head_dim=33, head_dim_v=256), {}),
    (decode_case("decode_256_24", LONG, 5, head_dim=256, head_dim_v=24, num_heads_q=2), {}),
    (decode_case("decode_window", (700, 5, 90), 4, window=33, rope=RopeCase()), {"page_size": 7}),
    (decode_case("decode_padded", LONG, 2, kv_start=(99, 0, 333)), {"page_size": 64}),
    (decode_case("decode_capped", LONG, 3, softcap=3.0, scale="row"), {}),
    (decode_case("decode_capped_window", LONG, 2, softcap=2.0, window=9), {}),
    (decode_case("decode_scale_rows", LONG, 3, scale="row", rope=RopeCase()), {}),
    (decode_case("decode_huge", LONG, 2, head_dim=128, magnitude="huge"), {}),
    (decode_case("decode_more_queries_than_keys", (4, 1, 40), 6), {}),
    (decode_case("decode_mqa", LONG, 1, num_heads_q=9, num_heads_kv=1), {"page_size": 1}),
    (decode_case("decode_many", LONG, 70, rope=RopeCase()), {"num_new": 1}),
    (decode_case("decode_many_rotated", LONG, 40, rope=PARTIAL), {"cache": "rotated"}),
    (decode_case("decode_many_pages", LONG, 50, scale="row", window=60), {"page_size": 16}),
    (
        decode_case("decode_many_rotated_pages", LONG, 33, rope=RopeCase()),
        {"cache": "rotated", "page_size": 5},
    ),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("case", "options"), CASES, ids=lambda x: getattr(x, "name", ""))
def test_every_isa_decodes(
    isa: str, case: Case, options: dict[str, Any], dtype: torch.dtype
) -> None:
    call = make_call(case, dtype)
    defaults = {"num_new": min(1, *case.kv_end)}
    check(call, Caches(call, **(defaults | options)).decode())


@pytest.mark.parametrize(
    ("dtype", "rope"),
    [(torch.float32, None), (torch.bfloat16, RopeCase())],
    ids=["float32-plain", "bfloat16-rope"],
)
def test_a_long_cache_is_cut_into_splits(
    isa: str, dtype: torch.dtype, rope: RopeCase | None
) -> None:
    """8192 keys and shorter rows beside them; NaN behind each."""
    call = make_call(decode_case("decode_8k", (8192, 3, 4097), 1, rope=rope), dtype)
    check(call, Caches(call, 1).decode())


# --- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("seqlen_q", [1, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_identical_bits(
    threads: None, dtype: torch.dtype, seqlen_q: int
) -> None:
    for rope in (None, RopeCase()):
        case = decode_case("decode_threads", (9000, 2100), seqlen_q, rope=rope, head_dim=64)
        call = make_call(case, dtype)
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            caches = Caches(call, 1)
            results.append((*caches.decode(), *caches.caches))
        for others in results[1:]:
            for one, other in zip(results[0], others, strict=True):
                assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("seqlen_q", [1, 30])
@pytest.mark.parametrize("cache", ["raw", "rotated"])
def test_pages_change_no_bit(seqlen_q: int, cache: str) -> None:
    case = decode_case("decode_pages", (300, 65, 64), seqlen_q, rope=RopeCase())
    call = make_call(case, torch.bfloat16)
    expected = Caches(call, 3, cache=cache).decode()
    for page_size in (1, 7, 16, 64, 256, 1000):
        results = Caches(call, 3, cache=cache, page_size=page_size).decode()
        for one, other in zip(results, expected, strict=True):
            assert torch.equal(one, other)


def test_strided_caches_change_no_bit() -> None:
    """Caches that are views: of (B, S, H, D) memory, and of one buffer for keys and values."""
    call = make_call(decode_case("decode_strides", (300, 65), 2, rope=RopeCase()), torch.float32)
    expected = Caches(call, 2).decode()
    transposed = Caches(call, 2)
    transposed.caches = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in transposed.caches]
    together = Caches(call, 2)
    buffer = torch.cat(together.caches, dim=-1)
    together.caches = list(buffer.chunk(2, dim=-1))
    for caches in (transposed, together):
        for one, other in zip(caches.decode(), expected, strict=True):
            assert torch.equal(one, other)
    assert torch.equal(together.caches[1].nan_to_num(7.0), transposed.caches[1].nan_to_num(7.0))


# --- appends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [None, 16, 100])
@pytest.mark.parametrize("cache", ["raw", "rotated"])
def test_appends_of_any_length_fill_the_cache(cache: str, page_size: int | None) -> None:
    """1 to 600 tokens at a time: each chunk sees what a single call over all of them sees."""
    rows, heads_q, heads_kv, dim = 999, 4, 2, 32
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, rows, dim, generator=generator) for n in (4, 2, 2))
    expected = dk.attention(q, k, v, rope=True, backend="cpu")
    table, shape = None, (1, heads_kv, rows, dim)
    if page_size is not None:
        table = torch.arange(-(-rows // page_size)).flip(0)[None].int()
        shape = (table.shape[1], heads_kv, page_size, dim)
    caches = [torch.full(shape, torch.nan) for _ in range(2)]
    first, outs = 0, []
    for count in (1, 600, 37, 1, 1, 15, 17, 120, 207):
        chunk = slice(first, first + count)
        outs.append(
            dk.attention_decode(
                q[:, :, chunk],
                *caches,
                k=k[:, :, chunk],
                v=v[:, :, chunk],
                cache_seqlens=torch.tensor([first], dtype=torch.int32),
                page_table=table,
                rope=True,
                cache=cache,
                backend="cpu",
            )
        )
        first += count
    assert first == rows
    assert heads_q == q.shape[1]
    torch.testing.assert_close(torch.cat(outs, dim=2), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"batch": 0}, {"seqlen_q": 0}])
def test_nothing_to_attend(changes: dict[str, int]) -> None:
    sizes = {"batch": 2, "seqlen_q": 1} | changes
    batch, heads, seqlen_q = sizes["batch"], 2, sizes["seqlen_q"]
    k_cache, v_cache = torch.zeros(2, batch, heads, 9, 8)
    new = torch.ones(batch, heads, 2, 8)
    out, lse = dk.attention_decode(
        torch.ones(batch, heads, seqlen_q, 8),
        k_cache,
        v_cache,
        k=new,
        v=new,
        cache_seqlens=torch.full((batch,), 3, dtype=torch.int32),
        return_lse=True,
        backend="cpu",
    )
    assert out.shape == (batch, heads, seqlen_q, 8)
    assert lse.shape == (batch, heads, seqlen_q)
    assert k_cache[:, :, 3:5].eq(1).all()
    assert k_cache.sum() == new.sum()


def test_a_new_key_that_is_not_finite_stays_in_its_row() -> None:
    call = make_call(decode_case("decode_infinite", (70, 40), 1), torch.float32)
    caches = Caches(call, 1)
    expected = Caches(call, 1).decode()
    caches.new[1][0] = torch.inf
    out, _ = caches.decode()
    assert torch.equal(out[1], expected[0][1])
    assert out[0].eq(torch.inf).all()


# --- callers and memory --------------------------------------------------------------------------


def test_concurrent_callers_do_not_disturb_each_other(threads: None) -> None:
    torch.set_num_threads(2)
    cases = [
        decode_case(f"decode_caller_{length}", (length, 77), 1, rope=RopeCase())
        for length in (9000, 3000, 5000, 8000)
    ]
    calls = [make_call(case, torch.float32) for case in cases]
    expected = [Caches(call, 1).decode() for call in calls]
    with ThreadPoolExecutor(4) as callers:
        for _ in range(3):
            results = list(callers.map(lambda call: Caches(call, 1).decode(), calls))
            for result, reference in zip(results, expected, strict=True):
                assert all(torch.equal(*pair) for pair in zip(result, reference, strict=True))


MEASURE_MEMORY = """
import resource, numpy, torch
from drope_kernels import attention_decode
torch.set_num_threads(2)
def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def decode(rows, seqlen_q, paged):
    shape = (rows // 64, 1, 64, 128) if paged else (1, 1, rows, 128)
    # NumPy's zeros, unlike torch's, stay with the system until they are written.
    caches = [torch.from_numpy(numpy.zeros(shape, numpy.float32)) for _ in range(2)]
    table = torch.arange(rows // 64).view(1, -1).int() if paged else None
    new = torch.ones(1, 1, seqlen_q, 128)
    attention_decode(new, *caches, k=new, v=new, page_table=table, rope=True, backend="cpu",
                     cache_seqlens=torch.tensor([1000], dtype=torch.int32))
calls = [(seqlen_q, paged) for seqlen_q in (1, 100) for paged in (False, True)]
for call in calls:
    decode(2048, *call)
before = peak_mib()
for call in calls:
    decode(2**20, *call)  # caches of 512 MiB each
print(peak_mib() - before)
"""


def test_memory_follows_the_rows_in_use_not_the_capacity() -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert float(result.stdout) < 24


def test_expanded_scale_and_lengths_of_other_strides() -> None:
    """Arguments that are views reach the kernel as what they mean."""
    case = decode_case("decode_views", (90, 60), 2)
    call = replace(make_call(case, torch.float32), scale=torch.tensor(0.3).expand(2, 4, 2))
    caches = Caches(call, 2)
    expected = caches.decode()
    again = Caches(call, 2)
    again.lengths = torch.stack([again.lengths, again.lengths + 1], dim=1)[:, 0]
    assert not again.lengths.is_contiguous()
    for one, other in zip(again.decode(), expected, strict=True):
        assert torch.equal(one, other)
