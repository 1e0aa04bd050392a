"""Tokens are counted as they are read; the last step of a pass has what is left."""

from __future__ import annotations

import json

import pytest
import torch
from recalibrations import CONTEXT as RUN_CONTEXT
from recalibrations import at, command, result, stop, weights, write_start
from training import CONTEXT, config, counting_rows, parameters_of, tiny_decoder

from drope_kernels.cli import main
from drope_kernels.recalibrate import PackedFolder, recalibrate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "steps", "read"),
    [
        (3, 1, 16, 6, 18),  # every step takes all there is
        (3, 1, 3, 6, 18),
        (3, 1, 2, 5, 2 + 1 + 2 + 1 + 2),
        (4, 1, 2, 5, 10),  # divides
        (7, 2, 2, 4, 4 + 2 + 4 + 2),  # 3 batches, a row is left out
        (64, 8, 1, 9, 72),
    ],
)
def test_tokens_of_short_steps(rows, batch, accumulation, steps, read):
    settings = config(
        steps=steps, batch_size=batch, gradient_accumulation=accumulation, log_steps=1
    )
    found = recalibrate(tiny_decoder(), counting_rows(rows), settings, description=None)
    assert found.tokens == read * CONTEXT == settings.tokens_read(steps, rows)
    logged = [entry for entry in found.history if "loss" in entry]
    assert logged[-1]["tokens"] == read * CONTEXT
    assert logged[0]["tokens"] == settings.tokens_read(1, rows)
    spent = sum(
        (now["tokens"] - before["tokens"]) / now["tokens_per_second"]
        for before, now in zip([{"tokens": 0}, *logged], logged, strict=False)
    )
    assert 0 < spent <= found.seconds  # of the tokens that were read


def test_a_short_step_weighs_what_it_holds():
    """Three micro-batches of one row, of sixteen asked for, are a batch of these three."""
    ends = []
    for batch, accumulation in ((3, 1), (1, 16)):
        model = tiny_decoder()
        settings = config(
            steps=3, batch_size=batch, gradient_accumulation=accumulation, warmup=0, log_steps=1
        )
        found = recalibrate(model, counting_rows(3), settings, description=None)
        losses = [entry["loss"] for entry in found.history if "loss" in entry]
        ends.append((parameters_of(model), losses))
    (first, losses), (second, others) = ends
    assert losses == pytest.approx(others, abs=1e-5)
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-5)


def test_tokens_are_counted_across_a_resume(tmp_path):
    rows = counting_rows(3)
    shape = {"batch_size": 1, "gradient_accumulation": 2, "schedule": "constant", "warmup": 2}
    kept = {"save_steps": 1, "output_dir": str(tmp_path / "out"), "resume": True, **shape}
    recalibrate(tiny_decoder(), rows, config(steps=3, **kept), description=None)
    longer = config(steps=6, **kept)
    assert recalibrate(tiny_decoder(), rows, longer, description=None).tokens == 9 * CONTEXT
    assert recalibrate(tiny_decoder(), rows, longer, description=None).tokens == 9 * CONTEXT


def test_a_checkpoint_that_counted_no_tokens_is_gone_on_from(tmp_path):
    kept = {"save_steps": 1, "output_dir": str(tmp_path / "out"), "resume": True}
    kept |= {"schedule": "constant", "batch_size": 8}
    recalibrate(tiny_decoder(), counting_rows(), config(steps=5, **kept), description=None)
    file = tmp_path / "out" / "checkpoint-5" / "run.json"
    record = json.loads(file.read_text())
    del record["unlogged"]["tokens"]
    file.write_text(json.dumps(record))
    found = recalibrate(tiny_decoder(), counting_rows(), config(steps=6, **kept), description=None)
    assert found.tokens == 6 * 8 * CONTEXT


def test_the_result_and_the_model_say_what_was_read(tmp_path, monkeypatch, capsys):
    start, out = write_start(tmp_path), tmp_path / "out"
    given = command(start, out, "--gradient_accumulation", "1000", "--save_steps", "1", steps="3")
    with monkeypatch.context() as patch:
        at(patch, 2, stop)
        assert main(given) == 130
    assert main(given) == 0
    rows = PackedFolder.load(out / "data").num_tokens("train") // RUN_CONTEXT
    read = 3 * (rows // 4) * 4 * RUN_CONTEXT
    assert result(out)["tokens"] == read
    note = json.loads((out / "model" / "config.json").read_text())["drope"]["recalibration"]
    assert note["tokens"] == read
    shown = capsys.readouterr().err
    assert f"3 steps read {read:,} tokens, not {3 * 4000 * RUN_CONTEXT:,}" in shown
    assert f"3 steps, {read:,} tokens" in shown
    assert weights(out / "model")
    capsys.readouterr()
    assert main(command(start, tmp_path / "whole", "--gradient_accumulation", "2", steps="2")) == 0
    assert "tokens, not" not in capsys.readouterr().err
    assert result(tmp_path / "whole")["tokens"] == 2 * 2 * 4 * RUN_CONTEXT


def test_rows_for_every_device(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"data: expected at least 32 rows \(one batch on each"):
        recalibrate(tiny_decoder(), counting_rows(31), config(), description=None)
