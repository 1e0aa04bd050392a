"""What CMake decides before anything is compiled: CUDA or not, for which GPUs, and why not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from repository import ROOT

from bench.machine import find_nvcc

CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
pytestmark = pytest.mark.skipif(CMAKE is None, reason="needs cmake")
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")

# Answers as nvcc does to --version, and fails as one without its headers does.
FAKE_NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release VERSION, VVERSION.88" ;;
  *) echo "a.cu: some warning"; echo "fatal error: crt/host_config.h: No such file" >&2; exit 1 ;;
esac
"""


@dataclass(frozen=True)
class Configured:
    """facts: the names and values of build_facts.h; empty when CMake stopped."""

    returncode: int
    message: str
    facts: dict[str, str]


def configure(folder: Path, cuda_home: Path | None = None, **settings: str) -> Configured:
    """One CMake run of this tree, nothing compiled; `cuda_home` hides every other nvcc."""
    import pybind11

    environment = os.environ | ({"CUDA_HOME": str(cuda_home), "CUDACXX": ""} if cuda_home else {})
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    settings |= {"pybind11_DIR": pybind11.get_cmake_dir(), "Python_EXECUTABLE": sys.executable}
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    assert CMAKE is not None
    done = subprocess.run(
        [CMAKE, "-S", ROOT, "-B", folder, "-G", "Ninja", *defines],
        capture_output=True,
        text=True,
        env=environment,
    )
    header = folder / "facts" / "build_facts.h"
    text = header.read_text() if header.exists() else ""
    facts = dict(re.findall(r'(k\w+) = R?"(?:reason\()?(.*?)(?:\)reason)?";', text))
    return Configured(done.returncode, " ".join(done.stderr.split()), facts)


def fake_nvcc(home: Path, version: str) -> Path:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(FAKE_NVCC.replace("VERSION", version))
    nvcc.chmod(0o755)
    return home


REASONS = {
    "nothing there": (None, r"CUDA_HOME=\S+ holds no bin/nvcc"),
    "too old": ("11.8", r"\S+/bin/nvcc is of CUDA 11.8.88, and 12.5 or later is needed"),
    "broken": ("13.0", r"\S+/bin/nvcc cannot build a small kernel \(fatal error: crt/host_config"),
}


@pytest.mark.parametrize("name", REASONS)
def test_auto_without_a_working_nvcc_builds_for_the_cpu_and_says_why(
    name: str, tmp_path: Path
) -> None:
    version, reason = REASONS[name]
    home = tmp_path / "cuda"
    if version is not None:
        fake_nvcc(home, version)
    automatic = configure(tmp_path / "auto", home)
    assert automatic.returncode == 0, automatic.message
    assert re.match(reason, automatic.facts["kNoCudaReason"])
    assert automatic.facts["kVersion"].endswith("+cpu")
    assert (tmp_path / "auto" / "version.txt").read_text() == automatic.facts["kVersion"]
    insisting = configure(tmp_path / "on", home, DROPE_CUDA="ON")
    assert insisting.returncode != 0
    assert re.search(f"DROPE_CUDA=ON, but {reason}", insisting.message)
    assert "DROPE_CUDA=OFF builds for the CPU alone" in insisting.message


def test_cuda_can_be_left_out(tmp_path: Path) -> None:
    facts = configure(tmp_path, DROPE_CUDA="OFF").facts
    assert facts["kNoCudaReason"] == "DROPE_CUDA=OFF asked for the CPU alone"
    assert facts["kCudaVersion"] == facts["kCudaArchitectures"] == ""


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DROPE_CUDA", "yes", "must be ON, OFF or AUTO, got 'yes'"),
        ("TORCH_CUDA_ARCH_LIST", "8.0 Ampere", 'got "Ampere" in "8.0 Ampere"'),
        ("TORCH_CUDA_ARCH_LIST", "sm_80", 'such as "8.0;9.0a" or "8.6+PTX", got "sm_80"'),
    ],
)
def test_settings_that_cannot_be_read_are_refused(
    name: str, value: str, message: str, tmp_path: Path
) -> None:
    result = configure(tmp_path, **{name: value})
    assert result.returncode != 0
    assert message in result.message


def test_gpus_without_kernels_leave_a_build_for_the_cpu(tmp_path: Path) -> None:
    facts = configure(tmp_path, TORCH_CUDA_ARCH_LIST="7.0;7.5").facts
    assert 'TORCH_CUDA_ARCH_LIST="7.0;7.5" names no GPU' in facts["kNoCudaReason"]


@needs_nvcc
@pytest.mark.parametrize(
    ("listed", "compiled"),
    [
        ("", "sm_80;sm_90;compute_80;sm_90a"),
        ("7.5 8.6+PTX", "sm_86;compute_80"),
        ("9.0", "sm_90;sm_90a"),
        ("8.0;8.0;12.0a", "sm_80;sm_120"),
    ],
)
def test_architecture_list_is_torch_s(listed: str, compiled: str, tmp_path: Path) -> None:
    result = configure(tmp_path, TORCH_CUDA_ARCH_LIST=listed, DROPE_CUDA="ON")
    assert result.returncode == 0, result.message
    assert result.facts["kCudaArchitectures"] == compiled
    assert re.fullmatch(r"\d+\.\d+\.\d+\+cu\d+", result.facts["kVersion"])


@needs_nvcc
def test_a_gpu_that_nvcc_does_not_know_is_named(tmp_path: Path) -> None:
    result = configure(tmp_path, TORCH_CUDA_ARCH_LIST="8.0;99.9", DROPE_CUDA="ON")
    assert result.returncode != 0
    assert "sm_999" in result.message


def test_source_distribution_holds_every_source_and_no_label(tmp_path: Path) -> None:
    listing = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True
    )
    if listing.returncode != 0:
        pytest.skip("needs the git checkout")
    tree = tmp_path / "tree"
    names = [name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    assert re.fullmatch(r"drope_kernels-\d+\.\d+\.\d+\.tar\.gz", archive.name)
    with tarfile.open(archive) as packing:
        packed = {name.partition("/")[2] for name in packing.getnames()}
    folders = ("cmake/", "csrc/", "python_bindings/", "drope_kernels/", "tests/", "tools/")
    assert {name for name in names if name.startswith(folders)} - packed == set()
