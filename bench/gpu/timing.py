"""Device times with CUDA events, the L2 cache flushed before every call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

FLUSH_BYTES = 256 << 20  # several times the largest L2
HEAD_START_CYCLES = 2_000_000  # about 1 ms: the host queues the call before the clock starts
MAX_CALLS, MIN_CALLS = 40, 5
TARGET_MS = 300.0


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: the median and the quartiles."""

    median_ms: float
    p25_ms: float
    p75_ms: float
    num_calls: int


def percentiles(samples: list[float]) -> Times:
    ordered = torch.tensor(sorted(samples), dtype=torch.float64)
    levels = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    median, low, high = torch.quantile(ordered, levels).tolist()
    return Times(median, low, high, len(samples))


def cold_timer() -> Callable[[Callable[[], Any]], float]:
    """Times one call on the device, in ms, after the L2 cache was overwritten."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def sample(call: Callable[[], Any]) -> float:
        flush.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start = torch.cuda.Event(enable_timing=True)
        stop = torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    return sample


def time_call(call: Callable[[], Any]) -> Times:
    """Warms up, then times calls one by one until TARGET_MS or MAX_CALLS."""
    return interleave({"call": call}, cold_timer())["call"]


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    sample: Callable[[Callable[[], Any]], float],
    target_ms: float = TARGET_MS,
) -> dict[str, Times]:
    """Every call once a round, so that a drifting clock hits all alike; two rounds warm up.

    There are as many rounds as `target_ms` allows each call on average, at most MAX_CALLS.
    """
    for call in calls.values():
        call()
    first = [sample(call) for call in calls.values()]
    mean_ms = max(sum(first) / len(first), 1e-3)
    num_rounds = int(min(MAX_CALLS, max(MIN_CALLS, target_ms / mean_ms)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(num_rounds):
        for name, call in calls.items():
            samples[name].append(sample(call))
    return {name: percentiles(values) for name, values in samples.items()}


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
