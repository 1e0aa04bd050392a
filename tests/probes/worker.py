"""Runs one probe in its own process, so that a hung or poisoned context ends with it.

python -m probes.worker LIBRARY PROBE: prints one JSON line.
"""

from __future__ import annotations

import ctypes
import json
import sys
from dataclasses import asdict

from probes import copy as probes_copy
from probes import sm80 as probes_sm80
from probes import wgmma as probes_wgmma
from probes.probe import run_probe

PROBES = [*probes_sm80.PROBES, *probes_copy.PROBES, *probes_wgmma.PROBES]


def main() -> None:
    library_path, name = sys.argv[1:]
    probe = next(probe for probe in PROBES if probe.name == name)
    comparisons = run_probe(ctypes.CDLL(library_path), probe)
    print(json.dumps([asdict(comparison) for comparison in comparisons]))


if __name__ == "__main__":
    main()
