"""One stage in its own process: python -m gpu_check.stage MODULE NAME OUT SECONDS MODE."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from .report import RUNNING, Context, Outcome


def main() -> None:
    module, name, out, seconds, mode = sys.argv[1:]
    context = Context(name, Path(out), mode == "dry-run", float(seconds))
    context.save(Outcome(RUNNING, {}, []))
    context.save(importlib.import_module(module).run(context))


if __name__ == "__main__":
    main()
