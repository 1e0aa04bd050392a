"""Needles written as sentences in the user's text, for a model with a tokenizer of its own.

Five tasks after RULER (arXiv 2404.06654, section 3) in our own words: single, multi-key,
multi-value, multi-query and variable tracking. Numbers of seven digits, two-word keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drope_kernels.evaluate.model_calls import (
    DEFAULT_BATCH_TOKENS,
    LanguageModel,
    greedy_tokens,
    last_logits,
)
from drope_kernels.evaluate.needle import CaseScores
from drope_kernels.evaluate.tokens import encode

NUM_ASKED = 4  # values of a key, keys of a query, and keys among which one is asked
CHAIN = 5  # names that share a value in variable tracking
SLACK = 8  # tokens that an answer may take beyond 3/2 of the shortest wording
DIGITS = 7

_FIRST = (
    "amber ancient bitter brave bright broken calm clever copper crimson curious distant early "
    "eager faint frozen gentle golden hidden hollow humble ivory lonely lucky narrow noble patient "
    "polite purple quiet rapid silent silver sleepy solid steady sunny velvet wild yellow"
)
_SECOND = (
    "anchor basket bridge candle castle cellar cloud desert engine falcon feather forest garden "
    "hammer harbor island jacket kettle ladder lantern lemon magnet meadow mirror monkey mountain "
    "needle orchard pencil pepper pillow planet rabbit river rocket saddle shovel temple tiger "
    "window"
)
_CONSONANTS, _VOWELS = "BDFGKLMNPRSTVZ", "AEIOU"


@dataclass(frozen=True)
class Writing:
    """One case before it is put into text."""

    lines: tuple[str, ...]  # in the order in which they stand
    question: str  # ends where the answer begins
    wanted: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    asked_line: int | None = None  # the one whose depth is chosen


@dataclass(frozen=True)
class WrittenCase:
    """One case in tokens. `answer` is None where the order of the answers is free."""

    prompt: Tensor  # (length,) int64
    answer: Tensor | None  # (A,) int64
    writing: Writing
    num_new_tokens: int
    depth: float | None
    seed: int


@dataclass(frozen=True)
class WrittenCases:
    """Cases of one task at one length; the model has read `length` tokens when it must answer.

    With an `answer` greedy decoding is scored in one forward call; else the model continues the
    prompt, and a case is right if every wanted string and no unwanted one is in what it wrote.
    """

    cases: tuple[WrittenCase, ...]
    decode: Callable[[Tensor], str]

    @property
    def num_tokens(self) -> int:
        return sum(len(case.prompt) + case.num_new_tokens for case in self.cases)

    def score(self, model: LanguageModel, max_tokens: int = DEFAULT_BATCH_TOKENS) -> CaseScores:
        """At most max_tokens tokens (but at least one case) go through the model in a call."""
        longest = max(len(case.prompt) + case.num_new_tokens for case in self.cases)
        rows = max(1, max_tokens // longest)
        shares, right = [], []
        for begin in range(0, len(self.cases), rows):
            batch = self.cases[begin : begin + rows]
            for case, ids in zip(batch, _written(model, batch), strict=True):
                share, whole = self._judge(case, ids)
                shares.append(share)
                right.append(whole)
        return CaseScores(
            right=tuple(right),
            share=tuple(shares),
            depth=tuple(case.depth for case in self.cases),
            seed=tuple(case.seed for case in self.cases),
        )

    def _judge(self, case: WrittenCase, ids: Tensor) -> tuple[float, bool]:
        """The share of the wanted answers in a case's new tokens, and whether it is right."""
        if case.answer is not None:
            same = torch.equal(ids[: len(case.answer)], case.answer)
            return float(same), same
        written = self.decode(ids[: case.num_new_tokens])
        found = [wanted in written for wanted in case.writing.wanted]
        clean = not any(unwanted in written for unwanted in case.writing.unwanted)
        return sum(found) / len(found), all(found) and clean


def _written(model: LanguageModel, cases: Sequence[WrittenCase]) -> Tensor:
    """The most likely tokens (B, the longest case's) after each prompt, on the CPU.

    With an answer each is given the answer's tokens before it, which is the same until the first
    wrong one; shorter answers are padded behind, where no earlier token sees it.
    """
    prompts = torch.stack([case.prompt for case in cases])
    answers = [case.answer for case in cases if case.answer is not None]
    if len(answers) == len(cases):
        told = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True)
        read = torch.cat([prompts, told[:, :-1]], dim=1)
        return last_logits(model, read, told.shape[1]).argmax(dim=-1).cpu()
    return greedy_tokens(model, prompts, max(case.num_new_tokens for case in cases)).cpu()


