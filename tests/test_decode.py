"""attention_decode: every backend on the same calls, the CUDA kernels emulated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from checker import BACKENDS, EMULATED, INTERPRETED, REFUSAL
from decodes import (
    DECODES,
    LONGER,
    PLAIN,
    PROMPTS,
    DecodeCall,
    DecodeCase,
    bits,
    check_caches,
    check_decode,
    check_results,
)
from torch import Tensor

from drope_kernels.call import decode_op

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
EVERYWHERE = (*BACKENDS, *EMULATED)
ON_DEVICES = (INTERPRETED, *EMULATED)  # which never read values on the host
BY_NAME = {case.name: case for case in (*DECODES, *LONGER, *PROMPTS)}
LONGEST = {"cpu": 4096, INTERPRETED: 100}  # append within the time of a test; elsewhere 256

on_every_backend = pytest.mark.parametrize("backend", EVERYWHERE, indirect=True)


def dtype_on(backend: str) -> torch.dtype:
    """The finest dtype that the backend computes."""
    return BF16 if backend in EMULATED else FP32


def runs() -> Iterator[Any]:
    """Every backend and dtype on every call; those too long for it are slow."""
    for backend, dtype, case in product(EVERYWHERE, (FP32, BF16), BY_NAME.values()):
        if dtype == FP32 and backend in EMULATED:
            continue
        marks = [pytest.mark.slow] if case.num_new > LONGEST.get(backend, 256) else []
        label = f"{backend}-{str(dtype).removeprefix('torch.')}-{case.name}"
        yield pytest.param(backend, dtype, case, marks=marks, id=label)


@pytest.mark.parametrize(("backend", "dtype", "case"), list(runs()), indirect=["backend"])
def test_decode_is_attention_over_the_history(
    backend: str, dtype: torch.dtype, case: DecodeCase
) -> None:
    if case.softcap is not None and backend in EMULATED:
        with pytest.raises(ValueError, match=f"{REFUSAL}.*softcap"):
            check_decode(case, dtype, backend)
        return
    check_decode(case, dtype, backend)


@pytest.mark.parametrize("name", ["chunk_rope", "pages_rotated", "long_rows_80"])
@pytest.mark.parametrize("backend", [INTERPRETED, "cpu"])
def test_decode_in_float16(backend: str, name: str) -> None:
    check_decode(BY_NAME[name], FP16, backend)


# --- one cache, several calls --------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["raw", "rotated"])
@on_every_backend
def test_token_by_token_equals_the_whole_prompt(backend: str, cache: str) -> None:
    """Every step reads what the steps before wrote."""
    dtype, rows = dtype_on(backend), 12
    case = DecodeCase("steps", (0, 0), rows, rows, capacity=rows, rope=PLAIN, cache=cache)
    call = DecodeCall(case, dtype)
    before = call.plain_caches()
    q, k, v = (call.arguments()[name] for name in "qkv")
    steps = []
    for row in range(rows):
        one = {name: x[:, :, row : row + 1] for name, x in zip("qkv", (q, k, v), strict=True)}
        steps.append(call.run(backend, **one, cache_seqlens=torch.full((2,), row).int()))
    check_results(call, {name: torch.cat([x[name] for x in steps], dim=2) for name in steps[0]})
    check_caches(call, before)


@pytest.mark.parametrize("name", ["chunk_rope", "pages_of_three", "long_rows_80"])
@on_every_backend
def test_raw_and_rotated_caches_give_the_same(backend: str, name: str) -> None:
    """Keys are rounded once, whether they rotate when they are appended or when they are read."""
    dtype = dtype_on(backend)
    raw, rotated = (
        DecodeCall(replace(BY_NAME[name], cache=cache), dtype).run(backend)
        for cache in ("raw", "rotated")
    )
    for result in raw:
        torch.testing.assert_close(raw[result], rotated[result])


@pytest.mark.parametrize("name", ["chunk_rope", "pages", "long_rows_80"])
@on_every_backend
def test_one_raw_cache_serves_both_modes(backend: str, name: str) -> None:
    dtype, case = dtype_on(backend), BY_NAME[name]
    call = DecodeCall(case, dtype)
    call.run(backend)  # appends
    filled = [bits(one).clone() for one in (call.k_cache, call.v_cache)]
    read = {"k": None, "v": None, "cache_seqlens": call.lengths + case.num_new}
    check_results(call, call.run(backend, **read))
    free = DecodeCall(replace(case, rope=None), dtype)
    check_results(free, call.run(backend, **read, rope=False))
    for was, now in zip(filled, (call.k_cache, call.v_cache), strict=True):
        assert torch.equal(was, bits(now)), "reading changed the cache"


# --- appends that do not fit ---------------------------------------------------------------------


def with_lengths(name: str, dtype: torch.dtype, *lengths: int) -> DecodeCall:
    """The call with fills that its caches do not have."""
    call = DecodeCall(BY_NAME[name], dtype)
    call.lengths = torch.tensor(lengths, dtype=torch.int32)
    return call


OVERFLOWS = {"chunk_rope": (5, 21, 17), "pages_rotated": (22, 0, 17), "one_token": (5, -1, 17)}


@pytest.mark.parametrize("name", OVERFLOWS)
@on_every_backend
def test_overflow_is_refused_before_anything_is_written(backend: str, name: str) -> None:
    call = with_lengths(name, dtype_on(backend), *OVERFLOWS[name])
    before = [bits(one).clone() for one in (call.k_cache, call.v_cache)]
    with pytest.raises(ValueError, match="cache_seqlens: expected values in"):
        call.run(backend)
    for was, now in zip(before, (call.k_cache, call.v_cache), strict=True):
        assert torch.equal(was, bits(now))


LARGEST = 2**31 - 1
NO_PAGES = (-1, 10**6, LARGEST, -LARGEST - 1)
on_devices = pytest.mark.parametrize("backend", ON_DEVICES, indirect=True)


@dataclass
class Trial:
    """A call, and the same call with values that only the device knows spoiled."""

    intact: DecodeCall
    spoiled: DecodeCall
    before: list[Tensor]
    expected: dict[str, Tensor]
    ours: dict[str, Tensor]

    def check(self, lost: Tensor, *, written: bool) -> None:
        """Rows are as in the intact call, but for those lost (B,), which have no result."""
        for name, expected in self.expected.items():
            assert torch.equal(self.ours[name][~lost], expected[~lost]), name
            assert self.ours[name][lost].isnan().all(), name
        caches = (self.before, self.spoiled.plain_caches(), self.intact.plain_caches())
        for was, now, good in zip(*caches, strict=True):
            assert torch.equal(bits(now[~lost]), bits(good[~lost]))
            assert written or torch.equal(bits(now[lost]), bits(was[lost]))


def try_out(backend: str, name: str, **spoiled: Tensor) -> Trial:
    dtype = dtype_on(backend)
    intact, call = (DecodeCall(BY_NAME[name], dtype) for _ in range(2))
    before, expected = call.plain_caches(), intact.run(backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_op, "check_decode_values", lambda inputs: None)
        ours = call.run(backend, **spoiled)
    return Trial(intact, call, before, expected, ours)


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("chunk_rope", (5, 21, 17)),
        ("chunk_rope", (5, -1, LARGEST)),
        ("one_token", (-LARGEST, 0, 24)),
        ("pages_rotated", (22, 0, 17)),
        ("pages_chunk", (LARGEST, -LARGEST - 1, 17)),
        ("nothing_appended", (25, 0, 17)),
    ],
    ids=str,
)
@on_devices
def test_overflow_on_a_device_loses_its_row_only(
    backend: str, name: str, lengths: tuple[int, ...]
) -> None:
    spoiled = torch.tensor(lengths, dtype=torch.int32)
    trial = try_out(backend, name, cache_seqlens=spoiled)
    trial.check(spoiled != trial.intact.lengths, written=False)


def table_without(name: str, row: int, block: int, page: int) -> Tensor:
    table = DecodeCall(BY_NAME[name], FP32).page_table
    assert table is not None
    table[row, block] = page
    return table


@pytest.mark.parametrize("page", NO_PAGES)
@on_devices
def test_a_page_of_history_that_is_not_there_loses_its_row_only(backend: str, page: int) -> None:
    table = table_without("pages_rotated", row=2, block=1, page=page)
    trial = try_out(backend, "pages_rotated", page_table=table)
    trial.check(torch.tensor([False, False, True]), written=True)


@pytest.mark.parametrize("page", NO_PAGES)
@on_devices
def test_a_page_to_append_to_that_is_not_there_loses_its_row_only(backend: str, page: int) -> None:
    table = table_without("pages_chunk", row=1, block=1, page=page)
    trial = try_out(backend, "pages_chunk", page_table=table)
    trial.check(torch.tensor([False, True, False]), written=False)
