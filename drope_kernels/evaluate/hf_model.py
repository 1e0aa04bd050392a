"""A transformers model under evaluation: states and head apart, so that memory is O(length)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from drope_kernels.evaluate.model_calls import DecodingModel

AttentionName = Literal["kernels", "sdpa", "eager"]
ATTENTIONS: tuple[AttentionName, ...] = ("kernels", "sdpa", "eager")
_PROBE_TOKENS = 5


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
    decoder, output = model.get_decoder(), model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    device = output.weight.device

    def hidden(input_ids: Tensor) -> Tensor:
        states: Tensor = decoder(input_ids.to(device), use_cache=False).last_hidden_state
        return states

    def head(states: Tensor) -> Tensor:
        logits: Tensor = output(states)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def greedy(input_ids: Tensor, count: int) -> Tensor:
        found: list[Tensor] = []
        cache, given = None, input_ids.to(device)
        with torch.no_grad():  # else the states of every layer would be kept
            for _ in range(count):
                step = decoder(given, past_key_values=cache, use_cache=True)
                cache = step.past_key_values
                given = head(step.last_hidden_state[:, -1:]).argmax(dim=-1)
                found.append(given)
        return torch.cat(found, dim=1)

    _check_parts(model, hidden, head)
    return DecodingModel(hidden, head, greedy)


def _check_parts(model: Any, hidden: Any, head: Any) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    probe = torch.arange(_PROBE_TOKENS)[None] % vocabulary
    with torch.no_grad():
        expected = model(probe.to(model.device), use_cache=False).logits
        got = head(hidden(probe))
    if not torch.allclose(got.float(), expected.float(), rtol=1e-2, atol=1e-2):
        raise NotImplementedError(
            f"model: expected logits that are the output embedding of the decoder's states, got "
            f"{type(model).__name__}, which computes others; pass a SplitModel of your own to "
            "drope_kernels.evaluate.run_sweep"
        )
