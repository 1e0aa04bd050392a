"""The benchmark suite: `pytest bench/`."""

import sys
from pathlib import Path

# The GPU cases are those of tools/gpu_check, which also measures them without pytest.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
