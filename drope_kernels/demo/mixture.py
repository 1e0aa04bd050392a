"""The training sequences of the demo: needles in text, repeats, plain text; all from one seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from drope_kernels.demo.corpus import Corpus
from drope_kernels.evaluate.needle import insert_lines

# Half of the sequences carry the task; repeats teach copying, which retrieval builds on.
SHARES = {"needle": 0.50, "said_twice": 0.12, "random_repeated": 0.10, "text": 0.28}
MAX_NEEDLES = MAX_QUERIES = 4
ANSWER_WEIGHT = 6.0
LINE_LENGTH = 4  # \n NAME VALUE \n
VALUE_AT = 2


def training_sequences(
    corpus: Corpus, length: int, num_sequences: int, seed: int
) -> dict[str, Tensor]:
    """Columns input_ids (N, length) int64 and loss_weights (N, length) float32, shuffled.

    loss_weights[n, i] weighs the loss of token i. Every share is drawn in whole arrays.
    """
    shortest = LINE_LENGTH * (MAX_NEEDLES + MAX_QUERIES)
    if length < shortest:
        raise ValueError(f"length: expected at least {shortest} tokens, got {length}")
    rng = np.random.default_rng(seed)
    kinds = rng.choice(len(SHARES), num_sequences, p=list(SHARES.values()))
    input_ids = _text(rng, corpus, num_sequences, length)
    weights = np.ones((num_sequences, length), dtype=np.float32)

    names = list(SHARES)
    needle_rows = np.flatnonzero(kinds == names.index("needle"))
    shapes = rng.integers(1, [MAX_NEEDLES + 1, MAX_QUERIES + 1], (len(needle_rows), 2))
    for num_needles in range(1, MAX_NEEDLES + 1):
        for num_queries in range(1, MAX_QUERIES + 1):
            rows = needle_rows[(shapes == (num_needles, num_queries)).all(axis=1)]
            text = input_ids[rows, : length - LINE_LENGTH * (num_needles + num_queries)]
            input_ids[rows], weights[rows] = _needles(rng, corpus, text, num_needles, num_queries)

    twice = np.flatnonzero(kinds == names.index("said_twice"))
    input_ids[twice] = _repeated(rng, input_ids[twice])
    random = np.flatnonzero(kinds == names.index("random_repeated"))
    noise = rng.integers(0, corpus.text_vocab_size, (len(random), length))
    input_ids[random] = _repeated(rng, noise)
    return {"input_ids": torch.from_numpy(input_ids), "loss_weights": torch.from_numpy(weights)}


def _text(rng: np.random.Generator, corpus: Corpus, rows: int, length: int) -> np.ndarray:
    starts = rng.integers(0, len(corpus.train) - length + 1, rows)
    return corpus.train.numpy()[starts[:, None] + np.arange(length)]


def _needles(
    rng: np.random.Generator, corpus: Corpus, text: np.ndarray, num_needles: int, num_queries: int
) -> tuple[np.ndarray, np.ndarray]:
    """Needle lines, then lines that repeat some of them; the repeated values are the answers."""
    num_rows, num_text = text.shape
    num_lines = num_needles + num_queries
    rows = np.arange(num_rows)[:, None]
    asked = rng.integers(0, num_needles, (num_rows, num_queries))
    lines = np.full((num_rows, num_lines, LINE_LENGTH), corpus.newline)
    for column, words in ((1, corpus.names), (VALUE_AT, corpus.values)):
        picks = rng.random((num_rows, len(words))).argsort(axis=1)[:, :num_needles]
        chosen = np.asarray(words)[picks, 0]
        lines[:, :, column] = np.concatenate([chosen, chosen[rows, asked]], axis=1)
    cuts = np.sort(rng.integers(0, num_text + 1, (num_rows, num_lines)), axis=1)
    answers = cuts[:, num_needles:] + LINE_LENGTH * np.arange(num_needles, num_lines) + VALUE_AT
    weights = np.ones((num_rows, num_text + num_lines * LINE_LENGTH), dtype=np.float32)
    weights[rows, answers] = ANSWER_WEIGHT
    return insert_lines(text, lines, cuts), weights


def _repeated(rng: np.random.Generator, tokens: np.ndarray) -> np.ndarray:
    """Each row becomes its own first part said again; the period differs from row to row."""
    num_rows, length = tokens.shape
    period = rng.integers(length // 4, 3 * length // 4, (num_rows, 1))
    return tokens[np.arange(num_rows)[:, None], np.arange(length) % period]
