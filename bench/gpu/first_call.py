"""How long the first calls of a process take: python -m bench.gpu.first_call DEVICE BACKEND.

Prints one JSON line: seconds of each call of small_calls, in its order, then of all of them again.
What Triton compiled before lies in TRITON_CACHE_DIR.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from bench.gpu.sm80 import SM80, register_sm80
from bench.gpu.small_calls import SMALL, small_calls


def main(device: str, backend: str) -> None:
    if backend == SM80:
        register_sm80()
    calls = small_calls(backend, device, SMALL)
    found: dict[str, float] = {}
    for suffix in ("", ", again"):
        for name, call in calls.items():
            synchronize(device)
            started = time.perf_counter()
            call()
            synchronize(device)
            found[name + suffix] = time.perf_counter() - started
    print(json.dumps(found))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
