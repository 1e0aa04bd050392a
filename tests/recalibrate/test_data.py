"""`PackedRows`: rows and batches of packed documents, and how a model reads them."""

from __future__ import annotations

import pickle
from itertools import pairwise

import hf_models
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import byte_tokenizer, documents_of
from torch.utils.data import DataLoader
from training import config

from drope_kernels.hf import use_kernels
from drope_kernels.nn.loss import IGNORED_LABEL, causal_lm_loss, next_token_targets
from drope_kernels.recalibrate import PackedRows, pack_documents, recalibrate

EOS = 256


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """Packs documents of the given lengths, EOS included; texts are drawn from the lengths."""

    def pack_lengths(lengths):
        letters = np.random.default_rng(len(lengths)).integers(97, 123, sum(lengths))
        ends = np.cumsum(lengths)
        texts = [
            bytes(letters[end - length : end - 1].tolist()).decode()
            for end, length in zip(ends, lengths, strict=True)
        ]
        return pack_documents(
            documents_of(*texts),
            byte_tokenizer(),
            tmp_path_factory.mktemp("packed") / "packed",
            validation_share=0.0,
        )

    return pack_lengths


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=20),
    context_length=st.integers(2, 40),
    across=st.booleans(),
)
def test_rows_hold_every_token_once(pack, lengths, context_length, across):
    folder = pack(lengths)
    stream = folder.tokens("train").tolist()
    if len(stream) < context_length:
        with pytest.raises(ValueError, match=f"at least context_length={context_length} tokens"):
            PackedRows(folder, context_length)
        return
    rows = PackedRows(folder, context_length, attend_across_documents=across)
    position, firsts = 0, set(np.cumsum([0, *lengths]).tolist())
    for r in range(len(rows)):
        row = rows[r]
        positions = []
        for i in range(context_length):
            t = r * context_length + i
            begins = i == 0 or (t in firsts and not across)
            position = 0 if begins else position + 1
            positions.append(position)
            assert row["input_ids"][i] == stream[t]
            assert row["labels"][i] == (IGNORED_LABEL if begins else stream[t])
        assert across or row["position_ids"].tolist() == positions
        assert set(row) == {"input_ids", "labels"} | (set() if across else {"position_ids"})
        assert all(column.dtype == torch.int64 for column in row.values())
    assert len(rows) * context_length + rows.num_left_out == len(stream)
    assert 0 <= rows.num_left_out < context_length
    assert torch.equal(rows[-1]["input_ids"], rows[len(rows) - 1]["input_ids"])
    with pytest.raises(IndexError):
        rows[len(rows)]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 12), min_size=8, max_size=20),
    context_length=st.integers(2, 8),
    batch_size=st.integers(1, 4),
)
def test_batches_say_where_documents_begin(pack, lengths, context_length, batch_size):
    rows = PackedRows(pack(lengths), context_length)
    for batch in DataLoader(rows, batch_size, collate_fn=rows.collate):
        cu_seqlens = batch["cu_seq_lens_q"]
        size = batch["input_ids"].shape[1]
        assert all(batch[name].shape == (1, size) for name in ("labels", "position_ids"))
        assert cu_seqlens.dtype == torch.int32
        assert torch.equal(cu_seqlens, batch["cu_seq_lens_k"])
        assert (cu_seqlens[0], cu_seqlens[-1]) == (0, size)
        parts = cu_seqlens.diff().tolist()
        assert min(parts) >= 1
        assert max(parts) == batch["max_length_q"] == batch["max_length_k"]
        assert batch["position_ids"][0].tolist() == [i for part in parts for i in range(part)]
        assert set(range(0, size, context_length)) <= set(cu_seqlens.tolist())
        targets = next_token_targets(batch["labels"])[0]
        for begin, end in pairwise(cu_seqlens.tolist()):
            tokens = batch["input_ids"][0, begin:end].tolist()
            assert EOS not in tokens[:-1]  # one document, and no other's
            assert targets[begin:end].tolist() == [*tokens[1:], IGNORED_LABEL]


