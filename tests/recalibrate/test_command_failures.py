"""`drope recalibrate`: every way to fail says what, keeps what there was, and how to go on."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from recalibrations import (
    at,
    command,
    llama,
    poison,
    result,
    save,
    weights,
    write_start,
)
from safetensors import SafetensorError
from texts import byte_tokenizer, documents_of
from tokenizers import processors
from transformers import DogeConfig, DogeForCausalLM, LlamaForCausalLM

from drope_kernels.cli import main
from drope_kernels.recalibrate import enough, pack_documents
from drope_kernels.recalibrate import run as running
from drope_kernels.recalibrate.run_config import read_run_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("start"))


def test_a_loss_that_is_no_number(start, tmp_path, monkeypatch, capsys):
    at(monkeypatch, 7, poison)
    out = tmp_path / "out"
    assert main(command(start, out, "--save_steps", "3")) == 1
    shown = capsys.readouterr().err
    assert "the training loss is nan at step 8" in shown
    assert f"failed; {out / 'checkpoint-6'} is whole" in shown
    assert all(value.isfinite().all() for value in weights(out / "checkpoint-6").values())


def test_a_full_disk(start, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    stock = torch.save

    def save_once(content, file, *rest, **named):
        if "checkpoint-6" in str(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        stock(content, file, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_once)
        assert main(command(start, out, "--save_steps", "3")) == 1
    shown = capsys.readouterr().err
    assert "No space left on device" in shown
    assert f"failed; {out / 'checkpoint-3'} is whole, the same command goes on from it" in shown
    assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-3"]
    assert main(command(start, out, "--save_steps", "3")) == 0


def test_a_disk_that_fills_up_before_the_model_is_saved(start, tmp_path, monkeypatch, capsys):
    stock = LlamaForCausalLM.save_pretrained

    def save(model, folder, **options):
        stock(model, folder, **options)
        if "checkpoint" not in str(folder):
            raise SafetensorError("No space left on device (os error 28)")

    out = tmp_path / "out"
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save)
    assert main(command(start, out, "--save_steps", "20")) == 1
    shown = capsys.readouterr().err
    assert f"{out / 'model'}: could not be written (No space left on device" in shown
    assert f"failed; {out / 'checkpoint-10'} is whole" in shown
    assert {path.name for path in out.iterdir()} == {"checkpoint-10", "data", "settings.json"}


def test_a_disk_without_place_for_the_settings(start, tmp_path, monkeypatch):
    """What was begun of them does not make the folder another run's."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full_disk)
        assert main(command(start, out)) == 1
    assert [path.name for path in out.iterdir()] == [".partial-settings.json"]
    assert main(command(start, out)) == 0


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_records_of_a_run_that_cannot_be_read(start, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(start, out)) == 0
    for name in ("result.json", "settings.json"):
        (out / name).write_text('{"steps": ')
        assert main(command(start, out)) == 2
        assert f"{out / name}: expected what an earlier run wrote" in capsys.readouterr().err


