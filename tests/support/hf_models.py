"""Tiny random models of the families that `drope_kernels.hf` knows, and batches for them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma3 import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.mistral import MistralConfig, MistralForCausalLM
from transformers.models.olmo2 import Olmo2Config, Olmo2ForCausalLM
from transformers.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

from drope_kernels import hf

VOCABULARY = 61
WINDOW = 7  # shorter than every sequence here
_FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": WINDOW}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 9,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {}),
}
FAMILIES = tuple(_FAMILIES)
# Two layers of float32 sums of up to 64 terms in another order: some 2e-6 measured, of the largest.
TOLERANCE = 1e-5
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
}
STOCK_ATTENTION = ("eager", "sdpa")
ATTENTION = (*STOCK_ATTENTION, "kernels", "fused rotation")


def build(family: str, **changes: Any) -> Any:
    """A stock model with the eager attention, weights large enough for sharp attention."""
    model_class, config_class, specific = _FAMILIES[family]
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    torch.manual_seed(FAMILIES.index(family))
    model = model_class(config_class(**{**options, **specific, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms start at one value for every channel
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def dropped(family: str, beta: float = 1.0, **changes: Any) -> Any:
    """Such a model without positions, at a temperature."""
    return hf.set_temperature(hf.drop_positions(build(family, **changes)), beta)


def copied(model: Any) -> Any:
    """A model of its own with the same weights."""
    return copy.deepcopy(model)


def tokens(batch: int = 2, seqlen: int = 19) -> Tensor:
    """(B, S) without padding tokens."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(1, VOCABULARY, (batch, seqlen), generator=generator)


def padding(batch: int = 2, seqlen: int = 19, *, left: int = 0, right: int = 0) -> Tensor:
    """(B, S) int64: `left` padding tokens in the first row, `right` in the last."""
    mask = torch.ones((batch, seqlen), dtype=torch.int64)
    mask[0, :left] = 0
    mask[-1, seqlen - right :] = 0
    return mask


def packed(*rows: list[int]) -> Tensor:
    """position_ids (B, S) of rows of sequences with the given lengths."""
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])


def close(name: str, ours: Tensor, theirs: Tensor, size: Tensor | None = None) -> None:
    """Within `TOLERANCE` of the largest number of theirs, or of `size`."""
    limit = TOLERANCE * (theirs if size is None else size).abs().max()
    error = (ours - theirs).abs().max()
    assert error <= limit, f"{name}: {error:.3g} > {limit:.3g}"


def logits(model: Any, inputs: dict[str, Any] | None = None) -> Tensor:
    """Of the tokens that are not padding, by default `tokens()`."""
    inputs = {"input_ids": tokens()} if inputs is None else inputs
    with torch.no_grad():
        out: Tensor = model(**inputs).logits
    mask = inputs.get("attention_mask")
    return out if mask is None else out[mask.bool()]


def with_attention(model: Any, name: str) -> Any:
    """The same model with one of `ATTENTION`."""
    if name not in STOCK_ATTENTION:
        return hf.use_kernels(model, fused_rotation=name == "fused rotation")
    model.set_attn_implementation(name)
    return model


def with_identity_rotation(model: Any, layers: Iterable[int] | None = None) -> Any:
    """The same model whose stock code turns these layers' queries and keys by cos 1, sin 0."""
    for index, layer in enumerate(model.get_decoder().layers):
        if layers is None or index in layers:
            layer.register_forward_pre_hook(_identity, with_kwargs=True)
    return model


def _identity(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    cos, sin = kwargs["position_embeddings"]
    return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_calls() -> Any:
    """Counts calls of torch's ops by name, such as "drope::attention_fwd"."""
    with _Counting() as mode:
        yield mode.calls
