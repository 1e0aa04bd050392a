"""A causal transformers model in two: its decoder's states, and what its head makes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PROBED_TOKENS = 8
_SHARE = 0.02  # of the largest logit: more than 16-bit rounding, less than any other head


def decoder_states(model: Any, **inputs: Any) -> Tensor:
    """What the head reads: (B, S, E). No cache is made."""
    states: Tensor = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    return states


def head_logits(model: Any, states: Tensor) -> Tensor:
    """Logits (..., V) of states (..., E), Gemma's cap included."""
    logits: Tensor = model.get_output_embeddings()(states)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.no_grad()
def is_split(model: Any) -> bool:
    """Whether the model's logits are `head_logits` of its `decoder_states`: on a few tokens."""
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.arange(_PROBED_TOKENS, device=model.device)[None] % vocabulary
    training = model.training
    model.eval()
    try:
        expected = model(input_ids=tokens, use_cache=False).logits.float()
        found = head_logits(model, decoder_states(model, input_ids=tokens)).float()
    finally:
        model.train(training)
    limit = _SHARE * float(expected.abs().max())
    return torch.allclose(found, expected, rtol=0.0, atol=limit)
