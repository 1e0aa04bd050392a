"""`KeyRanges`: which keys each query of a forward pass sees, in the words of `attention`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeyRanges:
    """Every query sees an interval of the keys: what our mask function returns, never a dense mask.

    Query i of row b sits at key index q_start[b] + i. Packed rows have cu_seqlens instead of the
    three tensors before it.
    """

    q_length: int
    kv_length: int
    causal: bool
    window: int | None = None
    q_start: int | Tensor = 0  # Tensor: (B,) int32
    kv_start: Tensor | None = None  # (B,) int32
    kv_end: Tensor | None = None  # (B,) int32
    cu_seqlens: Tensor | None = None  # (num_seqs + 1,) int32, over the B * S tokens of all rows

    # transformers and accelerate ask these of a mask that they only pass on.
    ndim: ClassVar[int] = 4

    def contiguous(self) -> KeyRanges:
        return self

    def to(self, device: Any, **options: Any) -> KeyRanges:
        moved: dict[str, Any] = {
            name: x.to(device, **options) for name, x in vars(self).items() if isinstance(x, Tensor)
        }
        return replace(self, **moved)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise _no_tensor(f".{name}")

    def __getitem__(self, index: Any) -> Any:
        raise _no_tensor("[...]")

    def __add__(self, other: Any) -> Any:
        raise _no_tensor(" + ...")

    def __mul__(self, other: Any) -> Any:
        raise _no_tensor(" * ...")

    __radd__, __rmul__ = __add__, __mul__


class NoTensorError(NotImplementedError, AttributeError):
    """A model computes with its mask; `hasattr` says that the mask has no such thing."""


def _no_tensor(use: str) -> NoTensorError:
    return NoTensorError(
        f"attention_mask: expected a model that only hands it to its attention, got one that "
        f"computes with it (mask{use}); these kernels make no dense mask, use the eager or sdpa "
        "attention"
    )


class Unpadded:
    """Stands where a 2-D attention_mask (B, S) would: every token counts, no row is packed.

    With it transformers does not look for packed rows in position_ids, which costs a device a
    synchronisation and `torch.compile` its knowledge that there are none.
    """

    ndim = 4  # not a 2-D mask to be cast to bool

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def to(self, device: Any, **options: Any) -> Unpadded:
        return self


def ranges_of_padding(
    padding: Tensor, kv_length: int, kv_offset: int
) -> tuple[Tensor | None, Tensor | None]:
    """kv_start and kv_end (B,) int32 of a bool mask (B, length) whose first key is key -kv_offset.

    Keys behind its end are not valid. One look at the values decides whether the mask can be
    left out, and refuses holes; while compiling the second is an assertion in the graph.

    Raises:
        ValueError: a row whose valid tokens are not one run.
    """
    batch, length = padding.shape
    count = padding.sum(-1)
    start = padding.int().argmax(-1)  # of the first True
    whole, in_one_run = _facts(padding, start, count)
    if not in_one_run:
        raise ValueError(_HOLES)
    kv_end: Tensor | None
    if whole:
        if length >= kv_offset + kv_length:
            return None, None
        return None, count.new_full((batch,), length - kv_offset, dtype=torch.int32)
    kv_start = (start - kv_offset).clamp(0, kv_length).int()
    kv_end = (start + count - kv_offset).clamp(0, kv_length).int()
    return kv_start, kv_end


_HOLES = (
    "attention_mask: expected each row's valid tokens in one run, padding only on its left and "
    "right, got a row with a hole; these kernels attend to intervals of keys: pack the sequences "
    "with position_ids, or use the eager attention"
)


def _facts(padding: Tensor, start: Tensor, count: Tensor) -> tuple[bool, bool]:
    """Whether every token is valid, and whether the valid ones of each row are one run."""
    index = torch.arange(padding.shape[1], device=padding.device)
    run = (index >= start[:, None]) & (index < (start + count)[:, None])
    in_one_run = (run == padding).all()
    if torch.compiler.is_compiling():
        torch._assert_async(in_one_run, _HOLES)
        return False, True
    whole, in_one_run = torch.stack([padding.all(), in_one_run]).tolist()
    return bool(whole), bool(in_one_run)


def cu_seqlens_of_segments(segments: Tensor) -> Tensor:
    """(num_seqs + 1,) int32 of a (B, S) tensor whose rows number their sequences in order."""
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    begin = starts.flatten().nonzero().flatten()
    return torch.cat([begin, begin.new_tensor([segments.numel()])]).int()
