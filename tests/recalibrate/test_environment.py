"""What the environment says to accelerate changes no run."""

from __future__ import annotations

import os

import pytest
import torch
from recalibrations import at, command, same, stop, weights, write_start
from training import config, counting_rows, parameters_of, tiny_decoder

from drope_kernels.cli import main
from drope_kernels.recalibrate import recalibrate
from drope_kernels.recalibrate.environment import ENGINES

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(**settings):
    model = tiny_decoder()
    recalibrate(model, counting_rows(), config(steps=3, **settings), description=None)
    return parameters_of(model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
        ("ACCELERATE_MIXED_PRECISION", "no"),
        ("ACCELERATE_DOWNCAST_BF16", "true"),
        ("ACCELERATE_DYNAMO_BACKEND", "no-such-compiler"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3"),
    ],
)
def test_settings_rule(name, value, monkeypatch):
    for settings in ({}, {"bf16": True}, {"gradient_accumulation": 2}):
        expected = trained(**settings)
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert same(trained(**settings), expected)
            assert os.environ[name] == value  # what else runs in this process has it back
    assert not same(trained(), trained(bf16=True))


def test_a_run_goes_on_as_it_began_under_another_launcher(tmp_path, monkeypatch):
    start = write_start(tmp_path)
    given = ["--save_steps", "1", "--warmup", "0"]
    assert main(command(start, tmp_path / "whole", *given, steps="3")) == 0
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        at(patch, 2, stop)
        assert main(command(start, tmp_path / "out", *given, steps="3")) == 130
    assert main(command(start, tmp_path / "out", *given, steps="3")) == 0
    assert same(weights(tmp_path / "out" / "model"), weights(tmp_path / "whole" / "model"))


@pytest.mark.parametrize("name", ENGINES)
def test_another_engine_is_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(name, "true")
    message = f"{name}: expected it not to be set, got 'true'; launch with torchrun"
    with pytest.raises(ValueError, match=message):
        trained()
    paths = ["--model", "none", "--data", "none", "--output_dir", str(tmp_path / "out")]
    assert main(["recalibrate", *paths, "--steps", "2"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv(name, "false")
    assert torch.is_tensor(next(iter(trained().values())))
