"""`drope export`: what it writes, prints and returns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import build, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from drope_kernels import hf
from drope_kernels.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Llama with positions, in bfloat16, and its tokenizer."""
    folder = tmp_path / "source"
    build("llama").to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    return folder


def export(*words: Any) -> int:
    return main(["export", *map(str, words)])


def test_export(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    lengths = ("--log-slope", 0.4, "--train-length", 100, "--length", 800)
    assert export(source, out, "--drop", *lengths, "--context", 4096, "--engine", "vllm") == 0
    printed = capsys.readouterr().out
    assert "FAILED" not in printed
    assert "error, by that of one rounding" in printed
    beta = 1 + 0.4 * math.log(8)
    assert f"temperature: {beta:.6g} folded into 2 parameters" in printed
    assert "served by: transformers, llama.cpp, vllm, sglang" in printed
    assert f"wrote {out}, a llama" in printed
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["max_position_embeddings"]) == ("bfloat16", 4096)
    assert config["drope"]["export"]["source"] == source.name
    for file in out.iterdir():  # nothing tells where on this machine it was made
        assert str(tmp_path).encode() not in file.read_bytes()
    assert hf.load_tokenizer(out)("b a")["input_ids"] == [2, 1]
    with torch.no_grad():
        live = hf.set_temperature(hf.drop_positions(hf.load_model(source)), beta)
        ours, theirs = hf.load_model(out)(tokens()).logits, live(tokens()).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * float(theirs.abs().max()))


def test_recorded_temperature(source: Path, tmp_path: Path) -> None:
    hf.set_temperature(hf.drop_positions(hf.load_model(source)), 1.2).save_pretrained(
        tmp_path / "recorded"
    )
    for options, beta in (((), 1.2), (("--temperature", 1.5), 1.5)):
        assert export(tmp_path / "recorded", tmp_path / "out", "--no-verify", *options) == 0
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["drope"]["export"]["temperature"] == pytest.approx(beta)
        assert config["dtype"] == "float32"


def test_check(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert export(source, out, "--drop", "--no-verify", "--dtype", "float32") == 0
    assert "not verified" in capsys.readouterr().out
    assert export("--check", out) == 0
    assert f"{out}: position-free" in capsys.readouterr().out
    assert export("--check", source) == 1
    assert f"{source}: NOT position-free" in capsys.readouterr().out


def test_check_of_a_broken_directory(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "model.safetensors").write_bytes(b"half")
    assert export("--check", source) == 2
    assert "expected whole weights" in capsys.readouterr().err
    (source / "model.safetensors").unlink()
    assert export("--check", source) == 2
    error = capsys.readouterr().err
    assert "got no model.safetensors" in error
    assert "was not written" not in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected SOURCE and OUT, or --check DIR"),
        (["SOURCE"], "expected SOURCE and OUT"),
        (["--check", "SOURCE", "OUT"], "--check: expected nothing else"),
        (["--check", "SOURCE", "--engine", "vllm"], "--check: expected nothing else"),
        (["SOURCE", "OUT"], "call drop_positions first"),
        (["OUT", "SOURCE"], "expected a directory with config.json or a .gguf file"),
        (["SOURCE", "SOURCE", "--drop"], "something else in it; choose another"),
        (["SOURCE", "OUT", "--drop", "--log-slope", "0.1"], "expected all three or none"),
        (["SOURCE", "OUT", "--drop", "--temperature", "-1"], "beta: expected"),
        (["SOURCE", "OUT", "--drop", "--context", "9"], "context: expected at least"),
        (["--check", "OUT"], "without config.json"),
    ],
)
def test_bad_requests(
    words: list[str],
    message: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"SOURCE": source, "OUT": tmp_path / "out"}
    assert export(*(places.get(word, word) for word in words)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_full_disk(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_out(model: Any, folder: Path, **options: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", run_out)
    assert export(source, tmp_path / "out", "--drop") == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert f"{tmp_path / 'out'} was not written" in error
