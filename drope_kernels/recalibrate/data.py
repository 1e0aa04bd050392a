"""Token rows for the trainer: columns `input_ids`, `labels` and, where wanted, `loss_weights`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

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
