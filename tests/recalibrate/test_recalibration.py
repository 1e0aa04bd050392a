"""`drope_kernels.recalibrate`: it learns, weighs tokens, repeats itself, survives a stop."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
import transformers
from training import CONTEXT, VOCAB, config, counting_rows, parameters_of, tiny_decoder, tiny_llama

from drope_kernels.nn.loss import causal_lm_loss
from drope_kernels.recalibrate import (
    LengthSweep,
    TokenRows,
    packed_rows,
    recalibrate,
)


@pytest.mark.parametrize("build", [tiny_decoder, tiny_llama])
def test_the_loss_falls(build):
    model = build()
    result = recalibrate(model, counting_rows(), config(steps=80))
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert result.model is model
    assert not model.training
    assert losses[0] > 1.0
    assert losses[-1] < 0.1
    assert (result.steps, result.tokens) == (80, 80 * 8 * CONTEXT)
    assert result.seconds > 0
    assert result.train_loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_drop_then_recalibrate():
    model = tiny_decoder()
    recalibrate(model, counting_rows(), config(steps=60))
    model.drop_positions()
    result = recalibrate(model, counting_rows(), config(steps=60))
    assert all(layer.rope is False for layer in model.attentions)
    assert result.history[-2]["loss"] < 0.2


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
def test_schedules(schedule, bf16):
    settings = config(schedule=schedule, bf16=bf16, min_lr_ratio=0.1, steps=20, log_steps=1)
    history = recalibrate(tiny_decoder(), counting_rows(), settings).history
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    assert rates[0] < rates[3] <= 1e-2 + 1e-12  # warm-up of 4 steps
    assert max(rates) == pytest.approx(1e-2, rel=1e-3)
    assert rates[12] == pytest.approx(1e-2) or schedule in ("cosine", "linear")
    if schedule in ("cosine", "wsd"):
        assert 1e-3 <= rates[-1] < 2.5e-3
    assert all(math.isfinite(entry["loss"]) for entry in history if "loss" in entry)


def test_tokens_of_zero_weight_do_not_train():
    """Same run whatever stands in the labels of weight 0; another run if the weight is 1."""
    rows = counting_rows()
    weights = torch.ones(64, CONTEXT)
    weights[:, 5:9] = 0.0
    garbled = rows.input_ids.clone()
    garbled[:, 5:9] = 3
    outcomes = []
    for labels, loss_weights in ((None, weights), (garbled, weights), (garbled, None)):
        model = tiny_decoder()
        recalibrate(model, TokenRows(rows.input_ids, labels, loss_weights), config(steps=3))
        outcomes.append(parameters_of(model))
    for name, value in outcomes[0].items():
        assert torch.equal(value, outcomes[1][name]), name
    assert any(not torch.equal(v, outcomes[2][n]) for n, v in outcomes[0].items())


@pytest.mark.parametrize("build", [tiny_decoder, tiny_llama])
def test_one_step_is_the_weighted_mean_over_all_micro_batches(build):
    """Plain SGD by hand against the trainer's recorded gradient, unequal weights per batch."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (12, CONTEXT), generator=generator)
    weights = torch.rand(12, CONTEXT, generator=generator) ** 4
    labels = ids.masked_fill(torch.rand(12, CONTEXT, generator=generator) < 0.2, -100)
    by_hand = build()
    causal_lm_loss(by_hand(ids).logits, labels, weights).backward()

    seen = {}

    class Recorder(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
            seen.update({name: p.grad.clone() for name, p in model.named_parameters()})

    settings = config(batch_size=4, gradient_accumulation=3, steps=1, max_grad_norm=0.0)
    model = build()
    recalibrate(model, TokenRows(ids, labels, weights), settings, callbacks=[Recorder()])
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_chunked_loss_trains_the_same():
    results = []
    for chunk in (None, 5):
        model = tiny_decoder()
        recalibrate(model, counting_rows(), config(steps=5, loss_chunk=chunk))
        results.append(parameters_of(model))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-3, atol=1e-5)


def test_a_seed_decides_the_run():
    def outcome(seed):
        model = tiny_decoder()
        recalibrate(model, counting_rows(), config(steps=6, seed=seed))
        return parameters_of(model)

    first, again, other = outcome(1), outcome(1), outcome(2)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("build", [tiny_decoder, tiny_llama])
def test_bf16_is_autocast_of_one_run_only(build):
    """Of the same model, again and again: no state stays behind, none is missing."""
    model, dtypes = build(), set()
    model.lm_head.register_forward_hook(lambda _, args, out: dtypes.add(out.dtype))
    for bf16 in (True, False, True, True):
        dtypes.clear()
        recalibrate(model, counting_rows(), config(steps=2, bf16=bf16))
        assert dtypes == {torch.bfloat16 if bf16 else torch.float32}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        dtypes.clear()
        with torch.no_grad():
            model(counting_rows().input_ids)
        assert dtypes == {torch.float32}


def test_only_matrices_decay():
    model = tiny_decoder(smear_keys=True, attention_bias=True)
    before = parameters_of(model)
    rows = TokenRows(counting_rows().input_ids, None, torch.zeros(64, CONTEXT))  # no gradient
    settings = config(steps=1, schedule="constant", warmup=0, weight_decay=0.5)
    recalibrate(model, rows, settings)
    for name, value in parameters_of(model).items():
        expected = before[name] * (1 - 0.5 * 1e-2) if value.ndim >= 2 else before[name]
        torch.testing.assert_close(value, expected, msg=name)


