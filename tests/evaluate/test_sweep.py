"""`drope_kernels.evaluate`: intervals, needles, losses, baselines, temperature, report files."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drope_kernels.evaluate import (
    MeanLoss,
    NeedleTask,
    Proportion,
    SplitModel,
    draw_sweep,
    fit_log_slope,
    fit_temperature,
    last_target_losses,
    log_spaced_edges,
    loss_by_position,
    mean_loss,
    rope_at_length,
    row_named,
    run_sweep,
    score_needles,
    text_windows,
    window_losses,
)
from drope_kernels.evaluate.verdicts import loss_verdict
from drope_kernels.rope import Rope

TEXT_TOKENS = 20  # ids below it are text; names follow, then values
NAMES, VALUES = 8, 8
VOCAB = TEXT_TOKENS + NAMES + VALUES


def text_of(length, seed=0):
    return torch.randint(1, TEXT_TOKENS, (length,), generator=torch.Generator().manual_seed(seed))


def task_of(num_needles, name_tokens=1, value_tokens=1, after=(0,)):
    """Names and values of several tokens share all but their last one."""
    first_value = TEXT_TOKENS + NAMES
    names = tuple((TEXT_TOKENS,) * (name_tokens - 1) + (TEXT_TOKENS + i,) for i in range(NAMES))
    values = tuple((first_value,) * (value_tokens - 1) + (first_value + i,) for i in range(VALUES))
    return NeedleTask(num_needles, names, values, before=(0,), after=after)


class Oracle:
    """Reads the query's name, finds its line, answers with the value there (one token each)."""

    def __call__(self, input_ids):
        logits = torch.zeros(*input_ids.shape, VOCAB)
        for row, ids in enumerate(input_ids.tolist()):
            asked = ids[-1]
            logits[row, -1, ids[ids.index(asked) + 1]] = 1.0
        return logits


class FixedLoss:
    """Gives token t the loss of `nats(position of t)`, whatever the tokens are."""

    def __init__(self, nats):
        self.nats = nats

    def __call__(self, input_ids):
        batch, length = input_ids.shape
        right = torch.tensor([math.exp(-self.nats(i + 1)) for i in range(length)])
        following = torch.roll(input_ids, -1, dims=1)
        chosen = torch.nn.functional.one_hot(following, VOCAB).bool()
        wrong = ((1 - right) / (VOCAB - 1))[None, :, None].expand(batch, length, VOCAB)
        return torch.where(chosen, right[None, :, None], wrong).log()


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Stat. Med. 17, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_interval_is_newcombes(successes, trials, low, high):
    assert Proportion(successes, trials).interval() == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 400), st.data())
@settings(max_examples=60, deadline=None)
def test_wilson_interval_holds_the_mean(trials, data):
    score = Proportion(data.draw(st.integers(0, trials)), trials)
    low, high = score.interval()
    assert 0 <= low <= score.mean <= high <= 1


