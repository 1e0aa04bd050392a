"""What is packed for a GPU machine and unpacked there: of no other sources, over no limit."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from gpu_check import command, installed
from gpu_check.report import Context
from gpu_check.visit import carried, limits, pack
from probes import library as probe_library
from probes.nvcc import Compilation
from repository import ROOT

from bench import machine

TAG = sys.implementation.cache_tag
MODULE = f"drope_kernels/_C.{TAG}-test.so"
C_SOURCE = 'const char* probe_error_name(int status) { return "none"; }\n'
needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a GPU machine keeps what it unpacked."""
    site = tmp_path / "site"
    monkeypatch.setattr(installed, "FOLDER", site)
    monkeypatch.setattr(installed, "STAMP", site / "sources.txt")
    monkeypatch.setattr(probe_library, "FOLDER", tmp_path / "probes")
    return site


def built_module() -> Path:
    """The tree's own compiled module: a stand-in for one that was built elsewhere."""
    found = sorted((ROOT / "drope_kernels").glob(f"_C.{TAG}*.so"))
    assert found, "the extension is not built: `make build`"
    return found[0]


def compile_c(path: Path) -> None:
    source = path.with_suffix(".c")
    source.write_text(C_SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As --pack leaves it, with a wheel of one module and a library of one function."""
    folder = tmp_path / "visit"
    folder.mkdir()
    with zipfile.ZipFile(folder / "package.whl", "w") as wheel:
        wheel.write(built_module(), MODULE)
        wheel.writestr("drope_kernels/__init__.py", "")
    compile_c(folder / probe_library.LIBRARY)
    facts = {"sources": probe_library.digest(), "compilations": [], "complaints": []}
    (folder / probe_library.FACTS).write_text(json.dumps(facts))
    stamp = {
        "package": part(folder / "package.whl", carried.package_digest()) | {"python": TAG},
        "probes": part(folder / probe_library.LIBRARY, probe_library.digest()),
    }
    write_stamp(folder, stamp)
    return folder


def part(path: Path, sources: str) -> dict[str, str]:
    return pack.part(path, sources, (2, 17))


def write_stamp(folder: Path, stamp: dict[str, Any]) -> None:
    (folder / carried.STAMP).write_text(json.dumps(stamp))


def with_stamp(folder: Path, kind: str, **changes: str) -> None:
    stamp = json.loads((folder / carried.STAMP).read_text())
    stamp[kind] |= changes
    write_stamp(folder, stamp)


# ---- on the machine with the GPU


@needs_cc
def test_what_fits_is_put_into_place(folder: Path, places: Path) -> None:
    assert carried.check(folder) == carried.Unpacked("", "")
    assert carried.unpack(folder) == carried.Unpacked("", "")
    assert (places / MODULE).exists()
    assert installed.is_current()
    assert probe_library.find(probe_library.FOLDER) is not None
    assert carried.unpack(None) == carried.Unpacked("", ""), "a later call finds it there"


@needs_cc
@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("package", {"sources": "0" * 12}, "package.whl was made of the sources 000000000000"),
        ("package", {"python": "cpython-27"}, f"is for cpython-27, this Python is {TAG}"),
        ("package", {"machine": "sparc"}, f"is for sparc, this machine is {platform.machine()}"),
        ("package", {"glibc": "99.1"}, "needs glibc 99.1, this machine has"),
        ("package", {"sha256": "0" * 64}, "is not what was packed"),
        ("package", {"file": "other.whl"}, "other.whl is missing"),
        ("probes", {"sources": "0" * 12}, "libdrope_probes.so was made of the sources"),
        ("probes", {"sha256": "0" * 64}, "is not what was packed"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(
    kind: str, change: dict[str, str], reason: str, folder: Path, places: Path
) -> None:
    with_stamp(folder, kind, **change)
    if set(change) <= {"sources", "sha256", "file"}:
        assert reason in getattr(carried.check(folder), kind)
    else:
        assert carried.check(folder) == carried.Unpacked("", ""), "it may fit another machine"
    unpacked = carried.unpack(folder)
    assert reason in getattr(unpacked, kind)
    other = "probes" if kind == "package" else "package"
    assert getattr(unpacked, other) == ""
    assert places.exists() == (kind != "package")


@needs_cc
def test_what_cannot_be_loaded_is_refused(folder: Path, places: Path) -> None:
    library = folder / probe_library.LIBRARY
    library.write_bytes(b"no library")
    with zipfile.ZipFile(folder / "package.whl", "w") as wheel:
        wheel.writestr(MODULE, "no module")
    stamp = json.loads((folder / carried.STAMP).read_text())
    stamp["package"] |= {"sha256": carried.checksum(folder / "package.whl")}
    stamp["probes"] |= {"sha256": carried.checksum(library)}
    write_stamp(folder, stamp)
    unpacked = carried.unpack(folder)
    assert "package.whl does not work here" in unpacked.package
    assert "does not work here" in unpacked.probes
    assert not installed.is_current()
    assert probe_library.find(probe_library.FOLDER) is None


def test_nothing_carried_is_said(tmp_path: Path, places: Path) -> None:
    assert carried.unpack(None).package == "nothing is carried"
    assert "stamp.json is missing" in carried.unpack(tmp_path).package
    write_stamp(tmp_path, {})
    assert carried.unpack(tmp_path) == carried.Unpacked("it was not packed", "it was not packed")
    assert carried.check(tmp_path) == carried.unpack(tmp_path)


def test_a_library_of_other_sources_is_not_used(tmp_path: Path) -> None:
    (tmp_path / probe_library.LIBRARY).touch()
    facts = {"sources": "0" * 12, "compilations": [], "complaints": []}
    (tmp_path / probe_library.FACTS).write_text(json.dumps(facts))
    assert probe_library.find(tmp_path) is None


# ---- where it is packed


def test_the_newest_glibc_is_read_from_the_file(tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    library.write_bytes(b"\0GLIBC_2.2.5\0GLIBC_2.34\0GLIBC_2.4\0GLIBCXX_3.4.30\0")
    assert carried.glibc_needed(library) == (2, 34)
    library.write_bytes(b"none of it")
    assert carried.glibc_needed(library) == (0,)
    assert carried.glibc_needed(built_module()) >= (2, 2, 5)


def test_a_file_for_a_newer_system_is_not_packed(tmp_path: Path) -> None:
    path = tmp_path / "library.so"
    path.touch()
    with pytest.raises(pack.PackError, match=r"needs glibc 2.38, expected at most 2.34"):
        pack.part(path, "0" * 12, (2, 38))


def test_a_python_of_the_version_is_found_or_none() -> None:
    version = "{}.{}".format(*sys.version_info)
    found = pack.find_python(version)
    assert found is None or found.tag == TAG
    assert pack.find_python("3.1") is None


def test_pyenv_is_asked_where_path_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shim of a version that nobody chose stands on PATH, and answers nothing."""
    shim, inside = tmp_path / "shims" / "python3.12", tmp_path / "versions" / "3.12.1" / "bin"
    inside.mkdir(parents=True)
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\nexit 127\n")
    (inside / "python3.12").write_text("#!/bin/sh\necho 3 12\necho cpython-312\n")
    for path in (shim, inside / "python3.12"):
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(shim.parent), prepend=":")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert pack.find_python("3.12") == pack.Interpreter(inside / "python3.12", "cpython-312")


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("docs", "expected a folder that git ignores"), ("..", "expected a folder inside")],
)
def test_a_folder_that_would_not_travel_by_name_is_refused(
    folder: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--pack", str(ROOT / folder)]) == 1
    assert reason in capsys.readouterr().err


@pytest.fixture
def packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """--pack with nothing compiled and no Python found."""
    folder = tmp_path / "build" / "visit"

    def make(nvcc: str, into: Path) -> probe_library.ProbeLibrary:
        facts = probe_library.facts_of([Compilation("x", 1.0, 0, "", [], [], [])])
        (into / probe_library.LIBRARY).write_bytes(b"\0GLIBC_2.17\0")
        (into / probe_library.FACTS).write_text(json.dumps(facts))
        return probe_library.ProbeLibrary(into / probe_library.LIBRARY, facts)

    monkeypatch.setattr(pack, "check_place", lambda folder: "build/visit")
    monkeypatch.setattr(probe_library, "make", make)
    monkeypatch.setattr(machine, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(pack, "find_python", lambda version: None)
    monkeypatch.setattr(limits, "ROOT", tmp_path)
    monkeypatch.setattr(limits, "tree_bytes", lambda: 6 << 20)
    return folder


def test_without_a_python_the_probes_alone_are_packed(
    packing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / "visit-1.tar.gz"
    earlier.write_bytes(b"results")
    assert command.main(["--pack", str(packing), "--after", str(earlier)]) == 0
    stamp = json.loads((packing / carried.STAMP).read_text())
    assert set(stamp) == {"commit", "probes"}
    said = capsys.readouterr().out
    assert "no Python 3.12 here" in said
    assert f"--visit 2 --carried build/visit --after build/visit/{pack.ARCHIVE}" in said
    assert (packing / pack.ARCHIVE).read_bytes() == b"results"


def test_what_is_over_a_limit_is_not_ready(
    packing: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "tree_bytes", lambda: 65 << 20)
    assert command.main(["--pack", str(packing)]) == 1
    assert "OVER A LIMIT: tree and carried paths are 65.0 MiB" in capsys.readouterr().out
    paths = [f"build/{index}" for index in range(9)]
    found = limits.complaints(["x" * 2000], paths, 0)
    assert "the command line has 2000 characters, allowed are 1999" in found[0]
    assert "9 paths are carried, allowed are 8" in found[1]
    assert limits.complaints(["x" * 1999], paths[:8], 64 << 20) == []


def test_the_tree_that_travels_is_far_below_its_limit() -> None:
    assert limits.tree_bytes(ROOT) < limits.TREE_BYTES / 2


def test_the_command_of_a_visit_is_one_that_is_understood(tmp_path: Path) -> None:
    for number in (1, 2):
        line = limits.command_line(number, "build/visit", None).replace('"$OUT"', str(tmp_path))
        script, *arguments = line.split()
        assert (ROOT / script).exists()
        options = command.parse(arguments, {})
        assert (options.visit, options.out) == (number, tmp_path)
        assert options.carried == Path("build/visit")


def test_a_dry_run_uses_what_was_unpacked(
    tmp_path: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_check import package

    context = Context("cases", tmp_path, dry_run=True, seconds=60)
    assert package.find_or_build(context).folder == ROOT
    monkeypatch.setattr(installed, "of_the_tree", lambda: False)
    assert "neither in the tree nor carried" in package.find_or_build(context).error
    places.mkdir()
    installed.mark()
    assert package.find_or_build(context).folder == places
