"""Layers whose queries and keys transformers does not rotate: a kernel does, or nothing does."""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from drope_kernels.hf.interface import KernelChoice
from drope_kernels.hf.qk_norm import norms_of
from drope_kernels.rope import Rope

# Their attention calls `apply_rotary_pos_emb` of its module on pairs (i, i + D / 2) and hands
# position_ids to the attention function; tests compare each with its stock form.
FAMILIES = ("gemma3_text", "llama", "mistral", "olmo2", "qwen2", "qwen3")
_FIXED_TYPES = ("default", "linear", "llama3", "yarn", "proportional")


class Unrotated:
    """Stands where cos and sin would: queries and keys are not rotated, only normalised."""

    def __init__(self, q_norm: nn.Module | None = None, k_norm: nn.Module | None = None) -> None:
        self.q_norm = q_norm
        self.k_norm = k_norm

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Of queries (B, Hq, S, D) and keys (B, Hkv, S, D)."""
        return (
            q if self.q_norm is None else self.q_norm(q),
            k if self.k_norm is None else self.k_norm(k),
        )


_UNROTATED = Unrotated()


class SparingRotary(nn.Module):
    """Takes the place of a model's rotary_emb: computes angles only where a layer reads them."""

    def __init__(self, stock: Any, fused_by: str | None, rotating: Collection[str | None]) -> None:
        super().__init__()
        self.stock = stock
        self.fused_by = fused_by  # name of the attention function that rotates in the kernel
        self.rotating = frozenset(rotating)  # types of layers, None where a model knows no types
        bypass(stock)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        bypass(self.stock)  # which a process that unpickles a model has not done yet

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Any, Any]:
        fused = self.stock.config._attn_implementation == self.fused_by
        if fused or layer_type not in self.rotating:
            return _UNROTATED, _UNROTATED
        typed = {} if layer_type is None else {"layer_type": layer_type}
        angles: tuple[Tensor, Tensor] = self.stock(hidden_states, position_ids, **typed)
        return angles


def stock_rotary(decoder: Any) -> Any:
    """The rotary embedding that transformers built."""
    rotary = decoder.rotary_emb
    return rotary.stock if isinstance(rotary, SparingRotary) else rotary


def fused_by(decoder: Any) -> str | None:
    """Name of the attention function that rotates inside the kernel."""
    rotary = decoder.rotary_emb
    return rotary.fused_by if isinstance(rotary, SparingRotary) else None


def rotates_in_kernel(decoder: Any) -> bool:
    """Whether caches of this decoder hold keys that a kernel still has to rotate."""
    name = fused_by(decoder)
    if name is None or not decoder.rotary_emb.rotating:
        return False
    return bool(decoder.config._attn_implementation == name)


def without_rotation(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a dropped layer's attention; its presence says that it is dropped."""
    unrotated = Unrotated(*(norms_of(attention) or ()))
    return args, {**kwargs, "position_embeddings": (unrotated, unrotated)}


def dropped_layers(decoder: Any) -> tuple[int, ...]:
    """Indices of the layers without positions."""
    return tuple(
        index
        for index, layer in enumerate(decoder.layers)
        if without_rotation in layer.self_attn._forward_pre_hooks.values()
    )


def settle_rotation(
    decoder: Any, dropped: Collection[int], fused_by: str | None, stock: Any = None
) -> None:
    """Makes exactly these layers of a decoder position-free, in place; the others rotate.

    Args:
        decoder: of one of `FAMILIES`.
        dropped: indices of layers.
        fused_by: name of the attention function whose kernel rotates the others' queries and keys,
            None: transformers rotates them.
        stock: the rotary embedding of transformers, None: the one that is there.

    Raises:
        NotImplementedError: frequencies that the kernel cannot know; nothing has changed then.
    """
    before, stock = dropped_layers(decoder), stock or stock_rotary(decoder)
    types = layer_types(decoder)
    rotating = {x for index, x in enumerate(types) if index not in dropped}
    ropes: dict[str | None, Rope | None] = dict.fromkeys(types)
    if fused_by is not None:
        ropes |= {x: rope_of(stock, x) for x in rotating}
    for index, layer in enumerate(decoder.layers):
        attention = layer.self_attn
        rope = None if index in dropped else ropes[types[index]]
        choice = getattr(attention, "drope_kernels", None)
        if choice is not None or rope is not None:
            attention.drope_kernels = replace(choice or KernelChoice(), rope=rope)
        _set_hook(attention, index in dropped)
    if set(before) != set(dropped):
        torch.compiler.reset()  # compiled code does not notice that hooks have come or gone
    if fused_by is None and len(dropped) == 0:
        decoder.rotary_emb = stock
    else:
        decoder.rotary_emb = SparingRotary(stock, fused_by, rotating)


def _set_hook(attention: nn.Module, dropped: bool) -> None:
    hooks = attention._forward_pre_hooks
    present = [key for key, hook in hooks.items() if hook is without_rotation]
    if dropped and not present:
        attention.register_forward_pre_hook(without_rotation, with_kwargs=True)
    elif not dropped:
        for key in present:
            del hooks[key]
            del attention._forward_pre_hooks_with_kwargs[key]


def bypass(rotary: nn.Module) -> None:
    """Lets `apply_rotary_pos_emb`, beside this rotary embedding's class, know `Unrotated`.

    The function is replaced for the process; for cos and sin that are tensors it is what it was.
    """
    module: Any = sys.modules[type(rotary).__module__]
    stock = module.apply_rotary_pos_emb
    if getattr(stock, "knows_unrotated", False):
        return

    @functools.wraps(stock)
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Any, sin: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if isinstance(cos, Unrotated):
            return cos(q, k)
        return stock(q, k, cos, sin, *args, **kwargs)

    apply_rotary_pos_emb.knows_unrotated = True  # type: ignore[attr-defined]
    module.apply_rotary_pos_emb = apply_rotary_pos_emb


def layer_types(decoder: Any) -> list[str | None]:
    """Of each layer: its type, None where one rotation serves every type."""
    stock = stock_rotary(decoder)
    types = getattr(decoder.config, "layer_types", None) or [None] * len(decoder.layers)
    return [x if hasattr(stock, f"{x}_inv_freq") else None for x in types]


def rope_of(rotary: Any, layer_type: str | None) -> Rope:
    """The rotation that a model's rotary_emb makes in layers of one type.

    Raises:
        NotImplementedError: frequencies that change with the length of the input.
    """
    rope_type = rotary.rope_type if layer_type is None else rotary.rope_type[layer_type]
    if rope_type not in _FIXED_TYPES:
        raise NotImplementedError(
            f"rope_parameters: expected a rope_type of {', '.join(_FIXED_TYPES)} with "
            f"fused_rotation=True, got {rope_type!r}, whose frequencies change with the length; "
            "use fused_rotation=False"
        )
    inv_freq: Tensor = getattr(rotary, _named("inv_freq", layer_type))
    return Rope(
        inv_freq=inv_freq.detach().float().cpu(),
        attention_factor=attention_factor(rotary, layer_type),
    )


def attention_factor(rotary: Any, layer_type: str | None) -> float:
    """What a model's rotary_emb multiplies queries, and keys, with (YaRN)."""
    return float(getattr(rotary, _named("attention_scaling", layer_type)))


def _named(attribute: str, layer_type: str | None) -> str:
    return attribute if layer_type is None else f"{layer_type}_{attribute}"
