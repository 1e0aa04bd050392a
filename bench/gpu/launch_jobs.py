"""Jobs of the stage launch: "first BACKEND" and "steady BACKEND"."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from bench.gpu.accelerator import StandIn
from bench.gpu.small_calls import SDPA, SMALL, small_calls
from bench.machine import ROOT

NUM_ROUNDS, CALLS_PER_ROUND = 20, 25  # the queue of the device, 1024 launches, never fills


def first(backend: str, where: StandIn) -> dict[str, Any]:
    """Seconds of a process's first calls: with no compiled kernel on disk, then with all."""
    with tempfile.TemporaryDirectory() as cache:
        runs = {name: first_calls(backend, where, cache) for name in ("cold", "warm")}
    return {"first_seconds": runs}


def first_calls(backend: str, where: StandIn, cache: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.gpu.first_call", where.device, backend]
    environment = os.environ | {"TRITON_CACHE_DIR": cache}
    done = subprocess.run(
        command, env=environment, cwd=ROOT / "tools", capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"the first calls failed: {done.stderr.strip()[-800:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def steady(backend: str, where: StandIn) -> dict[str, Any]:
    """Microseconds of the host for one call, while the device keeps up: median of rounds."""
    calls = small_calls(backend, where.device, SMALL)
    return {"host_us": {name: host_microseconds(call, where) for name, call in calls.items()}}


def host_microseconds(call: Callable[[], Any], where: StandIn) -> float:
    rounds = []
    for _ in range(NUM_ROUNDS if where.device == "cuda" else 2):
        where.synchronize()
        started = time.perf_counter()
        for _ in range(CALLS_PER_ROUND):
            call()
        rounds.append(1e6 * (time.perf_counter() - started) / CALLS_PER_ROUND)
    return statistics.median(rounds)


def run_job(job: str, where: StandIn) -> dict[str, Any]:
    if job == "list":
        backends = list(where.backends)
        steady_jobs = [f"steady {name}" for name in (*backends, SDPA)]
        return {"jobs": [*steady_jobs, *(f"first {name}" for name in backends)]}
    kind, backend = job.split()
    return {"first": first, "steady": steady}[kind](backend, where)