def _single(rng: np.random.Generator, number: Callable[[], str]) -> Writing:
    return _one_of(rng, number, 1)


def _multi_key(rng: np.random.Generator, number: Callable[[], str]) -> Writing:
    return _one_of(rng, number, NUM_ASKED)


def _one_of(rng: np.random.Generator, number: Callable[[], str], count: int) -> Writing:
    keys = _keys(rng, count)
    values = [number() for _ in keys]
    return Writing(
        lines=tuple(map(_code_line, keys, values)),
        question=(
            f"Question: what is the locker code of {keys[0]}?\n"
            f"Answer: the locker code of {keys[0]} is"
        ),
        wanted=(values[0],),
        asked_line=0,
    )


def _multi_value(rng: np.random.Generator, number: Callable[[], str]) -> Writing:
    key = _keys(rng, 1)[0]
    values = [number() for _ in range(NUM_ASKED)]
    return Writing(
        lines=tuple(f"Remember this: one locker code of {key} is {value}." for value in values),
        question=(
            f"Question: which {NUM_ASKED} locker codes does {key} have?\n"
            f"Answer: the locker codes of {key} are"
        ),
        wanted=tuple(values),
    )


def _multi_query(rng: np.random.Generator, number: Callable[[], str]) -> Writing:
    keys = _keys(rng, NUM_ASKED)
    values = [number() for _ in keys]
    listed = f"{', '.join(keys[:-1])} and {keys[-1]}"
    return Writing(
        lines=tuple(map(_code_line, keys, values)),
        question=(
            f"Question: what are the locker codes of {listed}?\n"
            f"Answer: the locker codes of {listed} are"
        ),
        wanted=tuple(values),
    )


def _variable_tracking(rng: np.random.Generator, number: Callable[[], str]) -> Writing:
    names = _names(rng, 2 * CHAIN)
    chains = names[:CHAIN], names[CHAIN:]
    value = number()
    written = []
    for chain, start in zip(chains, (value, number()), strict=True):
        sources = [start, *(f"the value of {name}" for name in chain)]
        written.append(
            [
                f"Remember this: the value of {name} is {source}."
                for name, source in zip(chain, sources, strict=False)
            ]
        )
    # Both chains in their own order, one among the other at random.
    turns = rng.permutation(np.repeat([0, 1], CHAIN))
    lines = [written[turn].pop(0) for turn in turns]
    return Writing(
        lines=tuple(lines),
        question=(
            f"Question: which {CHAIN} names have the value {value}?\n"
            f"Answer: the names with the value {value} are"
        ),
        wanted=tuple(chains[0]),
        unwanted=tuple(chains[1]),
    )


_WRITERS = {
    "single": _single,
    "multi-key": _multi_key,
    "multi-value": _multi_value,
    "multi-query": _multi_query,
    "variable tracking": _variable_tracking,
}
WRITTEN_TASKS = tuple(_WRITERS)
# Only one answer is right and it is short: one forward call scores it.
ONE_ANSWER = ("single", "multi-key")


def write_cases(
    task: str,
    tokenizer: Any,
    text: Tensor,
    length: int,
    num_cases: int,
    *,
    seeds: Sequence[int] = (0,),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    taken: frozenset[str] = frozenset(),
    start: int | None = None,
) -> WrittenCases:
    """num_cases cases for each seed, in haystacks from text (T,) int64.

    Args:
        task: one of `WRITTEN_TASKS`.
        tokenizer: of transformers.
        text: tokens of the haystacks, T >= length.
        length: tokens read when the answer begins.
        num_cases: per seed.
        seeds: of keys, numbers, haystacks and places; not of any training.
        depths: of the asked needle where one is asked, in turn; 0 start of the text, 1 end.
        taken: numbers that occur in the text, never drawn.
        start: the token that every prompt begins with, one of its `length`.

    Raises:
        ValueError: an unknown task; a length too short for the needles, or more than the text.
    """
    if task not in _WRITERS:
        raise ValueError(f"task: expected one of {', '.join(_WRITERS)}, got {task!r}")
    if text.ndim != 1 or len(text) < length or text.dtype != torch.int64:
        raise ValueError(
            f"text: expected a 1-D int64 tensor of at least {length} tokens, "
            f"got {tuple(text.shape)} {text.dtype}"
        )
    cases: list[WrittenCase] = []
    for seed in seeds:
        # The same cases for a task whatever other tasks and lengths there are.
        rng = np.random.default_rng([seed, WRITTEN_TASKS.index(task), length])
        for _ in range(num_cases):
            writing = _WRITERS[task](rng, partial(_number, rng, taken))
            depth = None if writing.asked_line is None else depths[len(cases) % len(depths)]
            prompt = _prompt(writing, tokenizer, text, length, rng, depth, start)
            cases.append(_case(task, writing, tokenizer, prompt, depth, seed))
    return WrittenCases(tuple(cases), lambda ids: tokenizer.decode(ids.tolist()))


