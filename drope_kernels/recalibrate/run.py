"""One run of `drope recalibrate`: data, model, training, what is left in the end."""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Subset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from drope_kernels.build import build_info
from drope_kernels.hf import DropState, drop_positions, export, load_model
from drope_kernels.recalibrate.callbacks import TensorBoard
from drope_kernels.recalibrate.checkpoints import checkpoints_of, step_of
from drope_kernels.recalibrate.data import PackedRows
from drope_kernels.recalibrate.enough import Need
from drope_kernels.recalibrate.environment import is_first_process, num_devices
from drope_kernels.recalibrate.packed_folder import SPLITS, PackedFolder
from drope_kernels.recalibrate.packing import pack_documents
from drope_kernels.recalibrate.preflight import RunPlan, change_attention
from drope_kernels.recalibrate.progress import TrainingProgress
from drope_kernels.recalibrate.recalibration import RecalibrationResult, recalibrate
from drope_kernels.recalibrate.records import StepRecords
from drope_kernels.recalibrate.run_folder import (
    MODEL,
    RESULT,
    SETTINGS,
    settings_record,
    write_json,
)
from drope_kernels.recalibrate.samples import HeldOutLosses, Observer, SampleTexts
from drope_kernels.recalibrate.saving import reserved_room, save_model
from drope_kernels.texts.tokens import first_token
from drope_kernels.texts.windows import text_windows

SAMPLES, SWEEP, EVENTS = "samples.jsonl", "length_sweep.jsonl", "runs"
PATIENCE = 600  # seconds that a process waits for the first one's checks


def run_recalibration(plan: RunPlan, command: str) -> None:
    """Does what is left to do of a run; every process of it calls this.

    The folder then holds `model` (for `load_model` and stock transformers, with its tokenizer) and
    `result.json`, written last.

    Raises:
        ValueError, OSError, FloatingPointError, KeyboardInterrupt: as `recalibrate` and
            `pack_documents` do; whole checkpoints stay.
    """
    if plan.progress == "finished":
        say(f"finished before: {plan.folder / MODEL}")
    else:
        _run(plan, command)
    if plan.config.export is not None and is_first_process():
        model = load_model(plan.folder / MODEL, dtype=getattr(torch, plan.config.dtype))
        say(f"exported to {export(model, plan.config.export, tokenizer=plan.tokenizer)}")


def _run(plan: RunPlan, command: str) -> None:
    settings = Settings(plan)
    if not is_first_process():
        _wait_for_settings(plan.folder / SETTINGS)
    elif not (plan.folder / SETTINGS).exists():
        settings.write()
    data, held_out = packed_data(plan)
    watchers = observers(plan, held_out)
    model, teacher = prepared_model(plan)
    with contextlib.ExitStack() as room:
        if is_first_process():
            kept = plan.config.save_steps is not None
            room.enter_context(reserved_room(plan.folder, model, checkpoints=kept))
        result, begun_at = _train(plan, model, teacher, data, held_out, [settings, *watchers])
    if is_first_process():
        settings.write()
        _note_recalibration(plan, model, result)
        save_model(plan.folder, model, plan.tokenizer, result.steps)
        write_json(plan.folder / RESULT, summary(plan, result, begun_at, command))
        say(f"{result.steps} steps, {result.tokens:,} tokens; {plan.folder / MODEL}")


def say(text: str) -> None:
    """A line on stderr, of the first process only."""
    if is_first_process():
        tell(text)


def tell(text: str) -> None:
    """A line on stderr, of any process."""
    who = "" if is_first_process() else f" (process {os.environ['RANK']})"
    print(f"drope recalibrate{who}: {text}", file=sys.stderr, flush=True)


# ---- data --------------------------------------------------------------------------------------
def packed_data(plan: RunPlan) -> tuple[PackedRows, PackedRows | None]:
    """Rows to train on and, where they are asked for, held-out rows.

    Every process packs or, as a rule, finds that another one has: all see the same mistakes.
    """
    folder = pack_documents(
        plan.documents,
        plan.tokenizer,
        plan.data_folder,
        validation_documents=plan.validation_documents,
        validation_share=plan.config.validation_share,
        seed=plan.config.seed,
        bos=plan.config.bos,
        split_at_eos=plan.config.split_at_eos,
        progress=PackingProgress(),
    )
    Need(plan.config, plan.context_length).check_packed(folder)
    train = _rows(plan, folder, "train")
    counts = [f"{folder.num_tokens(split):,}" for split in ("train", "validation")]
    say(
        f"{counts[0]} tokens to train on in {len(train):,} rows of {plan.context_length}, "
        f"{counts[1]} held out; "
        f"{sum(map(folder.num_documents, SPLITS)):,} documents"
    )
    tell_what_is_read(plan, len(train))
    if plan.config.eval_steps is None and not plan.config.length_sweep:
        return train, None
    return train, _rows(plan, folder, "validation")


def tell_what_is_read(plan: RunPlan, rows: int) -> None:
    """Where it is not what one would think."""
    config, devices = plan.recalibration, num_devices()
    steps = config.total_steps(devices)
    read, asked = config.tokens_read(steps, rows, devices), steps * config.tokens_per_step * devices
    if read < asked:
        say(
            f"{rows:,} rows end every pass with a shorter step: {steps:,} steps read {read:,} "
            f"tokens, not {asked:,}; lower gradient_accumulation or sequences_per_step, or give "
            "more text"
        )
    passes = read / (rows * plan.context_length)
    if passes > 1.5:
        say(f"the run reads its text {passes:.1f} times: watch the validation loss")


def _rows(plan: RunPlan, folder: PackedFolder, split: Any) -> PackedRows:
    return PackedRows(
        folder,
        plan.context_length,
        split,
        plan.config.attend_across_documents,
        flatten=plan.config.attention == "kernels",
    )


