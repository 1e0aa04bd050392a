"""What must fit together before a run begins: data, model, teacher, settings."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from drope_kernels.hf.apply import is_position_free
from drope_kernels.nn import DecoderLM
from drope_kernels.recalibrate.config import RecalibrationConfig
from drope_kernels.recalibrate.data import Columns, PackedRows
from drope_kernels.recalibrate.distillation import vocabulary
from drope_kernels.recalibrate.identity import sampled

_DECODER_COLUMNS = frozenset({"input_ids", "labels", "loss_weights"})


def check_data(
    data: Dataset[Columns],
    eval_data: Dataset[Columns] | None,
    config: RecalibrationConfig,
    devices: int,
) -> None:
    """Rows: map-style, enough of them, with the columns, of the config's length."""
    if config.eval_steps is not None and eval_data is None:
        raise ValueError("eval_data: expected rows because config.eval_steps is set, got None")
    for name, rows, least in (
        ("data", data, config.batch_size * devices),
        ("eval_data", eval_data, 1),
    ):
        if rows is None:
            continue
        if isinstance(rows, IterableDataset) or not isinstance(rows, Sized):
            raise TypeError(
                f"{name}: expected a map-style dataset, got {type(rows).__name__}; pack streams "
                "into a folder first (pack_documents)"
            )
        if len(rows) < least:
            raise ValueError(
                f"{name}: expected at least {least} rows (one batch on each device), got "
                f"{len(rows)}; lower batch_size, or give more text"
            )
        columns = rows[0]
        if not {"input_ids", "labels"} <= set(columns):
            raise ValueError(
                f"{name}: expected the columns input_ids and labels, got {sorted(columns)}"
            )
    length = len(data[0]["input_ids"])
    if length != config.context_length:
        raise ValueError(
            f"data: expected rows of config.context_length={config.context_length} tokens, "
            f"got {length}"
        )


def check_model(
    model: nn.Module,
    data: Any,
    eval_data: Any,
    config: RecalibrationConfig,
) -> None:
    """A model that has these tokens, columns and positions."""
    _check_context(model, config)
    if isinstance(model, DecoderLM) and config.activation_checkpointing:
        raise ValueError(
            "activation_checkpointing: expected False for a DecoderLM, got True; only transformers "
            "models recompute their layers, loss_chunk bounds the loss of both"
        )
    tokens = vocabulary(model)
    for name, rows in (("data", data), ("eval_data", eval_data)):
        if rows is None:
            continue
        if isinstance(rows, PackedRows) and rows.largest_token >= tokens:
            raise ValueError(_foreign(name, "input_ids", rows.largest_token, tokens))
        for index in sampled(len(rows)):
            _check_row(f"{name}[{index}]", rows[index], model, tokens)


def _check_row(name: str, row: Columns, model: nn.Module, tokens: int) -> None:
    for column in ("input_ids", "labels"):
        largest = int(torch.as_tensor(row[column]).max())
        if largest >= tokens:
            raise ValueError(_foreign(name, column, largest, tokens))
    others = set(row) - _DECODER_COLUMNS
    if isinstance(model, DecoderLM) and others:
        raise ValueError(
            f"{name}: expected the columns {', '.join(sorted(_DECODER_COLUMNS))} for a DecoderLM, "
            f"got {', '.join(sorted(others))} as well; it reads rows from their first token"
        )


def _foreign(name: str, column: str, largest: int, tokens: int) -> str:
    return (
        f"{name}: expected {column} below {tokens}, the model's vocabulary, got {largest}; "
        "tokenise with the model's own tokenizer"
    )


def _check_context(model: Any, config: RecalibrationConfig) -> None:
    """Rotated positions end where the model's do; without positions there is no end."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None or config.context_length <= limit or is_position_free(model.config):
        return
    raise ValueError(
        f"context_length: expected at most {limit} tokens, the max_position_embeddings of this "
        f"{type(model).__name__}, got {config.context_length}; shorten it, or drop the positions "
        "of all layers first"
    )


def check_teacher(teacher: nn.Module | None, config: RecalibrationConfig) -> None:
    """A teacher where one is asked for, and only there."""
    if (config.distillation > 0) != (teacher is not None):
        raise ValueError(
            f"teacher: expected a model exactly if config.distillation > 0, got "
            f"{'None' if teacher is None else type(teacher).__name__} with distillation="
            f"{config.distillation:g}"
        )
