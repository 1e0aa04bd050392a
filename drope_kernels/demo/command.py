"""The command line of `drope demo`; light to import, the work is imported when it runs."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

from drope_kernels.console.locks import alone_in, lock_beside
from drope_kernels.console.paths import user_path

FAILED, BAD_ARGUMENTS = 1, 2
INTERRUPTED = 130  # the shell's status for Ctrl-C


def add_demo_command(parser: argparse.ArgumentParser) -> None:
    """Options of `drope demo`."""
    parser.add_argument(
        "--out",
        type=user_path,
        default=Path("report"),
        help="folder of the report (default: report)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="every stage for a moment only")
    parser.add_argument("--steps", type=int, help="pretraining steps (default: 2500)")
    parser.add_argument(
        "--recalibration-steps", type=int, help="steps after the drop (default: 3000)"
    )
    parser.add_argument("--backend", default="auto", help="attention backend (default: auto)")
    parser.add_argument(
        "--processes", type=int, choices=(1, 2), help="default: 2 where there are 2 cores"
    )
    parser.set_defaults(run=demo)


def demo(arguments: argparse.Namespace) -> int:
    """Runs the demo; status 2 for bad arguments, 130 when interrupted."""
    from drope_kernels.demo.config import DemoConfig

    try:
        from drope_kernels.demo.lanes import LaneError
        from drope_kernels.demo.run import check_demo, default_lanes, run_demo
    except ImportError as error:
        print(
            f"drope demo: {error.name or error} is missing: "
            "pip install 'drope_kernels[train,eval]'",
            file=sys.stderr,
        )
        return BAD_ARGUMENTS
    chosen = {
        "seed": arguments.seed,
        "backend": arguments.backend,
        "pretrain_steps": arguments.steps,
        "recalibration_steps": arguments.recalibration_steps,
    }
    out = arguments.out
    with ExitStack() as lock:
        try:
            config = DemoConfig(**{k: v for k, v in chosen.items() if v is not None})
            config = config.quick() if arguments.quick else config
            processes = arguments.processes or default_lanes()
            check_demo(config, out, processes)
            lock.enter_context(alone_in(out, argument="out", lock=lock_beside(out)))
        except (ValueError, OSError) as error:
            print(f"drope demo: {error}", file=sys.stderr)
            return BAD_ARGUMENTS
        try:
            run_demo(config, out, processes, _command(arguments, processes))
        except LaneError as error:
            print(f"drope demo: {error}", file=sys.stderr)
            return FAILED
        except KeyboardInterrupt:
            print(f"\ninterrupted; {out} was not touched", file=sys.stderr)
            return INTERRUPTED
    return 0


def _command(arguments: argparse.Namespace, processes: int) -> str:
    """What repeats the run, for the report: every choice but the folder."""
    words = ["drope demo", f"--seed {arguments.seed}", f"--processes {processes}"]
    if arguments.quick:
        words.append("--quick")
    if arguments.backend != "auto":
        words.append(f"--backend {arguments.backend}")
    for option in ("steps", "recalibration_steps"):
        value = getattr(arguments, option)
        if value is not None:
            words.append(f"--{option.replace('_', '-')} {value}")
    return " ".join(words)
