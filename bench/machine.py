"""What this machine is. Reads only; a GPU's settings are never changed."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository
DISTRIBUTIONS = (
    "torch",
    "triton",
    "numpy",
    "cupy-cuda13x",
    "transformers",
    "pybind11",
    "cmake",
    "ninja",
    "flash-attn",
    "flash-attn-4",
    "fa3-fwd",
)
GPU_FIELDS = (
    "name",
    "compute_cap",
    "driver_version",
    "memory.total",
    "power.limit",
    "power.draw",
    "temperature.gpu",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
)
SOURCE_SUFFIXES = {".py", ".h", ".cu", ".cuh", ".cpp", ".sh", ".txt", ".toml", ".cmake", ".in"}
SOURCE_FOLDERS = ("cmake", "csrc", "drope_kernels", "python_bindings", "tools")


def gpu_fields() -> dict[str, str]:
    """nvidia-smi's query of the first GPU; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    query = [tool, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    if answer.returncode != 0 or not answer.stdout.strip():
        return {}
    values = [value.strip() for value in answer.stdout.splitlines()[0].split(",")]
    return dict(zip(GPU_FIELDS, values, strict=True))


def clocks_of(fields: dict[str, str]) -> dict[str, str]:
    """What of nvidia-smi's answer belongs beside a measured time."""
    names = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    return {name: fields[name] for name in names if name in fields}


def runtime() -> str:
    """What the kernel says it is; in gVisor neither ncu nor compute-sanitizer were seen to work."""
    release = platform.release()
    if "gvisor" in platform.version().lower() or release.startswith("4.4.0"):
        return f"gVisor ({release})"
    if "-fc" in release or "firecracker" in platform.version().lower():
        return f"Firecracker ({release})"
    return release


def what_applies(capability: str | None) -> str:
    """Which of our kernels run on a GPU of this compute capability, and what follows for stages."""
    if capability is None:
        return "no GPU is found: only a dry run works here"
    version = tuple(int(part) for part in capability.split("."))
    if version < (8, 0):
        return f"compute capability {capability}: nothing applies, our kernels need 8.0 or later"
    if version == (9, 0):
        return "compute capability 9.0: everything applies, the sm_90a kernels and the sm_80 ones"
    if version < (9, 0):
        return (
            f"compute capability {capability}: the sm_80 kernels run, `cuda` is they; the sm_90a "
            "probes and `cuda_sm80` do not apply; the estimates are a Hopper's"
        )
    return (
        f"compute capability {capability}: the sm_80 kernels run from their PTX, which the driver "
        "compiles at the first call; the sm_90a probes and `cuda_sm80` do not apply; the estimates "
        "are a Hopper's"
    )


@functools.cache
def description() -> dict[str, str | int | None]:
    gpu = gpu_fields()
    return {
        "gpu": gpu.get("name"),
        "compute_capability": gpu.get("compute_cap"),
        "driver": gpu.get("driver_version"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "runtime": runtime(),
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def find_nvcc() -> str | None:
    """CUDA_HOME's compiler when that is set, else the one on PATH, else the usual place."""
    home = os.environ.get("CUDA_HOME")
    if home is not None:
        candidate = Path(home) / "bin" / "nvcc"
        return str(candidate) if candidate.exists() else None
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


@functools.cache
def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    nvcc = find_nvcc()
    found["nvcc"] = None
    if nvcc is not None:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = [line for line in text.splitlines() if "release" in line]
        found["nvcc"] = release[0].split("release")[1].strip() if release else text.strip()
    return found


@functools.cache
def commit(root: Path) -> str:
    """HEAD, with "+changes" when the tree differs; "unknown" where git's folder did not travel."""
    git = ["git", "-C", str(root)]
    if shutil.which("git") is None or not (root / ".git").exists():
        return "unknown"
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return "unknown"
    status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


@functools.cache
def source_digest(root: Path, names: tuple[str, ...] = SOURCE_FOLDERS) -> str:
    """Names the sources that ran, also where no commit is known: first 12 digits of a SHA-256.

    names: folders, of which the sources count, and files.
    """
    digest = hashlib.sha256()
    for name in names:
        found = sorted((root / name).rglob("*")) if (root / name).is_dir() else [root / name]
        for path in found:
            if path.suffix in SOURCE_SUFFIXES and path.is_file():
                digest.update(str(path.relative_to(root)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
