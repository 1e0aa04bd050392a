"""NumPy and any DLPack array in, the same kind out: torch's results bit by bit, and no copies.

CuPy has `test_cupy`, and what is refused `test_bad_arrays`.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from arrays import (
    OPTIONS,
    SHAPES,
    Foreign,
    Old,
    OnGpu,
    Writable,
    decoding,
    in_torch,
    packed,
    randoms,
)
from operands import BACKENDS

import drope_kernels as dk
from drope_kernels.backends import reference

on_every_cpu_backend = pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name in ("cpu", "reference")]
)


def assert_same(got: Any, want: torch.Tensor) -> None:
    """A NumPy array with the values, dtype and shape of a tensor."""
    assert type(got) is np.ndarray
    np.testing.assert_array_equal(got, want.numpy(), strict=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("name", OPTIONS)
@on_every_cpu_backend
def test_numpy_gives_what_torch_gives(backend: str, name: str, dtype: Any) -> None:
    call = {**randoms(SHAPES, dtype), **OPTIONS[name], "backend": backend}
    want = dk.attention(**in_torch(call), return_lse=True)
    got = dk.attention(**call, return_lse=True)
    for ours, theirs in zip(got, want, strict=True):
        assert_same(ours, theirs)
    assert_same(dk.attention(**call), want[0])


def test_float64_runs_on_the_reference() -> None:
    call = randoms(SHAPES, np.float64)
    assert_same(dk.attention(**call), dk.attention(**in_torch(call)))


@pytest.mark.parametrize(("names", "axis"), [("qkv", 0), ("q", 2), ("kv", 2)])
def test_empty_arrays(names: str, axis: int) -> None:
    call = randoms(SHAPES)
    call |= {name: call[name].take([], axis) for name in names}
    out, lse = dk.attention(**call, return_lse=True)
    assert out.shape == (*call["q"].shape[:3], 12)
    assert (out == 0).all()
    assert (lse == -np.inf).all()


def test_results_follow_the_memory_order_of_q() -> None:
    q, k, v = randoms({"q": (2, 6, 4, 16), "k": (2, 9, 2, 16), "v": (2, 9, 2, 12)}).values()
    call = {name: x.swapaxes(1, 2) for name, x in (("q", q), ("k", k), ("v", v))}
    out = dk.attention(**call)
    assert out.swapaxes(1, 2).flags.c_contiguous
    assert_same(out, dk.attention(**in_torch(call)))


@on_every_cpu_backend
def test_varlen(backend: str) -> None:
    call = {**packed(), "rope": True, "positions": np.arange(6), "backend": backend}
    want = dk.attention_varlen(**in_torch(call), return_lse=True)
    got = dk.attention_varlen(**call, return_lse=True)
    for ours, theirs in zip(got, want, strict=True):
        assert_same(ours, theirs)
    assert_same(dk.attention_varlen(**call), want[0])


@pytest.mark.parametrize("cache", ["raw", "rotated"])
@pytest.mark.parametrize("paged", [False, True])
@on_every_cpu_backend
def test_decode_writes_the_callers_caches(backend: str, paged: bool, cache: str) -> None:
    call = {**decoding(paged=paged), "rope": True, "cache": cache, "backend": backend}
    tensors, before = in_torch(call), in_torch(call)
    want = dk.attention_decode(**tensors, return_lse=True)
    got = dk.attention_decode(**call, return_lse=True)
    for ours, theirs in zip(got, want, strict=True):
        assert_same(ours, theirs)
    for name in ("k_cache", "v_cache"):
        assert_same(call[name], tensors[name])
        assert not np.array_equal(call[name], before[name].numpy())


def test_merge() -> None:
    q, k, v = randoms(SHAPES).values()
    parts = [
        dk.attention(q, k[:, :, keys], v[:, :, keys], causal=False, return_lse=True)
        for keys in (slice(0, 4), slice(4, 9))
    ]
    outs, lses = (list(x) for x in zip(*parts, strict=True))
    want = dk.merge_attention([in_torch(x) for x in outs], [in_torch(x) for x in lses])
    for ours, theirs in zip(dk.merge_attention(outs, tuple(lses)), want, strict=True):
        assert_same(ours, theirs)


def test_explain_says_what_it_says_for_torch() -> None:
    call = {**randoms(SHAPES), **OPTIONS["ranges"]}
    assert dk.explain(**call) == dk.explain(**in_torch(call))


# ---- no copies ---------------------------------------------------------------------------------
def test_backend_and_caller_share_every_array(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = reference.forward

    def watched(inputs: Any, **options: Any) -> Any:
        results = forward(inputs, **options)
        seen.append((inputs, results))
        return results

    monkeypatch.setattr(reference, "forward", watched)
    call = {**randoms(SHAPES), **OPTIONS["ranges"], **OPTIONS["head_scale"]}
    positions = np.zeros((2, 6), np.float32)
    results = dk.attention(
        **call, rope=True, positions=positions, return_lse=True, backend="reference"
    )
    ((inputs, computed),) = seen
    pairs = [(call[name], getattr(inputs, name)) for name in call]
    pairs += [(positions, inputs.rotation.positions), *zip(results, computed, strict=False)]
    assert len(pairs) == 10
    for array, tensor in pairs:
        assert array.__array_interface__["data"][0] == tensor.data_ptr()


def test_read_only_arrays_are_read(recwarn: pytest.WarningsRecorder) -> None:
    call = {**decoding(), "scale": np.full((4, 1), 0.2, np.float32)}
    want = dk.attention_decode(**in_torch(call))
    for name, x in call.items():
        x.flags.writeable = name in ("k_cache", "v_cache")
    assert_same(dk.attention_decode(**call), want)
    assert not recwarn.list


def test_read_only_caches_will_do_when_nothing_is_appended() -> None:
    call = {**decoding(), "k": None, "v": None}
    want = dk.attention_decode(**in_torch(call))
    for name in ("k_cache", "v_cache"):
        call[name].flags.writeable = False
    assert_same(dk.attention_decode(**call), want)


# ---- a library of its own ----------------------------------------------------------------------
def test_any_library_gets_its_own_arrays_back() -> None:
    tensors = in_torch(randoms(SHAPES))
    tensors = {name: x.bfloat16() for name, x in tensors.items()}
    foreign = {name: Foreign(x) for name, x in tensors.items()}
    got = dk.attention(**foreign, return_lse=True)
    for ours, theirs in zip(got, dk.attention(**tensors, return_lse=True), strict=True):
        assert type(ours) is Foreign
        assert torch.equal(ours.data, theirs)
    for x in foreign.values():
        assert x.asked["copy"] is False
        assert x.asked.get("stream") is None  # there are none on a CPU


def test_decode_writes_through_dlpack() -> None:
    call = decoding()
    foreign = {name: Writable(torch.from_numpy(x)) for name, x in call.items()}
    tensors = in_torch(call)
    out = dk.attention_decode(**foreign)
    assert torch.equal(out.data, dk.attention_decode(**tensors))
    for name in ("k_cache", "v_cache"):
        assert torch.equal(foreign[name].data, tensors[name])


def test_producers_are_told_the_stream_that_the_kernels_run_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's current stream of the arrays' device."""
    devices = []

    def current_stream(device: Any = None) -> Any:
        devices.append(str(device))
        return SimpleNamespace(cuda_stream=1234)

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    call = {name: OnGpu(x) for name, x in in_torch(randoms(SHAPES)).items()}
    dk.attention(**call)
    assert [x.asked["stream"] for x in call.values()] == [1234] * 3
    assert set(devices) == {"cuda:0"}


