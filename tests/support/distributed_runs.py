"""Program of one process of a group: makes the named runs, leaves what they did in a folder.

distributed_runs.py FOLDER RUN[:resume|:die] ...
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hf_models import VOCABULARY, build, counted_calls
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from training import tiny_decoder
from transformers import TrainerCallback

from drope_kernels.hf import drop_positions, use_kernels
from drope_kernels.recalibrate import (
    LengthSweep,
    PackedRows,
    RecalibrationConfig,
    TokenRows,
    recalibrate,
)
from drope_kernels.recalibrate.distributed import leave_process_group

ROWS, CONTEXT = 32, 16
BATCH, ACCUMULATION = 8, 2  # of all processes together
CONFIG = RecalibrationConfig(
    batch_size=BATCH,
    context_length=CONTEXT,
    steps=7,  # into the fourth epoch, and beyond the last regular checkpoint
    gradient_accumulation=ACCUMULATION,
    learning_rate=1e-2,
    warmup=2,
    use_cpu=True,
    log_steps=1,
    keep_checkpoints=None,
)
ENDINGS = {"": "", "die": "-killed", "resume": "-resumed"}
_SAVED = {"save_steps": 3, "eval_steps": 4}
_PACKED = {"loss_chunk": 50, "activation_checkpointing": True, "distillation": 0.5}
RUNS: dict[str, dict[str, Any]] = {
    "llama": _SAVED,
    "llama-sharded": _SAVED | {"sharded": True},
    "bf16": {"bf16": True},
    "bf16-sharded": {"bf16": True, "sharded": True},
    "packed": _PACKED,
    "packed-sharded": _PACKED | {"sharded": True},
    "decoder": {},
    "decoder-sharded": {"sharded": True},
}


class TwoDocuments(Dataset):
    """Every row holds two documents; batches are one flat row, as `PackedRows` makes them."""

    attend_across_documents, flatten = False, True
    collate = PackedRows.collate

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        ids, first = rows().input_ids[index], 3 + index % 8
        positions = torch.cat([torch.arange(first), torch.arange(CONTEXT - first)])
        return {
            "input_ids": ids,
            "labels": ids.masked_fill(positions == 0, -100),
            "position_ids": positions,
        }


def rows(seed: int = 1) -> TokenRows:
    """Random tokens whose weights differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (ROWS, CONTEXT), generator=generator)
    return TokenRows(ids, None, torch.rand(ROWS, CONTEXT, generator=generator) ** 4)


def uneven_rows() -> TokenRows:
    """They fill no last batch, and some have hardly a target."""
    few = rows(2)
    weights = few.loss_weights * (torch.arange(ROWS) % 3 == 0)[:, None]
    return TokenRows(few.input_ids[:27], None, weights[:27])


def dropped_llama():
    """Tied embeddings, one layer without positions and with norms, one that rotates."""
    model = build("llama", tie_word_embeddings=True)
    return use_kernels(drop_positions(model, layers=[1], qk_norm="head"))


class Witness(TrainerCallback):
    """Where weights, gradients and optimiser states are, and in what the layers compute."""

    def __init__(self):
        self.slices, self.computed_in, self.groups = {}, set(), []

    def on_train_begin(self, args, state, control, *, model, **others):
        self.groups = [name for name, x in model.named_modules() if isinstance(x, FSDPModule)]

        def watch(projection, inputs, output):
            self.computed_in.add((type(projection.weight), projection.weight.dtype))

        model.model.layers[0].self_attn.q_proj.register_forward_hook(watch)

    def on_pre_optimizer_step(self, args, state, control, *, model, optimizer, **others):
        if state.global_step == 1:  # the second step: the optimiser has states
            for name, parameter in model.named_parameters():
                moment = optimizer.optimizer.state[parameter]["exp_avg"]
                self.slices[name] = [slice_of(x) for x in (parameter, parameter.grad, moment)]


def slice_of(tensor):
    """Whether it is a DTensor, the shape of all of it and of what is here, and in what."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return isinstance(tensor, DTensor), tuple(tensor.shape), tuple(local.shape), local.dtype


class Death(TrainerCallback):
    """The last process dies in a step that no checkpoint has."""

    def on_step_end(self, args, state, control, **others):
        if state.global_step == 5 and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, name: str, manner: str = "", **changes: Any) -> dict[str, Any]:
    """One run in a subfolder of its own; every process begins with other weights."""
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    output_dir = str(folder / (name + ENDINGS[manner]))
    shared = {"batch_size": BATCH // processes, "output_dir": output_dir}
    settings = replace(CONFIG, **(shared | RUNS[name] | changes), resume=manner == "resume")
    is_decoder = name.startswith("decoder")
    model = tiny_decoder(vocab_size=VOCABULARY) if is_decoder else dropped_llama()
    with torch.no_grad():
        next(model.parameters()).add_(rank)  # rank 0's weights are to count
    witness, sweep = Witness(), LengthSweep({8: rows(3).input_ids[:2, :8]}, every=3)
    with counted_calls() as calls:
        result = recalibrate(
            model,
            TwoDocuments() if name.startswith("packed") else rows(),
            settings,
            eval_data=uneven_rows() if settings.eval_steps else None,
            teacher=build("llama") if settings.distillation else None,
            callbacks=[witness, sweep, *([Death()] if manner == "die" else [])],
        )
    return {
        "folder": Path(settings.output_dir),
        "tokens": result.tokens,
        "losses": [entry["loss"] for entry in result.history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in result.history if "loss" in entry],
        "evaluations": [entry["eval_loss"] for entry in result.history if "eval_loss" in entry],
        "sweep": [losses[8] for _, losses in sweep.rows],
        "weights": {name: p.detach().clone() for name, p in result.model.named_parameters()},
        "groups": witness.groups,
        "slices": witness.slices,
        "computed_in": witness.computed_in,
        "attention_calls": calls["drope::attention_fwd"],
    }


def prepare(folder: Path, name: str) -> None:
    """The folder to resume in, with one checkpoint."""
    if dist.get_rank() == 0:
        killed = folder / (name + ENDINGS["die"])
        source = (killed if killed.exists() else folder / name) / "checkpoint-3"
        shutil.copytree(source, folder / (name + ENDINGS["resume"]) / source.name)
    dist.barrier()


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    for named in names:
        name, _, manner = named.partition(":")
        if manner == "resume":
            prepare(Path(folder), name)
        outcome = run(Path(folder), name, manner)
        torch.save(outcome, Path(folder, f"{name}{ENDINGS[manner]}-{dist.get_rank()}.pt"))
    leave_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
