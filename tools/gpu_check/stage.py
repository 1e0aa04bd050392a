"""One stage in its own process: python -m gpu_check.stage MODULE NAME OUT SECONDS MODE.

A JSON list on its input names the jobs to do; without one, all are done.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from gpu_check.report import RUNNING, Context, Outcome


def main() -> None:
    module, name, out, seconds, mode = sys.argv[1:]
    asked = sys.stdin.read()
    only = frozenset(json.loads(asked)) if asked else None
    context = Context(name, Path(out), mode == "dry-run", float(seconds), only=only)
    context.save(Outcome(RUNNING, {}, []))
    context.save(importlib.import_module(module).run(context))


if __name__ == "__main__":
    main()