class PackingProgress:
    """A line every few seconds."""

    def __init__(self, every: float = 10.0) -> None:
        self.every, self.last = every, time.perf_counter()

    def __call__(self, documents: int, tokens: int) -> None:
        if time.perf_counter() - self.last > self.every:
            say(f"packing: {documents:,} documents, {tokens:,} tokens")
            self.last = time.perf_counter()


# ---- model -------------------------------------------------------------------------------------
def prepared_model(plan: RunPlan) -> tuple[Any, Any]:
    """The model as it is trained, and the teacher where there is one."""
    config = plan.config
    model = load_model(str(config.model), dtype=getattr(torch, config.dtype))
    change_attention(model, config)
    teacher = copy.deepcopy(model) if config.distillation > 0 else None
    if config.drop != "none":
        norm = None if config.qk_norm == "none" else config.qk_norm
        drop_positions(model, config.layers(), qk_norm=norm)
    return model, teacher


def _train(
    plan: RunPlan,
    model: Any,
    teacher: Any,
    data: PackedRows,
    held_out: PackedRows | None,
    beside: list[TrainerCallback],
) -> tuple[RecalibrationResult, int]:
    """What `recalibrate` returns, and the step where it began."""
    whole = checkpoints_of(plan.folder)
    begun_at = step_of(whole[-1]) if whole else 0
    if begun_at:
        say(f"going on from {whole[-1]}")
    with contextlib.ExitStack() as cleanup:
        progress = TrainingProgress("recalibrate", lines=True)
        cleanup.callback(progress.close)
        callbacks: list[TrainerCallback] = [*beside, progress]
        if plan.config.tensorboard and is_first_process():
            board = TensorBoard(plan.folder / EVENTS, after=begun_at)
            cleanup.callback(board.close)
            callbacks.insert(0, board)
            for watcher in beside:
                if isinstance(watcher, Observer):
                    watcher.board = board
        result = recalibrate(
            model,
            data,
            replace(plan.recalibration, tensorboard=False),  # the board here takes samples too
            eval_data=None if held_out is None else some_rows(held_out, plan.config.eval_rows),
            teacher=teacher,
            callbacks=callbacks,
            description=None,
        )
    return result, begun_at


def some_rows(rows: PackedRows, most: int) -> Any:
    """At most so many, spread evenly."""
    if len(rows) <= most:
        return rows
    return Subset(rows, [i * len(rows) // most for i in range(most)])


def observers(plan: RunPlan, held_out: PackedRows | None) -> list[Observer]:
    """Samples and length sweep, where the run asks for them."""
    config = plan.config
    found: list[Observer] = []
    if config.samples:
        records = StepRecords(plan.folder / SAMPLES)
        prompts, length = config.samples, config.sample_tokens
        found.append(SampleTexts(prompts, plan.tokenizer, length, records, config.sample_steps))
    if config.length_sweep and held_out is not None:
        lengths = [n * plan.context_length for n in sorted(set(config.length_sweep))]
        text = torch.from_numpy(np.array(held_out.folder.tokens("validation")))
        windows = text_windows(text, lengths[-1], config.sweep_windows)
        records = StepRecords(plan.folder / SWEEP)
        start = first_token(plan.tokenizer) if config.bos else None
        found.append(HeldOutLosses(windows, lengths, records, config.sweep_steps, start))
    return found


# ---- what is left ------------------------------------------------------------------------------
def _note_recalibration(plan: RunPlan, model: Any, result: RecalibrationResult) -> None:
    """Into `config.drope`, with which every copy of the model says how it came about."""
    config = plan.config
    state = DropState.from_config(model.config)
    facts = {
        "tokens": result.tokens,
        "steps": result.steps,
        "context_length": plan.context_length,
        "learning_rate": config.learning_rate,
        "recipe": config.recipe,
        "distillation": config.distillation,
    }
    earlier = state.notes.get("recalibration")
    if earlier is not None:
        facts["before"] = earlier
    replace(state, notes={**state.notes, "recalibration": facts}).into_config(model.config)


def summary(
    plan: RunPlan, result: RecalibrationResult, begun_at: int, command: str
) -> dict[str, Any]:
    """The content of result.json."""
    logged = [entry for entry in result.history if "loss" in entry]
    build = build_info()
    return {
        "command": command,
        "settings": asdict(plan.config),
        "context_length": plan.context_length,
        "devices": num_devices(),
        "steps": result.steps,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "seconds_cover": f"steps {begun_at + 1} to {result.steps}",
        "train_loss": result.train_loss,
        "first_loss": logged[0]["loss"] if logged else None,
        "last_loss": logged[-1]["loss"] if logged else None,
        "validation": {
            str(entry["step"]): entry["eval_loss"]
            for entry in result.history
            if "eval_loss" in entry
        },
        "length_sweep": StepRecords(plan.folder / SWEEP).read(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "drope_kernels": f"{build['version']} {build['commit']}",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


class Settings(TrainerCallback):
    """settings.json, which a run that goes on replaces only when nothing can refuse it any more."""

    def __init__(self, plan: RunPlan) -> None:
        self.plan = plan

    def write(self) -> None:
        self.plan.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.plan.folder / SETTINGS, settings_record(self.plan.config))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            self.write()


def _wait_for_settings(file: Path) -> None:
    """The first process writes them once it has found output_dir free for this run."""
    until = time.monotonic() + PATIENCE
    while not file.is_file():
        if time.monotonic() > until:
            raise TimeoutError(
                f"{file}: expected the first process to write it within {PATIENCE} s, got none; "
                "see what that process said, and whether all of them see the same folder"
            )
        time.sleep(0.5)
