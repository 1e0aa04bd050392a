"""What `drope recalibrate` says is to be done after a failure, done."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil

import pytest
import torch
from recalibrations import at, command, poison, result, stop, write_start

from drope_kernels.cli import main
from drope_kernels.recalibrate import run as running

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("start"))


def raises(error):
    def act(model):
        raise error

    return act


def full(model):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def told_command(shown):
    """The last command line that was shown."""
    (*_, line) = re.findall(r"; drope (recalibrate .*)", shown)
    return shlex.split(line)


@pytest.mark.parametrize("act", [stop, full], ids=["interrupted", "full"])
@pytest.mark.parametrize("resume", ["--resume", "--no_resume", "yaml"])
def test_the_command_that_is_told_ends_the_run(act, resume, start, tmp_path, monkeypatch, capsys):
    out, more = tmp_path / "out", [resume]
    if resume == "yaml":
        (tmp_path / "run.yaml").write_text("resume: false")
        more = [str(tmp_path / "run.yaml")]
    given = command(start, out, "--save_steps", "1", steps="3")
    given = [given[0], *more, *given[1:]]
    with monkeypatch.context() as patch:
        at(patch, 3, act)
        assert main(given) == (130 if act is stop else 1)
    shown = capsys.readouterr().err
    whole = f"{out / 'checkpoint-2'} is whole, "
    assert whole + ("the same" if resume == "--resume" else "this") + " command goes on" in shown
    assert main(told_command(shown)) == 0
    assert "going on from" in capsys.readouterr().err
    assert result(out)["steps"] == 3


@pytest.mark.parametrize("resume", ["--resume", "--no_resume"])
def test_the_command_that_is_told_begins_again(resume, start, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        at(patch, 1, stop)
        assert main(command(start, out, resume, steps="2")) == 130
    shown = capsys.readouterr().err
    assert "there is no checkpoint yet, the same command begins again" in shown
    assert main(told_command(shown)) == 0


@pytest.mark.parametrize("kept", [[], ["--save_steps", "1"]])
def test_after_a_loss_that_is_no_number(kept, start, tmp_path, monkeypatch, capsys):
    """The same command would end there again: it is not told; other settings are another run."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        at(patch, 2, poison)
        assert main(command(start, out, *kept, steps="3")) == 1
    shown = capsys.readouterr().err
    assert "goes on from it" not in shown
    assert "begins again" not in shown
    assert ("lower learning_rate" in shown, "in another output_dir" in shown) == (True, bool(kept))
    lower = ["--learning_rate", "1e-4"]
    assert main(command(start, out, *kept, *lower, steps="3")) == (2 if kept else 0)
    if kept:
        assert main(command(start, tmp_path / "other", *kept, *lower, steps="3")) == 0


@pytest.mark.parametrize("kept", [[], ["--save_steps", "1"]])
def test_after_memory_that_was_too_small(kept, start, tmp_path, monkeypatch, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    with monkeypatch.context() as patch:
        at(patch, 2, raises(torch.OutOfMemoryError("out of memory")))
        assert main(command(start, out, *kept, steps="3")) == 1
    shown = capsys.readouterr().err
    assert "set activation_checkpointing or loss_chunk" in shown
    assert ("in another output_dir" in shown) == bool(kept)
    smaller = ["--batch_size", "2"]
    assert main(command(start, other if kept else out, *kept, *smaller, steps="3")) == 0
    if kept:
        assert main(command(start, out, *kept, *smaller, steps="3")) == 2
        savings = ["--loss_chunk", "8", "--activation_checkpointing"]
        assert main(command(start, out, *kept, *savings, steps="3")) == 0


def test_after_texts_that_changed(start, tmp_path, monkeypatch, capsys):
    """A refusal on the way promises nothing for the same command."""
    out, texts = tmp_path / "out", tmp_path / "texts"
    shutil.copytree(start / "texts", texts)
    given = command(start, out, "--save_steps", "1", steps="3")
    given[given.index("--data") + 1] = str(texts)
    with monkeypatch.context() as patch:
        at(patch, 2, stop)
        assert main(given) == 130
    (texts / "b.txt").write_text("more and more\n" * 40)
    shutil.rmtree(out / "data")
    capsys.readouterr()
    assert main(given) == 1
    shown = capsys.readouterr().err
    assert "data.digest was" in shown
    assert "choose another output_dir" in shown
    assert shown.endswith(f"failed; {out / 'checkpoint-1'} is whole\n")
    given[given.index("--output_dir") + 1] = str(tmp_path / "other")
    assert main(given) == 0


def test_after_a_result_that_could_not_be_written(start, tmp_path, monkeypatch, capsys):
    out, stock = tmp_path / "out", running.write_json

    def write(file, content):
        if file.name == "result.json":
            full(None)
        stock(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(running, "write_json", write)
        assert main(command(start, out, steps="2")) == 1
    assert f"failed; {out / 'model'} is whole" in capsys.readouterr().err
    assert main(command(start, out, steps="2")) == 0


def test_after_a_result_that_cannot_be_read(start, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(start, out, steps="2")) == 0
    (out / "result.json").write_text('{"steps": ')
    assert main(command(start, out, steps="2")) == 2
    assert "delete it, and the run ends anew" in capsys.readouterr().err
    (out / "result.json").unlink()
    assert main(command(start, out, steps="2")) == 0
    assert json.loads((out / "result.json").read_text())["steps"] == 2


def test_room_is_asked_for_only_where_it_is_missing(start, tmp_path, monkeypatch, capsys):
    stock = torch.save
    for number, asked in ((errno.ENOSPC, True), (errno.EACCES, False)):
        out = tmp_path / str(number)

        def save(content, file, *rest, number=number, **named):
            if "checkpoint-2" in str(file):
                raise OSError(number, os.strerror(number))
            stock(content, file, *rest, **named)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", save)
            assert main(command(start, out, "--save_steps", "1", steps="2")) == 1
        shown = capsys.readouterr().err
        assert ("make room, then resume" in shown) == asked
        assert ("mend that" in shown) != asked
        assert main(told_command(shown)) == 0


def test_what_a_kill_leaves_of_a_file_stops_nothing(start, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".partial-result.json").write_text("{")
    (out / ".partial-checkpoint-1").mkdir()
    assert main(command(start, out, "--save_steps", "1", steps="2")) == 0
    assert not (out / ".partial-checkpoint-1").exists()
