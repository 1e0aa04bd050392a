"""CuPy arrays on a GPU: torch's results bit by bit, caches in place, streams in order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from arrays import OPTIONS, SHAPES, decoding, in_torch, randoms

import drope_kernels as dk


@pytest.fixture(scope="module")
def cupy() -> Any:
    module = pytest.importorskip("cupy", exc_type=ImportError)
    if not module.cuda.is_available():
        pytest.skip("CuPy finds no CUDA device")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return module


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("name", ["plain", "rope", "positions", "ranges", "head_scale"])
def test_cupy_gives_what_torch_gives(cupy: Any, name: str, dtype: Any) -> None:
    call = {**randoms(SHAPES, dtype), **OPTIONS[name]}
    tensors = {n: x.cuda() if torch.is_tensor(x) else x for n, x in in_torch(call).items()}
    arrays = {n: cupy.asarray(x) if isinstance(x, np.ndarray) else x for n, x in call.items()}
    want = dk.attention(**tensors, return_lse=True)
    for ours, theirs in zip(dk.attention(**arrays, return_lse=True), want, strict=True):
        assert type(ours) is cupy.ndarray
        np.testing.assert_array_equal(ours.get(), theirs.cpu().numpy(), strict=True)


def test_cupy_decode_writes_the_callers_caches(cupy: Any) -> None:
    call = decoding(dtype=np.float16)
    tensors = {name: x.cuda() for name, x in in_torch(call).items()}
    arrays = {name: cupy.asarray(x) for name, x in call.items()}
    want, got = dk.attention_decode(**tensors), dk.attention_decode(**arrays)
    for ours, theirs in (
        (got, want),
        (arrays["k_cache"], tensors["k_cache"]),
        (arrays["v_cache"], tensors["v_cache"]),
    ):
        np.testing.assert_array_equal(ours.get(), theirs.cpu().numpy(), strict=True)


def test_cupy_streams_are_respected(cupy: Any) -> None:
    """On a stream that waits for no other: late arguments, results read late, memory reused."""
    spin = cupy.RawKernel(
        'extern "C" __global__ void spin(long long cycles) {'
        "  for (long long begin = clock64(); clock64() - begin < cycles;) {} }",
        "spin",
    )
    call = randoms(SHAPES, np.float16)
    want = dk.attention(**{name: x.cuda() for name, x in in_torch(call).items()}).cpu().numpy()
    with cupy.cuda.Stream(non_blocking=True):
        arrays = {name: cupy.asarray(x) for name, x in call.items()}
        dk.attention(**arrays)  # what is compiled or loaded at a first call, is
        late = cupy.zeros_like(arrays["k"])
        spin((1,), (1,), (np.int64(500_000_000),))
        late[...] = arrays["k"]
        out = dk.attention(**{**arrays, "k": late})
        late.fill(np.nan)
        spin((1,), (1,), (np.int64(500_000_000),))
        read = out.copy()
        del out
        torch.full(want.shape, np.nan, dtype=torch.float16, device="cuda")
        np.testing.assert_array_equal(read.get(), want, strict=True)
