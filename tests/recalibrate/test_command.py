"""`drope recalibrate`: whole runs on a tiny model, watched, interrupted, killed, and resumed."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from recalibrations import (
    CONTEXT,
    START_SECONDS,
    VOCABULARY,
    WATCHED,
    at,
    command,
    llama,
    result,
    same,
    save,
    stop,
    weights,
    write_start,
)
from texts import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from drope_kernels.cli import main
from drope_kernels.hf import DropState, load_model
from drope_kernels.recalibrate import PackedFolder
from drope_kernels.recalibrate.records import StepRecords
from drope_kernels.recalibrate.samples import HeldOutLosses

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("start"))


@torch.no_grad()
def check_last_look(out, model):
    """Sweep and sample after the last step are those of the saved model, computed plainly."""
    folder = PackedFolder.load(out / "data")
    text = torch.from_numpy(folder.tokens("validation").astype("int64"))
    half = len(text) // 2
    windows = torch.stack([text[: 2 * CONTEXT], text[half : half + 2 * CONTEXT]])
    for length, loss in result(out)["length_sweep"][-1]["losses"].items():
        pieces = windows.view(-1, int(length))
        logits = model(pieces).logits[:, :-1].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, pieces[:, 1:].flatten())
        assert loss == pytest.approx(float(expected), abs=1e-4)
    tokenizer = byte_tokenizer()
    ids = tokenizer("1 and", return_tensors="pt")["input_ids"]
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    said = tokenizer.decode(ids[0, -4:], skip_special_tokens=True)
    assert StepRecords(out / "samples.jsonl").read()[-1]["text"] == said


def test_a_whole_run(start, tmp_path, capsys):
    out = tmp_path / "out"
    given = command(start, out, *WATCHED, "--export", str(tmp_path / "plain"), steps="40")
    if importlib.util.find_spec("tensorboard"):
        given.append("--tensorboard")
    assert main(given) == 0
    found = result(out)
    assert (found["steps"], found["tokens"], found["devices"]) == (40, 40 * 4 * CONTEXT, 1)
    assert found["last_loss"] < found["first_loss"] - 0.3
    assert [*found["validation"]] == [str(n) for n in range(5, 41, 5)]
    assert found["command"].startswith("drope recalibrate --model ")
    assert found["settings"]["learning_rate"] == 1e-3
    losses = [row["losses"] for row in found["length_sweep"]]
    assert [row["step"] for row in found["length_sweep"]] == list(range(5, 41, 5))
    assert losses[-1][str(CONTEXT)] < losses[0][str(CONTEXT)]
    samples = StepRecords(out / "samples.jsonl").read()
    assert [row["step"] for row in samples] == list(range(5, 41, 5))
    shown = capsys.readouterr().err
    assert re.search(r"step 40/40, loss \d\.\d+, lr [\de.-]+, [\d,]+ tokens/s", shown)
    assert "validation loss" in shown

    live, stock = load_model(out / "model"), AutoModelForCausalLM.from_pretrained(out / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = live(ids).logits
        for model in (stock, plain):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
            shifted = model(ids, position_ids=ids + 5000).logits
            torch.testing.assert_close(shifted, expected, rtol=1e-4, atol=1e-5)
    check_last_look(out, live)
    assert len(AutoTokenizer.from_pretrained(out / "model")) == VOCABULARY
    note = DropState.from_config(live.config).notes["recalibration"]
    assert note["tokens"] == 40 * 4 * CONTEXT
    assert (note["context_length"], note["learning_rate"]) == (CONTEXT, 1e-3)


def test_tensorboard_has_what_was_measured(start, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main(command(start, tmp_path / "out", *WATCHED, "--tensorboard")) == 0
    events = accumulator.EventAccumulator(str(tmp_path / "out" / "runs"))
    events.Reload()
    scalars = {"loss", "learning_rate", "grad_norm", "tokens_per_second", "eval_loss"}
    assert scalars | {"held_out_loss/32", "held_out_loss/64"} <= set(events.Tags()["scalars"])
    assert [entry.step for entry in events.Scalars("loss")] == [2, 4, 6, 8, 10]
    assert any("sample 0" in name for name in events.Tags()["tensors"])


def test_an_interrupted_run_goes_on_unchanged(start, tmp_path, monkeypatch, capsys):
    keep = [*WATCHED, "--save_steps", "3"]
    assert main(command(start, tmp_path / "whole", *keep)) == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        at(patch, 7, stop)
        assert main(command(start, out, *keep)) == 130
    shown = capsys.readouterr().err
    assert f"interrupted; {out / 'checkpoint-6'} is whole" in shown
    assert "drope recalibrate --model" in shown
    assert not (out / "model").exists()
    assert main(command(start, out, *keep)) == 0
    assert f"going on from {out / 'checkpoint-6'}" in capsys.readouterr().err
    assert same(weights(out / "model"), weights(tmp_path / "whole" / "model"))
    for name in ("samples.jsonl", "length_sweep.jsonl"):
        assert (out / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert main(command(start, out, *keep)) == 0
    assert "finished before" in capsys.readouterr().err


def test_looking_does_not_change_the_run(start, tmp_path):
    assert main(command(start, tmp_path / "watched", *WATCHED)) == 0
    assert main(command(start, tmp_path / "alone")) == 0
    assert same(weights(tmp_path / "watched" / "model"), weights(tmp_path / "alone" / "model"))


def test_a_killed_run_resumes(start, tmp_path):
    out = tmp_path / "out"
    given = command(start, out, "--save_steps", "2", steps="120")
    child = subprocess.Popen(
        [sys.executable, "-m", "drope_kernels.cli", *given],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + START_SECONDS
    while not list(out.glob("checkpoint-*")):
        assert child.poll() is None, child.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    child.stderr.close()
    assert not (out / "result.json").exists()
    shorter = command(start, out, "--save_steps", "100", steps="120")
    assert main(shorter) == 0
    assert result(out)["steps"] == 120
    assert result(out)["seconds_cover"] != "steps 1 to 120"


def test_the_control_keeps_its_positions(start, tmp_path):
    assert main(command(start, tmp_path / "out", "--drop", "none")) == 0
    control = load_model(tmp_path / "out" / "model")
    assert control.config.rope_parameters["rope_type"] == "default"
    assert control.config.drope["dropped_layers"] == []
    assert control.config.drope["recalibration"]["steps"] == 10
    assert main(command(start, tmp_path / "other")) == 0
    assert not same(weights(tmp_path / "out" / "model"), weights(tmp_path / "other" / "model"))


def test_distillation_learns_from_the_model_before_the_drop(start, tmp_path, capsys):
    more = ["--distillation", "1.0", "--log_steps", "1"]
    assert main(command(start, tmp_path / "control", *more, "--drop", "none", steps="1")) == 0
    assert result(tmp_path / "control")["first_loss"] == pytest.approx(0, abs=1e-6)
    assert main(command(start, tmp_path / "out", *more, steps="40")) == 0
    found = result(tmp_path / "out")
    assert 0.01 < found["last_loss"] < found["first_loss"]
    assert re.search(r"loss \d\.\d+, ce \d\.\d+, kl \d\.\d+", capsys.readouterr().err)
    note = load_model(tmp_path / "out" / "model").config.drope["recalibration"]
    assert note["distillation"] == 1.0


@pytest.mark.parametrize("form", ["head", "full"])
def test_norms_are_trained_and_kept(form, start, tmp_path):
    more = ["--export", str(tmp_path / "plain")] if form == "head" else []
    assert main(command(start, tmp_path / "out", "--qk_norm", form, *more)) == 0
    model = load_model(tmp_path / "out" / "model")
    norm = model.model.layers[0].self_attn.q_norm.weight
    assert norm.shape == ((16,) if form == "head" else (32,))
    assert not torch.equal(norm, torch.ones_like(norm))
    if form == "head":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
        assert plain.config.model_type == "qwen3"
        ids = torch.arange(20)[None]
        with torch.no_grad():
            torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_training_begins_documents_as_samples_and_sweeps_begin(start, tmp_path, monkeypatch):
    tokenizer = byte_tokenizer(bos=True)
    save(tmp_path / "model", llama(vocab_size=258), tokenizer)
    seen = []
    stock = HeldOutLosses.mean_loss

    def mean_loss(sweep, model, pieces):
        seen.append(sweep.first_token)
        return stock(sweep, model, pieces)

    monkeypatch.setattr(HeldOutLosses, "mean_loss", mean_loss)
    for name, switch, first in (("with", [], 257), ("without", ["--no_bos"], None)):
        out = tmp_path / name
        given = command(start, out, *WATCHED, *switch, steps="1")
        given[given.index("--model") + 1] = str(tmp_path / "model")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "bos:")
            assert main(given) == 0
        tokens = PackedFolder.load(out / "data").tokens("train")
        starts = PackedFolder.load(out / "data").starts("train")[:-1]
        assert (tokens == 257).sum() == (len(starts) if first else 0)
        assert (tokens[starts] == 257).all() == bool(first)
        assert result(out)["settings"]["bos"] is bool(first)
        assert set(seen) == {first}
        seen.clear()


def test_some_layers_may_keep_their_positions(start, tmp_path):
    savings = ["--bf16", "--activation_checkpointing", "--loss_chunk", "16"]
    assert main(command(start, tmp_path / "out", "--drop", "1", *savings)) == 0
    state = DropState.from_config(load_model(tmp_path / "out" / "model").config)
    assert state.dropped_layers == (1,)


def test_attention_is_a_matter_of_speed_only(start, tmp_path):
    losses = []
    for name in ("kernels", "sdpa", "eager"):
        assert main(command(start, tmp_path / name, "--attention", name, steps="3")) == 0
        losses.append(result(tmp_path / name)["train_loss"])
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)
    assert main(command(start, tmp_path / "across", "--attend_across_documents", steps="3")) == 0
    assert abs(result(tmp_path / "across")["train_loss"] - losses[0]) > 1e-4


def test_a_gguf_file_is_a_model_too(start, tmp_path):
    pytest.importorskip("gguf")
    from gguf_files import VOCABULARY as OF_ITS_TOKENIZER
    from gguf_files import write_gguf

    file = write_gguf(tmp_path / "tiny.gguf", llama(vocab_size=OF_ITS_TOKENIZER))
    given = command(start, tmp_path / "out", steps="2")
    given[given.index("--model") + 1] = str(file)
    assert main(given) == 0
    assert DropState.from_config(load_model(tmp_path / "out" / "model").config).dropped_layers


def test_records_of_repeated_steps_are_replaced(tmp_path):
    records = StepRecords(tmp_path / "records.jsonl")
    for step in (5, 10, 15):
        records.append(step, text="naïve")
    with records.path.open("a") as file:
        file.write('{"step": 20, "te')  # the process was killed here
    assert [row["step"] for row in records.read()] == [5, 10, 15]
    records.begin(10)
    records.append(12)
    assert [row["step"] for row in records.read()] == [5, 10, 12]
    assert records.read()[0]["text"] == "naïve"


def test_a_bar_on_a_terminal(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(command(start, tmp_path / "out", "--eval_steps", "5")) == 0
    shown = capsys.readouterr().err
    assert re.search(r"recalibrate: +100%.*10/10 \[.*loss \d\.\d+.*tokens/s", shown)
    assert "step 5: validation loss" in shown


@pytest.mark.slow  # three processes load torch and transformers
def test_two_processes_are_one_run(start, tmp_path):
    """The same global batch: same losses up to the order of sums; one packs, one writes."""
    shared = ["--batch_size", "2", "--sequences_per_step", "4", *WATCHED]
    assert main(command(start, tmp_path / "one", *shared)) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, more in (("two", []), ("sharded", ["--sharded"])):
        given = command(start, tmp_path / name, *shared, *more)
        run = subprocess.run(
            [*launch, "-m", "drope_kernels.cli", *given],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=2 * START_SECONDS,
        )
        assert run.returncode == 0, run.stderr
        assert run.stderr.count("tokens to train on") == 1
        assert run.stderr.count("step 10/10, loss") == 1
        alone, together = result(tmp_path / "one"), result(tmp_path / name)
        assert together["devices"] == 2
        assert together["tokens"] == alone["tokens"]
        assert together["train_loss"] == pytest.approx(alone["train_loss"], abs=1e-4)
        for before, now in zip(alone["length_sweep"], together["length_sweep"], strict=True):
            assert now["losses"] == pytest.approx(before["losses"], abs=1e-3)
        first, second = weights(tmp_path / "one" / "model"), weights(tmp_path / name / "model")
        for key, value in first.items():
            torch.testing.assert_close(second[key], value, rtol=1e-2, atol=1e-4)
