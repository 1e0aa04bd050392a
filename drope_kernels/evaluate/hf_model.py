"""A transformers model under evaluation: states and head apart, so that memory is O(length)."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from drope_kernels.evaluate.model_calls import DecodingModel
from drope_kernels.hf.head import decoder_states, head_logits, is_split

AttentionName = Literal["kernels", "sdpa", "eager"]
ATTENTIONS: tuple[AttentionName, ...] = ("kernels", "sdpa", "eager")


def choose_attention(model: Any, name: AttentionName) -> None:
    """Sets what computes the attention: these kernels, or transformers' sdpa or eager form.

    Raises:
        NotImplementedError: a model that cannot, as `hf.use_kernels` says.
    """
    if name == "kernels":
        from drope_kernels.hf import use_kernels

        use_kernels(model)
    else:
        model.set_attn_implementation(name)


def decoding_model(model: Any) -> DecodingModel:
    """A causal transformers model as states and head, so that (S, V) logits never exist.

    Inputs may be on any device, results are on the model's.

    Raises:
        NotImplementedError: a model whose logits are not its output embedding of the decoder's
            states, softcapped where its config says so. Seen by calling it on a few tokens.
    """
    if not is_split(model):
        raise NotImplementedError(
            f"model: expected logits that are the output embedding of the decoder's states, got "
            f"{type(model).__name__}, which computes others; pass a SplitModel of your own to "
            "drope_kernels.evaluate.run_sweep"
        )
    decoder, device = model.get_decoder(), model.get_output_embeddings().weight.device

    def hidden(input_ids: Tensor) -> Tensor:
        return decoder_states(model, input_ids=input_ids.to(device))

    def greedy(input_ids: Tensor, count: int) -> Tensor:
        found: list[Tensor] = []
        cache, given = None, input_ids.to(device)
        with torch.no_grad():  # else the states of every layer would be kept
            for _ in range(count):
                step = decoder(given, past_key_values=cache, use_cache=True)
                cache = step.past_key_values
                given = head_logits(model, step.last_hidden_state[:, -1:]).argmax(dim=-1)
                found.append(given)
        return torch.cat(found, dim=1)

    return DecodingModel(hidden, partial(head_logits, model), greedy)
