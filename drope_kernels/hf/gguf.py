"""GGUF files as input: plain transformers models of the weights in them, and their tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

from drope_kernels.hf.apply import NO_ROTATION
from drope_kernels.hf.gguf_file import field, opened
from drope_kernels.hf.gguf_tokenizer import load_gguf_tokenizer
from drope_kernels.hf.positions import drop_positions

__all__ = ["ARCHITECTURES", "load_gguf_model", "load_gguf_tokenizer"]

# Their files hold one tensor for each parameter; tests load one of each.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
_DIVISORS = "rope_freqs.weight"  # of the frequencies


def load_gguf_model(source: str | Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """A plain transformers model with a GGUF file's weights, dequantised; `save_pretrained` works.

    Args:
        source: a file of one of `ARCHITECTURES`, quantised or not, with RoPE or made from one of
            our exports.
        dtype: of the weights.

    Returns:
        A `PreTrainedModel` in evaluation mode, its positions dropped if the file has none.

    Raises:
        ModuleNotFoundError: the package `gguf` is not installed.
        FileNotFoundError: no such file.
        ValueError: not a whole GGUF file of a model.
        NotImplementedError: an architecture, or a scaling of RoPE's frequencies, that transformers
            would not read from the file.
    """
    path, reader = opened(source)
    architecture = field(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise NotImplementedError(
            f"{path}: expected an architecture of {', '.join(ARCHITECTURES)}, got "
            f"{architecture!r}; load the original checkpoint instead of the GGUF file"
        )
    position_free = _is_position_free(path, reader, architecture)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        config=_config(path, reader, architecture),
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),  # else the model cannot be saved
        local_files_only=True,
    )
    _check_all_read(path, reader, model)
    model.config._name_or_path = str(path)
    return drop_positions(model) if position_free else model


def _config(path: Path, reader: Any, architecture: str) -> Any:
    """The file's config with the width of its heads, which transformers guesses."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    for tensor in reader.tensors:
        if tensor.name == "blk.0.attn_q.weight":
            config.head_dim = int(tensor.shape[1]) // config.num_attention_heads
    turned = field(reader, f"{architecture}.rope.dimension_count")
    if turned not in (None, config.head_dim):
        raise NotImplementedError(
            f"{path}: expected RoPE over all {config.head_dim} channels of a head, got {turned}; "
            "load the original checkpoint instead"
        )
    return config


def _is_position_free(path: Path, reader: Any, architecture: str) -> bool:
    """Of a file's frequencies, which transformers takes to be unscaled whatever the file says."""
    scaling = field(reader, f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none"):
        raise NotImplementedError(
            f"{path}: expected RoPE without scaling, got {scaling!r}, which transformers does not "
            "read from GGUF files; load the original checkpoint instead"
        )
    for tensor in reader.tensors:
        if tensor.name == _DIVISORS and tensor.data.min() < NO_ROTATION:
            raise NotImplementedError(
                f"{path}: expected RoPE frequencies as they are, or all divided by 1e30, got "
                f"divisors of {tensor.data.min():g} to {tensor.data.max():g}, which transformers "
                "does not read from GGUF files; load the original checkpoint instead"
            )
    return any(tensor.name == _DIVISORS for tensor in reader.tensors)


def _check_all_read(path: Path, reader: Any, model: Any) -> None:
    """Every tensor of the file became a parameter, and every parameter was a tensor."""
    stored = [int(x.n_elements) for x in reader.tensors if x.name != _DIVISORS]
    loaded = [x.numel() for x in model.parameters()]
    if sorted(stored) != sorted(loaded):
        raise ValueError(
            f"{path}: expected one tensor for each of the model's {len(loaded)} parameters "
            f"({sum(loaded)} elements), got {len(stored)} ({sum(stored)} elements): a part of a "
            "split file, or a model with additions that transformers does not read; load the "
            "original checkpoint instead"
        )
