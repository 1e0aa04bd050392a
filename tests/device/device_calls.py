"""Calls of the test suite, moved to the device and run in memory that holds NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from calls import Call
from torch import Tensor

from bench.gpu.accelerator import StandIn

MODES = ("deterministic", "free")


def moved(value: Any, device: str) -> Any:
    """Tensors on the device with the strides, gaps and shared elements they have here."""
    if not isinstance(value, Tensor):
        return value
    storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    there = storage.to(device)
    return there.as_strided(value.size(), value.stride(), value.storage_offset())


def on_device(call: Call, device: str) -> Call:
    fields = {
        name: moved(getattr(call, name), device)
        for name in ("q", "k", "v", "scale", "grad_out", "grad_lse")
    }
    options = {name: moved(value, device) for name, value in call.options.items()}
    return replace(call, options=options, **fields)


def run_in(mode: str, where: StandIn, call: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The results on the CPU; what the kernels do not write is NaN in both modes.

    In deterministic mode torch fills new tensors itself; otherwise the allocator's blocks are.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode == "deterministic")
    try:
        where.poison()
        return {name: result.cpu() for name, result in call().items()}
    finally:
        torch.use_deterministic_algorithms(before)
