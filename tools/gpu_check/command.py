"""The command line of tools/gpu_check.sh."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from gpu_check.runner import STAGES, Stage, run_stages
from gpu_check.visit import clock, conduct, pack, plan

USAGE = """tools/gpu_check.sh OUT [STAGE...]                   every stage, or those named
       tools/gpu_check.sh --pack FOLDER                    what a visit takes along, made here
       tools/gpu_check.sh --visit N --carried FOLDER OUT   minutes of a GPU by plan, one tar
       tools/gpu_check.sh --dry-run ...                    the same without a GPU"""


def parse(arguments: list[str], stages: dict[str, Stage]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/gpu_check.sh", usage=USAGE)
    add = parser.add_argument
    add("out", type=Path, nargs="?", help="folder for the results")
    add("stages", nargs="*", metavar="STAGE", help=f"of: {', '.join(stages)}")
    add(
        "--dry-run",
        action="store_true",
        help="no GPU: compile, launch nothing; with --visit "
        "print where each second goes, and run the visit's stages dry where OUT is given",
    )
    add("--seconds", type=float, default=math.inf, help="for all together; then stop")
    add("--visit", type=int, choices=list(plan.VISITS), help="by the plan of that visit")
    add("--carried", type=Path, metavar="FOLDER", help="what --pack made")
    add(
        "--after",
        type=Path,
        metavar="RESULTS",
        help="tar or folder of the visit before: what failed there or was not reached comes first",
    )
    add("--pack", type=Path, metavar="FOLDER", help="make a folder to carry to the GPU")
    add("--python", default="3.12", metavar="VERSION", help="of the machine with the GPU (3.12)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.stages if name not in stages]
    if unknown:
        parser.error(f"unknown stage {', '.join(unknown)}; the stages are {', '.join(stages)}")
    if options.visit is not None and options.stages:
        parser.error("a visit has its own stages: name either")
    clock_only = options.visit is not None and options.dry_run
    if options.out is None and options.pack is None and not clock_only:
        parser.error("expected OUT, a folder for the results")
    if options.after is not None and not options.after.exists():
        parser.error(f"--after {options.after}: there is no such tar or folder")
    return options


def main(arguments: list[str], stages: dict[str, Stage] = STAGES) -> int:
    """0 when nothing failed; 1 for a failure; 2 for a command line that cannot be meant."""
    options = parse(arguments, stages)
    if options.pack is not None:
        try:
            return pack.pack(options.pack, options.python, options.after)
        except pack.PackError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if options.visit is None:
        names = options.stages or list(stages)
        return run_stages(names, stages, options.out, options.dry_run, options.seconds)
    visit = plan.prepare(options.visit, options.after, options.seconds)
    if options.dry_run:
        fits = clock.show(visit, options.carried)
        if options.out is None or not fits:
            return int(not fits)
    return conduct.run(visit, stages, options.out, options.carried, options.dry_run)
