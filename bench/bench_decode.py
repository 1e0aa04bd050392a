"""Decode against a plain read of the same keys and values, and against torch's SDPA.

The call is bound by memory: a vectorised sum over the tensors is the roofline, timed in the same
rounds with as many threads. Its share is the column "of peak".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import drope_kernels

from .cases import DecodeCase, decode_grid, decode_tensors
from .measure import torch_threads
from .peers import eager_rope
from .timing import Run, Samples, clock_for, interleave, peak_extra_memory

CONTENDERS = ("drope_kernels", "sdpa", "plain_read")
PAIRS = [(case, name) for case in decode_grid() for name in CONTENDERS]


def decode_calls(case: DecodeCase) -> dict[str, Run]:
    """One more token each; the cache of SDPA is rotated, as it has to be there."""
    q, k, v = decode_tensors(case)
    append = {"k": k[:, :, -1:].clone(), "v": v[:, :, -1:].clone()}
    lengths = torch.tensor([case.seqlen - 1], dtype=torch.int32)
    grouped = case.num_heads_kv != case.num_heads_q
    rotated = eager_rope(k) if case.rope else k
    words = k.view(torch.float32), v.view(torch.float32)
    return {
        "drope_kernels": lambda: drope_kernels.attention_decode(
            q, k, v, cache_seqlens=lengths, rope=case.rope, **append
        ),
        "sdpa": lambda: scaled_dot_product_attention(q, rotated, v, enable_gqa=grouped),
        "plain_read": lambda: [x.sum() for x in words],
    }


# --- the gate ------------------------------------------------------------------------------------


def rotate(x: Tensor, first: int) -> Tensor:
    """Half-split RoPE of x (S, D) from position `first` on, in float64."""
    dim = x.shape[-1]
    inv_freq = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(first, first + x.shape[0], dtype=torch.float64)[:, None] * inv_freq
    left, right = x.double().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def error_of_last_head(case: DecodeCase, attend: Callable[[], object]) -> tuple[float, float]:
    """Relative error of the last head against float64: ours, and a same-precision peer's."""
    out = attend()
    assert isinstance(out, Tensor)
    q, k, v = (x[0, -1] for x in decode_tensors(case))
    if case.rope:
        q, k = (rotate(x, case.seqlen - x.shape[0]).to(case.torch_dtype) for x in (q, k))
    scale = case.head_dim**-0.5
    p = torch.softmax(q.double() @ k.double().T * scale, dim=-1)
    truth = p @ v.double()
    rounded = torch.softmax((q.float() @ k.float().T) * scale, dim=-1).to(case.torch_dtype)
    peer = (rounded.float() @ v.float()).to(case.torch_dtype)

    def error(x: Tensor) -> float:
        return float((x.double() - truth).norm() / truth.norm())

    return error(out[0, -1]), error(peer)


# --- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeasuredDecode:
    case: DecodeCase
    samples: dict[str, Samples]
    memory: dict[str, int | None]  # peak extra bytes, by contender
    worst_error: float

    def ratio(self, name: str, to: str) -> float:
        return self.samples[name].over(self.samples[to])

    def row(self, name: str) -> dict[str, object]:
        samples = self.samples[name]
        memory = self.memory[name]
        return {
            "case": self.case.name,
            "contender": name,
            "median_ms": samples.median * 1e3,
            "spread": samples.spread,
            "rounds": len(samples.seconds),
            "gflops": self.case.flops / samples.median / 1e9,
            "gigabytes_per_second": self.case.num_bytes / samples.median / 1e9,
            "peak_fraction": self.ratio("plain_read", name),
            "speedup_of_drope": self.ratio(name, "drope_kernels"),
            "peak_extra_mib": None if memory is None else memory / 2**20,
            "worst_error": self.worst_error if name == "drope_kernels" else None,
        }


@functools.cache
def measure_decode(case: DecodeCase, *, budget: float = 3.0) -> MeasuredDecode:
    """Gate, then time, `budget` wall seconds for all contenders together."""
    with torch_threads(case.threads):
        calls = decode_calls(case)
        ours, peers = error_of_last_head(case, calls["drope_kernels"])
        if not ours <= 2 * peers + 2e-6:
            raise AssertionError(f"{case.name} is not timed: error {ours}, a peer's {peers}")
        memory = {name: peak_extra_memory(run) for name, run in calls.items()}
        samples = interleave(calls, clock=clock_for(case.threads), budget=budget)
    return MeasuredDecode(case, samples, memory, ours)


@pytest.mark.parametrize(
    ("case", "contender"), PAIRS, ids=lambda value: getattr(value, "name", value)
)
def test_decode(case, contender, replay):
    measured = measure_decode(case)
    replay(measured.row(contender), measured.samples[contender])
