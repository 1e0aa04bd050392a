"""One model measured at several lengths: needle retrieval, text loss, loss by position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from drope_kernels.evaluate.loss import (
    MeanLoss,
    PositionBucket,
    loss_by_position,
    mean_loss,
    window_losses,
)
from drope_kernels.evaluate.model_calls import DEFAULT_BATCH_TOKENS, LanguageModel
from drope_kernels.evaluate.needle import (
    CaseScores,
    NeedleCases,
    NeedleTask,
    Proportion,
    score_needles,
)
from drope_kernels.evaluate.written_needles import WrittenCases
from drope_kernels.texts.windows import text_windows

# The model to use for inputs of a given length: a scaled RoPE or a temperature depends on it.
ModelAtLength = Callable[[int], LanguageModel]
Score = TypeVar("Score", Proportion, CaseScores)


@dataclass(frozen=True)
class SweepData:
    """The same inputs for every model under comparison.

    Text: `windows` are cut into pieces of each length, so that every length reads the same text;
    the last `num_last_targets` tokens of a window are its targets in `last_loss`, again the same
    for every length. Every length divides the windows' length.
    """

    lengths: tuple[int, ...]
    needles: Mapping[tuple[str, int], NeedleCases | WrittenCases]  # (task name, length)
    windows: Tensor  # (N, S) int64
    num_last_targets: int
    first_token: int | None = None  # stands in for the first token of every piece of text

    @property
    def num_cells(self) -> int:
        return len(self.needles) + len(self.lengths)

    @property
    def cell_tokens(self) -> list[int]:
        """How much a model reads in each cell, in the order in which `run_sweep` goes."""
        needles = [cases.num_tokens for cases in self.needles.values()]
        return [*needles, *(self.windows.numel() for _ in self.lengths)]

    def pieces(self, length: int) -> Tensor:
        """The windows cut into (N * S / length, length)."""
        pieces = self.windows.reshape(-1, length)
        if self.first_token is None:
            return pieces
        return torch.cat([torch.full_like(pieces[:, :1], self.first_token), pieces[:, 1:]], dim=1)

    @property
    def task_names(self) -> list[str]:
        return list(dict.fromkeys(task for task, _ in self.needles))

    def beyond(self, length: int) -> SweepData:
        """The same inputs at greater lengths only."""
        return replace(
            self,
            lengths=tuple(x for x in self.lengths if x > length),
            needles={key: cases for key, cases in self.needles.items() if key[1] > length},
        )


@dataclass(frozen=True)
class SweepRow:
    """One model's numbers. Losses in nats per token."""

    name: str
    retrieval: dict[str, dict[int, Proportion]]  # task name -> length -> score
    text_loss: dict[int, MeanLoss]  # all targets of the text, read in pieces of that length
    last_loss: dict[int, MeanLoss]  # the same last targets, read with that much context
    by_position: list[PositionBucket]  # at the greatest length
    cases: dict[str, dict[int, CaseScores]] = field(default_factory=dict)  # of written needles

    def and_of(self, other: SweepRow) -> SweepRow:
        """With the numbers of another row at the lengths that this one was not measured at."""
        return replace(
            self,
            retrieval=_and_of(self.retrieval, other.retrieval),
            text_loss={**other.text_loss, **self.text_loss},
            last_loss={**other.last_loss, **self.last_loss},
            cases=_and_of(self.cases, other.cases),
        )

    @property
    def tasks_with_depth(self) -> list[str]:
        """Tasks whose cases ask for one needle."""
        return [
            task
            for task, scores in self.cases.items()
            if all(score.by_depth() for score in scores.values())
        ]


def draw_sweep(
    tasks: Mapping[str, NeedleTask],
    text: Tensor,
    cases_per_length: Mapping[int, int],
    num_windows: int,
    num_last_targets: int,
    seed: int,
) -> SweepData:
    """Draws the cases of every (task, length) and the text windows from held-out text (T,)."""
    lengths = tuple(sorted(cases_per_length))
    if not lengths or any(lengths[-1] % length for length in lengths):
        raise ValueError(f"lengths: expected divisors of the greatest one, got {lengths}")
    if not 0 < num_last_targets < lengths[0]:
        raise ValueError(
            f"num_last_targets: expected 1..{lengths[0] - 1} (below the least length), "
            f"got {num_last_targets}"
        )
    cells = [(name, length) for name in tasks for length in lengths]
    needles = {
        (name, length): tasks[name].cases(
            text, length, cases_per_length[length], seed=seed * len(cells) + index
        )
        for index, (name, length) in enumerate(cells)
    }
    return SweepData(
        lengths, needles, text_windows(text, lengths[-1], num_windows), num_last_targets
    )


def run_sweep(
    name: str,
    model_at: ModelAtLength,
    data: SweepData,
    max_tokens: int = DEFAULT_BATCH_TOKENS,
    on_cell: Callable[[], None] | None = None,
) -> SweepRow:
    """Measures one model on all of `data`; on_cell is called data.num_cells times."""
    report = on_cell or _nothing
    retrieval: dict[str, dict[int, Proportion]] = {task: {} for task in data.task_names}
    one_by_one: dict[str, dict[int, CaseScores]] = {}
    for (task, length), cases in data.needles.items():
        if isinstance(cases, WrittenCases):
            scores = cases.score(model_at(length), max_tokens)
            one_by_one.setdefault(task, {})[length] = scores
            retrieval[task][length] = scores.proportion
        else:
            retrieval[task][length] = score_needles(model_at(length), cases, max_tokens)
        report()
    text_loss, last_loss = {}, {}
    losses = torch.empty(0, 0)
    for length in data.lengths:
        losses = window_losses(model_at(length), data.pieces(length), max_tokens)
        pieces = losses.view(len(data.windows), -1, length - 1)
        text_loss[length] = mean_loss(pieces.flatten(1))
        last_loss[length] = mean_loss(pieces[:, -1, -data.num_last_targets :])
        report()
    by_position = loss_by_position(losses)
    return SweepRow(name, retrieval, text_loss, last_loss, by_position, one_by_one)


def row_named(rows: Sequence[SweepRow], name: str) -> SweepRow:
    for row in rows:
        if row.name == name:
            return row
    raise KeyError(f"no row {name!r}; rows: {[row.name for row in rows]}")


def _and_of(
    ours: Mapping[str, dict[int, Score]], theirs: Mapping[str, dict[int, Score]]
) -> dict[str, dict[int, Score]]:
    """By task, then by length."""
    return {task: {**scores, **ours.get(task, {})} for task, scores in theirs.items()}


def _nothing() -> None:
    pass
