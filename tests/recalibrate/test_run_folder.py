"""The folder of a run: who may write there, and that a refusal leaves it as it is."""

from __future__ import annotations

import json

import pytest
from held_folders import held_by_another
from recalibrations import CONTEXT, at, command, result, same, stop, weights, write_start
from training import config, counting_rows, tiny_decoder

from drope_kernels.cli import main
from drope_kernels.recalibrate import command as command_module
from drope_kernels.recalibrate import recalibrate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("start"))


def contents(folder):
    """Every file below a folder, with its bytes and when it was written."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("kept", [[], ["--save_steps", "1"]])
@pytest.mark.parametrize("steps", ["1", "3"])
def test_a_finished_run_of_another_length_is_refused(kept, steps, start, tmp_path, capsys):
    """A cosine schedule has one length; without checkpoints there is nothing to go on from."""
    out = tmp_path / "out"
    assert main(command(start, out, *kept, steps="2")) == 0
    before = contents(tmp_path)
    assert main(command(start, out, *kept, steps=steps)) == 2
    shown = capsys.readouterr().err
    assert contents(tmp_path) == before
    if kept:
        assert f"lengths.steps was 2 and is {steps}" in shown
    else:
        assert f"another length of it: steps 2 there, {steps} here; choose" in shown
    assert "choose another output_dir" in shown
    assert main(command(start, tmp_path / "other", *kept, steps=steps)) == 0
    assert main(command(start, out, *kept, steps="2")) == 0
    assert "finished before" in capsys.readouterr().err


@pytest.mark.parametrize("change", [["--batch_size", "2"], ["--gradient_accumulation", "2"]])
def test_an_interrupted_run_with_other_steps_is_refused(
    change, start, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        at(patch, 2, stop)
        assert main(command(start, out, "--save_steps", "1", steps="3")) == 130
    before = contents(tmp_path)
    assert main(command(start, out, "--save_steps", "1", *change, steps="3")) == 2
    assert f"settings.{change[0].removeprefix('--')} was" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_a_longer_run_keeps_the_shorter_one_until_it_is_done(start, tmp_path, monkeypatch):
    """Interrupted, the result of the shorter one still tells of the model beside it."""
    out, more = tmp_path / "out", ["--schedule", "constant", "--warmup", "1", "--save_steps", "1"]
    assert main(command(start, out, *more, steps="2")) == 0
    before = contents(out / "model") | {"result": result(out)}
    with monkeypatch.context() as patch:
        at(patch, 3, stop)
        assert main(command(start, out, *more, steps="4")) == 130
    assert contents(out / "model") | {"result": result(out)} == before
    assert main(command(start, out, *more, steps="4")) == 0
    assert result(out)["steps"] == 4
    assert same(weights(out / "model"), weights(out / "checkpoint-4"))


def test_a_run_that_the_data_refuses_leaves_the_settings(start, tmp_path, monkeypatch, capsys):
    """Stopped before its first checkpoint, its tokens are those of another seed."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        at(patch, 1, stop)
        assert main(command(start, out)) == 130
    before = contents(out)
    assert main(command(start, out, "--seed", "1")) == 1
    assert "got a folder packed with different seed" in capsys.readouterr().err
    assert contents(out) == before
    assert json.loads((out / "settings.json").read_text())["seed"] == 0


def test_a_second_command_in_one_folder_is_refused(start, tmp_path, capsys):
    """Whatever the first one has written yet; and what a killed one left is taken over."""
    out, given = tmp_path / "out", command(start, tmp_path / "out", "--save_steps", "1", steps="2")
    with held_by_another(out) as pid:
        before = contents(tmp_path)
        assert main(given) == 2
        assert f"held by process {pid} on" in capsys.readouterr().err
        assert contents(tmp_path) == before
    assert main(given) == 0
    assert not (out / ".lock").exists()
    with held_by_another(out):
        before = contents(tmp_path)
        assert main(given) == 0  # finished: nothing is written
        assert main([*given, "--export", str(tmp_path / "plain")]) == 2
        assert contents(tmp_path) == before


