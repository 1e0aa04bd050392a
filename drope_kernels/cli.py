"""The console script `drope`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from drope_kernels.build import build_info, cuda_unavailable_reason
from drope_kernels.demo.command import add_demo_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status."""
    arguments = build_parser().parse_args(argv)
    status: int = arguments.run(arguments)
    return status


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="drope", description="Drop the positions of a RoPE model, recalibrate, evaluate."
    )
    commands = parser.add_subparsers(required=True, dest="command")
    info = commands.add_parser("info", help="what this installation was built with and can run")
    info.set_defaults(run=print_info)
    add_demo_command(
        commands.add_parser("demo", help="pretrain, drop, recalibrate and measure a small model")
    )
    return parser


def print_info(arguments: argparse.Namespace) -> int:
    import torch

    from drope_kernels import available_backends

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
