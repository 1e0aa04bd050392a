"""Starting kernels on the device of their tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current device: makes it that of `x`."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


@cache
def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture_of(x: Tensor) -> int:
    """Compute capability as configs are chosen by it: 80, 90. The interpreter counts as 80."""
    return _capability(x.device.index) if x.device.type == "cuda" else 80


def padded(dim: int) -> int:
    """The power of two that holds `dim` channels; a product of tiles takes at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def num_blocks(seqlen: int, block: int, num_seqs: int) -> int:
    """Tiles of one head and batch row; of packed sequences at most, as lengths are the device's."""
    return -(-seqlen // block) + num_seqs


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 tiles are multiplied: as torch.set_float32_matmul_precision says."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"
