"""Needle retrieval: NAME VALUE lines hidden in text, one asked for at the very end.

With one needle any rule "copy the only value in sight" passes; with several the name decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from drope_kernels.evaluate.model_calls import (
    DEFAULT_BATCH_TOKENS,
    LanguageModel,
    batches,
    last_logits,
)

TokenIds = tuple[int, ...]
Key = TypeVar("Key", int, float)


@dataclass(frozen=True)
class Proportion:
    """`successes` out of `trials`, with Wilson's interval (Wilson 1927, JASA 22)."""

    successes: int
    trials: int

    def __post_init__(self) -> None:
        if not 0 <= self.successes <= self.trials or self.trials < 1:
            raise ValueError(
                f"expected 0 <= successes <= trials and trials >= 1, "
                f"got {self.successes} of {self.trials}"
            )

    @property
    def mean(self) -> float:
        return self.successes / self.trials

    def interval(self, z: float = 1.959963984540054) -> tuple[float, float]:
        """Wilson's score interval; the default z gives 95 %."""
        n, p = self.trials, self.mean
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        # At 0 and 1 the bound is the mean itself, which rounding may miss.
        return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


@dataclass(frozen=True)
class CaseScores:
    """Cases of one task at one length, one by one."""

    right: tuple[bool, ...]
    share: tuple[float, ...]  # of the wanted answers that were given
    depth: tuple[float | None, ...]  # of the asked needle; None where several are asked
    seed: tuple[int, ...]

    @property
    def proportion(self) -> Proportion:
        return Proportion(sum(self.right), len(self.right))

    @property
    def mean_share(self) -> float:
        return sum(self.share) / len(self.share)

    def by_depth(self) -> dict[float, Proportion]:
        """In rising order; empty where cases have no depth."""
        return _grouped(self.right, self.depth)

    def by_seed(self) -> dict[int, Proportion]:
        return _grouped(self.right, self.seed)


@dataclass(frozen=True)
class NeedleCases:
    """Cases of one task at one length.

    The model has read `length` tokens when it must give the answer's first token; an answer of A
    tokens adds A - 1 more to the input, so greedy decoding is scored in one forward call.
    """

    input_ids: Tensor  # (N, length + A - 1) int64
    answer_ids: Tensor  # (N, A) int64
    depth: Tensor  # (N,) float32: place of the asked needle, 0 = start of the text, 1 = end

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()


@dataclass(frozen=True)
class NeedleTask:
    """`num_needles` lines `before NAME between VALUE after`, then the query `before NAME between`.

    All names have the same number of tokens, and so have all values. No value may occur in the
    text: the answer is then in the context exactly once.
    """

    num_needles: int
    names: tuple[TokenIds, ...]
    values: tuple[TokenIds, ...]
    before: TokenIds
    between: TokenIds = ()
    after: TokenIds = ()

    def __post_init__(self) -> None:
        for argument, words in (("names", self.names), ("values", self.values)):
            if len(words) < self.num_needles or len(set(words)) != len(words):
                raise ValueError(
                    f"{argument}: expected at least num_needles={self.num_needles} different "
                    f"entries, got {len(set(words))}"
                )
            if len({len(word) for word in words}) != 1 or not words[0]:
                raise ValueError(
                    f"{argument}: expected entries of one token count, at least 1, got "
                    f"{sorted({len(word) for word in words})}; keep those of one length"
                )
        if self.num_needles < 1:
            raise ValueError(f"num_needles: expected at least 1, got {self.num_needles}")

    @property
    def line_length(self) -> int:
        return self.query_length + len(self.values[0]) + len(self.after)

    @property
    def query_length(self) -> int:
        return len(self.before) + len(self.names[0]) + len(self.between)

    def cases(
        self, text: Tensor, length: int, num_cases: int, seed: int, depth: float | None = None
    ) -> NeedleCases:
        """Draws cases. `text` (T,) int64 gives the haystacks; depth None places needles at random.

        With a depth in [0, 1] the asked needle sits there and the others at random.
        """
        num_text = length - self.num_needles * self.line_length - self.query_length
        self._check(text, length, num_text, depth)
        rng = np.random.default_rng(seed)
        starts = rng.integers(0, len(text) - num_text + 1, num_cases)
        haystack = text.numpy()[starts[:, None] + np.arange(num_text)]
        names = _draw(rng, self.names, num_cases, self.num_needles)
        values = _draw(rng, self.values, num_cases, self.num_needles)
        cuts = rng.integers(0, num_text + 1, (num_cases, self.num_needles))
        if depth is not None:
            cuts[:, 0] = round(depth * num_text)
        # Needle 0 is the asked one; the order of the cuts decides where each line goes.
        order = np.argsort(cuts, axis=1, kind="stable")
        rows = np.arange(num_cases)[:, None]
        lines = self._lines(names[rows, order], values[rows, order])
        body = insert_lines(haystack, lines, cuts[rows, order])
        query = self._lines(names[:, :1], values[:, :1])[:, 0, : self.query_length]
        input_ids = np.concatenate([body, query, values[:, 0, :-1]], axis=1)
        return NeedleCases(
            torch.from_numpy(input_ids),
            torch.from_numpy(values[:, 0].copy()),
            torch.from_numpy(cuts[:, 0] / max(1, num_text)).float(),
        )

    def _lines(self, names: np.ndarray, values: np.ndarray) -> np.ndarray:
        """names (N, K, a), values (N, K, b) -> lines (N, K, line_length)."""
        fixed = [
            np.asarray(part, dtype=np.int64) for part in (self.before, self.between, self.after)
        ]
        before, between, after = (np.broadcast_to(p, (*names.shape[:2], p.size)) for p in fixed)
        return np.concatenate([before, names, between, values, after], axis=2)

    def _check(self, text: Tensor, length: int, num_text: int, depth: float | None) -> None:
        if num_text < 0:
            raise ValueError(
                f"length: expected at least {length - num_text} tokens for {self.num_needles} "
                f"needles and the query, got {length}"
            )
        if text.ndim != 1 or len(text) < num_text or text.dtype != torch.int64:
            raise ValueError(
                f"text: expected a 1-D int64 tensor of at least {num_text} tokens, "
                f"got {tuple(text.shape)} {text.dtype}"
            )
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"depth: expected None or a number in [0, 1], got {depth}")
        for value in self.values:
            if _occurs(text, value):
                raise ValueError(f"text: value {value} occurs in it; choose values that do not")


