"""Rotation inside the kernel: a model's own rotary embedding is passed by."""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import Tensor, nn

from drope_kernels.rope import Rope

# Their attention calls `apply_rotary_pos_emb` of its module on pairs (i, i + D / 2) and hands
# position_ids to the attention function; tests compare each with its stock form.
FAMILIES = ("gemma3_text", "llama", "mistral", "olmo2", "qwen2", "qwen3")
_FIXED_TYPES = ("default", "linear", "llama3", "yarn", "proportional")


class InKernel:
    """Stands where cos and sin would: the attention function rotates."""


_IN_KERNEL = InKernel()


class KernelRotary(nn.Module):
    """Takes the place of a model's rotary_emb and computes no angles."""

    def __init__(self, stock: Any, attention: str) -> None:
        super().__init__()
        self.stock = stock
        self.attention = attention  # name of the attention function that rotates

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self.stock.config._attn_implementation != self.attention:
            return self.stock(hidden_states, *args, **kwargs)
        return _IN_KERNEL, _IN_KERNEL


def bypass(attention: nn.Module) -> None:
    """Lets `apply_rotary_pos_emb`, as this attention module's class sees it, know `InKernel`.

    The function is replaced for the process; for cos and sin that are tensors it is what it was.
    """
    module: Any = sys.modules[type(attention).__module__]
    stock = module.apply_rotary_pos_emb
    if getattr(stock, "knows_in_kernel", False):
        return

    @functools.wraps(stock)
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Any, sin: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if isinstance(cos, InKernel):
            return q, k
        return stock(q, k, cos, sin, *args, **kwargs)

    apply_rotary_pos_emb.knows_in_kernel = True  # type: ignore[attr-defined]
    module.apply_rotary_pos_emb = apply_rotary_pos_emb


def rope_of(rotary: Any, layer_type: str | None) -> Rope:
    """The rotation that a model's rotary_emb makes in layers of one type.

    Raises:
        NotImplementedError: frequencies that change with the length of the input.
    """
    prefix = f"{layer_type}_" if hasattr(rotary, f"{layer_type}_inv_freq") else ""
    rope_type = rotary.rope_type[layer_type] if prefix else rotary.rope_type
    if rope_type not in _FIXED_TYPES:
        raise NotImplementedError(
            f"rope_parameters: expected a rope_type of {', '.join(_FIXED_TYPES)} with "
            f"fused_rotation=True, got {rope_type!r}, whose frequencies change with the length; "
            "use fused_rotation=False"
        )
    inv_freq: Tensor = getattr(rotary, f"{prefix}inv_freq")
    return Rope(
        inv_freq=inv_freq.detach().float().cpu(),
        attention_factor=float(getattr(rotary, f"{prefix}attention_scaling")),
    )
