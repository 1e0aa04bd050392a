"""The commands that README and docs show: every one is understood, and the small one runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from recalibrations import llama, result, save
from repository import ROOT

from drope_kernels.cli import build_parser, main
from drope_kernels.recalibrate.run_config import read_run_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(
    r"^ *(?:[\w -]*-m drope_kernels\.cli|drope) (\w+) ((?:\\\n|[^#\n\\])*)", re.MULTILINE
)


def commands(name: str) -> list[str]:
    """What follows `drope NAME` in every page, as it stands there."""
    found = [match for page in PAGES for match in COMMAND.finditer(page.read_text())]
    return sorted({x[2].replace("\\\n", " ").strip() for x in found if x[1] == name})


@pytest.mark.parametrize("words", commands("recalibrate"))
def test_every_recalibration_is_understood(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("model: m\ndata: texts\noutput_dir: run\nsteps: 3\n")
    config = read_run_config(shlex.split(words))
    assert config.output_dir in ("run", "try", "control", "distilled")


@pytest.mark.parametrize("name", ["evaluate", "export"])
def test_every_other_command_is_understood(name: str) -> None:
    found = commands(name)
    assert len(found) > 2
    for words in found:
        assert build_parser(name).parse_args([name, *shlex.split(words)]).command == name


def test_the_small_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = [words for words in commands("recalibrate") if "--output_dir try" in words]
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "SmolLM2-135M", llama(max_position_embeddings=256))
    Path("texts").mkdir()
    for i in range(12):
        Path(f"texts/{i}.txt").write_text("".join(f"{i} and {j}\n" for j in range(400)))
    assert main(["recalibrate", *shlex.split(words), "--cpu"]) == 0
    assert result(Path("try"))["tokens"] >= 20_000