def insert_lines(text: np.ndarray, lines: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Puts K lines into each row of text, in order.

    text (N, T), lines (N, K, W), cuts (N, K) ascending in [0, T]: line k comes after cuts[k] text
    tokens. Returns (N, T + K * W).
    """
    num_rows, num_lines, width = lines.shape
    at = cuts[:, :, None] + width * np.arange(num_lines)[:, None] + np.arange(width)
    at = at.reshape(num_rows, num_lines * width)
    is_text = np.ones((num_rows, text.shape[1] + num_lines * width), dtype=bool)
    rows = np.arange(num_rows)[:, None]
    is_text[rows, at] = False
    out = np.empty(is_text.shape, dtype=np.int64)
    out[is_text] = text.ravel()
    out[rows, at] = lines.reshape(at.shape)
    return out


def score_needles(
    model: LanguageModel, cases: NeedleCases, max_tokens: int = DEFAULT_BATCH_TOKENS
) -> Proportion:
    """Exact match of the greedy answer. `max_tokens` bounds the tokens of one model call."""
    answers = cases.answer_ids.split(max(1, max_tokens // cases.input_ids.shape[1]))
    num_right = 0
    for input_ids, answer in zip(batches(cases.input_ids, max_tokens), answers, strict=True):
        given = last_logits(model, input_ids, answer.shape[1]).argmax(dim=-1)
        num_right += int((given.cpu() == answer).all(dim=1).sum())
    return Proportion(num_right, len(cases.input_ids))


def _draw(
    rng: np.random.Generator, words: tuple[TokenIds, ...], num_cases: int, count: int
) -> np.ndarray:
    """(num_cases, count, tokens): `count` different words a case, every order equally likely."""
    picks = rng.random((num_cases, len(words))).argsort(axis=1)[:, :count]
    return np.asarray(words, dtype=np.int64)[picks]


def _grouped(right: tuple[bool, ...], keys: tuple[Key | None, ...]) -> dict[Key, Proportion]:
    groups: dict[Key, list[bool]] = {}
    for one, key in zip(right, keys, strict=True):
        if key is not None:
            groups.setdefault(key, []).append(one)
    return {key: Proportion(sum(groups[key]), len(groups[key])) for key in sorted(groups)}


def _occurs(text: Tensor, word: TokenIds) -> bool:
    if len(text) < len(word):
        return False
    windows = text.unfold(0, len(word), 1)
    return bool((windows == torch.tensor(word)).all(dim=1).any())