def test_the_folder_of_a_call_is_its_own_too(tmp_path):
    settings = config(steps=2, save_steps=1, output_dir=str(tmp_path / "out"))
    with held_by_another(tmp_path / "out"):
        with pytest.raises(ValueError, match="output_dir: expected a folder that no other command"):
            recalibrate(tiny_decoder(), counting_rows(), settings, description=None)
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    recalibrate(tiny_decoder(), counting_rows(), settings, description=None)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"checkpoint-1", "checkpoint-2"}


def test_what_was_written_meanwhile_is_judged(start, tmp_path, monkeypatch, capsys):
    """Between the first look at the folder and its lock another command ran to its end."""
    out, stock = tmp_path / "out", command_module.plan_run

    def plan_and_be_late(config):
        plan = stock(config)
        monkeypatch.setattr(command_module, "plan_run", stock)
        assert main(command(start, out, steps="2")) == 0
        return plan

    monkeypatch.setattr(command_module, "plan_run", plan_and_be_late)
    assert main(command(start, out, steps="3")) == 2
    assert "another length of it: steps 2 there, 3 here" in capsys.readouterr().err
    assert result(out)["steps"] == 2


def spelled(given, **paths):
    """The command line with other values of some options."""
    given = list(given)
    for name, value in paths.items():
        given[given.index(f"--{name}") + 1] = value
    return given


@pytest.mark.parametrize("stopped", [True, False])
def test_another_spelling_of_its_paths_is_the_same_run(
    stopped, start, tmp_path, monkeypatch, capsys
):
    """From where it began, and from elsewhere; what is at another place is another run."""
    (tmp_path / "elsewhere").mkdir()
    for name in ("model", "texts"):
        (tmp_path / name).symlink_to(start / name)
    monkeypatch.chdir(tmp_path)
    given = command(start, "out", "--save_steps", "1", steps="3")
    with monkeypatch.context() as patch:
        if stopped:
            at(patch, 2, stop)
        first = spelled(given, model="model", data="texts")
        assert main(first) == (130 if stopped else 0)
    capsys.readouterr()
    told = "going on from" if stopped else "finished before"
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(spelled(given, model="model", data="texts", output_dir="../out")) == 2
    before = contents(tmp_path / "out")
    assert main(spelled(given, output_dir="../out", data=str(start))) == 2
    assert f"which holds another: data ['texts'] there, ['{start}'] here" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    assert main(spelled(given, model="../model/", data="../texts", output_dir="../out")) == 0
    assert told in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(spelled(given, model="./model", data="texts/", output_dir="./out/")) == 0
    assert "finished before" in capsys.readouterr().err


def test_a_home_is_one_place_however_it_is_written(start, tmp_path, monkeypatch, capsys):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    for name in ("model", "texts"):
        (home / name).symlink_to(start / name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (here / "run.yaml").write_text(
        "model: ~/model\ndata: [~/texts]\noutput_dir: ~/run\ndata_cache: ~/tokens\n"
        "export: ~/plain\nvalidation_share: 0.25\ncpu: true\nsave_steps: 1\nsteps: 3\n"
        f"batch_size: 4\ncontext_length: {CONTEXT}\n"
    )
    with monkeypatch.context() as patch:
        at(patch, 2, stop)
        assert main(["recalibrate", "run.yaml"]) == 130
    assert main(["recalibrate", "run.yaml", "--output_dir=~/run"]) == 0
    assert f"going on from {home / 'run' / 'checkpoint-1'}" in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["run.yaml"]
    assert {path.name for path in home.iterdir()} == {"model", "texts", "run", "tokens", "plain"}
    assert result(home / "run")["seconds_cover"] == "steps 2 to 3"
    assert main(["recalibrate", "run.yaml", "--output_dir", str(home / "run")]) == 0
    assert "finished before" in capsys.readouterr().err


def test_the_home_of_a_call(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    settings = config(steps=2, save_steps=1, output_dir="~/out", resume=True)
    for _ in range(2):
        result = recalibrate(tiny_decoder(), counting_rows(), settings, description=None)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert {path.name for path in (tmp_path / "home" / "out").iterdir()} == {
        "checkpoint-1",
        "checkpoint-2",
    }
    result.model.save("~/model.safetensors")
    assert (tmp_path / "home" / "model.safetensors").is_file()
