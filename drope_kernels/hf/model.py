"""`use_kernels`: a transformers model computes its attention with these kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from drope_kernels.call.dispatch import available_backends
from drope_kernels.hf.apply import check_applied
from drope_kernels.hf.cache import RawDynamicCache, RawKeys, check_positions, require_raw
from drope_kernels.hf.families import is_decoder
from drope_kernels.hf.interface import KernelChoice, attend
from drope_kernels.hf.masks import key_ranges
from drope_kernels.hf.ranges import Unpadded
from drope_kernels.hf.rotation import FAMILIES, dropped_layers, rotates_in_kernel, settle_rotation

NAME = "drope_kernels"
# What the forward of a decoder of FAMILIES calls its arguments, in order.
_ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "use_cache",
)

AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, key_ranges)


def use_kernels(model: Any, *, backend: str = "auto", fused_rotation: bool = False) -> Any:
    """Makes a transformers model compute its attention with these kernels, in place.

    Logits, gradients and `generate()` stay those of the eager attention, up to rounding, except
    that padding tokens attend to nothing. Call it again to change the arguments, and
    `model.set_attn_implementation("sdpa")` to go back.

    Args:
        model: a `PreTrainedModel` whose attention goes through `AttentionInterface`.
        backend: as in `attention`.
        fused_rotation: rotate queries and keys inside the kernel. Caches then hold unrotated keys
            and cannot be exchanged with other models. For the families of `FAMILIES`.

    Returns:
        The model.

    Raises:
        ValueError: an unknown backend; a model that transformers itself loaded, without what its
            `config.drope` tells.
        NotImplementedError: a model that cannot; calls of it that need something the kernels do
            not have (dense masks, dropout, sinks, attention weights, ...) raise it by name.
    """
    if backend not in ("auto", *available_backends()):
        raise ValueError(
            f"backend: expected 'auto' or one of {available_backends()}, got {backend!r}"
        )
    decoders = [x for x in model.modules() if is_decoder(x)]
    if fused_rotation and not decoders:
        raise NotImplementedError(
            f"model: expected one of {', '.join(FAMILIES)} with fused_rotation=True, got "
            f"{model.config.model_type}; use fused_rotation=False"
        )
    for decoder in decoders:
        check_applied(model, decoder)
    for decoder in decoders:
        settle_rotation(decoder, dropped_layers(decoder), NAME if fused_rotation else None)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise NotImplementedError(
            f"model: expected attention through transformers' AttentionInterface, got "
            f"{type(model).__name__}, which does not use it"
        )
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            choice = getattr(module, "drope_kernels", KernelChoice())
            module.drope_kernels = replace(choice, backend=backend)
    for decoder in decoders:
        if before_forward not in decoder._forward_pre_hooks.values():
            decoder.register_forward_pre_hook(before_forward, with_kwargs=True)
            decoder.register_forward_hook(after_forward, with_kwargs=True, always_call=True)
    return model


def before_forward(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]] | None:
    """Forward pre-hook of a decoder: says that rows are not packed, readies the cache."""
    if decoder.config._attn_implementation != NAME:
        return None
    kwargs = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    tokens = kwargs.get("input_ids")
    batch, seqlen = (kwargs["inputs_embeds"] if tokens is None else tokens).shape[:2]
    if rotates_in_kernel(decoder):
        _ready_cache(decoder, kwargs, (batch, seqlen))
    if kwargs.get("attention_mask") is None and (
        kwargs.get("position_ids") is None
        or kwargs.get("cu_seq_lens_q") is not None
        or kwargs.get("past_key_values") is not None
    ):
        kwargs["attention_mask"] = Unpadded((batch, seqlen))
    return (), kwargs


def _ready_cache(decoder: Any, kwargs: dict[str, Any], shape: tuple[int, int]) -> None:
    """A cache of raw keys, open for writing, whose keys the new positions follow."""
    cache = kwargs.get("past_key_values")
    if cache is None:
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = decoder.config.use_cache
        if not use_cache or (decoder.gradient_checkpointing and decoder.training):
            return
        cache = kwargs["past_key_values"] = RawDynamicCache(config=decoder.config)
    require_raw(cache)
    if not torch.compiler.is_compiling():
        check_positions(cache, kwargs.get("position_ids"), kwargs.get("attention_mask"), shape)
    cache.writable = True


def after_forward(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Forward hook: closes a cache of raw keys, also after an exception."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, RawKeys):
        cache.writable = False
