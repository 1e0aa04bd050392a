"""`load_model`, `load_tokenizer`: a saved model with its positions dropped as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from drope_kernels.console.paths import user_path
from drope_kernels.hf.apply import apply_state
from drope_kernels.hf.families import decoder_of
from drope_kernels.hf.gguf import load_gguf_model
from drope_kernels.hf.gguf_tokenizer import load_gguf_tokenizer
from drope_kernels.hf.qk_norm import add_norms
from drope_kernels.hf.state import DropState
from drope_kernels.hf.weight_files import check_files, check_no_pointer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_NORMS = (".q_norm.weight", ".k_norm.weight")


def load_model(
    source: str | Path, *, dtype: torch.dtype = torch.float32, **from_pretrained_options: Any
) -> Any:
    """A causal language model, with positions dropped, norms and temperature as it was saved.

    Args:
        source: a directory that `save_pretrained` wrote, or a .gguf file. Nothing is downloaded.
        dtype: of the weights.
        from_pretrained_options: as `AutoModelForCausalLM.from_pretrained` takes them; none for a
            .gguf file.

    Raises:
        FileNotFoundError: no such directory or file, or no config.json in it.
        ValueError: weights that are missing, cut short or not those that `config.drope` tells of;
            a `config.drope` that `drop_positions` does not write.
        NotImplementedError: `config.drope` of a family that cannot be dropped.
    """
    path = _existing(source)
    if path.suffix == ".gguf":
        if from_pretrained_options:
            raise TypeError(
                f"expected no options for a .gguf file, got {', '.join(from_pretrained_options)}; "
                "convert it with save_pretrained first"
            )
        return load_gguf_model(path, dtype=dtype)
    if not {"subfolder", "variant"} & set(from_pretrained_options):
        check_files(path)
    trust = from_pretrained_options.get("trust_remote_code", False)
    config = read_config(path, trust_remote_code=trust)
    state = DropState.from_config(config)
    model_class = AutoModelForCausalLM
    if state.qk_norm is not None:
        model_class = _class_with_norms(config, state.dropped_layers, state.qk_norm)
    try:
        model, report = model_class.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `_check_weights` names them
            **from_pretrained_options,
        )
    except SafetensorError as error:
        raise ValueError(
            f"source: expected whole weights in {path}, got a file that cannot be read ({error}); "
            "copy it again"
        ) from error
    _check_weights(path, model, report)
    if state.qk_norm is not None:
        model.__class__ = model_class.__base__
    if not state.is_stock:
        apply_state(decoder_of(model), state)
    return model


def read_config(source: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model's directory or .gguf file.

    Raises:
        FileNotFoundError: no such directory or file, or no config.json in it.
        ValueError: a config.json that is no model's, such as one with half of a RoPE scaling.
    """
    path = _existing(source)
    if path.suffix == ".gguf":
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    check_no_pointer(path / "config.json")
    try:
        return AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (AttributeError, KeyError, TypeError, StrictDataclassError) as error:
        raise ValueError(
            f"source: expected a config.json that transformers reads in {path}, got "
            f"{error.args[0] if error.args else error}; mend it"
        ) from error


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer beside a model, or inside a .gguf file.

    Raises:
        FileNotFoundError: no such directory or file, or no tokenizer in it.
        ValueError: one that cannot be read.
    """
    path = _existing(source)
    if path.suffix == ".gguf":
        return load_gguf_tokenizer(path)
    read_config(path)  # transformers reads it too, and its mistakes are none of the tokenizer's
    if not any((path / name).exists() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"source: expected a tokenizer in {path} ({', '.join(_TOKENIZER_FILES)}), got none; "
            "save the model's tokenizer there with save_pretrained"
        )
    for name in _TOKENIZER_FILES:
        if (path / name).exists():
            check_no_pointer(path / name)
    try:  # it would ask at the terminal whether to run code that lies there
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"source: expected a tokenizer that transformers reads in {path}, got "
            f"{type(error).__name__}: {error}; copy its files again"
        ) from error


def _existing(source: str | Path) -> Path:
    path = user_path(source)
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"source: expected a directory with config.json or a .gguf file, got {path}; models "
            "are not downloaded, save one with save_pretrained"
        )
    return path


def _check_weights(path: Path, model: Any, report: dict[str, Any]) -> None:
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"source: expected weights of the shapes that config.json in {path} says, got "
            f"{tuple(found)} for {tuple(expected)}, {name}; take both from the same save"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"source: expected all weights of a {type(model).__name__} in {path}, {len(missing)} "
            f"are missing, {missing[0]} among them; save the whole model"
        )
    unread = [x for x in sorted(report["unexpected_keys"]) if x.endswith(_NORMS)]
    if unread:
        raise ValueError(
            f"source: expected norms of queries and keys in {path} only where config.drope tells "
            f"of them, got {unread[0]}; take config.json from the save that the weights are of"
        )


def _class_with_norms(config: Any, dropped_layers: tuple[int, ...], form: str) -> Any:
    """The class of a saved model whose constructor adds norms, so that transformers loads them."""
    stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    class WithNorms(stock):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            layers = decoder_of(self).layers
            for index in dropped_layers:
                add_norms(layers[index].self_attn, form)

    WithNorms.__name__ = stock.__name__  # transformers looks its loss up by it
    return WithNorms
