"""Where a stage runs: the GPU, or the CPU standing in for it in a dry run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bench import machine
from bench.gpu import timing
from bench.gpu.sm80 import register_sm80

Call = Callable[[], Any]
POISON_BLOCKS = (64 << 20, *[4 << 20] * 8, *[1 << 19] * 16)  # bytes: both pools of the allocator


class StandIn:
    """The CPU and the reference backend: the logic of a check without the thing it checks."""

    device = "cpu"
    backends: Sequence[str] = ("reference",)
    target_ms = 1.0  # of all timed calls of one kind: the numbers mean nothing here

    def synchronize(self) -> None:
        """Nothing is asynchronous here."""

    def settle(self) -> None:
        """Raises what a job left behind on the device."""

    def poison(self) -> None:
        """Uninitialised memory is not ours to fill on the CPU."""

    def stream(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def num_devices(self) -> int:
        return 1

    def capture(self, call: Callable[[], tuple[Tensor, ...]]) -> tuple[Call, tuple[Tensor, ...]]:
        """(replay, results): each replay writes the call's results into the same tensors."""
        results = call()

        def replay() -> None:
            for old, new in zip(results, call(), strict=True):
                old.copy_(new)

        return replay, results

    def timer(self) -> Callable[[Call], float]:
        """Milliseconds of one call."""

        def sample(call: Call) -> float:
            started = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - started)

        return sample

    def clocks(self) -> dict[str, str]:
        """The GPU's clocks, power and temperature now, just after what was timed."""
        return {}

    def peak_bytes(self, call: Call) -> int | None:
        """By how much one call raises the device memory in use; None where that is not known."""
        call()
        return None


class Gpu(StandIn):
    """CUDA device 0 (the current one) and the backends of this build that run there.

    Triton last: it compiles while the others run.
    """

    device = "cuda"
    target_ms = timing.TARGET_MS

    def __init__(self) -> None:
        import drope_kernels

        if os.environ.get("TRITON_INTERPRET"):
            raise RuntimeError("TRITON_INTERPRET is set: no Triton kernel would be compiled")
        torch.cuda.init()
        available = drope_kernels.available_backends()
        self.backends = ["cuda"] if "cuda" in available else []
        if self.backends and torch.cuda.get_device_capability() == (9, 0):
            self.backends.append(register_sm80())
        if "triton" in available:
            self.backends.append("triton")
        if not self.backends:
            raise RuntimeError(
                f"no GPU backend: available_backends() is {available}, "
                f"build_info() {drope_kernels.build_info()}"
            )

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def settle(self) -> None:
        """Also gives back the memory that the last job left with the allocator."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def poison(self) -> None:
        """Leaves NaN (in every float format) in the memory that the next tensors will get."""
        blocks = [
            torch.full((size // 2,), 0x7FFF, dtype=torch.int16, device=self.device)
            for size in POISON_BLOCKS
        ]
        del blocks

    def stream(self) -> AbstractContextManager[Any]:
        """A new stream, behind what is queued."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(stream)

    def num_devices(self) -> int:
        return torch.cuda.device_count()

    def capture(self, call: Callable[[], tuple[Tensor, ...]]) -> tuple[Call, tuple[Tensor, ...]]:
        with self.stream():  # lazy set-up must happen outside the capture
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        return graph.replay, results

    def timer(self) -> Callable[[Call], float]:
        return timing.cold_timer()

    def clocks(self) -> dict[str, str]:
        return machine.clocks_of(machine.gpu_fields())

    def peak_bytes(self, call: Call) -> int | None:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del result
        return peak


def accelerator(dry_run: bool) -> StandIn:
    return StandIn() if dry_run else Gpu()
