"""Runs one probe in its own process, so that a hung or poisoned context ends with it.

python -m gpu_check.probe_worker LIBRARY PROBE: prints one JSON line.
"""

from __future__ import annotations

import ctypes
import json
import sys
from dataclasses import asdict

from . import probes_copy, probes_sm80, probes_wgmma
from .probe import run_probe

PROBES = [*probes_sm80.PROBES, *probes_copy.PROBES, *probes_wgmma.PROBES]


def main() -> None:
    library_path, name = sys.argv[1:]
    probe = next(probe for probe in PROBES if probe.name == name)
    comparisons = run_probe(ctypes.CDLL(library_path), probe)
    print(json.dumps([asdict(comparison) for comparison in comparisons]))


if __name__ == "__main__":
    main()
