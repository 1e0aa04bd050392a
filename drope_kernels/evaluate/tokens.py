"""A user's text as tokens: one part to fit the temperature on, another to measure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FIT_SHARE = 4  # one token in four, from the start, is for the temperature fit only


@dataclass(frozen=True)
class TextParts:
    """No token is in both. Documents follow each other, each ended by the tokenizer's EOS."""

    fit: Tensor  # (F,) int64, empty where nothing is fitted
    measured: Tensor  # (M,) int64


def encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids (T,) int64 without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def encode_documents(tokenizer: Any, documents: Iterable[str]) -> Tensor:
    """All documents (T,) int64, an EOS after each where the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = [
        part
        for document in documents
        for part in (encode(tokenizer, document), torch.tensor(end, dtype=torch.int64))
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def split_text(tokens: Tensor, longest: int, num_windows: int, num_fit_windows: int) -> TextParts:
    """Cuts tokens (T,) into parts that hold their windows of `longest` tokens.

    Raises:
        ValueError: too few tokens; says how many are needed.
    """
    need_fit, need_measured = longest * num_fit_windows, longest * num_windows
    if len(tokens) < need_fit + need_measured:
        fitted = f" and {num_fit_windows} to fit the temperature on" if num_fit_windows else ""
        raise ValueError(
            f"text: expected at least {need_fit + need_measured} tokens ({num_windows} windows of "
            f"{longest} to measure{fitted}), got {len(tokens)}; give more text, or lower the "
            "greatest length or the number of windows"
        )
    fit = max(need_fit, len(tokens) // FIT_SHARE) if num_fit_windows else 0
    fit = min(fit, len(tokens) - need_measured)
    return TextParts(tokens[:fit], tokens[fit:])
