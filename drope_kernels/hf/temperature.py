"""The softmax temperature of a transformers model, as a factor of its attention logits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from drope_kernels.hf.apply import apply_state
from drope_kernels.hf.families import decoder_of
from drope_kernels.hf.state import DropState


def set_temperature(model: Any, beta: float) -> Any:
    """Multiplies the attention logits of every layer by beta, in place; 1.0 undoes it.

    Recorded in `config.drope`, which `load_model` reads; other loaders do not, and need
    `export`. The paper's beta for a length s times the trained one is 1 + c ln s.
    Source: DroPE, arXiv 2512.12167, appendix C.2.

    Args:
        model: a `PreTrainedModel` of `FAMILIES`, dropped or not.
        beta: factor of the stock model's logits, finite and positive, not of the last call's.

    Returns:
        The model.

    Raises:
        ValueError, TypeError: beta is not such a number.
        NotImplementedError: a model of another family.
    """
    if isinstance(beta, bool) or not isinstance(beta, int | float):
        raise TypeError(f"beta: expected a number, got {type(beta).__name__}; 1.0 undoes it")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta: expected a finite number > 0, got {beta}; 1.0 undoes it")
    decoder = decoder_of(model)
    state = DropState.from_config(decoder.config)
    apply_state(decoder, replace(state, temperature=float(beta)))
    return model


def logit_factors(model: Any) -> list[float]:
    """Of each layer: by what its logits are multiplied beyond the stock model's scale."""
    attentions = [layer.self_attn for layer in decoder_of(model).layers]
    return [x.scaling / getattr(x, "stock_scaling", x.scaling) for x in attentions]
