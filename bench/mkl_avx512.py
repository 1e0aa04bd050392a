"""Runs cases with MKL's AVX-512 path forced on, in a process of its own.

On processors that are not Intel's, MKL serves torch's matrix products with AVX2 code. Overriding
its vendor check at load time lifts SDPA two- to fourfold; a comparison without that says more of
MKL than of attention. `python -m bench.mkl_avx512 CASES.json OUT.json` is what the suite starts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

SHIM = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


def unavailable() -> str | None:
    if sys.platform != "linux":
        return f"LD_PRELOAD needs Linux, this is {sys.platform}"
    if shutil.which("cc") is None:
        return "no C compiler (cc) to build the one-line override with"
    if "avx512f" not in Path("/proc/cpuinfo").read_text():
        return "this processor has no AVX-512"
    return None


def run_forced(cases: list[object], directory: Path) -> dict[str, dict[str, object]]:
    """Measure `cases` in a child process; rows by '<case>/<contender>'."""
    shim, source = directory / "shim.so", directory / "shim.c"
    source.write_text(SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, source], check=True)
    wanted, out = directory / "cases.json", directory / "rows.json"
    wanted.write_text(json.dumps([dataclasses.asdict(c) for c in cases]))
    subprocess.run(
        [sys.executable, "-m", "bench.mkl_avx512", wanted, out],
        check=True,
        env=os.environ | {"LD_PRELOAD": str(shim)},
        cwd=Path(__file__).resolve().parent.parent,
    )
    return json.loads(out.read_text())


def main(wanted: str, out: str) -> None:
    from .cases import BenchCase
    from .measure import measure

    measured = {}
    for fields in json.loads(Path(wanted).read_text()):
        result = measure(BenchCase(**fields), budget=3.0, compiled=False)
        for name, samples in result.samples.items():
            row = result.row(name) | {"seconds": samples.seconds}
            measured[f"{result.case.name}/{name}"] = row
    Path(out).write_text(json.dumps(measured))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
