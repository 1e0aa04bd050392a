"""NumPy arguments of the public calls, and arrays of a library that torch has never heard of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from operands import ROPE

SHAPES = {"q": (2, 4, 6, 16), "k": (2, 2, 9, 16), "v": (2, 2, 9, 12)}
PACKED = {"q": (6, 4, 16), "k": (9, 2, 16), "v": (9, 2, 12)}


def randoms(shapes: dict[str, tuple[int, ...]], dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def packed() -> dict[str, Any]:
    """Arguments of attention_varlen; the second sequence has no queries."""
    ends = {"cu_seqlens_q": ints(0, 2, 2, 6), "cu_seqlens_k": ints(0, 4, 5, 9)}
    return {**randoms(PACKED), **ends}


def decoding(*, paged: bool = False, dtype: Any = np.float32) -> dict[str, Any]:
    """Arguments of attention_decode, two rows of 8 keys at most, or of 4 pages of 2."""
    cache = (9, 2, 2) if paged else (2, 2, 8)
    shapes = {"q": (2, 4, 1, 16), "k_cache": (*cache, 16), "v_cache": (*cache, 12)}
    new = {"k": (2, 2, 1, 16), "v": (2, 2, 1, 12)}
    table = {"page_table": np.arange(8, dtype=np.int32)[::-1].reshape(2, 4).copy()}
    arrays = {**randoms({**shapes, **new}, dtype), "cache_seqlens": ints(3, 7)}
    return {**arrays, **table} if paged else arrays


def in_torch(x: Any) -> Any:
    """Arrays as tensors with memory of their own, NumPy's numbers as Python's."""
    if isinstance(x, dict):
        return {name: in_torch(item) for name, item in x.items()}
    if isinstance(x, np.ndarray):
        return torch.from_numpy(x.copy())
    return x.item() if isinstance(x, np.generic) else x


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rope": {"rope": ROPE, "window": 4, "softcap": 9.0},
    "positions": {
        "rope": True,
        "positions": np.arange(12).reshape(2, 6),
        "kv_positions": np.arange(18, dtype=np.float32).reshape(2, 9),
    },
    "ranges": {"q_start": ints(3, -2), "kv_start": ints(1, 0), "kv_end": ints(9, 4)},
    "head_scale": {"scale": np.linspace(0.1, 0.4, 4, dtype=np.float32)[:, None]},
    "scalar_array": {"scale": np.array(0.3, np.float32)},
    "numbers": {
        "scale": np.float32(0.3),
        "softcap": np.float16(8),
        "window": np.int64(4),
        "q_start": np.int32(2),
        "causal": np.True_,
    },
}


class Foreign:
    """An array that knows DLPack and nothing else; keeps how torch asked for it."""

    device: tuple[int, int] = (1, 0)

    def __init__(self, data: Any) -> None:
        self.data = data
        self.asked: dict[str, Any] = {}

    def __array_namespace__(self) -> Any:
        return LIBRARY

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **asked: Any) -> Any:
        self.asked = asked
        return self.data.__dlpack__(max_version=asked.get("max_version"), copy=asked.get("copy"))


class Writable(Foreign):
    """Assignment is all it can beside DLPack."""

    def __getitem__(self, index: Any) -> Any:
        return self.data[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.data[index] = value


class OnGpu(Foreign):
    """Says that it lies on CUDA device 0; a machine without a GPU can be told so, too."""

    device = (2, 0)


class Old(Foreign):
    """DLPack before version 1: it is asked for nothing but a stream."""

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        return self.data.__dlpack__()


class Homeless(Foreign):
    """Of a library that cannot read DLPack."""

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(__name__="homeless")


LIBRARY = SimpleNamespace(__name__="library", from_dlpack=lambda x: Foreign(torch.from_dlpack(x)))
