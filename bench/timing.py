"""Interleaved timing: every contender of a case runs once per round, so that noise hits all alike.

One-thread cases use the thread's CPU clock, which does not count what other programs take from
us; cases with more threads use the wall clock. The compute peak is probed in the same rounds.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Run = Callable[[], object]

WARM_BELOW = 0.05


@dataclass
class Samples:
    """Seconds per call, one entry a round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles over the median; NaN from fewer than three rounds."""
        if len(self.seconds) < 3:
            return float("nan")
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median

    def over(self, other: Samples) -> float:
        """Median over rounds of this time over the other's in the same round."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)


def clock_for(threads: int) -> Callable[[], float]:
    return time.thread_time if threads == 1 else time.perf_counter


def interleave(
    contenders: Mapping[str, Run],
    *,
    clock: Callable[[], float],
    budget: float,
    max_rounds: int = 25,
) -> dict[str, Samples]:
    """Run all contenders round by round until `budget` wall seconds are spent.

    One untimed round warms up where a round is short (under a fifth of the budget). At least
    three rounds are made unless a single one already exceeds the budget. Calls under
    `WARM_BELOW` seconds run once untimed before each timed call: else they would be charged for
    refilling caches that the contender before them emptied.
    """
    samples = {name: Samples() for name in contenders}
    short: set[str] = set()
    begin = time.perf_counter()
    warmed = False
    while True:
        round_begin = time.perf_counter()
        for name, run in contenders.items():
            if name in short:
                run()
            start = clock()
            run()
            samples[name].seconds.append(clock() - start)
        round_seconds = time.perf_counter() - round_begin
        if not warmed:
            warmed = True
            short = {name for name, s in samples.items() if s.median < WARM_BELOW}
            if round_seconds < budget / 5:
                samples = {name: Samples() for name in contenders}
                continue
        rounds = len(next(iter(samples.values())).seconds)
        spent = time.perf_counter() - begin
        if rounds >= max_rounds or (spent >= budget and (rounds >= 3 or round_seconds > budget)):
            return samples


def peak_extra_memory(run: Run) -> int | None:
    """Bytes by which `run` raised the process's peak resident memory; None where not measurable."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return None

    def kib(key: str) -> int:
        line = next(row for row in status.read_text().splitlines() if row.startswith(key))
        return int(line.split()[1])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory must not hide what the call takes
    clear.write_text("5")  # resets VmHWM, the peak
    before = kib("VmRSS")
    result = run()
    peak = kib("VmHWM")
    del result
    return max(0, peak - before) * 1024


class ReplayClock:
    """Hands samples that were measured interleaved to pytest-benchmark, one a round."""

    def __init__(self, samples: Samples):
        self._pending = iter(samples.seconds)
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def advance(self) -> None:
        self._now += next(self._pending)
