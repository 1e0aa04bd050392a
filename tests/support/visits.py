"""tools/gpu_check.sh, run from a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from repository import ROOT

SCRIPT = ROOT / "tools" / "gpu_check.sh"


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"PATH": path} | environment,
    )
