"""Runs that are killed, resumed, killed again: `python resumed_runs.py FOLDER`.

FOLDER/packed holds the data. Every life is a process forked from this one, which has imported all
it needs, so that a life costs no start. FOLDER/NAME/ gets each run's log, its end and its weights.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from training import CONTEXT, config

from drope_kernels.hf import drop_positions, use_kernels
from drope_kernels.recalibrate import PackedRows, recalibrate
from drope_kernels.recalibrate.packed_folder import PackedFolder

BATCH = 2
RUNS = {
    "plain": {"save_steps": 3, "log_steps": 1},
    "accumulated": {
        "save_steps": 2,
        "log_steps": 1,
        "gradient_accumulation": 2,
        "bf16": True,
        "activation_checkpointing": True,
    },
    "distilled": {"save_steps": 3, "log_steps": 4, "distillation": 0.5, "loss_chunk": 7},
}
STEPS = 20
# What a life dies in: a step, or a call while a checkpoint is written, its first or a later one.
DEATHS = {
    "plain": [("step", 5), ("torch.save", 2), ("step", 11), ("_save_rng_state", 1)],
    "accumulated": [("_save_optimizer_and_scheduler", 2), ("step", 9), ("rename", 3)],
    "distilled": [("step", 8), ("rmtree", 4)],
}


def tiny_model(vocab_size):
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )


class Log(transformers.TrainerCallback):
    """Every entry at once to a file, where it outlives the process, and what chance says then."""

    def __init__(self, file):
        self.file = file

    def on_log(self, args, state, control, logs, **_):
        if "loss" in logs:
            chance = [x.hex() for x in (torch.rand(()).item(), np.random.rand(), random.random())]
            with self.file.open("a") as file:
                entry = entry_of({**logs, "step": state.global_step})
                file.write(json.dumps(entry + chance) + "\n")


def entry_of(logs):
    names = ("step", "loss", "ce", "kl", "grad_norm", "learning_rate", "tokens")
    return [float(logs[name]).hex() for name in names if name in logs]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class DeathAfterStep(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            die()


def die_in_call(owner, name, count):
    """At the count-th call; of torch.save when half of a file is written."""
    stock, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(name)
        if len(calls) < count:
            return stock(*args, **kwargs)
        if owner is torch:
            stock(*args, **kwargs)
            os.truncate(args[1], Path(args[1]).stat().st_size // 2)
        return die()

    setattr(owner, name, dying)


def prepare_death(kind, count):
    if kind == "step":
        return [DeathAfterStep(count)]
    owners = {"torch.save": torch, "rename": Path, "rmtree": shutil}
    die_in_call(owners.get(kind, transformers.Trainer), kind.split(".")[-1], count)
    return []


def live(folder, packed, settings, death):
    torch.set_num_threads(1)
    rows = PackedRows(packed, CONTEXT)
    model = tiny_model(rows.largest_token + 1)
    teacher = copy.deepcopy(model) if "distillation" in settings else None
    use_kernels(drop_positions(model))
    callbacks = [Log(folder / "log.jsonl")] + ([] if death is None else prepare_death(*death))
    run = config(
        steps=STEPS, batch_size=BATCH, resume=True, output_dir=str(folder / "run"), **settings
    )
    result = recalibrate(model, rows, run, teacher=teacher, callbacks=callbacks, description=None)
    torch.save(model.state_dict(), folder / "weights.pt")
    history = [entry_of(entry) for entry in result.history if "loss" in entry]
    (folder / "end.json").write_text(json.dumps([history, result.train_loss.hex()]))


def main(place):
    packed = PackedFolder.load(place / "packed")
    for name, settings in RUNS.items():
        for folder, deaths in ((f"{name}-whole", [None]), (name, [*DEATHS[name], None])):
            (place / folder).mkdir()
            for death in deaths:
                process = os.fork()
                if process == 0:
                    live(place / folder, packed, settings, death)
                    os._exit(0)
                status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                if status != (0 if death is None else -signal.SIGKILL):
                    raise SystemExit(f"{folder} {death}: exit code {status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
