"""A `DropState` put into effect: rotation, norms and logit scale of a decoder, and its config."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from drope_kernels.hf.provenance import forget_top_level
from drope_kernels.hf.qk_norm import add_norms, norms_of, remove_norms
from drope_kernels.hf.rotation import (
    attention_factor,
    dropped_layers,
    fused_by,
    layer_types,
    settle_rotation,
    stock_rotary,
)
from drope_kernels.hf.state import DropState

_FACTOR = 1e30  # by which frequencies are divided: no angle is left that float32 sees
NO_ROTATION = 1e29  # of other people's: less turns by an angle that float32 sees, somewhere


def apply_state(decoder: Any, state: DropState) -> None:
    """Brings a decoder and its config from whatever state they are in into this one.

    Raises:
        ValueError: its config tells of norms that it does not have; nothing has changed then.
        NotImplementedError: fused rotation by frequencies that the kernel cannot know; likewise.
    """
    config = decoder.config
    recorded = DropState.from_config(config)
    attentions = [layer.self_attn for layer in decoder.layers]
    if recorded.qk_norm and not any(map(norms_of, attentions)):
        raise ValueError(
            "model: expected the norms of queries and keys that its config tells of, got a model "
            "without them; load it with drope_kernels.hf.load_model"
        )
    original = copy.deepcopy(config.rope_parameters)
    if turns_nothing(original):
        original = recorded.rope_parameters or original
    rotary = stock_rotary(decoder)
    if recorded.dropped_layers and not dropped_layers(decoder):
        # As transformers itself loaded it: its rotary embedding may be the position-free one.
        rotary = _rebuilt(rotary, config, original)
    settle_rotation(decoder, state.dropped_layers, fused_by(decoder), rotary)
    for index, attention in enumerate(attentions):
        if state.qk_norm is None or index not in state.dropped_layers:
            remove_norms(attention)
        elif norms_of(attention) is None:
            add_norms(attention, state.qk_norm)
    _settle_logits(decoder, state.temperature)
    forget_top_level(config)
    config.rope_parameters = copy.deepcopy(original)
    whole = len(state.dropped_layers) == len(attentions)
    if whole and state.qk_norm is None:
        config.rope_parameters = position_free_parameters(config)
    replace(state, rope_parameters=original).into_config(config)


def _rebuilt(rotary: Any, config: Any, parameters: dict[str, Any]) -> Any:
    """The rotary embedding that transformers would build for other `rope_parameters`."""
    before = copy.copy(config)
    forget_top_level(before)
    before.rope_parameters = copy.deepcopy(parameters)
    rebuilt = type(rotary)(config=before).to(next(rotary.buffers()).device)
    rebuilt.config = config
    return rebuilt


def _settle_logits(decoder: Any, beta: float) -> None:
    """Sets every layer's logit scale: stock, times beta, times what dropping would have lost.

    YaRN's attention factor multiplies rotated queries and keys; dropped layers keep it squared.
    """
    stock, dropped = stock_rotary(decoder), dropped_layers(decoder)
    types = layer_types(decoder)
    for index, layer in enumerate(decoder.layers):
        factor = beta
        if index in dropped:
            factor *= attention_factor(stock, types[index]) ** 2
        attention = layer.self_attn
        attention.stock_scaling = getattr(attention, "stock_scaling", attention.scaling)
        attention.scaling = attention.stock_scaling * factor


def check_applied(model: Any, decoder: Any) -> None:
    """ValueError where a config tells of what transformers, which loaded the model, did not do."""
    config, layers = decoder.config, decoder.layers
    state = DropState.from_config(config)
    if state.is_stock or hasattr(layers[0].self_attn, "stock_scaling"):
        return
    before = _rebuilt(
        stock_rotary(decoder), config, state.rope_parameters or config.rope_parameters
    )
    lost = any(attention_factor(before, x) != 1.0 for x in layer_types(decoder))
    whole = len(state.dropped_layers) == len(layers) and state.qk_norm is None
    if lost or not whole or state.temperature != 1.0:
        raise ValueError(
            "model: expected positions, norms and temperature as its config.drope tells, got a "
            f"{type(model).__name__} as transformers itself loads it; load it with "
            "drope_kernels.hf.load_model"
        )


def position_free_parameters(config: Any) -> dict[str, Any]:
    """`rope_parameters` that turn nothing, in the layout of this config, for any stock engine.

    Llama-3's scaling divides frequencies whose wavelength exceeds the original length, here 1, by
    the factor. Nested by the type of layer where the config's are.
    """
    given = config.rope_parameters
    if any(isinstance(x, dict) for x in given.values()):
        return {key: None if x is None else _unturning(x) for key, x in given.items()}
    return _unturning(given)


def turns_nothing(rope_parameters: dict[str, Any]) -> bool:
    """Whether no layer rotates by them, at any position."""
    by_type = [x for x in rope_parameters.values() if isinstance(x, dict)] or [rope_parameters]
    return all(
        x.get("rope_type") == "llama3"
        and x["factor"] >= NO_ROTATION
        and x["original_max_position_embeddings"] <= 1
        for x in by_type
    )


def is_position_free(config: Any) -> bool:
    """Whether a config of transformers says that no layer has positions."""
    if len(DropState.from_config(config).dropped_layers) == config.num_hidden_layers:
        return True
    return turns_nothing(getattr(config, "rope_parameters", None) or {"rope_type": "default"})


def _unturning(parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": parameters["rope_theta"],
        "factor": _FACTOR,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1,
    }
