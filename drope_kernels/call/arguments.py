"""What the public calls have in common on the way to their op: rope, scale, autocast, gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from drope_kernels.call import validate
from drope_kernels.call.unserved import served_window
from drope_kernels.frequencies import constant
from drope_kernels.rope import DEFAULT_ROPE, Rope


def autocast(x: Tensor) -> Tensor:
    """q, k or v in the autocast dtype where autocast is on; what torch's own ops leave, stays."""
    if not isinstance(x, Tensor) or x.dtype not in validate.AUTOCAST_DTYPES:
        return x  # what is wrong with it is for `validate` to say
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def scale_arguments(scale: float | Tensor | None, q: Tensor) -> tuple[Tensor | None, float]:
    """scale_rows (B, Hq, Sq) and scale of the op: autograd reduces the expansion."""
    if isinstance(scale, Tensor):
        return scale.expand(q.shape[:3]), 1.0
    return None, q.shape[-1] ** -0.5 if scale is None else scale


def window_arguments(
    window: int | tuple[int, int] | None, *, causal: bool
) -> tuple[int | None, int | None]:
    """window_left and window_right of the op: keys beside the query's own, None for no limit."""
    if window is None:
        return None, None
    if isinstance(window, tuple):
        left, right = (None if side == -1 else side for side in window)
        served_window(left, right, causal=causal)
    else:
        left = right = window - 1
    return left, (None if left is None else 0) if causal else right


def rope_arguments(
    rope: Rope | bool,
    q: Tensor,
    k: Tensor,
    positions: Tensor | None,
    kv_positions: Tensor | None,
) -> tuple[Tensor | None, bool, float, Tensor | None, Tensor | None]:
    """turns, interleaved, attention_factor, positions and kv_positions of the op."""
    if rope is False:
        return None, False, 1.0, None, None
    if rope is True:
        rope = DEFAULT_ROPE
    validate.check_rope(rope, k.shape[1])
    turns = rope.turns(q.shape[-1], q.device)
    return turns, rope.interleaved, constant(rope.attention_factor), positions, kv_positions


def needs_grad(q: Tensor, k: Tensor, v: Tensor, scale: float | Tensor | None) -> bool:
    """Whether the op should keep what its backward needs."""
    return torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (isinstance(scale, Tensor) and scale.requires_grad)
    )