def test_another_process_without_the_first(start, tmp_path, monkeypatch, capsys):
    """It gives up; and it judges a folder of tokens by itself."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(running, "PATIENCE", 0)
    out = tmp_path / "out"
    assert main(command(start, out)) == 1
    assert "settings.json: expected the first process to write it" in capsys.readouterr().err
    out.mkdir()
    (out / "settings.json").touch()
    packed = ["--data_cache", str(tmp_path / "tokens")]
    monkeypatch.setattr(running, "prepared_model", packed_only)
    with pytest.raises(AssertionError, match="packed"):
        main(command(start, out, *packed))
    assert main(command(start, out, *packed, "--seed", "1")) == 1
    assert "got a folder packed with different seed" in capsys.readouterr().err


def packed_only(plan):
    raise AssertionError(f"packed into {plan.data_folder}")


def test_a_corrupt_line_is_named_and_can_be_left_out(start, tmp_path, capsys):
    lines = [json.dumps({"text": f"{i} and so on, " * 20}) for i in range(12)]
    lines[4] = '{"text": "cut'
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(lines))
    given = command(start, tmp_path / "out", steps="2")
    given[given.index("--data") + 1] = str(file)
    assert main(given) == 1
    assert f"{file}, line 5: expected a JSON object" in capsys.readouterr().err
    assert not (tmp_path / "out" / "data").exists()
    with pytest.warns(UserWarning, match="line 5"):
        assert main([*given, "--skip_corrupt"]) == 0


SIZES = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
WRONG_ROPE = {
    "half a scaling": {"rope_type": "linear", "rope_theta": 1e4},
    "foreign scaling": {"rope_type": "spiral", "rope_theta": 1e4},
    "no parameters": "default",
}


def broken(name, start, tmp_path):
    """A model folder with one thing wrong."""
    folder = tmp_path / "model"
    changes = {
        "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "vocabulary": {"vocab_size": 200, "eos_token_id": 199},
        "dropout": {"attention_dropout": 0.1},
    }
    if name == "no model":
        return str(folder)
    if name == "own mask":
        return save(folder, DogeForCausalLM(DogeConfig(**SIZES)))
    tokenizer = byte_tokenizer(eos=name != "no eos")
    if name == "no start":
        plain = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        tokenizer.backend_tokenizer.post_processor = plain
    save(folder, llama(**changes.get(name, {})), tokenizer)
    if name == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    if name == "cut weights":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[:-1])
    if name == "no tokens":
        (folder / "tokenizer.json").write_text('{"version": ')
    if name in WRONG_ROPE:
        written = json.loads((folder / "config.json").read_text())
        written["rope_parameters"] = WRONG_ROPE[name]
        (folder / "config.json").write_text(json.dumps(written))
    if name == "dropped":
        main(command(start, tmp_path / "first", steps="1"))
        return str(tmp_path / "first" / "model")
    return str(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no model", "expected a directory with config.json or a .gguf file"),
        ("no tokenizer", "expected a tokenizer in"),
        ("no eos", "expected one with an EOS token"),
        ("no start", "samples: expected prompts of at least one token, got ''"),
        ("vocabulary", "expected ids below 200, the model's vocabulary, got 256"),
        ("dynamic", "expected RoPE with fixed frequencies, got rope_type 'dynamic'"),
        ("no tokens", r"expected a tokenizer that transformers reads in .*JSONDecodeError"),
        ("half a scaling", "a config.json that transformers reads in .*Missing .*'factor'"),
        ("foreign scaling", "expected a rope_type of .*yarn or default, got 'spiral'; mend"),
        ("no parameters", "a config.json that transformers reads in .*rope_parameters"),
        (
            "dropout",
            "dropout: expected 0, got 0.1; set attention_dropout=0 in the config; or",
        ),
        ("own mask", r"got one that computes with it \(mask.dtype\)"),
        ("cut weights", "expected whole weights in .*model.safetensors"),
        ("dropped", "got one with 2 of 2 layers dropped; --drop none trains it on"),
    ],
)
def test_wrong_models_are_refused_before_their_weights_are_read(
    name, message, start, tmp_path, capsys, monkeypatch
):
    model = broken(name, start, tmp_path)
    monkeypatch.setattr(running, "load_model", None)
    capsys.readouterr()
    given = command(start, tmp_path / "out", "--samples", "")
    if name == "own mask":
        given += ["--drop", "none", "--samples", "a"]
    if name in ("dropout", "cut weights"):
        given += ["--samples", "a"]
    given[given.index("--model") + 1] = model
    assert main(given) == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)
    assert not (tmp_path / "out").exists()


def test_ids_beyond_the_embedding_count_where_a_text_has_them(start, tmp_path, capsys):
    """Gemma 3 has such an id, which no text gets."""
    model, out = tmp_path / "model", tmp_path / "out"
    tokenizer = byte_tokenizer(more=1)
    tokenizer.add_tokens(["<image>"])
    save(model, llama(), tokenizer)  # ids 257 and 258 are beyond
    given = command(start, out, steps="1")
    given[given.index("--model") + 1] = str(model)
    assert main(given) == 0
    given[given.index("--output_dir") + 1] = str(tmp_path / "other")
    assert main([*given, "--samples", "an <image>"]) == 2
    assert "got 258 in the prompt 'an <image>'; put the model's" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.txt").write_text("an <image> in it")
    given[given.index("--data") + 1] = str(tmp_path / "*.txt")
    assert main(given) == 2
    shown = capsys.readouterr().err
    assert "tokenizer: expected ids below 257, the model's vocabulary, got 258 in the text" in shown
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--context_length", "999"], "expected at most 128, the model's max_position_embeddings"),
        (["--drop", "0,7"], "layers: expected 0 to 1, got 7"),
        (["--backend", "none"], "backend: expected 'auto' or one of"),
        (["--sequences_per_step", "6"], "expected a multiple of batch_size x devices = 4 x 1"),
        (["--data", "{tmp}/nothing/*.txt"], "expected a file or a folder of texts"),
        (["--output_dir", "{tmp}/file"], "expected a folder, got the file"),
        (["--output_dir", "{tmp}/file/out"], "file is no folder that can be written to"),
        (["--output_dir", "{tmp}/full"], "with other files; choose another"),
        (["--export", "{tmp}/full"], "expected a new or empty folder, or an earlier export"),
        (["--export", "{tmp}/e", "--drop", "none"], "expected a run that drops all positions"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    more, message, start, tmp_path, capsys
):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("kept")
    more = [word.format(tmp=tmp_path) for word in more]
    assert main(command(start, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_a_folder_with_another_run_is_left_alone(start, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(start, out)) == 0
    before = (out / "result.json").read_text()
    assert main(command(start, out, "--learning_rate", "2e-3")) == 2
    assert "which holds another: learning_rate 0.001 there, 0.002 here" in capsys.readouterr().err
    assert main(command(start, out, "--no_resume")) == 2
    assert "which holds a run; delete it" in capsys.readouterr().err
    assert (out / "result.json").read_text() == before


def test_a_finished_run_is_made_longer_where_its_schedule_allows(start, tmp_path, capsys):
    for schedule, status in (("constant", 0), ("cosine", 2)):
        out = tmp_path / schedule
        more = ["--schedule", schedule, "--warmup", "2", "--save_steps", "5"]
        assert main(command(start, out, *more)) == 0
        assert main(command(start, out, *more, steps="13")) == status
        if status == 0:
            assert result(out)["steps"] == 13
            assert result(out)["seconds_cover"] == "steps 11 to 13"
    assert "Only a constant schedule" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--length_sweep", "1", "100"],
            "length_sweep: expected at least 100 x context_length x s",
        ),
        (["--length_sweep", "1", "100"], "= 100 x 32 x 4 = 12800 held-out tokens, got "),
        (
            ["--length_sweep", "9", "--validation_share", "0.001"],
            "raise validation_share=0.001, na",
        ),
        (["--length_sweep", "9", "--validation_data", "{short}"], "got 4; give more data, name"),
        (
            ["--eval_steps", "5", "--validation_data", "{short}"],
            "eval_steps: expected a row of con",
        ),
        (["--batch_size", "999"], "batch_size x context_length = 999 x 32 = 31968 tokens to train"),
        (["--data", "{short}"], "validation_share: expected two documents or more"),
        (["--recipe", "smollm2_135m", "--context_length", "32"], "batch_size: expected at least"),
    ],
)
def test_too_little_text_is_said_before_it_is_packed(more, message, start, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("abc")
    more = [word.format(short=tmp_path / "short.txt") for word in more]
    if "smollm2_135m" in more:
        more += ["--batch_size", "256", "--sequences_per_step", "256"]
    assert main(command(start, tmp_path / "out", *more)) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_too_little_text_is_said_of_packed_text_too(start, tmp_path, capsys):
    cache = ["--data_cache", str(tmp_path / "tokens")]
    assert main(command(start, tmp_path / "one", *cache, steps="1")) == 0
    assert main(command(start, tmp_path / "two", *cache, "--length_sweep", "100")) == 1
    assert "length_sweep: expected at least 100 x context_length" in capsys.readouterr().err


def test_enough_is_what_packing_gives(tmp_path, monkeypatch):
    """The look before packing counts to within an EOS a document what is packed, for any draw."""
    monkeypatch.setattr(enough.Need, "_check", lambda need, found: found_tokens.update(found))
    texts = documents_of(*(f"{i} " * (i + 1) for i in range(30)), " ")
    for seed, share in ((0, 0.01), (1, 0.01), (2, 0.3)):
        given = [
            *("--model", "m", "--data", "d", "--output_dir", "o", "--steps", "1"),
            *("--length_sweep", "1000", "--batch_size", "9999"),
            *("--seed", str(seed), "--validation_share", str(share)),
        ]
        found_tokens = {}
        config = read_run_config(given)
        enough.Need(config, 32).check_documents(texts, None, byte_tokenizer())
        packed = pack_documents(
            texts, byte_tokenizer(), tmp_path / str(seed), seed=seed, validation_share=share
        )
        assert found_tokens["validation"] == packed.num_tokens("validation") > 0
        assert found_tokens["train"] >= packed.num_tokens("train")
