"""Held-out text that is in the training text: its share, counted and told."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from texts import byte_tokenizer, documents_of, pack

from drope_kernels.recalibrate import overlap
from drope_kernels.recalibrate.overlap import WINDOW, share_seen


def drawn(number, seed=0, vocabulary=50_000):
    return np.random.default_rng(seed).integers(0, vocabulary, number).astype(np.uint16)


def counted(held_out, train):
    """The definition."""
    inside = {tuple(train[i : i + WINDOW]) for i in range(len(train) - WINDOW + 1)}
    starts = range(0, len(held_out) // WINDOW * WINDOW, WINDOW)
    return np.mean([tuple(held_out[i : i + WINDOW]) in inside for i in starts])


@pytest.mark.parametrize("vocabulary", [2, 300, 50_000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_is_counted_token_for_token(vocabulary, share, monkeypatch):
    monkeypatch.setattr(overlap, "_AT_ONCE", 100)  # windows across what is read at once
    held_out = drawn(40 * WINDOW, 1, vocabulary)
    copied = held_out[: int(share * len(held_out))]
    train = np.concatenate([drawn(777, 2, vocabulary), copied, drawn(500, 3, vocabulary)])
    assert share_seen(held_out, train) == counted(held_out, train) == pytest.approx(share)


def test_one_other_token_is_another_window():
    held_out = drawn(4 * WINDOW)
    train = held_out.copy()
    train[[0, 2 * WINDOW - 1]] += 1
    assert share_seen(held_out, train) == 0.5
    assert share_seen(np.zeros(2 * WINDOW, np.uint16), np.zeros(WINDOW, np.uint16)) == 1.0
    assert share_seen(np.zeros(2 * WINDOW, np.uint16), np.zeros(WINDOW - 1, np.uint16)) == 0.0
    assert share_seen(drawn(0), train) == share_seen(drawn(9), train) == 0.0


def test_many_windows_are_sampled(monkeypatch):
    monkeypatch.setattr(overlap, "MOST_WINDOWS", 100)
    held_out = drawn(10_000 * WINDOW)
    assert share_seen(held_out, held_out[len(held_out) // 4 :]) == pytest.approx(0.75, abs=0.02)


def test_held_out_text_in_the_training_text_is_told(tmp_path):
    letters = np.random.default_rng(0).choice(list("abcdefgh "), (9, 400))
    texts = ["".join(row) for row in letters]
    tokenizer = byte_tokenizer()

    def packed(name, train, held_out):
        options = {"validation_documents": documents_of(*held_out)}
        return pack(tmp_path / name, train, tokenizer, **options)

    with pytest.warns(UserWarning, match="100% of the held-out text is in the text to train on as"):
        found = packed("file", texts, texts[2:5])
    assert found.held_out_seen == found.metadata["held_out_seen"] == 1.0
    with pytest.warns(UserWarning, match="of the held-out text"):  # an excerpt of a document
        found = packed("excerpt", ["".join(texts[:8])], [texts[3][100:], texts[8]])
    assert 0.3 < found.held_out_seen < 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert packed("clean", texts[:8], texts[8:]).held_out_seen == 0.0
