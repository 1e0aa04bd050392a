"""Rows of tokens for the trainer: `TokenRows` in memory, `PackedRows` of a packed folder.

Columns are `input_ids`, `labels` and, where wanted, `loss_weights` or `position_ids`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from drope_kernels.nn.loss import IGNORED_LABEL
from drope_kernels.recalibrate.packed_folder import SPLITS, PackedFolder, Split

Columns = dict[str, Tensor]


class TokenRows(Dataset[Columns]):
    """N sequences of one length, a map-style dataset.

    Args:
        input_ids: (N, C), any integer dtype; rows are handed out as int64.
        labels: (N, C) integers, -100 where nothing is to be predicted; default `input_ids`.
        loss_weights: (N, C) float; entry t weighs the prediction of token t. Without it every
            target counts 1.
    """

    def __init__(
        self, input_ids: Tensor, labels: Tensor | None = None, loss_weights: Tensor | None = None
    ) -> None:
        if input_ids.ndim != 2 or input_ids.is_floating_point():
            raise ValueError(
                "input_ids: expected an integer tensor (rows, tokens), got "
                f"{tuple(input_ids.shape)} {input_ids.dtype}; for one long text use packed_rows"
            )
        for name, column in (("labels", labels), ("loss_weights", loss_weights)):
            if column is not None and column.shape != input_ids.shape:
                raise ValueError(
                    f"{name}: expected the shape of input_ids {tuple(input_ids.shape)}, "
                    f"got {tuple(column.shape)}"
                )
        if loss_weights is not None and not bool((loss_weights >= 0).all()):
            raise ValueError("loss_weights: expected numbers >= 0, got negative or NaN entries")
        self.input_ids, self.labels, self.loss_weights = input_ids, labels, loss_weights

    @property
    def context_length(self) -> int:
        return self.input_ids.shape[1]

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, index: int) -> Columns:
        return {name: column[0] for name, column in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Columns:
        """A whole batch at once, the form that torch's DataLoader prefers: (len(indices), C)."""
        rows = torch.as_tensor(indices)
        input_ids = self.input_ids[rows].long()
        labels = input_ids if self.labels is None else self.labels[rows].long()
        batch = {"input_ids": input_ids, "labels": labels}
        if self.loss_weights is not None:
            batch["loss_weights"] = self.loss_weights[rows].float()
        return batch


def packed_rows(
    tokens: Tensor, context_length: int, loss_weights: Tensor | None = None
) -> TokenRows:
    """Cut one long text into rows of `context_length` tokens; an incomplete last row is left out.

    tokens (T,) integers and loss_weights (T,) float are viewed, not copied.
    """
    if tokens.ndim != 1 or context_length < 2 or tokens.numel() < context_length:
        raise ValueError(
            "tokens: expected a 1-D tensor of at least context_length >= 2 tokens, got "
            f"{tuple(tokens.shape)} with context_length={context_length}"
        )
    rows = tokens.numel() // context_length

    def cut(column: Tensor) -> Tensor:
        return column[: rows * context_length].view(rows, context_length)

    return TokenRows(cut(tokens), None, None if loss_weights is None else cut(loss_weights))


def collate(rows: Columns | Sequence[Mapping[str, Tensor]]) -> Columns:
    """Stack rows into one batch; a batch that `TokenRows` has already made passes through."""
    if isinstance(rows, dict):
        return rows
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


