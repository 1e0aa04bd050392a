"""Builds `drope_kernels._C` by calling CMake. What is compiled, and how, is in CMakeLists.txt."""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODULE = "drope_kernels._C"
# One directory for every kind of install, so that `pip install -e .` and
# `setup.py build_ext --inplace` share objects.
BUILD_DIR = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
# What an install or a wheel goes through; an sdist is neither for the CPU nor for CUDA.
COMMANDS_FOR_ONE_MACHINE = {
    *("egg_info", "dist_info", "bdist_wheel", "editable_wheel", "develop", "install"),
}


def find_tool(name: str, bin_dir_attribute: str) -> str:
    """The `cmake` or `ninja` executable: the wheel of this Python first, then PATH."""
    if importlib.util.find_spec(name) is not None:
        bin_dir = getattr(importlib.import_module(name), bin_dir_attribute, None)
        found = shutil.which(name, path=str(bin_dir)) if bin_dir else None
        if found:
            return found
    found = shutil.which(name)
    if found is None:
        sys.exit(f"error: building drope_kernels needs {name}: not found. `pip install {name}`")
    return found


def find_nvcc_wheels() -> list[str]:
    """bin folders of nvidia-cuda-nvcc wheels, also outside pip's isolated build environment."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    found = [nvcc for folder in folders for nvcc in Path(folder).glob("nvidia/*/bin/nvcc")]
    return list(dict.fromkeys(str(nvcc.parent) for nvcc in found))


def run(command: list[str]) -> None:
    """Stops the build without a traceback: what CMake or the compiler said is the last word."""
    status = subprocess.run(command).returncode
    if status != 0:
        sys.exit(f"error: {Path(command[0]).name} ended with status {status}; it said why above")


@contextmanager
def locked_build_dir() -> Iterator[Path]:
    """ninja does not guard a directory against a second one."""
    BUILD_DIR.mkdir(parents=True, exist_ok=True)
    with (BUILD_DIR / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield BUILD_DIR


def tools(build_type: str) -> dict[str, str]:
    """What a CMake cache cannot change later."""
    pybind11 = importlib.import_module("pybind11")
    python = Path(sys.executable).with_name("python3")  # one spelling of `python`, `python3.11`
    return {
        "CMAKE_MAKE_PROGRAM": find_tool("ninja", "BIN_DIR"),
        "CMAKE_BUILD_TYPE": build_type,
        "Python_EXECUTABLE": str(python if python.exists() else sys.executable),
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "NVCC_WHEELS": ";".join(find_nvcc_wheels()),
    }


def forget_tools(build_dir: Path) -> None:
    """As `cmake --fresh`, and keeps the object files: ninja knows which commands made them."""
    (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
    for compilers in build_dir.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(compilers)


def configure(build_dir: Path, options: dict[str, str], build_type: str = "Release") -> None:
    # CMake's cache pins the path of every tool, and an isolated `pip install .` deletes its
    # tools when it ends: a cache made with other tools is dropped, with the same ones it stays.
    cmake = find_tool("cmake", "CMAKE_BIN_DIR")
    settings = tools(build_type)
    chosen = {name: os.environ.get(name) for name in ("CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH")}
    chosen["nvcc"] = shutil.which("nvcc")
    identity = {"cmake": cmake, "source": str(ROOT), **settings, **chosen}
    record = build_dir / "configured_with.json"
    known = record.exists() and json.loads(record.read_text()) == identity
    if not known:
        record.unlink(missing_ok=True)
        forget_tools(build_dir)
    settings["DROPE_CUDA"] = os.environ.get("DROPE_CUDA", "AUTO")
    settings["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    defines = [f"-D{name}={value}" for name, value in {**settings, **options}.items()]
    run([cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", *defines])
    record.write_text(json.dumps(identity, indent=1))


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, one module into the place setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_type = "Debug" if self.debug else "Release"
        jobs = os.environ.get("MAX_JOBS")
        parallel = ["--parallel", jobs] if jobs else []
        with locked_build_dir() as build_dir:
            configure(build_dir, {"DROPE_OUTPUT_DIR": str(output.parent)}, build_type)
            cmake = find_tool("cmake", "CMAKE_BIN_DIR")
            run([cmake, "--build", str(build_dir), *parallel])
        if not output.exists():
            raise RuntimeError(f"CMake finished without writing {output}")


def version() -> str:
    """CMakeLists.txt's; with "+cpu" or "+cu130" where it is said of a build, as CMake decides."""
    if COMMANDS_FOR_ONE_MACHINE.isdisjoint(sys.argv):
        found = re.search(r"VERSION (\d+\.\d+\.\d+)", (ROOT / "CMakeLists.txt").read_text())
        assert found is not None
        return found[1]
    with locked_build_dir() as build_dir:
        configure(build_dir, {})
        return (build_dir / "version.txt").read_text()


setup(
    version=version(),
    ext_modules=[Extension(MODULE, sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
