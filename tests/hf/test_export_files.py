"""`hf.export` to a directory: whole or not at all, and in the place of an export only."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import dropped
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from drope_kernels import hf
from drope_kernels.hf.verify import VerificationError

pytestmark = pytest.mark.usefixtures("one_thread")

BETA = 1.3


def contents(folder: Path) -> dict[str, bytes]:
    return {x.name: x.read_bytes() for x in folder.iterdir()}


def test_a_bad_checkpoint_never_replaces_a_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hf.export(dropped("llama"), tmp_path / "out")
    good = contents(path)
    monkeypatch.setattr(PreTrainedModel, "load_state_dict", _zeros_loaded)
    with pytest.raises(VerificationError, match="FAILED  float32   error") as caught:
        hf.export(dropped("llama"), path)
    assert not caught.value.report.passed
    assert contents(path) == good
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def _zeros_loaded(model: Any, state: dict[str, Tensor], **options: Any) -> Any:
    zeros = {name: torch.zeros_like(x) for name, x in state.items()}
    return torch.nn.Module.load_state_dict(model, zeros, **options)


def _run_out(model: Any, folder: Path, **options: Any) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def test_a_full_disk_leaves_the_old_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hf.export(dropped("llama"), tmp_path / "out", verify=False)
    good = contents(path)
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", _run_out)
    with pytest.raises(OSError, match="No space left"):
        hf.export(dropped("llama", BETA), path)
    assert contents(path) == good
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def test_an_export_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hf.export(dropped("llama"), tmp_path / "out", verify=False)
    good, rename = contents(path), Path.rename

    def refuse_the_new_one(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new_one)
    with pytest.raises(PermissionError, match="Permission denied"):
        hf.export(dropped("llama", BETA), path, verify=False)
    assert contents(path) == good
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_while_replacing(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before or after the second rename: the next export, even one that fails, mends it."""
    path = hf.export(dropped("llama"), tmp_path / "out", verify=False)
    good, aside = contents(path), tmp_path / ".out.drope-old"
    stale = tmp_path / f".out.partial-{os.getpid()}"  # numbers of processes come again
    if moment == "before":
        path.rename(aside)
    else:
        aside.mkdir()
        (aside / "config.json").write_text("{}")  # what is not removed yet
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", _run_out)
        with pytest.raises(OSError, match="No space left"):
            hf.export(dropped("llama", BETA), path, verify=False)
    assert contents(path) == good
    stale.mkdir()
    (stale / "tokenizer.json").write_text("{}")
    hf.export(dropped("llama"), path, verify=False)
    assert contents(path) == good
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def test_an_export_set_aside_outlives_what_took_its_name(tmp_path: Path) -> None:
    path = hf.export(dropped("llama"), tmp_path / "out", verify=False)
    good, aside = contents(path), tmp_path / ".out.drope-old"
    path.rename(aside)
    path.mkdir()
    (path / "notes").write_text("text")
    with pytest.raises(ValueError, match="something else in it"):
        hf.export(dropped("llama"), path)
    assert contents(aside) == good
    (path / "notes").unlink()
    hf.export(dropped("qwen3"), path, verify=False)
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def test_an_earlier_export_is_replaced_as_a_whole(tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"far": 0}, unk_token="far"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    path = hf.export(dropped("llama"), tmp_path / "out", tokenizer=tokenizer, verify=False)
    lines = (path / "drope_export.sha256").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert "tokenizer.json" in listed
    for name, digest in listed.items():
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest
    hf.export(dropped("qwen3"), path, verify=False)
    assert json.loads((path / "config.json").read_text())["model_type"] == "qwen3"
    assert not (path / "tokenizer.json").exists()
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    live = dropped("llama")
    trained, run, kept, file = (tmp_path / x for x in ("trained", "run", "kept", "file"))
    model = AutoModelForCausalLM.from_pretrained(hf.export(live, trained, verify=False))
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(trained)  # by transformers, with the config of an export
    hf.export(live, run, verify=False)
    (run / "checkpoint-10").mkdir()
    (run / "checkpoint-10" / "model.safetensors").write_text("")
    (hf.export(live, kept, verify=False) / "model.gguf").write_text("")
    file.write_text("text")
    for path in (trained, run, kept, file):
        with pytest.raises(ValueError, match="something else in it"):
            hf.export(live, path)
    (tmp_path / "empty").mkdir()
    hf.export(live, tmp_path / "empty", verify=False)
