"""What is made where there is time and carried to the GPU: its stamp, and its way into place there.

The folder holds a wheel, the compiled probes with what the compiler said of them, and stamp.json.
Each of the two is used only if it is of the sources as they are and fits the machine; else a
sentence says why not, and it is made there.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes import library as probe_library

from bench import machine
from bench.machine import ROOT
from gpu_check import installed

STAMP = "stamp.json"
NOT_PACKED = "it was not packed"
Version = tuple[int, ...]
_GLIBC = re.compile(rb"\0GLIBC_(\d+(?:\.\d+)+)(?=\0)")
LOAD_SECONDS = 60.0
# The compiled module alone: importing the package would import torch, which takes seconds.
LOAD_MODULE = """
import importlib.machinery, importlib.util, json, sys
loader = importlib.machinery.ExtensionFileLoader("drope_kernels._C", sys.argv[1])
spec = importlib.util.spec_from_file_location("drope_kernels._C", sys.argv[1], loader=loader)
module = importlib.util.module_from_spec(spec)
loader.exec_module(module)
print(json.dumps(module.build_info(), default=str))
"""


@dataclass(frozen=True)
class Unpacked:
    """Why the carried package, the carried probes are not used; empty: they are in place."""

    package: str
    probes: str


def glibc_needed(*libraries: Path) -> Version:
    """The newest version of glibc that one of the libraries asks for; (0,) for none."""
    found = [name for path in libraries for name in _GLIBC.findall(path.read_bytes())]
    return max((version_of(name.decode()) for name in found), default=(0,))


def version_of(text: str) -> Version:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def text_of(version: Version) -> str:
    return ".".join(map(str, version))


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def package_digest() -> str:
    return machine.source_digest(ROOT, installed.BUILT_FROM)


def why_not_whole(folder: Path, part: dict[str, Any], sources: str) -> str:
    """Empty when a carried file is there, unchanged, and of the present sources."""
    path = folder / str(part["file"])
    if not path.exists():
        return f"{path} is missing"
    if part["sources"] != sources:
        return (
            f"{path.name} was made of the sources {part['sources']}, these are {sources}: "
            "make it anew with --pack"
        )
    if checksum(path) != part["sha256"]:
        return f"{path.name} is not what was packed: it was cut off or changed"
    return ""


def why_not_here(part: dict[str, Any]) -> str:
    """Empty when the file is for this system."""
    if part["machine"] != platform.machine():
        return f"{part['file']} is for {part['machine']}, this machine is {platform.machine()}"
    has, needs = version_of(platform.libc_ver()[1]), version_of(part["glibc"])
    if has < needs:
        return f"{part['file']} needs glibc {text_of(needs)}, this machine has {text_of(has)}"
    return ""


def why_not_package(folder: Path, part: dict[str, Any]) -> str:
    """Puts the wheel's content where the stages look for the built package."""
    tag = sys.implementation.cache_tag
    if part["python"] != tag:
        return f"{part['file']} is for {part['python']}, this Python is {tag}"
    if reason := why_not_whole(folder, part, package_digest()) or why_not_here(part):
        return reason
    installed.clear()
    with zipfile.ZipFile(folder / part["file"]) as wheel:
        wheel.extractall(installed.FOLDER)
    modules = list((installed.FOLDER / "drope_kernels").glob(f"_C.{tag}*.so"))
    reason = why_not_loaded(modules[0]) if modules else "there is no compiled module in it"
    if reason:
        installed.clear()
        return f"{part['file']} does not work here: {reason}"
    installed.mark()
    return ""


def why_not_loaded(module: Path) -> str:
    command = [sys.executable, "-c", LOAD_MODULE, str(module)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_SECONDS)
    except subprocess.TimeoutExpired:
        return f"loading it took more than {LOAD_SECONDS:.0f} s"
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def why_not_probes(folder: Path, part: dict[str, Any]) -> str:
    if reason := why_not_whole(folder, part, probe_library.digest()) or why_not_here(part):
        return reason
    if reason := probe_library.why_not_loaded(folder / part["file"]):
        return f"{part['file']} does not work here: {reason}"
    probe_library.take(folder, probe_library.FOLDER)
    return ""


def read_stamp(folder: Path | None) -> dict[str, Any] | str:
    """What is carried, or why that is nothing."""
    if folder is None:
        return "nothing is carried"
    if not (folder / STAMP).exists():
        return f"{folder / STAMP} is missing: nothing is carried there"
    found: dict[str, Any] = json.loads((folder / STAMP).read_text())
    return found


def check(folder: Path | None) -> Unpacked:
    """Whether the folder's files are whole and of the present sources, for whichever machine."""
    stamp = read_stamp(folder)
    if folder is None or isinstance(stamp, str):
        return Unpacked(str(stamp), str(stamp))
    reasons = {"package": package_digest(), "probes": probe_library.digest()}
    for kind, digest in reasons.items():
        is_packed = kind in stamp
        reasons[kind] = why_not_whole(folder, stamp[kind], digest) if is_packed else NOT_PACKED
    return Unpacked(**reasons)


def unpack(folder: Path | None) -> Unpacked:
    """Puts into place what fits; what an earlier call left in place and still fits stays."""
    stamp = read_stamp(folder)
    package = probes = stamp if isinstance(stamp, str) else NOT_PACKED
    if folder is not None and isinstance(stamp, dict) and "package" in stamp:
        package = why_not_package(folder, stamp["package"])
    if folder is not None and isinstance(stamp, dict) and "probes" in stamp:
        probes = why_not_probes(folder, stamp["probes"])
    return Unpacked(
        package="" if installed.is_current() else package,
        probes="" if probe_library.find(probe_library.FOLDER) is not None else probes,
    )
