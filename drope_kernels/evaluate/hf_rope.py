"""RoPE baselines on a transformers model: its rotary embedding built anew, and put back after."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

ScaledMethod = Literal["PI", "NTK", "dynamic NTK", "YaRN"]
SCALED_METHODS: tuple[ScaledMethod, ...] = get_args(ScaledMethod)
LOCAL = "sliding_attention"  # no distance in such a layer exceeds its window: never scaled


@contextmanager
def scaled_rope(
    model: Any, method: ScaledMethod, train_length: int, longest: int
) -> Iterator[Callable[[int], None]]:
    """Gives a function that sets a model's rotation for inputs of a length; undone on leaving.

    PI, NTK and YaRN take the factor length / train_length, one for the whole input: the best case
    of each at that length. Dynamic NTK takes longest / train_length at every length, as a config
    says it once for all, and the base that transformers adapts to an input of that length; it
    stays while an answer is generated, as the keys in the cache were turned by it. Up to
    train_length all of them are the model's own rotation. The config is never touched.

    Args:
        model: with the stock rotary embedding, rope_type "default".
        method: one of `SCALED_METHODS`.
        train_length: tokens.
        longest: tokens, the greatest length that will be set.

    Raises:
        NotImplementedError: as `scaling_refusal` says.
    """
    refusal = scaling_refusal(model.config)
    if refusal is not None:
        raise NotImplementedError(refusal)
    decoder = model.get_decoder()
    stock = decoder.rotary_emb

    def settle(length: int) -> None:
        if length <= train_length:
            decoder.rotary_emb = stock
            return
        config = scaled_config(decoder.config, method, length, train_length, longest)
        device = next(decoder.parameters()).device
        decoder.rotary_emb = type(stock)(config).to(device)

    try:
        yield settle
    finally:
        decoder.rotary_emb = stock


def scaling_refusal(config: Any) -> str | None:
    """Why no method can scale this model's rotation, or None."""
    for parameters in _by_type(config.rope_parameters).values():
        if parameters["rope_type"] != "default":
            return (
                "rope_parameters: expected rope_type 'default' to scale, got "
                f"{parameters['rope_type']!r}, which is scaled already"
            )
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            return (
                "rope_parameters: expected every channel of a head to rotate, got "
                f"partial_rotary_factor {parameters['partial_rotary_factor']}"
            )
    return None


def scaled_config(
    config: Any, method: ScaledMethod, length: int, train_length: int, longest: int
) -> Any:
    """A copy of the config whose rope_parameters are those of `method` at `length`."""
    if method not in SCALED_METHODS:
        raise ValueError(f"method: expected one of {SCALED_METHODS}, got {method!r}")
    config = copy.deepcopy(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    factor, most = length / train_length, longest / train_length
    for layer_type, parameters in _by_type(config.rope_parameters).items():
        if layer_type == LOCAL:
            continue
        if method == "PI":
            parameters.update(rope_type="linear", factor=factor)
        elif method == "YaRN":
            parameters.update(
                rope_type="yarn", factor=factor, original_max_position_embeddings=train_length
            )
        else:  # a larger base is all that NTK is
            by = factor if method == "NTK" else most * factor - (most - 1)
            parameters["rope_theta"] *= by ** (head_dim / (head_dim - 2))
    return config


def _by_type(rope_parameters: dict[str, Any]) -> dict[str | None, dict[str, Any]]:
    """The parameters of each type of layers; None where one rotation serves all."""
    nested: dict[str | None, dict[str, Any]] = {
        layer_type: x for layer_type, x in rope_parameters.items() if isinstance(x, dict)
    }
    return nested or {None: rope_parameters}
