"""What was trained is not lost to a disk: room is taken before, another place found after."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from pathlib import Path

import pytest
from recalibrations import at, command, llama, result, same, stop, weights, write_start
from transformers import AutoTokenizer, LlamaForCausalLM

from drope_kernels.cli import main
from drope_kernels.hf import load_model
from drope_kernels.recalibrate import saving
from drope_kernels.recalibrate.saving import reserved_room

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("start"))


def no_place(number):
    def fallocate(*_):
        raise OSError(number, os.strerror(number))

    return fallocate


def test_the_room_is_taken_and_given_back(tmp_path):
    model = llama()
    with reserved_room(tmp_path, model, checkpoints=True):
        (room,) = tmp_path.iterdir()
        size = sum(value.nbytes for value in model.parameters())
        assert size < room.stat().st_size < size + (64 << 20)
        assert room.stat().st_blocks * 512 >= size  # of the disk, not of a sparse file
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spare", [-1, 0])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_room_for_the_model_and_a_checkpoint(checkpoints, spare, tmp_path, monkeypatch):
    model = llama()
    size = sum(value.nbytes for value in model.parameters())
    needed = size + saving._BESIDE_WEIGHTS + (3 * size if checkpoints else 0)
    monkeypatch.setattr(saving, "free_bytes", lambda _: needed + spare)
    if spare < 0:
        with (
            pytest.raises(OSError, match=r"output_dir: expected room in .* make room there, or"),
            reserved_room(tmp_path, model, checkpoints=checkpoints),
        ):
            pass
    else:
        with reserved_room(tmp_path, model, checkpoints=checkpoints):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_run_without_room_does_not_begin(number, start, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_place(number))
        at(patch, 1, lambda model: pytest.fail("it trains"))
        assert main(command(start, out, steps="2")) == 1
    shown = capsys.readouterr().err
    assert "make room there, or choose another output_dir" in shown
    assert "the same command begins again" in shown
    assert not list(out.glob(".partial-*"))
    assert main(command(start, out, steps="2")) == 0


def test_a_file_system_that_cannot_reserve(start, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", no_place(errno.EOPNOTSUPP))
    assert main(command(start, tmp_path / "out", steps="2")) == 0


def test_room_that_a_killed_run_had_taken(start, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        at(patch, 1, stop)
        assert main(command(start, out, steps="2")) == 130
    assert not list(out.glob(".partial-*"))
    (out / ".partial-room").write_bytes(b"0" * 99)
    assert main(command(start, out, steps="2")) == 0
    assert {path.name for path in out.iterdir()} == {
        "data",
        "model",
        "result.json",
        "settings.json",
    }


@pytest.mark.parametrize("kept", [[], ["--save_steps", "1"], ["--save_steps", "2"]])
def test_a_disk_that_fills_up_all_the_same(kept, start, tmp_path, monkeypatch, capsys):
    """Without a last checkpoint the trained weights are where there was a place for them."""
    out, spare, whole = tmp_path / "out", tmp_path / "spare", tmp_path / "whole"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    assert main(command(start, whole, *kept, steps="2")) == 0
    stock = LlamaForCausalLM.save_pretrained

    def save(model, folder, **options):
        if Path(folder).name == ".partial-model":
            no_place(errno.ENOSPC)()
        stock(model, folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", save)
        assert main(command(start, out, *kept, steps="2")) == 1
    shown = capsys.readouterr().err
    assert not (out / "model").exists()
    if kept:
        assert same(weights(out / "checkpoint-2"), weights(whole / "model"))
        assert not list(spare.glob("drope-model-*"))
        assert main(command(start, out, *kept, steps="2")) == 0
        assert same(weights(out / "model"), weights(whole / "model"))
        return
    (place,) = re.findall(r"The trained model is in (\S+): move it", shown)
    assert same(weights(place), weights(whole / "model"))
    assert load_model(place).config.drope["recalibration"]["tokens"] == result(whole)["tokens"]
    assert len(AutoTokenizer.from_pretrained(place)) > 0


def test_nowhere_a_place(start, tmp_path, monkeypatch, capsys):
    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", no_place(errno.ENOSPC))
    assert main(command(start, tmp_path / "out", steps="2")) == 1
    shown = capsys.readouterr().err
    assert re.search(r"out/model: could not be written .*Nor could .* to \S+/spare .*lost", shown)
    assert not list(spare.glob("drope-model-*"))
