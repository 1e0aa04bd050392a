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
from drope_kernels.recalibrate.environment import is_first_process
from drope_kernels.recalibrate.preflight import RunPlan, plan_run
from drope_kernels.recalibrate.run import run_recalibration, say, tell
from drope_kernels.recalibrate.run_config import list_recipes, read_run_config, run_config_parser
from drope_kernels.recalibrate.run_folder import MODEL, RESULT, progress_of

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
            run_recalibration(plan, launch(given))
        except KeyboardInterrupt:
            say(f"interrupted; {where_it_stands(plan.folder)}, {goes_on(plan, given)}")
            return INTERRUPTED
        except torch.OutOfMemoryError as error:
            tell(f"{error}\n{less_memory(plan.folder)}")
            say(f"failed; {where_it_stands(plan.folder)}")
        except OSError as error:  # of the machine: the run is as good as it was
            tell(str(error))
            say(f"failed; {where_it_stands(plan.folder)}, {goes_on(plan, given)}")
        except _BROKEN as error:  # it would come to the same end again; the error says what to do
            tell(str(error))
            say(f"failed; {where_it_stands(plan.folder)}")
        else:
            leave_process_group()
            return 0
    return FAILED


def where_it_stands(folder: Path) -> str:
    """What of a stopped run is kept."""
    whole = checkpoints_of(folder)
    if (folder / MODEL).is_dir() and not (folder / RESULT).exists():
        return f"{folder / MODEL} is whole"  # only its result could not be written
    return f"{whole[-1]} is whole" if whole else "there is no checkpoint yet"


def goes_on(plan: RunPlan, given: Sequence[str]) -> str:
    """The command that does what is left of a stopped run."""
    resumes = bool(checkpoints_of(plan.folder))
    more = ["--resume", "true"] if resumes and not plan.config.resume else []
    same = "this command" if more else "the same command"
    return f"{same} {'goes on from it' if resumes else 'begins again'}; {launch([*given, *more])}"


def less_memory(folder: Path) -> str:
    """What helps, and where: a checkpoint holds to the rows of a micro-batch."""
    free, bound = "set activation_checkpointing or loss_chunk", "lower batch_size, or set sharded"
    if checkpoints_of(folder):
        return f"{free} and go on from the last checkpoint; or {bound}, in another output_dir"
    return f"{free}; or {bound}"


def launch(given: Sequence[str]) -> str:
    """The command line, with what started its processes."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    program = "drope"
    if processes is not None:
        program = f"torchrun --nproc_per_node {processes} -m drope_kernels.cli"
    return f"{program} recalibrate {shlex.join(given)}"
