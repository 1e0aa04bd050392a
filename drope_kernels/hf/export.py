"""`export`: a model without positions as a plain checkpoint that stock engines serve."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel, Qwen3Config

from drope_kernels.console.paths import user_path
from drope_kernels.hf.apply import position_free_parameters
from drope_kernels.hf.families import decoder_of
from drope_kernels.hf.fold import Folding, fold
from drope_kernels.hf.provenance import TOP_LEVEL, export_note, is_export, seal
from drope_kernels.hf.rotation import dropped_layers
from drope_kernels.hf.state import DropState
from drope_kernels.hf.support import ENGINES, refusal
from drope_kernels.hf.verify import (
    VerificationError,
    VerificationReport,
    check_finite,
    verify_export,
)
from drope_kernels.scale import LogScale

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Qwen3 is their block with norms of each head's queries and keys.
_WITH_HEAD_NORMS = ("llama", "mistral")
_SHARED_WITH_QWEN3 = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


@dataclass(frozen=True)
class ExportResult:
    """What `export_model` wrote."""

    path: Path
    config: Any  # of the checkpoint
    folding: Folding
    verification: VerificationReport | None

    def __str__(self) -> str:
        temperature = "none"
        if self.folding.changes:
            lowest, highest = min(self.folding.factors), max(self.folding.factors)
            temperature = (
                f"{lowest:.6g}{'' if lowest == highest else f' to {highest:.6g}'} folded into "
                f"{len(self.folding.parameters)} parameters, which rounding changes by at most "
                f"{self.folding.rounding:.2g}"
            )
        return "\n".join(
            [
                "not verified" if self.verification is None else str(self.verification),
                f"temperature: {temperature}",
                f"served by: {', '.join(x for x in ENGINES if refusal(self.config, x) is None)}",
                f"wrote {self.path}, a {self.config.model_type}",
            ]
        )


def export(
    model: Any,
    path: str | Path,
    *,
    tokenizer: Any = None,
    scale: LogScale | None = None,
    length: int | None = None,
    context: int | None = None,
    engine: str | None = None,
    verify: bool = True,
) -> Path:
    """Writes a model without positions to a directory: plain architecture, plain weights.

    Rotation is left to the checkpoint's `rope_parameters`, whose frequencies are so low that they
    turn nothing; the temperature is folded into the weights; norms of each head that
    `drop_positions` added to a Llama or Mistral make it a Qwen3. `config.drope` says where it
    comes from. The directory appears, verified, as a whole; until then an earlier export there
    stays. The model is left as it is.

    Args:
        model: a causal `PreTrainedModel` of `FAMILIES` with every layer's positions dropped.
        path: a new or empty directory, or an earlier export as it was written, which is replaced.
        tokenizer: saved with it.
        scale: temperature by length, besides the model's own (`set_temperature`).
        length: tokens, for which `scale` is meant; one checkpoint has one temperature.
        context: tokens, the checkpoint's max_position_embeddings, which vLLM and SGLang hold to.
        engine: refuse what this one of `ENGINES` would not serve; None: what transformers does.
        verify: load and measure it first, with `verify_export`.

    Returns:
        The directory.

    Raises:
        ValueError: layers with positions, an inf or NaN among the weights, length without scale or
            scale without length, a context below the model's, a path with something else in it.
        NotImplementedError: another family, norms without a plain architecture, adapters, or what
            the engine would not serve, with the reason.
        VerificationError: the checkpoint does not compute what the model does; nothing is written.
        OSError: it could not be written; nothing is.
    """
    result = export_model(
        model,
        path,
        tokenizer=tokenizer,
        beta=temperature_at(scale, length),
        context=context,
        engine=engine,
        verify=verify,
    )
    return result.path


def export_model(
    model: Any,
    path: str | Path,
    *,
    tokenizer: Any = None,
    beta: float = 1.0,
    context: int | None = None,
    engine: str | None = None,
    verify: bool = True,
) -> ExportResult:
    """As `export`, with a number beta in place of a scale and a length, and all it has to tell."""
    path = user_path(path).resolve()
    source = _plain_source(model)
    _recover(path)
    _check_path(path)
    folding = fold(source, beta)
    config = _plain_config(source, folding, context)
    reason = refusal(config, engine or "transformers")
    if reason is not None:
        raise NotImplementedError(f"engine: {engine} would not serve this model: {reason}")
    plain = _plain_model(source, config, folding)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    if partial.exists():  # of a killed process with this one's number
        shutil.rmtree(partial)
    try:
        plain.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        verification = None
        if verify:
            with _multiplied_logits(source, beta):
                verification = verify_export(partial, source)
            if not verification.passed:
                raise VerificationError(verification)
        seal(partial)
        _put_in_place(partial, path)
    except SafetensorError as error:
        raise OSError(
            f"{path}: could not be written ({error}); nothing of it is left: make room there"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ExportResult(path, config, folding, verification)


def temperature_at(scale: LogScale | None, length: int | None) -> float:
    """What `scale` multiplies the logits by at `length` tokens, beyond 1 / sqrt(head_dim)."""
    if scale is None and length is None:
        return 1.0
    if scale is None:
        raise ValueError(
            f"length: expected None without a scale, got {length}; max_position_embeddings is "
            "called context"
        )
    if length is None:
        raise ValueError(
            f"length: expected the number of tokens that {scale} is meant for, got None; a "
            "checkpoint has one temperature for every length"
        )
    return scale(length, head_dim=1)


def _plain_source(model: Any) -> Any:
    """The `PreTrainedModel` to export, without what torch wraps around it."""
    source = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(source, DistributedDataParallel):
        source = source.module
    decoder = decoder_of(source)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[type(decoder.config)]
    if not isinstance(source, PreTrainedModel) or hasattr(source, "peft_config"):
        raise NotImplementedError(
            f"model: expected a {causal.__name__}, got a {type(source).__name__} with adapters "
            "or wrapped; merge them (merge_and_unload) or unwrap it"
        )
    if not isinstance(source, causal):
        raise NotImplementedError(
            f"model: expected a {causal.__name__}, got a {type(source).__name__}; only causal "
            "language models are exported"
        )
    dropped = dropped_layers(decoder)
    if not dropped:
        raise ValueError(
            "model: expected one without positions, got one with all of them; call drop_positions "
            "first"
        )
    if len(dropped) < len(decoder.layers):
        raise ValueError(
            f"model: expected every layer without positions, got {len(dropped)} of "
            f"{len(decoder.layers)}; no plain config of a {decoder.config.model_type} says which "
            "layers rotate: keep it with save_pretrained and load_model, or drop the others"
        )
    _check_weights(source)
    check_finite(source)
    return source


def _check_weights(source: Any) -> None:
    for name, weight in source.named_parameters():
        if weight.is_meta or isinstance(weight, DTensor) or weight.dtype not in _DTYPES:
            kind = "offloaded" if weight.is_meta else f"{type(weight).__name__} of {weight.dtype}"
            raise NotImplementedError(
                "model: expected every weight whole, in memory, in 32 or 16 bits and unquantised, "
                f"got {name} {kind}; load the model without quantization, offloading or sharding"
            )


def _check_path(path: Path) -> None:
    if not path.exists() or is_export(path) or (path.is_dir() and not any(path.iterdir())):
        return
    raise ValueError(
        f"path: expected a new or empty directory, or an earlier export, got {path} with something "
        "else in it; choose another"
    )


def _plain_config(source: Any, folding: Folding, context: int | None) -> Any:
    config = copy.deepcopy(source.config)
    state = DropState.from_config(config)
    note = export_note(config, folding.temperature, folding.rounding)
    if state.qk_norm is not None:
        config = _qwen3_config(config, state.qk_norm)
    length = config.max_position_embeddings
    if context is not None and context < length:
        raise ValueError(
            f"context: expected at least the model's max_position_embeddings, {length}, got "
            f"{context}"
        )
    config.max_position_embeddings = length if context is None else context
    config.rope_parameters = position_free_parameters(config)
    setattr(config, TOP_LEVEL, 1)
    # Factors of a rotation that nobody can restore would be multiplied in again by load_model.
    rope_parameters = state.rope_parameters if note["restorable"] else config.rope_parameters
    replace(
        state,
        qk_norm=None,
        temperature=1.0,
        rope_parameters=rope_parameters,
        notes={**state.notes, "export": note},
    ).into_config(config)
    return config


def _qwen3_config(config: Any, form: str) -> Qwen3Config:
    """Of the Qwen3 that a model with added norms of each head is."""
    family = config.model_type
    if form != "head" or family not in _WITH_HEAD_NORMS:
        raise NotImplementedError(
            f"model: expected no added norms, or those of each head in a "
            f"{' or '.join(_WITH_HEAD_NORMS)}, got qk_norm={form!r} in a {family}; no plain "
            "architecture has them: keep it with save_pretrained and load_model"
        )
    if getattr(config, "sliding_window", None) is not None or getattr(config, "mlp_bias", False):
        raise NotImplementedError(
            "model: expected neither a sliding window nor biases in the MLP, which Qwen3, the "
            f"architecture with these norms, has not, got a {family} with "
            f"{'mlp_bias' if getattr(config, 'mlp_bias', False) else 'sliding_window'}; keep it "
            "with save_pretrained and load_model"
        )
    return Qwen3Config(
        **{name: getattr(config, name) for name in _SHARED_WITH_QWEN3},
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        attention_bias=getattr(config, "attention_bias", False),
        drope=config.drope,
    )


def _plain_model(source: Any, config: Any, folding: Folding) -> Any:
    """A stock model with this config that shares the source's weights, the folded ones apart."""
    state: dict[str, Tensor] = {**source.state_dict(), **folding.parameters}
    with torch.device("meta"):
        plain = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    plain.load_state_dict(state, assign=True)
    plain.generation_config = source.generation_config
    return plain


@contextmanager
def _multiplied_logits(source: Any, beta: float) -> Iterator[None]:
    """The live model with a further temperature for a while."""
    attentions = [layer.self_attn for layer in decoder_of(source).layers]
    before = [attention.scaling for attention in attentions]
    try:
        for attention in attentions:
            attention.scaling *= beta
        yield
    finally:
        for attention, scaling in zip(attentions, before, strict=True):
            attention.scaling = scaling


def _put_in_place(partial: Path, path: Path) -> None:
    """Renames a finished directory to its name; an earlier export there goes away last."""
    old = _set_aside(path)
    if path.exists() and any(path.iterdir()):
        if old.exists():  # of a process that was killed when it had replaced it
            shutil.rmtree(old)
        path.rename(old)
    try:
        partial.rename(path)
    finally:
        _recover(path)
    if old.exists():
        shutil.rmtree(old)


def _recover(path: Path) -> None:
    """Gives an earlier export its name back where nothing has taken its place."""
    old = _set_aside(path)
    if old.exists() and not path.exists():
        old.rename(path)


def _set_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.drope-old")