def largest_in(cases: WrittenCases) -> int:
    """The largest token id of prompts and answers."""
    return max(
        int(ids.max())
        for case in cases.cases
        for ids in (case.prompt, case.answer)
        if ids is not None and len(ids)
    )


def numbers_in(text: str) -> frozenset[str]:
    """Every number of `DIGITS` digits in the text, so that no case asks for one."""
    return frozenset(re.findall(rf"(?=(\d{{{DIGITS}}}))", text))


def _prompt(
    writing: Writing,
    tokenizer: Any,
    text: Tensor,
    length: int,
    rng: np.random.Generator,
    depth: float | None,
    start: int | None,
) -> Tensor:
    """The lines in text, then the question: (length,)."""
    lines = [encode(tokenizer, f"\n{line}\n") for line in writing.lines]
    question = encode(tokenizer, f"\n{writing.question}")
    first = text.new_tensor([] if start is None else [start])
    num_text = length - sum(map(len, [*lines, question, first]))
    if num_text < 0:
        raise ValueError(
            f"lengths: expected at least {length - num_text} tokens for needles and question, "
            f"got {length}; use greater lengths or leave that task out"
        )
    cuts = rng.integers(0, num_text + 1, len(lines))
    if writing.asked_line is None:
        cuts.sort()
    else:
        cuts[writing.asked_line] = round((depth or 0.0) * num_text)
    at = int(rng.integers(0, len(text) - num_text + 1))
    haystack = text[at : at + num_text]
    parts, done = [first], 0
    for line in np.argsort(cuts, kind="stable"):
        parts += [haystack[done : cuts[line]], lines[line]]
        done = int(cuts[line])
    return torch.cat([*parts, haystack[done:], question])


def _case(
    task: str, writing: Writing, tokenizer: Any, prompt: Tensor, depth: float | None, seed: int
) -> WrittenCase:
    answer = None
    if task in ONE_ANSWER:
        answer = _continuation(tokenizer, f"\n{writing.question}", f" {writing.wanted[0]}")
    shortest = len(encode(tokenizer, f" {', '.join(writing.wanted)}"))
    found = replace(
        writing,
        wanted=tuple(_as_decoded(tokenizer, word) for word in writing.wanted),
        unwanted=tuple(_as_decoded(tokenizer, word) for word in writing.unwanted),
    )
    if answer is not None:
        return WrittenCase(prompt, answer, found, len(answer), depth, seed)
    return WrittenCase(prompt, None, found, shortest + shortest // 2 + SLACK, depth, seed)


def _as_decoded(tokenizer: Any, word: str) -> str:
    """A word as decoded text has it: a tokenizer may lower its case, or part its digits."""
    decoded: str = tokenizer.decode(encode(tokenizer, f" {word}").tolist())
    return decoded.strip()


def _continuation(tokenizer: Any, question: str, answer: str) -> Tensor | None:
    """Tokens of the answer after those of the question; None if a token spans both."""
    asked, whole = encode(tokenizer, question), encode(tokenizer, question + answer)
    return whole[len(asked) :] if torch.equal(whole[: len(asked)], asked) else None


def _code_line(key: str, value: str) -> str:
    return f"Remember this: the locker code of {key} is {value}."


def _keys(rng: np.random.Generator, count: int) -> list[str]:
    """Different keys of two words."""
    pairs = [f"{first}-{second}" for first in _FIRST.split() for second in _SECOND.split()]
    return [pairs[pick] for pick in rng.choice(len(pairs), count, replace=False).tolist()]


def _names(rng: np.random.Generator, count: int) -> list[str]:
    """Different names of five capitals, none of them a word."""
    names: list[str] = []
    while len(names) < count:
        letters = [
            str(rng.choice(list(_VOWELS if place % 2 else _CONSONANTS))) for place in range(5)
        ]
        if (name := "".join(letters)) not in names:
            names.append(name)
    return names


def _number(rng: np.random.Generator, taken: frozenset[str]) -> str:
    while (number := str(rng.integers(10 ** (DIGITS - 1), 10**DIGITS))) in taken:
        pass
    return number
