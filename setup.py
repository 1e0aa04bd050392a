"""Builds `drope_kernels._C` by calling CMake. What is compiled, and how, is in CMakeLists.txt."""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent
MODULE = "drope_kernels._C"


def find_tool(name: str, bin_dir_attribute: str) -> str:
    """The `cmake` or `ninja` executable: the wheel of this Python first, then PATH."""
    if importlib.util.find_spec(name) is not None:
        bin_dir = getattr(importlib.import_module(name), bin_dir_attribute, None)
        found = shutil.which(name, path=str(bin_dir)) if bin_dir else None
        if found:
            return found
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"building drope_kernels needs {name}: not found. `pip install {name}`")
    return found


def run(command: list[str]) -> None:
    """Stops the build without a traceback: what CMake or the compiler said is the last word."""
    status = subprocess.run(command).returncode
    if status != 0:
        raise ExecError(f"{Path(command[0]).name} ended with status {status}; its message is above")


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, one module into the place setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        # One directory for every kind of install, so that `pip install -e .` and
        # `setup.py build_ext --inplace` share objects; locked, as ninja does not guard its own.
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        with (build_dir / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.configure_and_build(build_dir, output.parent)
        if not output.exists():
            raise RuntimeError(f"CMake finished without writing {output}")

    def configure_and_build(self, build_dir: Path, output_dir: Path) -> None:
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        self.configure(cmake, build_dir, output_dir)
        jobs = os.environ.get("MAX_JOBS")
        parallel = ["--parallel", jobs] if jobs else []
        run([cmake, "--build", str(build_dir), *parallel])

    def settings(self) -> dict[str, str]:
        pybind11 = importlib.import_module("pybind11")
        python = Path(sys.executable).with_name("python3")  # one spelling of `python`, `python3.11`
        settings = {
            "CMAKE_MAKE_PROGRAM": find_tool("ninja", "BIN_DIR"),
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "Python_EXECUTABLE": str(python if python.exists() else sys.executable),
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "DROPE_CUDA": os.environ.get("DROPE_CUDA", "AUTO"),
        }
        if os.environ.get("CUDA_HOME"):
            settings["CUDAToolkit_ROOT"] = os.environ["CUDA_HOME"]
        return settings

    def configure(self, cmake: str, build_dir: Path, output_dir: Path) -> None:
        # CMake's cache pins the path of every tool, and an isolated `pip install .` deletes its
        # tools when it ends: a cache made with other tools is dropped, with the same ones it stays.
        settings = self.settings()
        record = build_dir / "configured_with.json"
        identity = {"cmake": cmake, "source": str(ROOT), **settings}
        known = record.exists() and json.loads(record.read_text()) == identity
        if not known:
            record.unlink(missing_ok=True)
        defines = [f"-D{name}={value}" for name, value in settings.items()]
        defines.append(f"-DDROPE_OUTPUT_DIR={output_dir}")
        fresh = [] if known else ["--fresh"]
        run([cmake, *fresh, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", *defines])
        record.write_text(json.dumps(identity, indent=1))


setup(ext_modules=[Extension(MODULE, sources=[])], cmdclass={"build_ext": CMakeBuild})
