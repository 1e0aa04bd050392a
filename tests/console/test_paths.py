"""One meaning of `~`, wherever a path enters."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")
from drope_kernels.cli import build_parser
from drope_kernels.console.paths import user_path
from drope_kernels.evaluate.command import _evaluation
from drope_kernels.hf import load_model


def test_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~") == tmp_path
    assert user_path("~/run/") == user_path(Path("~/run")) == tmp_path / "run"
    assert user_path("run/~") == Path("run/~")
    assert user_path("~no-such-user/run") == Path("~no-such-user/run")


def test_options_that_the_shell_has_not_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["evaluate", "~/m:name", "--text=~/t", "--out=~/o", "--compare=~/c", "--tokenizer=~/w"]
    given = build_parser("evaluate").parse_args(words)
    evaluation = _evaluation(given)
    assert given.out == tmp_path / "o"
    assert evaluation.model == ("name", tmp_path / "m")
    assert evaluation.compared == (("c", tmp_path / "c"),)
    assert (evaluation.text, evaluation.tokenizer) == ((tmp_path / "t",), tmp_path / "w")
    assert build_parser("demo").parse_args(["demo", "--out=~/o"]).out == tmp_path / "o"
    exported = build_parser("export").parse_args(["export", "~/m", "~/o"])
    assert (exported.source, exported.out) == (tmp_path / "m", tmp_path / "o")
    with pytest.raises(FileNotFoundError, match=f"got {tmp_path}/m"):
        load_model("~/m")