def test_rows_travel_to_a_worker_without_their_tokens(pack):
    rows = PackedRows(pack([5000, 5000]), 16, flatten=False)
    content = pickle.dumps(rows)
    assert len(content) < 4000
    again = pickle.loads(content)
    assert (len(again), again.flatten) == (len(rows), False)
    assert all(torch.equal(again[7][name], column) for name, column in rows[7].items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, "test"), r"split: expected one of \('train', 'validation'\), got 'test'"),
        ((1,), "context_length: expected at least 2"),
        ((16, "validation"), "in the split 'validation', got 0 in 0 documents"),
    ],
)
def test_rows_that_cannot_be(pack, arguments, message):
    with pytest.raises(ValueError, match=message):
        PackedRows(pack([40]), *arguments)


# ---- how a model reads them --------------------------------------------------------------------

POSITION_FREE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 1e30,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1,
}


def model(rotary, family="llama"):
    changes = {} if rotary else {"rope_parameters": POSITION_FREE}
    return hf_models.build(family, vocab_size=EOS + 1, **changes)


def loss_and_gradients(model, batch):
    labels = batch["labels"]
    others = {name: value for name, value in batch.items() if name != "labels"}
    loss = causal_lm_loss(model(**others, use_cache=False).logits, labels)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def loss_of_documents_alone(model, batch, num_rows):
    """The mean over all targets, each part of a document in a forward pass of its own."""
    total, count = 0.0, 0
    for ids, positions in zip(
        batch["input_ids"].view(num_rows, -1), batch["position_ids"].view(num_rows, -1), strict=True
    ):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for begin, end in pairwise(starts):
            part = ids[None, begin:end]
            logits = model(input_ids=part, use_cache=False).logits
            targets = end - begin - 1
            total = total + causal_lm_loss(logits, part, divisor=1.0)
            count += targets
    loss = total / count
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


LENGTHS, CONTEXT = [9, 2, 30, 5, 14, 3, 21, 40], 24


def assert_same(got, expected):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("family", "rotary"),
    [("llama", True), ("llama", False), ("gemma3", True)],
    ids=["rope", "dropped", "rope and windows"],
)
def test_documents_are_read_as_if_alone(pack, family, rotary):
    for flatten in (True, False):
        rows = PackedRows(pack(LENGTHS), CONTEXT, flatten=flatten)
        batch = rows.collate([rows[i] for i in (0, 3, 1)])
        expected = loss_of_documents_alone(model(rotary, family), batch, 3)
        stock = loss_and_gradients(model(rotary, family), batch)
        assert_same(stock, expected)
        assert_same(loss_and_gradients(use_kernels(model(rotary, family)), batch), expected)


@pytest.mark.parametrize("rotary", [True, False], ids=["rope", "dropped"])
def test_attending_across_documents_is_plain_rows(pack, rotary):
    packed = pack(LENGTHS)
    rows = PackedRows(packed, CONTEXT, attend_across_documents=True)
    batch = rows.collate([rows[0], rows[2]])
    ids = batch["input_ids"]
    assert ids.shape == (2, CONTEXT)
    expected = loss_and_gradients(model(rotary), {"input_ids": ids, "labels": ids})
    got = loss_and_gradients(use_kernels(model(rotary)), batch)
    assert_same(got, expected)
    apart = PackedRows(packed, CONTEXT)
    other = loss_and_gradients(model(rotary), apart.collate([apart[0], apart[2]]))
    assert abs(other[0] - got[0]) > 1e-2


def test_recalibrate_trains_on_packed_rows(pack):
    """One step over all four rows: its loss is the mean over their documents, run alone."""
    rows = PackedRows(pack(LENGTHS), 31)
    assert (len(rows), rows.num_left_out) == (4, 0)
    batch = rows.collate([rows[i] for i in range(4)])
    expected, _ = loss_of_documents_alone(model(False), batch, 4)
    settings = config(
        batch_size=2, context_length=31, gradient_accumulation=2, steps=1, log_steps=1, eval_steps=1
    )
    history = recalibrate(use_kernels(model(False)), rows, settings, eval_data=rows).history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses == [pytest.approx(expected.item(), rel=1e-4)]
    assert any("eval_loss" in entry for entry in history)
