"""The inputs that every row of one report reads: windows of the user's text, needles in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drope_kernels.evaluate.sweep import SweepData
from drope_kernels.evaluate.tokens import encode_documents, split_text
from drope_kernels.evaluate.written_needles import largest_in, numbers_in, write_cases
from drope_kernels.texts.tokens import first_token
from drope_kernels.texts.windows import text_windows

FIT_WINDOWS = 4  # one window to fit the temperature on for so many measured ones


@dataclass(frozen=True)
class InputChoice:
    """What the user decides about inputs."""

    num_windows: int = 8  # of the greatest length
    num_last_targets: int = 256
    tasks: tuple[str, ...] = ()
    num_cases: int = 20  # of one task, length and seed
    seeds: tuple[int, ...] = (0,)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)

    def __post_init__(self) -> None:
        for name in ("num_windows", "num_last_targets", "num_cases"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: expected different numbers >= 0, got {list(self.seeds)}")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths: expected numbers in [0, 1], got {list(self.depths)}")


@dataclass(frozen=True)
class Inputs:
    measured: SweepData
    fit: SweepData  # no needles; no windows where no temperature is fitted
    num_text_tokens: int
    num_documents: int
    largest_token: int = -1  # of text and needles


def read_texts(sources: Sequence[Path], text_column: str) -> list[str]:
    """The documents of files and folders.

    Raises:
        ValueError, ImportError: as `texts.documents.read_documents`.
    """
    from drope_kernels.texts.documents import read_documents

    return [document.text for document in read_documents(list(sources), text_column=text_column)]


def draw_inputs(
    texts: Sequence[str],
    tokenizer: Any,
    lengths: tuple[int, ...],
    choice: InputChoice,
    fits_temperature: bool,
) -> Inputs:
    """Windows and needles.

    Raises:
        ValueError: too little text (says how many tokens are needed), lengths too short for the
            needles.
    """
    tokens = encode_documents(tokenizer, texts)
    start = first_token(tokenizer)
    num_fit = -(-choice.num_windows // FIT_WINDOWS) if fits_temperature else 0
    parts = split_text(tokens, lengths[-1], choice.num_windows, num_fit)
    taken = frozenset().union(*map(numbers_in, texts))
    needles = {
        (task, length): write_cases(
            task,
            tokenizer,
            parts.measured,
            length,
            choice.num_cases,
            seeds=choice.seeds,
            depths=choice.depths,
            taken=taken,
            start=start,
        )
        for task in choice.tasks
        for length in lengths
    }
    windows = text_windows(parts.measured, lengths[-1], choice.num_windows)
    num_last = min(choice.num_last_targets, lengths[0] // 2)
    fit_windows = torch.empty(0, lengths[-1], dtype=torch.int64)
    if num_fit:
        fit_windows = text_windows(parts.fit, lengths[-1], num_fit)
    return Inputs(
        measured=SweepData(lengths, needles, windows, num_last, start),
        fit=SweepData(lengths, {}, fit_windows, num_last, start),
        num_text_tokens=len(tokens),
        num_documents=len(texts),
        largest_token=max(int(tokens.max()), *map(largest_in, needles.values()), start or 0),
    )