@given(
    st.integers(1, 4),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(40, 90),
    st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_needle_cases(num_needles, name_tokens, value_tokens, length, seed):
    task = task_of(num_needles, name_tokens, value_tokens)
    cases = task.cases(text_of(500), length, 6, seed)
    assert cases.input_ids.shape == (6, length + value_tokens - 1)
    assert cases.answer_ids.shape == (6, value_tokens)
    values = range(TEXT_TOKENS + NAMES, VOCAB)
    for ids, answer in zip(cases.input_ids.tolist(), cases.answer_ids.tolist(), strict=True):
        context = ids[:length]
        name = context[-name_tokens:]
        assert context[-name_tokens - 1] == 0  # the query starts as a line does
        assert ids[length:] == answer[:-1]
        found = [i for i in range(length) if context[i : i + value_tokens] == answer]
        assert len(found) == 1
        assert context[found[0] - name_tokens : found[0]] == name
        last_tokens = [token for token in context if token in values and token != values[0]]
        assert len(last_tokens) == len(set(last_tokens))  # no value twice
        text = [token for token in context if 0 < token < TEXT_TOKENS]
        assert len(text) == length - num_needles * task.line_length - task.query_length


def test_needle_haystack_is_a_piece_of_the_text_in_order():
    text = text_of(300)
    cases = task_of(3).cases(text, 60, 5, seed=1)
    windows = {tuple(w.tolist()) for w in text.unfold(0, 60 - 3 * 4 - 2, 1)}
    for ids in cases.input_ids.tolist():
        assert tuple(token for token in ids if 0 < token < TEXT_TOKENS) in windows


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_needle_depth(depth):
    length = 100
    cases = task_of(1).cases(text_of(300), length, 4, seed=0, depth=depth)
    num_text = length - 4 - 2
    for ids, answer in zip(cases.input_ids.tolist(), cases.answer_ids.tolist(), strict=True):
        assert ids.index(answer[0]) == round(depth * num_text) + 2  # after \n NAME
    assert cases.depth.tolist() == pytest.approx([depth] * 4, abs=0.01)


def test_random_depth_covers_the_text():
    depth = task_of(4).cases(text_of(300), 100, 400, seed=0).depth
    assert depth.min() < 0.05
    assert depth.max() > 0.95
    assert depth.mean().item() == pytest.approx(0.5, abs=0.06)


def test_needles_repeat_with_the_seed_only():
    draws = [task_of(2).cases(text_of(300), 80, 9, seed).input_ids for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("num_needles", [1, 4])
@pytest.mark.parametrize("max_tokens", [1, 200, 100_000])
def test_oracle_finds_every_needle(num_needles, max_tokens):
    cases = task_of(num_needles).cases(text_of(300), 70, 20, seed=0)
    assert score_needles(Oracle(), cases, max_tokens) == Proportion(20, 20)


def test_guessing_scores_at_chance():
    cases = task_of(4).cases(text_of(300), 50, 400, seed=0)
    generator = torch.Generator().manual_seed(0)

    def guess(input_ids):
        logits = torch.rand(*input_ids.shape, VOCAB, generator=generator)
        logits[..., : TEXT_TOKENS + NAMES] = -1.0  # one of the 8 values
        return logits

    low, high = score_needles(guess, cases).interval()
    assert low < 1 / VALUES < high


def test_an_answer_of_several_tokens_needs_all_of_them():
    cases = task_of(2, value_tokens=2).cases(text_of(300), 60, 10, seed=0)
    first_only = torch.nn.functional.one_hot(torch.tensor(TEXT_TOKENS + NAMES), VOCAB).float()
    always_first = score_needles(lambda ids: first_only.expand(*ids.shape, VOCAB), cases)
    expected = int((cases.answer_ids == TEXT_TOKENS + NAMES).all(dim=1).sum())
    assert always_first.successes == expected < 10


def test_loss_by_position_of_a_known_model():
    model = FixedLoss(lambda position: 0.5 if position < 16 else 1.0 + position / 100)
    windows = text_windows(text_of(400), 64, 5)
    losses = window_losses(model, windows, max_tokens=130)
    assert losses.shape == (5, 63)
    buckets = loss_by_position(losses)
    assert [(b.start, b.stop) for b in buckets] == [(1, 8), (8, 16), (16, 32), (32, 64)]
    expected = [0.5, 0.5, 1 + np.arange(16, 32).mean() / 100, 1 + np.arange(32, 64).mean() / 100]
    assert [b.loss.mean for b in buckets] == pytest.approx(expected, abs=1e-5)
    assert [b.loss.num_targets for b in buckets] == [35, 40, 80, 160]
    assert buckets[0].loss.stderr == pytest.approx(0, abs=1e-6)


def test_last_targets_are_the_same_whatever_the_context():
    seen = []

    def model(input_ids):
        seen.append(input_ids[:, -4:].clone())
        return torch.zeros(*input_ids.shape, VOCAB)

    windows = text_windows(text_of(400), 64, 3)
    for length in (8, 16, 64):
        loss = last_target_losses(model, windows, length, num_targets=4)
        assert loss.mean == pytest.approx(math.log(VOCAB), abs=1e-5)
        assert loss.num_targets == 12
    assert all(torch.equal(ids, windows[:, -4:]) for ids in seen)


def test_loss_differences_are_paired():
    a = mean_loss(torch.tensor([[1.0], [2.0], [6.0]]))
    b = mean_loss(torch.tensor([[0.9], [1.9], [5.9]]))
    assert a.stderr > 1
    assert a.minus(b).mean == pytest.approx(0.1)
    assert a.minus(b).stderr == pytest.approx(0, abs=1e-6)
    assert math.isnan(mean_loss(torch.ones(1, 3)).stderr)
    with pytest.raises(ValueError, match="same 3 windows"):
        a.minus(mean_loss(torch.ones(2, 1)))


def test_few_windows_say_little():
    """A difference of three standard errors, in 3 windows and in 7."""

    def said(count):
        ours = [1.0 + 0.01 * (i % 2) for i in range(count)]
        other = MeanLoss(tuple(ours), 4)
        difference = MeanLoss(tuple(0.001 * i for i in range(count)), 4)
        by = 3 * difference.stderr - difference.mean
        shifted = zip(ours, difference.per_window, strict=True)
        losses = {"a": MeanLoss(tuple(x + y + by for x, y in shifted), 4), "b": other}
        return loss_verdict("Loss", losses, "a", ["b"])

    assert "not separated from b" in said(3)
    assert "WORSE than b" in said(7)


def test_split_model_gives_the_same_numbers_in_chunks(monkeypatch):
    monkeypatch.setattr("drope_kernels.evaluate.model_calls.LOSS_CHUNK", 28)
    torch.manual_seed(0)
    embedding, head = torch.nn.Embedding(VOCAB, 12), torch.nn.Linear(12, VOCAB)
    whole = torch.nn.Sequential(embedding, head)
    widest = []

    def measured_head(states):
        widest.append(states.shape[:2].numel())
        return head(states)

    split = SplitModel(embedding, measured_head)
    windows = text_windows(text_of(400), 50, 4)
    torch.testing.assert_close(window_losses(split, windows), window_losses(whole, windows))
    assert max(widest) == 28  # of the 4 rows together
    cases = task_of(2).cases(text_of(300), 50, 10, seed=0)
    assert score_needles(split, cases) == score_needles(whole, cases)
    assert widest[-1] == 10  # one token of each case


def test_edges_are_log_spaced():
    assert log_spaced_edges(1024) == [1, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert log_spaced_edges(100, first=10) == [1, 10, 20, 40, 80, 100]
    assert log_spaced_edges(32, first=8, per_octave=2) == [1, 8, 11, 16, 23, 32]


def test_temperature_fits_find_known_optima():
    calls = []

    def loss(beta):
        calls.append(beta)
        return (beta - 1.37) ** 2

    assert fit_temperature(loss, tolerance=0.001) == pytest.approx(1.37, abs=0.001)
    assert len(calls) < 9  # golden section needs 17
    for at in (0.81, 1.0, 1.6, 2.2):
        for shape in (lambda x: abs(x) ** 1.5, lambda x: math.log1p(abs(x)), lambda x: x**4 + x**2):
            shifted = partial(lambda shape, at, beta: shape(beta - at), shape, at)
            beta = fit_temperature(shifted, tolerance=0.02)
            assert beta == pytest.approx(at, abs=0.021)
    wall = fit_temperature(lambda beta: math.inf if beta > 1.1 else (beta - 1) ** 2)
    assert wall == pytest.approx(1.0, abs=0.01)
    assert fit_temperature(lambda beta: beta) == pytest.approx(0.8, abs=0.02)
    betas = {64: 5.0, 128: 1 + 0.3 * math.log(2), 256: 1 + 0.3 * math.log(4)}
    assert fit_log_slope(betas, train_length=64) == pytest.approx(0.3)


def test_rope_baselines_are_the_constructors():
    shared = {"length": 256, "train_length": 64, "theta": 5e3}
    assert rope_at_length("as is", **shared) == Rope(theta=5e3)
    assert rope_at_length("PI", **shared) == Rope.pi(4.0, theta=5e3)
    assert rope_at_length("NTK", **shared) == Rope.ntk(4.0, theta=5e3)
    yarn = Rope.yarn(4.0, original_max_position_embeddings=64, theta=5e3)
    assert rope_at_length("YaRN", **shared) == yarn
    for method in ("as is", "PI", "NTK", "YaRN"):
        assert rope_at_length(method, 64, 64, 5e3) == Rope(theta=5e3)


def sweep_of(model, name="model"):
    tasks = {"1 needle": task_of(1), "4 needles": task_of(4)}
    data = draw_sweep(tasks, text_of(600), {32: 6, 64: 6, 128: 3}, 4, 8, seed=0)
    cells = []
    lengths = []

    def model_at(length):
        lengths.append(length)
        return model

    row = run_sweep(name, model_at, data, on_cell=lambda: cells.append(1))
    assert len(cells) == data.num_cells == 9
    assert set(lengths) == {32, 64, 128}
    return row


def test_sweep_of_a_known_model():
    row = sweep_of(FixedLoss(lambda position: position / 100))
    for length in (32, 64, 128):
        assert row.text_loss[length].mean == pytest.approx(length / 200, abs=1e-4)
        expected = (length - 4.5) / 100  # the mean of the last 8 positions
        assert row.last_loss[length].mean == pytest.approx(expected, abs=1e-4)
    assert row.by_position[-1].loss.mean == pytest.approx(np.arange(64, 128).mean() / 100, abs=1e-4)
    assert row_named([row], "model") is row
    with pytest.raises(KeyError, match="no row 'other'"):
        row_named([row], "other")


BAD_CALLS = [
    (lambda: Proportion(3, 2), "successes <= trials.*3 of 2"),
    (lambda: Proportion(0, 0), "trials >= 1"),
    (lambda: task_of(0), "num_needles: expected at least 1, got 0"),
    (lambda: task_of(9), "names: expected at least num_needles=9 different entries, got 8"),
    (lambda: NeedleTask(1, ((1,), (1,)), ((2,),), before=(0,)), "names: .*different"),
    (lambda: NeedleTask(1, ((1,), (1, 2)), ((2,),), before=(0,)), "one token count"),
    (lambda: NeedleTask(1, ((1,),), ((),), before=(0,)), "values: .*at least 1"),
    (lambda: task_of(4).cases(text_of(300), 17, 1, 0), "expected at least 18 tokens.*got 17"),
    (lambda: task_of(1).cases(text_of(30), 60, 1, 0), "text: expected a 1-D int64 tensor"),
    (lambda: task_of(1).cases(text_of(99).float(), 60, 1, 0), "text: .*float32"),
    (lambda: task_of(1).cases(text_of(99), 60, 1, 0, depth=1.5), "depth: .*1.5"),
    (lambda: task_of(1).cases(torch.arange(99), 60, 1, 0), "text: value .* occurs"),
    (lambda: text_windows(text_of(99), 50, 2), "at least length \\* count = 100"),
    (lambda: text_windows(text_of(99), 50, 0), "count=0"),
    (lambda: window_losses(Oracle(), text_of(9)), "expected \\(N, S\\)"),
    (lambda: window_losses(Oracle(), text_of(9)[None], max_tokens=0), "max_tokens"),
    (lambda: window_losses(lambda ids: torch.zeros(1, 3, 4), text_of(9)[None]), "logits \\(1, 9"),
    (lambda: log_spaced_edges(8), "first: expected between 1 and length=8"),
    (lambda: loss_by_position(torch.zeros(2, 9), [3, 2]), "edges: expected rising"),
    (lambda: loss_by_position(torch.zeros(2, 9), [1, 12]), "edges: .*1..10"),
    (lambda: last_target_losses(Oracle(), text_of(20)[None], 30, 4), "length <= 20, got 30"),
    (lambda: fit_temperature(abs, low=2, high=1), "0 < low < high"),
    (lambda: fit_temperature(abs, tolerance=math.nan), "tolerance > 0"),
    (lambda: fit_log_slope({64: 1.0}, 64), "length above train_length=64"),
    (lambda: rope_at_length("other", 128, 64, 1e4), "method: expected one of"),
    (lambda: rope_at_length("PI", 0, 64, 1e4), "at least 1 token"),
    (lambda: draw_sweep({}, text_of(600), {48: 1, 64: 1}, 1, 8, 0), "divisors of the greatest"),
    (lambda: draw_sweep({}, text_of(600), {32: 1, 64: 1}, 1, 32, 0), "num_last_targets: .*1..31"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