def test_evaluation_and_length_sweep():
    sweep = LengthSweep({n: counting_rows(seed=5).input_ids[:4, :n] for n in (4, 16)}, every=15)
    model, held_out = tiny_decoder(), counting_rows(rows=20, seed=7)  # 2 batches and a half
    result = recalibrate(
        model, counting_rows(), config(eval_steps=20), eval_data=held_out, callbacks=[sweep]
    )
    evaluations = {e["step"]: e["eval_loss"] for e in result.history if "eval_loss" in e}
    assert list(evaluations) == [20, 40]
    assert evaluations[40] < evaluations[20]
    assert [step for step, _ in sweep.rows] == [15, 30, 40]
    for got, ids in (
        (sweep.rows[-1][1][16], sweep.windows[16]),
        (evaluations[40], held_out.input_ids),
    ):
        with torch.no_grad():
            expected = causal_lm_loss(model(ids).logits, ids)
        assert got == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("nan_at", [1, 4])
def test_a_loss_that_is_no_number_stops_the_run(nan_at, tmp_path):
    """At that step, not at the next log; what the steps before it saved is whole."""
    rows = counting_rows()
    model, seen = tiny_decoder(), []

    class Poison(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(parameters_of(model))
            if state.global_step == nan_at - 1:
                model.model.norm.weight.data.fill_(math.nan)

    message = f"the training loss is nan at step {nan_at}, which is not taken"
    if nan_at > 2:
        message += f", {tmp_path}/checkpoint-2 is whole"
    settings = config(save_steps=2, log_steps=100, output_dir=str(tmp_path))
    with pytest.raises(FloatingPointError, match=message):
        recalibrate(model, rows, settings, callbacks=[Poison()])
    for name, value in parameters_of(model).items():
        assert torch.equal(value, seen[-1][name]) or "norm" in name


def test_a_gradient_that_is_no_number_stops_the_run():
    model = tiny_decoder()
    model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    for max_grad_norm in (1.0, 0.0):
        with pytest.raises(
            FloatingPointError, match=r"the training gradient's norm is .* at step 1"
        ):
            recalibrate(model, counting_rows(), config(max_grad_norm=max_grad_norm))
    assert all(bool(value.isfinite().all()) for value in parameters_of(model).values())


def test_missing_extra_is_named():
    """Without transformers the import says what to install and what was missing."""
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "try:\n    import drope_kernels.recalibrate\n"
        "except ImportError as error:\n    print(error); print(repr(error.__cause__))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'drope_kernels[train]'" in run.stdout
    assert "transformers" in run.stdout


def test_packed_rows():
    rows = packed_rows(torch.arange(35, dtype=torch.int16), 10, torch.arange(35) / 35)
    assert (len(rows), rows.context_length) == (3, 10)
    assert rows[2]["input_ids"].tolist() == list(range(20, 30))
    assert rows[2]["input_ids"].dtype == torch.int64
    batch = rows.__getitems__([2, 0])
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["loss_weights"][0, 3] == pytest.approx(23 / 35)


def test_config_arithmetic():
    assert config(steps=None, tokens=1000).total_steps() == math.ceil(1000 / 128)
    assert config(steps=None, tokens=1000, gradient_accumulation=2).total_steps(devices=2) == 2
    assert config(warmup=0.1).warmup_steps(200) == 20
    assert config(warmup=500).warmup_steps(200) == 200


BAD_SETTINGS = {
    "steps": ({"steps": 0}, "steps: expected an int >= 1, got 0"),
    "neither": ({"steps": None}, "expected exactly one"),
    "both": ({"tokens": 100}, "expected exactly one"),
    "batch_size": ({"batch_size": True}, "batch_size: expected an int"),
    "learning_rate": ({"learning_rate": -1.0}, "learning_rate: expected a number"),
    "nan": ({"learning_rate": math.nan}, "learning_rate: expected a number"),
    "warmup": ({"warmup": 1.5}, "warmup: expected a number"),
    "schedule": ({"schedule": "step"}, "schedule: expected one of"),
    "betas": ({"adam_betas": (0.9, 1.0)}, r"adam_betas\[1\]"),
    "seed": ({"seed": -1}, "seed: expected an int >= 0"),
    "save": ({"save_steps": 5}, "output_dir: expected a directory"),
    "decay": ({"decay": 1.1}, "decay: expected a number in"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings(name):
    changes, message = BAD_SETTINGS[name]
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().steps = 3


def test_bad_data():
    model, ids = tiny_decoder(), torch.zeros(64, CONTEXT, dtype=torch.long)
    for call, message in (
        (lambda: TokenRows(ids[0]), "input_ids: expected an integer tensor"),
        (lambda: TokenRows(ids.float()), "input_ids: expected an integer tensor"),
        (lambda: TokenRows(ids, ids[:3]), "labels: expected the shape of input_ids"),
        (lambda: TokenRows(ids, None, -torch.ones_like(ids)), "loss_weights: expected numbers"),
        (lambda: packed_rows(ids[0], 17), "tokens: expected a 1-D tensor"),
        (lambda: recalibrate(model, TokenRows(ids[:7]), config()), "data: expected at least 8"),
        (lambda: recalibrate(model, TokenRows(ids[:, :9]), config()), "context_length=16"),
        (lambda: recalibrate(model, TokenRows(ids), config(eval_steps=5)), "eval_data"),
        (lambda: recalibrate(model, [{"ids": 1}] * 9, config()), "input_ids and labels"),
        (lambda: LengthSweep({4: ids}, every=1), r"windows\[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="data: expected a map-style dataset, got generator"):
        recalibrate(model, (row for row in TokenRows(ids)), config())
