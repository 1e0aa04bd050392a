"""attention_decode on the CPU where its parts meet: few and many queries, shared pages, no room."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import RopeCase
from decodes import PARTIAL, PLAIN, DecodeCall, DecodeCase, bits, check_decode
from torch import Tensor

import drope_kernels as dk
from drope_kernels import _C

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# --- borders of blocks, chunks, splits and head groups -------------------------------------------

BORDERS = (
    DecodeCase("nine_heads", (700, 256), 1, 1, 9, 9, 40, capacity=704, rope=PLAIN),
    DecodeCase("many_heads", (300, 255), 1, 1, 20, 10, 64, capacity=320, page_size=5, rope=PARTIAL),
    DecodeCase("one_channel", (70, 3), 2, 2, head_dim=1, head_dim_v=1, capacity=80),
    DecodeCase("two_channels", (70, 3), 2, 2, head_dim=2, capacity=80, rope=RopeCase()),
    DecodeCase("odd_channels", (65, 64, 63), 1, 1, head_dim=255, head_dim_v=17, capacity=66),
    DecodeCase("eleven_rows", (300, 20), 11, 11, 8, 1, 33, capacity=320, rope=PARTIAL),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", BORDERS, ids=lambda case: case.name)
def test_borders(isa: str, case: DecodeCase, dtype: torch.dtype) -> None:
    check_decode(case, dtype, "cpu")


@pytest.mark.parametrize("num_queries", range(2, 15))
def test_few_and_many_queries_meet(isa: str, num_queries: int) -> None:
    """Each instruction set changes kernels at a number of its own: 3, 6 or 12 queries."""
    for dtype in (torch.float32, torch.bfloat16):
        case = DecodeCase(
            "meeting", (150, 0), num_queries, num_queries, capacity=170, rope=PLAIN, scale="row"
        )
        check_decode(case, dtype, "cpu")


# --- memory that the call does not own -----------------------------------------------------------


def test_rows_may_share_pages_of_a_prefix() -> None:
    """Two rows read the same first pages, append to their own, and are as if they were apart."""
    case = DecodeCase("prefix", (19, 19), 2, 2, capacity=24, page_size=8, rope=PLAIN)
    apart = DecodeCall(case, torch.float32)
    assert apart.page_table is not None
    first, second = apart.page_table.long()
    for pages in (apart.k_cache, apart.v_cache):
        pages[second[:2]] = pages[first[:2]]
        pages[second[2], :, :3] = pages[first[2], :, :3]
    shared = DecodeCall(case, torch.float32)
    shared.k_cache, shared.v_cache = apart.k_cache.clone(), apart.v_cache.clone()
    assert shared.page_table is not None
    shared.page_table[1, :2] = shared.page_table[0, :2]
    for pages in (shared.k_cache, shared.v_cache):
        pages[second[:2]] = torch.nan  # of nobody now
    expected = apart.run("cpu")
    for name, result in shared.run("cpu").items():
        assert torch.equal(result, expected[name])


def test_nothing_beside_the_caches_is_written() -> None:
    """Both caches lie in one buffer, with rows and channels of others all around them."""
    case = DecodeCase("inside", (61, 5), 3, 3, capacity=64, rope=PLAIN, cache="rotated")
    call = DecodeCall(case, torch.bfloat16)
    expected = DecodeCall(case, torch.bfloat16)
    heads, dim = case.num_heads_kv, case.head_dim
    buffer = torch.full((4, heads + 2, 70, 2 * dim + 7), 3.0, dtype=torch.bfloat16)
    before = bits(buffer).clone()
    k_cache = buffer[1:3, 1:-1, 2:66, 1 : 1 + dim]
    v_cache = buffer[1:3, 1:-1, 4:68, 4 + dim : 4 + 2 * dim]
    for ours, theirs in ((k_cache, call.k_cache), (v_cache, call.v_cache)):
        ours.copy_(theirs)
    call.k_cache, call.v_cache = k_cache, v_cache
    want = expected.run("cpu")
    for name, result in call.run("cpu").items():
        assert torch.equal(result, want[name])
    for ours, theirs in ((k_cache, expected.k_cache), (v_cache, expected.v_cache)):
        assert torch.equal(bits(ours.contiguous()), bits(theirs))
        ours.fill_(3.0)
    assert torch.equal(bits(buffer), before)


def test_expanded_queries_are_read_as_they_are() -> None:
    case = DecodeCase("expanded", (40, 9), 1, 1, rope=PLAIN, capacity=48)
    call = DecodeCall(case, torch.float32)
    q = call.dense.q[:, :1].expand(-1, case.num_heads_q, -1, -1)
    results = [call.run("cpu", q=x) for x in (q, q.contiguous())]
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name])


# --- nothing there, or no room -------------------------------------------------------------------


def caches_without_rows(paged: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """No rows at all, or no pages under a table that names some."""
    if not paged:
        return torch.zeros(2, 2, 0, 8), torch.zeros(2, 2, 0, 24), None
    table = torch.tensor([[5, -1], [2**31 - 1, 0]], dtype=torch.int32)
    return torch.zeros(0, 2, 4, 8), torch.zeros(0, 2, 4, 24), table


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 20])
@pytest.mark.parametrize("paged", [False, True])
def test_a_cache_without_rows(paged: bool, seqlen_q: int, rope: bool) -> None:
    k_cache, v_cache, table = caches_without_rows(paged)
    out, lse = dk.attention_decode(
        torch.ones(2, 4, seqlen_q, 8),
        k_cache,
        v_cache,
        cache_seqlens=torch.zeros(2, dtype=torch.int32),
        page_table=table,
        rope=rope,
        return_lse=True,
        backend="cpu",
    )
    assert out.shape == (2, 4, seqlen_q, 24)
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()


OUT_OF_MEMORY = """
import resource, torch
from pathlib import Path
from drope_kernels import attention_decode
pages, table = 1024, torch.arange(1024).view(1, -1).int()  # 65536 keys, 32 MiB
caches = [torch.zeros(pages, 1, 64, 128) for _ in range(2)]
new = torch.ones(1, 1, 100, 128)
def decode(length):
    lengths = torch.tensor([length], dtype=torch.int32)
    attention_decode(new, *caches, k=new, v=new, cache_seqlens=lengths, page_table=table,
                     backend="cpu")
torch.set_num_threads(1)
decode(0)
for cache in caches:
    cache.zero_()
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), resource.RLIM_INFINITY))
try:
    decode(65000)
except MemoryError:
    print(sum(int(cache.count_nonzero()) for cache in caches))
"""


@pytest.mark.skipif(_C.build_info()["sanitizers"], reason="shadow memory has no address limit")
def test_memory_that_runs_out_leaves_the_caches_alone() -> None:
    command = [sys.executable, "-c", OUT_OF_MEMORY]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout == "0\n"


def test_a_forked_child_decodes() -> None:
    """The pool's threads stay with the parent."""
    case = DecodeCase("forked", (3000, 2000), num_heads_q=8, num_heads_kv=8, head_dim=64)
    call = DecodeCall(replace(case, capacity=3001), torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    expected = call.run("cpu")["out"]
    child = os.fork()
    if child == 0:  # no test runner here: only the answer leaves it
        os._exit(0 if torch.equal(call.run("cpu")["out"], expected) else 1)
    torch.set_num_threads(before)
    assert os.waitpid(child, 0)[1] == 0
