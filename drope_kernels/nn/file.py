"""One file for a `DecoderLM`: a safetensors file whose metadata holds the config as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from drope_kernels.nn.config import DecoderConfig

CONFIG_KEY = "drope_decoder_config"
TIED_KEY = "lm_head.weight"  # left out when it is the embedding, as transformers does


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"saving a DecoderLM needs {error.name}: pip install 'drope_kernels[train]'"
        ) from error
    return safetensors


def write_decoder(path: Path, state: dict[str, Tensor], config: DecoderConfig) -> None:
    """Write weights and config to `path`; the file appears whole or not at all."""
    save_file = _safetensors().torch.save_file
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in state.items()
        if not (config.tie_embeddings and name == TIED_KEY)
    }
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(config.to_dict())}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        save_file(tensors, partial, metadata=metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_decoder(path: Path) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """Config and weights (on the CPU) from a file that `write_decoder` wrote."""
    safetensors = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a file written by DecoderLM.save, got {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            state = {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file, got: {error}") from error
    if CONFIG_KEY not in metadata:
        raise ValueError(
            f"{path}: expected metadata entry {CONFIG_KEY!r}, got {sorted(metadata)}; for a "
            "transformers checkpoint build DecoderConfig.from_llama and use load_state_dict"
        )
    return DecoderConfig.from_dict(json.loads(metadata[CONFIG_KEY])), state