def test_exporters_of_the_first_dlpack_will_do() -> None:
    tensors = in_torch(randoms(SHAPES))
    out = dk.attention(**{name: Old(x) for name, x in tensors.items()})
    assert torch.equal(out.data, dk.attention(**tensors))


# ---- beside torch's own machinery --------------------------------------------------------------
def test_torch_tensors_never_come_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Any, arguments: Any) -> Any:
        raise AssertionError(f"{function.__name__} took the way of foreign arrays")

    for module in ("attention", "decode", "merge"):
        monkeypatch.setattr(sys.modules[f"drope_kernels.{module}"], "through_dlpack", refuse)
    out, lse = dk.attention(**in_torch(randoms(SHAPES)), return_lse=True)
    dk.attention_varlen(**in_torch(packed()))
    dk.attention_decode(**in_torch(decoding()))
    dk.merge_attention([out], [lse])
    dk.explain(**in_torch(randoms(SHAPES)))
    with pytest.raises(AssertionError, match="attention took"):
        dk.attention(**randoms(SHAPES))


def test_autocast_is_for_torch_only() -> None:
    call = randoms(SHAPES)
    want = dk.attention(**call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = dk.attention(**call)
        assert torch.is_autocast_enabled("cpu")
    np.testing.assert_array_equal(got, want, strict=True)


def test_a_compiled_function_may_call_with_numpy() -> None:
    """A graph break: torch.compile has its own idea of NumPy arrays."""
    torch._dynamo.reset()

    def twice(q: Any, k: Any, v: Any) -> Any:
        return dk.attention(q * 2, k, v, rope=True)

    call = randoms(SHAPES).values()
    got = torch.compile(twice, backend="aot_eager")(*call)
    np.testing.assert_array_equal(got, twice(*call), strict=True)
