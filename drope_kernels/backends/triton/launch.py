"""Starting kernels on the device of their tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from drope_kernels.backends.triton.config import family_of
from drope_kernels.spec.layout import is_aligned
from drope_kernels.spec.spec import Rotation

# Inside a tile of rows offsets are int32; no tile has more rows than this.
_TALLEST_TILE = 256


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


def rotary_constants(rotation: Rotation | None, head_dim: int) -> dict[str, int]:
    """How a kernel splits the channels of a row: into pairs that rotate and others that do not."""
    dim = 0 if rotation is None else rotation.dim
    still = head_dim - dim
    return {
        "ROTARY_DIM": dim,
        "INTERLEAVED": rotation is not None and rotation.interleaved,
        "BLOCK_PAIRS": padded(dim // 2) if dim else 0,
        "BLOCK_STILL": padded(still) if still else 0,
    }


def num_blocks(seqlen: int, block: int, num_seqs: int) -> int:
    """Tiles of one head and batch row; of packed sequences at most, as lengths are the device's."""
    return -(-seqlen // block) + num_seqs


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 tiles are multiplied: as torch.set_float32_matmul_precision says."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def short_rows(x: Tensor) -> Tensor:
    """`x` (batch, heads, rows, channels), copied if its rows are too far apart for a tile."""
    return x if abs(x.stride(2)) * _TALLEST_TILE < 2**31 else x.contiguous()


def with_tma(architecture: int, *tensors: Tensor) -> bool:
    """Whether all of the tensors (batch, heads, rows, channels) can be read by TMA.

    float32 is left out: its products are computed from registers, not from what TMA brings.
    Expanded tensors are left out: the step of a tensor map is not documented to be allowed as 0.
    """
    return family_of(architecture) == 90 and all(
        x.dtype != torch.float32 and x.numel() > 0 and is_aligned(x) and 0 not in _steps(x)
        for x in tensors
    )


def _steps(x: Tensor) -> list[int]:
    """Strides; a step that nobody takes, of any size in torch, is a row."""
    row = padded(x.shape[3])
    return [step if size > 1 else row for step, size in zip(x.stride(), x.shape, strict=True)]


def tma_of(x: Tensor, block_rows: int, block_dim: int) -> TensorDescriptor:
    """What reads `x` (batch, heads, rows, channels) in blocks of rows of one head."""
    strides = [*_steps(x)[:3], 1]
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, block_rows, block_dim])
