"""The console script `drope`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from drope_kernels.build import build_info, cuda_unavailable_reason

# Command NAME has its options from add_NAME_command of its module, which is imported only when the
# command is asked for: what one command needs, the others do without.
COMMANDS = {
    "demo": ("drope_kernels.demo", "pretrain, drop, recalibrate and measure a small model"),
    "recalibrate": (
        "drope_kernels.recalibrate",
        "drop the positions of a pretrained model and train it on",
    ),
    "export": ("drope_kernels.hf", "write a model without positions for stock engines"),
    "evaluate": ("drope_kernels.evaluate", "measure models beyond their training length"),
}
BAD_ARGUMENTS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        parser = build_parser(argv[0] if argv else None)
    except ImportError as error:  # an optional package; the sentence names it and the remedy
        print(f"drope {argv[0]}: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    arguments, rest = parser.parse_known_args(argv)
    if rest and "rest" not in arguments:  # a command with `rest` reads its options itself
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    status: int = arguments.run(arguments)
    return status


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """All commands, and the options of one of them."""
    parser = argparse.ArgumentParser(
        prog="drope", description="Drop the positions of a RoPE model, recalibrate, evaluate."
    )
    commands = parser.add_subparsers(required=True, dest="command")
    info = commands.add_parser("info", help="what this installation was built with and can run")
    info.set_defaults(run=print_info)
    for name, (package, purpose) in COMMANDS.items():
        # resolve: a command that reads its options itself has its own --help
        options = commands.add_parser(name, help=purpose, conflict_handler="resolve")
        if name == command:
            getattr(import_module(f"{package}.command"), f"add_{name}_command")(options)
    return parser


def print_info(arguments: argparse.Namespace) -> int:
    import torch

    from drope_kernels import _C, available_backends

    rows = {name: _text(value) for name, value in build_info().items()}
    del rows["no_cuda_reason"]
    no_cuda = cuda_unavailable_reason()
    if no_cuda:
        rows["cuda"] = f"none: {no_cuda}"
    rows["torch"] = torch.__version__
    rows["torch threads"] = str(torch.get_num_threads())
    status = 0
    try:
        rows["backends"] = _text(available_backends())
        rows["cpu isa in use"] = _C.cpu_isa()
        rows["amx tiles"] = _C.amx_refusal() or "can be used"
    except ValueError as error:  # DROPE_CPU_ISA names an instruction set that cannot run here
        rows["backends"], status = str(error), 1
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name.replace('_', ' '):<{width}}  {value}")
    return status


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


if __name__ == "__main__":  # torchrun -m drope_kernels.cli
    sys.exit(main())
