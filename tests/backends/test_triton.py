"""The sentences of the Triton backend: which machine and which call it refuses, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from specs import SERVED

import drope_kernels.backends.triton as backend
from drope_kernels.backends.triton import TritonBackend

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "cpu": ({"device": "cpu"}, "it computes on CUDA devices and the tensors are on cpu."),
    "float64": ({"dtype": torch.float64}, "it computes float32, float16 and bfloat16, not float64"),
    "head_dim": ({"head_dim_v": 257}, "its head_dim is at most 256, got 128 (q, k) and 257 (v)."),
    "heads": ({"num_heads_q": 2**17}, "its heads have at most 2**23 channels together."),
    "rows": ({"seqlen_kv": 2**28}, "its sequences have at most 268435455 rows."),
    "tiles": ({"batch": 2**20, "seqlen_q": 2**16}, "its grids have at most 2**31 - 1 tiles"),
}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Compute capabilities of the GPUs that torch sees."""
    seen = [(9, 0)]
    backend._too_old.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(seen))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(seen))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: seen[index])
    yield seen
    backend._too_old.cache_clear()


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_sentences(gpus: list[tuple[int, int]], name: str) -> None:
    changes, sentence = REFUSED[name]
    reason = TritonBackend().supports(replace(SERVED, **changes))
    assert reason is not None
    assert reason.startswith(sentence)
    assert reason.endswith(".")


def test_serves_what_cuda_refuses(gpus: list[tuple[int, int]]) -> None:
    for changes in ({}, {"dtype": torch.float32}, {"softcap": True}, {"head_dim": 7}):
        assert TritonBackend().supports(replace(SERVED, aligned=False, **changes)) is None


def test_each_gpu_counts_for_itself(gpus: list[tuple[int, int]]) -> None:
    gpus[:] = [(7, 5), (8, 0)]
    mixed = TritonBackend()
    assert mixed.unavailable() is None
    assert mixed.supports(replace(SERVED, device_index=1)) is None
    old = mixed.supports(SERVED)
    assert old == "it needs compute capability 8.0 or later, the GPU has 7.5."


def test_machines_without_a_gpu_for_it(
    gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert TritonBackend().unavailable() == "it needs triton 3.6 or later, 3.5.1 is installed."
    gpus.clear()
    assert TritonBackend().unavailable() == "it runs on NVIDIA GPUs, and torch sees none."
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "HIP" in str(TritonBackend().unavailable())
    monkeypatch.setattr(backend, "find_spec", lambda _: None)
    assert str(TritonBackend().unavailable()).startswith("triton is not installed")
