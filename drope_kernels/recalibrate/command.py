"""The command line of `drope recalibrate`."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging

from drope_kernels.console.locks import alone_in
from drope_kernels.console.signals import sigterm_raises
from drope_kernels.hf.verify import VerificationError
from drope_kernels.recalibrate.checkpoints import checkpoints_of
from drope_kernels.recalibrate.distributed import leave_process_group
from drope_kernels.recalibrate.preflight import RunPlan, plan_run
from drope_kernels.recalibrate.run import run_recalibration, say, tell
from drope_kernels.recalibrate.run_config import list_recipes, read_run_config, run_config_parser
from drope_kernels.recalibrate.run_folder import is_first_process, progress_of

FAILED, BAD_ARGUMENTS = 1, 2
INTERRUPTED = 130  # the shell's status for Ctrl-C

_REFUSED = (ImportError, NotImplementedError, OSError, TypeError, ValueError)
_BROKEN = (*_REFUSED, FloatingPointError, VerificationError)


def add_recalibrate_command(parser: argparse.ArgumentParser) -> None:
    """`HfArgumentParser` reads the options, and prints the help."""
    parser.add_argument("-h", "--help", action="store_true")
    parser.set_defaults(run=recalibrate_command, rest=None)


def recalibrate_command(arguments: argparse.Namespace) -> int:
    """Runs it; status 2 for bad arguments, 1 for a run that failed, 130 when interrupted."""
    given = list(arguments.rest)
    if arguments.help:
        run_config_parser().print_help()
        return 0
    if {"--list_recipes", "--list-recipes"} & set(given):
        print(list_recipes())
        return 0
    with contextlib.ExitStack() as lock:
        try:
            plan = held(plan_run(read_run_config(given)), lock)
        except _REFUSED as error:
            tell(str(error))
            return BAD_ARGUMENTS
        except KeyboardInterrupt:
            say("interrupted before anything was written")
            return INTERRUPTED
        return carry_out(plan, given)


def held(plan: RunPlan, lock: contextlib.ExitStack) -> RunPlan:
    """The plan in a folder that is this command's alone, as long as `lock` is open.

    Raises:
        ValueError: another command is writing there.
    """
    writes = plan.progress != "finished" or plan.config.export is not None
    if not writes or not is_first_process():
        return plan
    lock.enter_context(alone_in(plan.folder, argument="output_dir"))
    # judged again: another command may have written until now
    return replace(plan, progress=progress_of(plan.config, plan.recalibration))


def carry_out(plan: RunPlan, given: Sequence[str]) -> int:
    """The run itself, to the status of its end."""
    logging.disable_progress_bar()  # of every file that transformers reads or writes
    with sigterm_raises(KeyboardInterrupt()):  # as Ctrl-C
        try:
            run_recalibration(plan, again(given))
        except KeyboardInterrupt:
            say(f"interrupted; {where_it_stands(plan.folder)}; {again(given)}")
            return INTERRUPTED
        except torch.OutOfMemoryError as error:
            tell(f"{error}\nlower batch_size, or set activation_checkpointing, loss_chunk, sharded")
        except _BROKEN as error:
            tell(str(error))
        else:
            leave_process_group()
            return 0
    say(f"failed; {where_it_stands(plan.folder)}; {again(given)}")
    return FAILED


def where_it_stands(folder: Path) -> str:
    """What of a stopped run is kept."""
    whole = checkpoints_of(folder)
    if whole:
        return f"{whole[-1]} is whole, the same command goes on from it"
    return "there is no checkpoint yet, the same command begins again"


def again(given: Sequence[str]) -> str:
    """The command that resumes this run."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    launch = "drope"
    if processes is not None:
        launch = f"torchrun --nproc_per_node {processes} -m drope_kernels.cli"
    return f"{launch} recalibrate {shlex.join(given)}"