class FilledRows(Dataset[Columns]):
    """`rows`, and behind them rows without a target up to a multiple of `unit`.

    Processes that share out rows would else take some of them twice.
    """

    def __init__(self, rows: Any, unit: int) -> None:
        self.rows, self.unit = rows, unit

    def __len__(self) -> int:
        return -(-len(self.rows) // self.unit) * self.unit

    def __getitem__(self, index: int) -> Columns:
        if index < len(self.rows):
            row: Columns = self.rows[index]
            return row
        first = self.rows[0]
        return {**first, "labels": torch.full_like(first["labels"], IGNORED_LABEL)}


class PackedRows(Dataset[Columns]):
    """One split of a packed folder in rows of one length, a map-style dataset.

    Row r holds the tokens r·C to (r + 1)·C - 1 of the split, so a document may go on in the next
    row; tokens that do not fill a last row are left out (`num_left_out`). Documents do not attend
    to each other unless asked: positions restart at every document and row, whose first token is
    no target.

    Args:
        folder: of `pack_documents`.
        context_length: C, tokens of a row.
        split: "train" or "validation".
        attend_across_documents: plain rows, without positions; every token but the row's first is
            a target.
        flatten: the form of batches, see `collate`.

    Raises:
        ValueError: a folder that was not packed, or a split without a whole row.
    """

    def __init__(
        self,
        folder: str | Path | PackedFolder,
        context_length: int,
        split: Split = "train",
        attend_across_documents: bool = False,
        *,
        flatten: bool = True,
    ) -> None:
        self.folder = folder if isinstance(folder, PackedFolder) else PackedFolder.load(folder)
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
        if context_length < 2:
            raise ValueError(f"context_length: expected at least 2 tokens, got {context_length}")
        num_tokens = self.folder.num_tokens(split)
        if num_tokens < context_length:
            raise ValueError(
                f"{self.folder.path}: expected at least context_length={context_length} tokens in "
                f"the split {split!r}, got {num_tokens} in {self.folder.num_documents(split)} "
                "documents; pack more documents into it, or take a shorter context_length"
            )
        self.context_length, self.split = context_length, split
        self.attend_across_documents, self.flatten = attend_across_documents, flatten
        self._tokens, self._starts = self.folder.tokens(split), self.folder.starts(split)

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process maps the files itself; a pickled map would be a copy of them."""
        arguments = (self.folder, self.context_length, self.split, self.attend_across_documents)
        return _packed_rows_again, (*arguments, self.flatten)

    def __len__(self) -> int:
        return len(self._tokens) // self.context_length

    @property
    def num_left_out(self) -> int:
        """Tokens behind the last whole row."""
        return len(self._tokens) - len(self) * self.context_length

    @property
    def largest_token(self) -> int:
        """The largest id of the split: a model's vocabulary must be larger."""
        return self.folder.largest_token(self.split)

    def __getitem__(self, index: int) -> Columns:
        """input_ids, labels and, unless documents attend across, position_ids: (C,) int64."""
        length = self.context_length
        begin = range(len(self))[index] * length
        input_ids = torch.from_numpy(self._tokens[begin : begin + length].astype(np.int64))
        labels = input_ids.clone()
        labels[0] = IGNORED_LABEL
        if self.attend_across_documents:
            return {"input_ids": input_ids, "labels": labels}
        first, last = np.searchsorted(self._starts, [begin, begin + length])
        starts = torch.from_numpy(self._starts[first:last] - begin)
        labels[starts] = IGNORED_LABEL
        document_start = torch.zeros_like(input_ids)
        document_start[starts] = starts
        position_ids = torch.arange(length) - document_start.cummax(0).values
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}

    def collate(self, rows: Sequence[Columns]) -> dict[str, Any]:
        """B rows as one batch.

        With `flatten`, columns are (1, B·C), and `cu_seq_lens_q`, `cu_seq_lens_k` (documents + 1,)
        int32 with `max_length_q`, `max_length_k` say where documents and rows begin, for attention
        functions that take them. Without it columns are (B, C) and attention functions have to
        read position_ids, as those of transformers do. Rows that attend across documents have
        none and are (B, C) always.
        """
        batch: dict[str, Any] = collate(rows)
        if not self.flatten or "position_ids" not in batch:
            return batch
        batch = {name: column.view(1, -1) for name, column in batch.items()}
        positions = batch["position_ids"][0]
        starts = (positions == 0).nonzero().flatten()
        cu_seq_lens = torch.cat([starts, starts.new_tensor([len(positions)])]).int()
        max_length = int(cu_seq_lens.diff().max())
        batch |= {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens.clone()}
        return batch | {"max_length_q": max_length, "max_length_k": max_length}


def _packed_rows_again(
    folder: PackedFolder, length: int, split: Split, across: bool, flatten: bool
) -> PackedRows:
    return PackedRows(folder, length, split, across, flatten=flatten)
