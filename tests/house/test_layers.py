"""The layers of the package, held by import-linter: a planted import upwards is found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter")

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """The package and its contracts, to be spoilt."""
    sources = ROOT / "drope_kernels"
    shutil.copytree(
        sources, tmp_path / sources.name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(house: Path) -> tuple[int, str]:
    run = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache", "--no-logo"],
        cwd=house,
        env={**os.environ, "PYTHONPATH": str(house)},
        capture_output=True,
        text=True,
    )
    return run.returncode, run.stdout


def plant(house: Path, module: str, line: str) -> None:
    file = house / "drope_kernels" / module
    file.write_text(f"{file.read_text()}\n{line}\n")


def test_the_house_keeps_its_layers(house: Path) -> None:
    status, said = lint(house)
    assert status == 0, said


PLANTED = {
    "from spec to call": (
        "spec/values.py",
        "from drope_kernels.call import ops",
        "drope_kernels.spec.values -> drope_kernels.call.ops",
    ),
    "from training to evaluation, late": (
        "recalibrate/run.py",
        "def late():\n    import drope_kernels.evaluate.loss",
        "drope_kernels.recalibrate.run -> drope_kernels.evaluate.loss",
    ),
    "from one backend to another": (
        "backends/cpu.py",
        "from drope_kernels.backends.reference import rotate",
        "drope_kernels.backends.cpu -> drope_kernels.backends.reference",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_an_import_upwards_is_found(house: Path, name: str) -> None:
    module, line, finding = PLANTED[name]
    plant(house, module, line)
    status, said = lint(house)
    assert status == 1
    assert finding in said


def test_a_new_module_has_to_say_where_it_belongs(house: Path) -> None:
    (house / "drope_kernels" / "helpers.py").write_text("")
    status, said = lint(house)
    assert status == 1
    assert "helpers" in said
