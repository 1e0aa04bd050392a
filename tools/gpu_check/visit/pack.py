"""Packs for a visit, where there is time: a wheel, the compiled probes, the results so far.

Nothing of it needs a GPU or torch. The wheel is built by a Python of the version that the machine
with the GPU has, in an environment of its own; where there is none of that version, the probes
alone are packed and the visit begins with the build.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes import library as probe_library

from bench import machine
from bench.machine import ROOT
from gpu_check.build import ENVIRONMENT
from gpu_check.visit import carried, limits

BUILD_REQUIREMENTS = ("setuptools", "pybind11", "ninja", "cmake")
ARCHIVE = "earlier.tar.gz"  # the results of the visit before, in the carried folder
SAY_TAG = (
    "import sys, sysconfig; print(sys.version_info[0], sys.version_info[1]); "
    "print(sys.implementation.cache_tag)"
)


class PackError(Exception):
    """What cannot be packed, and the remedy."""


@dataclass(frozen=True)
class Interpreter:
    path: Path
    tag: str  # sys.implementation.cache_tag, as in the names of compiled modules


def candidates(version: str) -> list[Path]:
    """Where a Python of that version may be: PATH, then pyenv's versions, newest first."""
    on_path = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    installed = sorted(pyenv.glob(f"{version}*/bin/python{version}"), reverse=True)
    return [*([Path(on_path)] if on_path else []), *installed]


def find_python(version: str) -> Interpreter | None:
    """The first that answers: pyenv's shims on PATH are there for versions that nobody chose."""
    for path in candidates(version):
        done = subprocess.run([str(path), "-c", SAY_TAG], capture_output=True, text=True)
        if done.returncode == 0:
            numbers, tag = done.stdout.splitlines()
            if numbers.split() == version.split("."):
                return Interpreter(path, tag)
    return None


def run(command: list[str], what: str, log: Path) -> None:
    """Raises PackError with the end of the log when the command fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=out, stderr=subprocess.STDOUT
        )
    if done.returncode != 0:
        end = log.read_text()[-1500:]
        raise PackError(f"{what} failed, see {log}:\n{end}")


def environment_of(python: Interpreter) -> Path:
    """The interpreter of an environment with what a build needs; torch is not among it."""
    folder = ROOT / "build" / f"gpu_check_{python.tag}"
    inside = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        log = folder / "log.txt"
        run([str(python.path), "-m", "venv", str(folder)], "making an environment", log)
        pins = ["-c", str(ROOT / "constraints.txt")]
        install = [str(inside), "-m", "pip", "install", "-q", *pins, *BUILD_REQUIREMENTS]
        run(install, f"installing {', '.join(BUILD_REQUIREMENTS)}", log)
        ready.touch()
    return inside


def build_wheel(python: Interpreter, folder: Path) -> Path:
    """The only wheel of the folder then, of the sources as they are."""
    for old in folder.glob("*.whl"):
        old.unlink()
    for stale in (ROOT / "build").glob(f"lib.*-{python.tag}"):
        shutil.rmtree(stale)  # setuptools would pack the modules that were deleted since
    inside = environment_of(python)
    offline = ["--no-index", "--no-build-isolation", "--no-deps"]
    command = [str(inside), "-m", "pip", "wheel", *offline, "-w", str(folder), str(ROOT)]
    run(command, "building the wheel", ROOT / "build" / "gpu_check_wheel.txt")
    return next(folder.glob("*.whl"))


def part(path: Path, sources: str, glibc: carried.Version, **more: str) -> dict[str, str]:
    if glibc > limits.NEWEST_GLIBC:
        newest = carried.text_of(limits.NEWEST_GLIBC)
        raise PackError(
            f"{path.name} needs glibc {carried.text_of(glibc)}, expected at most {newest}, so that "
            "it runs on the machine with the GPU: build it on an older system"
        )
    return {
        "file": path.name,
        "sources": sources,
        "sha256": carried.checksum(path),
        "machine": platform.machine(),
        "glibc": carried.text_of(glibc),
        **more,
    }


def pack_package(folder: Path, version: str) -> dict[str, str] | None:
    python = find_python(version)
    if python is None:
        for old in folder.glob("*.whl"):
            old.unlink()
        return None
    sources = carried.package_digest()
    wheel = build_wheel(python, folder)
    if sources != carried.package_digest():
        raise PackError("the sources changed while the wheel was built: pack again")
    extension = ROOT / "build" / "gpu_check_module"
    shutil.unpack_archive(wheel, extension, "zip")
    modules = list((extension / "drope_kernels").glob("_C*.so"))
    glibc = carried.glibc_needed(*modules)
    shutil.rmtree(extension)
    return part(wheel, sources, glibc, python=python.tag)


def pack_probes(folder: Path) -> dict[str, str]:
    if probe_library.find(folder) is None:
        nvcc = machine.find_nvcc()
        if nvcc is None:
            raise PackError(
                "nvcc not found: neither CUDA_HOME nor PATH names one, and without it nothing "
                "can be compiled for the GPU here"
            )
        try:
            probe_library.make(nvcc, folder)
        except probe_library.ProbesDoNotCompileError as error:
            raise PackError("\n".join([str(error), *error.facts["complaints"]])) from error
    library = folder / probe_library.LIBRARY
    return part(library, probe_library.digest(), carried.glibc_needed(library))


def check_place(folder: Path) -> str:
    """The folder as it is named on the command line there: relative to the root, ignored by git."""
    if not folder.resolve().is_relative_to(ROOT) or folder.resolve() == ROOT:
        raise PackError(f"expected a folder inside {ROOT}, got {folder}: it travels with the tree")
    name = str(folder.resolve().relative_to(ROOT))
    ignored = subprocess.run(["git", "-C", str(ROOT), "check-ignore", "-q", f"{name}/x"])
    if ignored.returncode != 0:
        raise PackError(f"expected a folder that git ignores, got {name}: choose build/visit, say")
    return name


def pack(folder: Path, version: str, earlier: Path | None) -> int:
    """Fills the folder; prints what it holds, the limits, and the command line to run there."""
    name = check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / carried.STAMP).unlink(missing_ok=True)
    stamp: dict[str, Any] = {"commit": machine.commit(ROOT), "probes": pack_probes(folder)}
    package = pack_package(folder, version)
    if package is None:
        print(f"no Python {version} here: no wheel is packed, the visit begins with the build")
    else:
        stamp["package"] = package
    (folder / ARCHIVE).unlink(missing_ok=True)
    if earlier is not None:
        shutil.copyfile(earlier, folder / ARCHIVE)
    (folder / carried.STAMP).write_text(json.dumps(stamp, indent=1) + "\n")
    for kind in ("package", "probes"):
        if kind in stamp:
            one = stamp[kind]
            print(f"{kind:8} {name}/{one['file']}, needs glibc {one['glibc']}")
    after = f"{name}/{ARCHIVE}" if earlier is not None else None
    return limits.report(name, after)
