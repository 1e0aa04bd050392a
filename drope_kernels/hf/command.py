"""The command line of `drope export`; the models are imported when it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from drope_kernels.console.paths import user_path
from drope_kernels.hf.support import ENGINES
from drope_kernels.scale import LogScale

FAILED, BAD_ARGUMENTS = 1, 2
INTERRUPTED = 130  # the shell's status for Ctrl-C
_DTYPES = ("float32", "bfloat16", "float16")
# What is wrong with the request; anything else is what went wrong on the way.
_REFUSED = (FileNotFoundError, ModuleNotFoundError, NotImplementedError, TypeError, ValueError)


def add_export_command(parser: argparse.ArgumentParser) -> None:
    """Options of `drope export`."""
    parser.description = (
        "Write a model without positions as a plain checkpoint that stock engines serve, verified "
        "in stock transformers before it appears; or check one that is there."
    )
    parser.add_argument("source", nargs="?", type=user_path, help="directory or .gguf file")
    parser.add_argument("out", nargs="?", type=user_path, help="directory to write")
    parser.add_argument("--check", type=user_path, metavar="DIR", help="verify an export and stop")
    parser.add_argument("--drop", action="store_true", help="drop all positions first")
    temperature = parser.add_argument_group(
        "temperature", "folded into the weights; by default the one that the source records"
    )
    temperature.add_argument("--temperature", type=float, metavar="B", help="in place of that one")
    temperature.add_argument(
        "--log-slope", type=float, metavar="C", help="times 1 + C ln(L / N), the paper's form"
    )
    temperature.add_argument(
        "--train-length", type=int, metavar="N", help="tokens of the last training's context"
    )
    temperature.add_argument("--length", type=int, metavar="L", help="tokens to serve it at")
    parser.add_argument("--context", type=int, metavar="N", help="its max_position_embeddings")
    parser.add_argument("--dtype", choices=_DTYPES, help="default: as the source is stored")
    parser.add_argument("--engine", choices=ENGINES, help="refuse what this one would not serve")
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure it in stock transformers first (default: yes)",
    )
    parser.set_defaults(run=export_command)


def export_command(arguments: argparse.Namespace) -> int:
    """Writes or checks an export; status 1 if that fails, 2 for a bad request."""
    from drope_kernels.hf.verify import VerificationError

    try:
        _check_arguments(arguments)
        return _check(arguments.check) if arguments.check is not None else _export(arguments)
    except _REFUSED as error:
        print(f"drope export: {error}", file=sys.stderr)
        return BAD_ARGUMENTS
    except (VerificationError, OSError) as error:
        outcome = "" if arguments.out is None else f"\n{arguments.out} was not written"
        print(f"drope export: {error}{outcome}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


def _check_arguments(arguments: argparse.Namespace) -> None:
    by_length = [arguments.log_slope, arguments.train_length, arguments.length]
    if arguments.check is not None:
        given = [arguments.source, arguments.temperature, *by_length]
        given += [arguments.context, arguments.dtype, arguments.engine]
        if arguments.drop or not arguments.verify or any(x is not None for x in given):
            raise ValueError("--check: expected nothing else; it only reads its own directory")
        return
    if arguments.out is None:
        raise ValueError("expected SOURCE and OUT, or --check DIR")
    if any(x is not None for x in by_length) and None in by_length:
        raise ValueError("--log-slope, --train-length, --length: expected all three or none")
    if arguments.log_slope is not None and arguments.temperature is not None:
        raise ValueError("--temperature: expected either it or --log-slope, got both")


def _check(path: Path) -> int:
    from drope_kernels.hf.verify import verify_export

    report = verify_export(path)
    print(report)
    print(f"{path}: {'position-free' if report.passed else 'NOT position-free'}")
    return 0 if report.passed else FAILED


def _export(arguments: argparse.Namespace) -> int:
    from drope_kernels.hf.export import export_model, temperature_at
    from drope_kernels.hf.loading import load_model
    from drope_kernels.hf.positions import drop_positions
    from drope_kernels.hf.temperature import set_temperature

    scale = None
    if arguments.log_slope is not None:
        scale = LogScale(arguments.log_slope, arguments.train_length)
    beta = temperature_at(scale, arguments.length)
    tokenizer = _tokenizer(arguments.source)
    model = load_model(arguments.source, dtype=_dtype(arguments))
    if arguments.drop:
        drop_positions(model)
    if arguments.temperature is not None:
        set_temperature(model, arguments.temperature)
    result = export_model(
        model,
        arguments.out,
        tokenizer=tokenizer,
        beta=beta,
        context=arguments.context,
        engine=arguments.engine,
        verify=arguments.verify,
    )
    print(result)
    return 0


def _dtype(arguments: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoConfig

    if arguments.dtype is not None:
        return getattr(torch, arguments.dtype)
    if arguments.source.suffix == ".gguf" or not (arguments.source / "config.json").is_file():
        return torch.float32
    config = AutoConfig.from_pretrained(arguments.source, local_files_only=True)
    return config.dtype or torch.float32


def _tokenizer(source: Path) -> Any:
    from drope_kernels.hf.loading import load_tokenizer

    try:
        return load_tokenizer(source)
    except FileNotFoundError:
        print(f"no tokenizer in {source}: the export has none either", file=sys.stderr)
        return None
