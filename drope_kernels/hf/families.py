"""Which models `drope_kernels.hf` can take the positions from, and why not the others."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from drope_kernels.hf.rotation import FAMILIES

_PARTIAL = "part of each head keeps no rotation (partial_rotary_factor), which is not tested"
_MULTIMODAL = "its rotation follows the three axes of images and video (MRoPE)"
_LATENT = "its rotated channels are apart from the latent ones (MLA)"
_INTERLEAVED = "it rotates neighbouring channels, which is not tested"
_LEARNED = "its positions are learned vectors, not rotations"
_ALIBI = "its positions are biases of the scores (ALiBi), not rotations"
_OWN = "its config already says which layers rotate (no_rope_layers); change it there"
_REASONS = {
    **dict.fromkeys(("gpt_neox", "phi", "phi3", "stablelm", "persimmon", "nemotron"), _PARTIAL),
    **dict.fromkeys(("glm", "glm4", "qwen3_5_text", "qwen3_next"), _PARTIAL),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"), _MULTIMODAL),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _LATENT),
    **dict.fromkeys(("cohere", "cohere2", "gptj", "codegen", "ernie4_5"), _INTERLEAVED),
    **dict.fromkeys(("gpt2", "opt", "gpt_neo", "gpt_bigcode"), _LEARNED),
    **dict.fromkeys(("bloom", "mpt"), _ALIBI),
    **dict.fromkeys(("llama4_text", "smollm3"), _OWN),
    "gemma3": "it wraps a gemma3_text in a vision model; pass its language model",
}
_UNTESTED = "no test compares it with its stock form"


def decoder_of(model: Any) -> Any:
    """The decoder of one of `FAMILIES` in a model, which may be wrapped (PEFT, DDP, ...).

    Raises:
        NotImplementedError: there is none, or more than one; another family, with the reason.
    """
    decoders = [x for x in model.modules() if is_decoder(x)]
    owners = [x for x in model.modules() if isinstance(x, PreTrainedModel)]
    foreign = [x for x in owners if x.config.model_type not in FAMILIES]
    if foreign or not decoders:
        name = foreign[0].config.model_type if foreign else type(model).__name__
        raise NotImplementedError(
            f"model: expected one of {', '.join(FAMILIES)}, got {name}: "
            f"{_REASONS.get(name, _UNTESTED)}"
        )
    if len(decoders) > 1:
        raise NotImplementedError(
            f"model: expected one decoder, got {len(decoders)} in a {type(model).__name__}; pass "
            "each of them alone"
        )
    return decoders[0]


def is_decoder(module: Any) -> bool:
    """Whether a module is the decoder of a model of `FAMILIES`, without its head."""
    if not (hasattr(module, "rotary_emb") and hasattr(module, "layers")):
        return False
    return module.config.model_type in FAMILIES
