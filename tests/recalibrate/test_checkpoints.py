"""Checkpoints of `recalibrate`: whole whenever they exist, also after an interrupt."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from torch.utils.data import Dataset
from training import config, counting_rows, tiny_decoder, tiny_llama

from drope_kernels.nn import DecoderLM
from drope_kernels.recalibrate import recalibrate


def test_checkpoints_are_whole_and_few(tmp_path):
    model = tiny_decoder()
    settings = config(steps=10, save_steps=3, keep_checkpoints=2, output_dir=str(tmp_path))
    recalibrate(model, counting_rows(), settings)
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["checkpoint-10", "checkpoint-9"]
    loaded = DecoderLM.load(tmp_path / "checkpoint-10" / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    state = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    assert state["global_step"] == 10
    with pytest.raises(ValueError, match=r"expected a folder without checkpoints.* resume=True"):
        recalibrate(model, counting_rows(), settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == folders


def test_checkpoints_of_a_llama(tmp_path):
    model = tiny_llama()
    recalibrate(model, counting_rows(), config(steps=4, save_steps=2, output_dir=str(tmp_path)))
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


class InterruptedRows(Dataset):
    """Raises what Ctrl-C raises, after so many rows."""

    def __init__(self, after):
        self.rows, self.left = counting_rows(), after

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.rows[index]


def test_interrupt_between_steps_keeps_finished_checkpoints(tmp_path):
    settings = config(save_steps=2, output_dir=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        recalibrate(tiny_decoder(), InterruptedRows(after=1 + 8 * 6), settings)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept
    assert all(name.startswith("checkpoint-") for name in kept)
    DecoderLM.load(tmp_path / kept[-1] / "model.safetensors")


RUN_UNTIL_STOPPED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & would have it ignored
import torch
from drope_kernels.nn import DecoderConfig, DecoderLM
from drope_kernels.recalibrate import RecalibrationConfig, TokenRows, recalibrate
settings = RecalibrationConfig(
    batch_size=2, context_length=4, steps=1_000_000, use_cpu=True, save_steps=1,
    keep_checkpoints=3, output_dir=sys.argv[1],
)
recalibrate(DecoderLM(DecoderConfig(9, 8, 8, 1, 1)), TokenRows(torch.ones(8, 4).long()), settings)
"""


def test_sigint_of_a_run_that_saves_all_the_time(tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-c", RUN_UNTIL_STOPPED, str(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint-9").exists() and run.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    kept = list(tmp_path.glob("checkpoint-*"))
    assert 2 <= len(kept) <= 4  # 4: stopped between saving one and forgetting another
    contents = {tuple(sorted(file.name for file in folder.iterdir())) for folder in kept}
    assert len(contents) == 1
    for folder in kept:
        DecoderLM.load(folder / "model.safetensors")
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] >= 6


@pytest.mark.parametrize("victim", ["_save_optimizer_and_scheduler", "_save_rng_state"])
def test_interrupt_while_saving_leaves_no_half_checkpoint(tmp_path, monkeypatch, victim):
    def interrupted(self, output_dir):
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.Trainer, victim, interrupted)
    settings = config(save_steps=2, output_dir=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        recalibrate(tiny_decoder(), counting_rows(), settings)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_are_cleared(tmp_path):
    (tmp_path / ".partial-checkpoint-3" / "checkpoint-3").mkdir(parents=True)
    settings = config(steps=2, save_steps=2, output_dir=str(tmp_path))
    recalibrate(tiny_decoder(), counting_rows(), settings)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
