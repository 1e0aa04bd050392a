"""Resuming a run: as if it had never stopped, or refused with the reason."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import resumed_runs
import torch
import transformers
from resumed_runs import RUNS, STEPS
from texts import byte_tokenizer, documents_of
from training import CONTEXT, config, counting_rows, parameters_of, tiny_decoder, tiny_llama

from drope_kernels.recalibrate import pack_documents, recalibrate
from drope_kernels.recalibrate.checkpoints import load_weights


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    """All of RUNS, uninterrupted and with their deaths, in one process that forks."""
    folder = tmp_path_factory.mktemp("lives")
    texts = [("to be or not to be " * 3)[i : 7 + 2 * i] for i in range(14)]
    pack_documents(documents_of(*texts), byte_tokenizer(), folder / "packed", validation_share=0)
    run = subprocess.run(
        [sys.executable, resumed_runs.__file__, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed_is_uninterrupted(lives, name):
    """Losses, their parts, norms, rates, chance and the final weights, bit for bit."""
    whole, killed = lives / f"{name}-whole", lives / name
    assert (killed / "end.json").read_text() == (whole / "end.json").read_text()
    once, again = (
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (whole, killed)
    )
    by_step = {entry[0]: entry for entry in once}
    assert float.fromhex(once[-1][0]) == STEPS
    assert len(again) > len(once) or RUNS[name]["log_steps"] > 1  # some steps are taken twice
    assert all(entry == by_step[entry[0]] for entry in again)
    weights = torch.load(killed / "weights.pt")
    for parameter, value in torch.load(whole / "weights.pt").items():
        assert torch.equal(value, weights[parameter]), parameter


def saved_run(folder, **changes):
    """Settings of a run of 8 steps in `folder` with checkpoints 3, 6 and 8."""
    settings = {"steps": 8, "save_steps": 3, "keep_checkpoints": None, "output_dir": str(folder)}
    return config(**(settings | changes))


@pytest.fixture
def interrupted(tmp_path):
    """A folder with checkpoints 3 and 6 of a run of 8 steps, and the run's weights at the end."""
    model = tiny_decoder()
    recalibrate(model, counting_rows(), saved_run(tmp_path))
    for file in (tmp_path / "checkpoint-8").iterdir():
        file.unlink()
    (tmp_path / "checkpoint-8").rmdir()
    return tmp_path, parameters_of(model)


def test_a_finished_run_is_not_trained_on(tmp_path):
    model, again = tiny_decoder(), tiny_decoder()
    whole = recalibrate(model, counting_rows(), saved_run(tmp_path, log_steps=3))
    result = recalibrate(again, counting_rows(), saved_run(tmp_path, log_steps=3, resume=True))
    assert (result.steps, result.tokens) == (8, 8 * 8 * CONTEXT)
    assert result.train_loss == whole.train_loss
    for name, value in parameters_of(model).items():
        assert torch.equal(value, parameters_of(again)[name])


def test_resume_without_checkpoint_starts(tmp_path):
    result = recalibrate(tiny_decoder(), counting_rows(), saved_run(tmp_path, resume=True))
    assert result.steps == 8


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "run.json"])
@pytest.mark.parametrize("damage", ["cut", "garbled", "gone"])
def test_a_damaged_checkpoint_is_named(interrupted, name, damage):
    """And once it is deleted the run goes on from the one before, to the same end."""
    folder, weights = interrupted
    file = folder / "checkpoint-6" / name
    content = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(content[:-9] if damage == "cut" else b"\x07" * len(content))
    model = tiny_decoder()
    message = r"checkpoint-6/.*: delete .*checkpoint-6, and the run resumes at checkpoint-3"
    with pytest.raises(ValueError, match=message) as error:
        recalibrate(model, counting_rows(), saved_run(folder, resume=True))
    assert name.split(".")[0] in str(error.value)
    for rest in (folder / "checkpoint-6").iterdir():
        rest.unlink()
    (folder / "checkpoint-6").rmdir()
    recalibrate(model, counting_rows(), saved_run(folder, resume=True))
    assert all(torch.equal(value, weights[n]) for n, value in parameters_of(model).items())


