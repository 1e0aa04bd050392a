"""The built package that the later stages import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.machine import ROOT
from gpu_check import build, installed
from gpu_check.report import RUNNING, Context, Outcome


@dataclass(frozen=True)
class Package:
    """folder: what goes on PYTHONPATH. builds: what was run for it, empty when it was there."""

    folder: Path
    builds: list[dict[str, Any]]
    error: str = ""


def find_or_build(context: Context) -> Package:
    """What was carried or stage build installed, or installed now; a dry run builds nothing."""
    if context.dry_run and installed.of_the_tree():
        return Package(ROOT, [])
    if context.dry_run and not installed.is_current():
        return Package(ROOT, [], "no package for this Python: neither in the tree nor carried")
    if installed.is_current():
        return Package(installed.FOLDER, [])
    installed.clear()
    command = build.pip_command(installed.FOLDER)
    context.save(Outcome(RUNNING, {"building": " ".join(command)}, []))
    done = build.run_logged("pip install", command, context.remaining())
    if done["returncode"] != 0:
        return Package(installed.FOLDER, [done], "the package does not build: run stage build")
    installed.mark()
    return Package(installed.FOLDER, [done])
