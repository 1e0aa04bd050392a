"""Stage build: installs the package without network, imports it, checks its CPU kernels."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.machine import ROOT
from gpu_check import installed
from gpu_check.report import FAILED, NOT_MEASURED, OK, RUNNING, Context, Outcome

LOG_CHARACTERS = 4000
# On a machine with a GPU a package without CUDA kernels is a failure: CMake says what is missing.
ENVIRONMENT = {"DROPE_CUDA": "ON"}


def pip_command(target: Path) -> list[str]:
    """Everything from this machine: its own setuptools, cmake, ninja, pybind11 and nvcc."""
    offline = ["--no-index", "--no-build-isolation", "--no-deps", "--no-compile"]
    return [sys.executable, "-m", "pip", "install", *offline, "--target", str(target), str(ROOT)]


def inplace_command() -> list[str]:
    return [sys.executable, "setup.py", "build_ext", "--inplace"]


def cmake_commands(work: Path) -> list[list[str]]:
    """Without setuptools, should this machine's be too old for pyproject.toml."""
    pybind11 = importlib.import_module("pybind11")
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "DROPE_OUTPUT_DIR": str(ROOT / "drope_kernels"),
        **ENVIRONMENT,
    }
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    configure = ["cmake", "-S", str(ROOT), "-B", str(work), "-G", "Ninja", *defines]
    return [configure, ["cmake", "--build", str(work)]]


def ways(folder: Path) -> list[tuple[str, list[list[str]], Path]]:
    """(name, commands, folder that then holds the package), the usual way first."""
    target = installed.FOLDER
    return [
        ("pip install", [pip_command(target)], target),
        ("build_ext --inplace", [inplace_command()], ROOT),
        ("cmake", cmake_commands(folder / "cmake"), ROOT),
    ]


def run_logged(way: str, command: list[str], seconds: float) -> dict[str, Any]:
    """What a build command did; a command over its time is stopped and says so."""
    started = time.time()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        code, log = done.returncode, done.stdout
    except subprocess.TimeoutExpired:
        code, log = None, f"stopped after {seconds:.0f} s"
    return {
        "way": way,
        "command": " ".join(command),
        "returncode": code,
        "seconds": round(time.time() - started, 1),
        "log_end": log[-LOG_CHARACTERS:],
    }


def run_smoke(package_folder: Path) -> dict[str, Any]:
    """smoke.py's report, or {"error": ...}; only `package_folder` can provide drope_kernels."""
    tools = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package_folder), str(tools)])}
    command = [sys.executable, "-m", "gpu_check.smoke"]
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=240
        )
    if done.returncode != 0:
        return {"error": done.stderr.strip()[-LOG_CHARACTERS:]}
    return json.loads(done.stdout.splitlines()[-1])


def smoke_table(smoke: dict[str, Any]) -> list[str]:
    if "error" in smoke:
        return ["import or smoke check failed: " + smoke["error"].splitlines()[-1]]
    lines = [f"imported in {smoke['import_seconds']} s, backends {', '.join(smoke['backends'])}"]
    for check in smoke["checks"]:
        worst = max(check["errors_out_dq_dk_dv"])
        verdict = "ok" if check["passed"] else "WRONG"
        lines.append(f"cpu {check['case']:16} largest relative error {worst:.1e} {verdict}")
    return lines


def passed(smoke: dict[str, Any]) -> bool:
    return "error" not in smoke and all(check["passed"] for check in smoke["checks"])


def dry_run() -> Outcome:
    """Builds nothing; checks the tree's own extension where one was built."""
    built = sorted(path.name for path in (ROOT / "drope_kernels").glob("_C*.so"))
    data: dict[str, Any] = {"pip": " ".join(pip_command(Path("TARGET"))), "extensions": built}
    if not built:
        return Outcome(NOT_MEASURED, data, ["no extension in the tree: nothing imported"])
    data["smoke"] = run_smoke(ROOT)
    table = smoke_table(data["smoke"])
    if not passed(data["smoke"]):
        return Outcome(FAILED, data, table, "the smoke check failed")
    return Outcome(NOT_MEASURED, data, table, "dry run: the tree's own build was checked")


def build_one(context: Context, data: dict[str, Any], way: str, commands: list[list[str]]) -> bool:
    """Whether every command succeeded; each is noted in data["builds"]."""
    for command in commands:
        build = run_logged(way, command, seconds=max(1.0, context.remaining() - 60))
        data["builds"].append(build)
        context.save(Outcome(RUNNING, data, []))
        if build["returncode"] != 0:
            return False
    return True


def run(context: Context) -> Outcome:
    if context.dry_run:
        return dry_run()
    data: dict[str, Any] = {"builds": []}
    installed.clear()
    with tempfile.TemporaryDirectory(prefix="drope_build_") as folder:
        for way, commands, package_folder in ways(Path(folder)):
            if build_one(context, data, way, commands):
                data["smoke"] = run_smoke(package_folder)
                if package_folder == installed.FOLDER and passed(data["smoke"]):
                    installed.mark()
                break
    table = [
        f"{build['way']:20} exit {build['returncode']}, {build['seconds']} s"
        for build in data["builds"]
    ]
    if "smoke" not in data:
        return Outcome(FAILED, data, table, "no build command succeeded; see log_end")
    table += smoke_table(data["smoke"])
    info = data["smoke"].get("build_info", {})
    table += [f"{key:14} {value}" for key, value in info.items()]
    if not passed(data["smoke"]):
        return Outcome(FAILED, data, table, "the smoke check failed")
    return Outcome(OK, data, table)
