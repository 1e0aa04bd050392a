"""Device times with CUDA events, the L2 cache flushed before every call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

FLUSH_BYTES = 256 << 20  # several times the largest L2
HEAD_START_CYCLES = 1_000_000  # about 0.5 ms: the host queues the call before the clock starts
MAX_CALLS, MIN_CALLS = 40, 5
TARGET_MS = 300.0


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    num_calls: int


def percentiles(samples: list[float]) -> Times:
    ordered = torch.tensor(sorted(samples), dtype=torch.float64)
    levels = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    median, p20, p80 = torch.quantile(ordered, levels).tolist()
    return Times(median, p20, p80, len(samples))


def time_call(call: Callable[[], Any]) -> Times:
    """Warms up, then times calls one by one until TARGET_MS or MAX_CALLS."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(2):
        call()
    torch.cuda.synchronize()

    def sample() -> float:
        flush.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start = torch.cuda.Event(enable_timing=True)
        stop = torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    first = sample()
    num_calls = int(min(MAX_CALLS, max(MIN_CALLS, TARGET_MS / max(first, 1e-3))))
    return percentiles([sample() for _ in range(num_calls)])


def copy_bandwidth(num_bytes: int) -> dict[str, Any]:
    """A device-to-device copy of random bytes; counts bytes read plus bytes written."""
    source = torch.randint(-128, 127, (num_bytes,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    times = time_call(lambda: target.copy_(source))
    rate = 2 * num_bytes / times.median_ms / 1e9
    return {"bytes": num_bytes, "terabytes_per_second": rate, **asdict(times)}


def matmul_rate(size: int) -> dict[str, Any]:
    """size x size x size in bfloat16 on random data; cuBLAS through torch."""
    left = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    times = time_call(lambda: left @ right)
    return {"size": size, "tflops": 2 * size**3 / times.median_ms / 1e9, **asdict(times)}