OTHER_RUNS = {
    "rate": ({"learning_rate": 1e-3}, {}, "settings.learning_rate was 0.01 and is 0.001"),
    "batch": ({"batch_size": 4}, {}, "settings.batch_size was 8 and is 4"),
    "steps": ({"steps": 9}, {}, "lengths.steps was 8 and is 9"),
    "data": ({}, {"data": counting_rows(seed=3)}, "data.digest was"),
    "rows": ({}, {"data": counting_rows(rows=80)}, "data.rows was 64 and is 80"),
    "model": ({}, {"model": tiny_llama}, "model.class was 'DecoderLM' and is 'LlamaForCausalLM'"),
    "two": ({"seed": 1, "bf16": True}, {}, "settings.bf16 was .*; settings.seed was 0 and is 1"),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_another_run_is_refused(interrupted, name):
    folder, _ = interrupted
    changes, others, message = OTHER_RUNS[name]
    model = others.get("model", tiny_decoder)()
    before = parameters_of(model)
    with pytest.raises(ValueError, match=f"expected the same run to go on, but .*{message}"):
        recalibrate(
            model, others.get("data", counting_rows()), saved_run(folder, resume=True, **changes)
        )
    assert all(torch.equal(value, before[n]) for n, value in parameters_of(model).items())


def test_positions_dropped_since_are_another_run(interrupted):
    model = tiny_decoder()
    model.drop_positions()
    with pytest.raises(ValueError, match=r"model\.config\.rope was"):
        recalibrate(model, counting_rows(), saved_run(interrupted[0], resume=True))


def test_settings_that_do_not_matter_may_change(interrupted):
    folder, weights = interrupted
    model = tiny_decoder()
    settings = saved_run(folder, resume=True, log_steps=1, save_steps=1, keep_checkpoints=1)
    result = recalibrate(model, counting_rows(), settings)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-8"]
    assert [entry["step"] for entry in result.history if "loss" in entry] == [7, 8]
    assert all(torch.equal(value, weights[n]) for n, value in parameters_of(model).items())


EXTENSIONS = {
    "constant": ({"schedule": "constant"}, {"steps": 12}, True),
    "constant, other warm-up": ({"schedule": "constant"}, {"steps": 12, "warmup": 3}, False),
    "wsd, before its decay": ({"schedule": "wsd"}, {"steps": 30}, True),
    "wsd, decaying": ({"schedule": "wsd", "decay": 0.5}, {"steps": 12}, False),
    "fewer than done": ({"schedule": "constant"}, {"steps": 5}, False),
}


@pytest.mark.parametrize("name", EXTENSIONS)
def test_only_some_schedules_take_other_steps(tmp_path, name):
    """Where they do, the run is the one that had the new number of steps from its start."""
    first, second, possible = EXTENSIONS[name]

    class Stop(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recalibrate(
            tiny_decoder(), counting_rows(), saved_run(tmp_path, **first), callbacks=[Stop()]
        )
    model, straight = tiny_decoder(), tiny_decoder()
    longer = saved_run(tmp_path, resume=True, **(first | second))
    if not possible:
        with pytest.raises(ValueError, match=r"lengths\.steps was 8"):
            recalibrate(model, counting_rows(), longer)
        return
    assert recalibrate(model, counting_rows(), longer).steps == second["steps"]
    recalibrate(straight, counting_rows(), saved_run(tmp_path / "straight", **(first | second)))
    for n, value in parameters_of(model).items():
        assert torch.equal(value, parameters_of(straight)[n])


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    stock = torch.save

    def full(content, path, *args, **kwargs):
        stock(content, path, *args, **kwargs)
        if "checkpoint-6" in str(path) and "optimizer" in str(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    message = r"checkpoint-6: could not be written \(.*No space left.*checkpoint-3 is whole"
    with pytest.raises(OSError, match=message):
        recalibrate(tiny_decoder(), counting_rows(), saved_run(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    monkeypatch.undo()
    result = recalibrate(tiny_decoder(), counting_rows(), saved_run(tmp_path, resume=True))
    assert result.steps == 8


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.raises(ValueError, match="expected a name like checkpoint-500"):
        recalibrate(tiny_decoder(), counting_rows(), saved_run(tmp_path, resume=True))


def test_weights_of_another_model_are_named(interrupted):
    with pytest.raises(ValueError, match=r"expected the weights of this LlamaForCausalLM"):
        load_weights(tiny_llama(), interrupted[0] / "checkpoint-3")
