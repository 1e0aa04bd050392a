"""Several processes, one model: FSDP2 shards for the trainer.

Launch one process per device, with either launcher, and everything else stays as it is:

    torchrun --nproc_per_node 8 -m drope_kernels.cli recalibrate run.yaml
    accelerate launch --multi_gpu --num_processes 8 -m drope_kernels.cli recalibrate run.yaml

On CPUs it is torchrun; over several machines `output_dir` is a folder that all of them see.

Without `sharded` the processes hold a whole model each and average gradients (accelerate's
DistributedDataParallel). With it each holds a slice of every weight, gradient and optimiser state
(torch's `fully_shard`), on CPUs as on GPUs; a teacher stays whole. Both take the same steps as one
process with the batch of all of them, up to the order of sums.
"""

from __future__ import annotations

import copy
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from drope_kernels.recalibrate.trainer import WeightedTrainer


class ShardedTrainer(WeightedTrainer):
    """`WeightedTrainer` whose steps run on a sharded copy of the model, made by `fully_shard`.

    The model itself stays whole, in the memory where it is: the copy's weights come back to it for
    every checkpoint and at the end, so that files are those of one process, and so is the result.
    An interrupted run leaves it as in its last checkpoint. Callbacks see the copy, whose forward
    all processes have to call together.

    With `args.bf16` the slices stay as they are, layers are gathered and computed in bfloat16, and
    gradients are summed in float32.

    Raises:
        ValueError: fewer than two processes, or a model without a list of `layers`.
    """

    def __init__(self, *, model: nn.Module, args: TrainingArguments, **others: Any) -> None:
        if args.world_size < 2:
            raise ValueError(
                f"sharded: expected at least 2 processes, got {args.world_size}; launch with "
                "`torchrun --nproc_per_node N` or set sharded to false"
            )
        decoder_layers(model)
        super().__init__(model=model, args=args, **others)
        self.whole = model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        output = super().train(*args, **kwargs)
        gather_weights(self.model, self.whole)
        return output

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # autocast and compilation, but no DistributedDataParallel around the shards
        self.accelerator.prepare_model = partial(
            self.accelerator.prepare_model, evaluation_mode=True
        )

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Not the whole model: `fully_shard` moves one layer after the other."""

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Shards first (a checkpoint is already loaded): the optimiser sees slices only."""
        device = self.args.device
        mesh = init_device_mesh(device.type, (self.args.world_size,))
        broadcast_weights(self.whole, device)
        self.model = self.model_wrapped = sharded_copy(self.whole, mesh, bf16=self.args.bf16)
        return super().create_optimizer(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        gather_weights(self.model, self.whole)
        sharded, self.model = self.model, self.whole
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.model = sharded

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        cast(FSDPModule, self.model).reshard()  # evaluation leaves what is in no layer gathered
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=options)
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def load_optimizer(self, file: Path) -> None:
        state = {}
        if self.args.process_index == 0:  # the others receive their slices from it
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(self.model, self.optimizer.optimizer, state, options=options)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers that are gathered one at a time."""
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList):
            return layers
    raise ValueError(
        f"model: expected a decoder with a ModuleList named `layers`, got {type(model).__name__}; "
        "set sharded to false"
    )


def broadcast_weights(model: nn.Module, device: torch.device) -> None:
    """Rank 0's weights become everybody's, as DistributedDataParallel does it."""
    for tensor in chain(model.parameters(), model.buffers()):
        held = tensor.detach().to(device)
        dist.broadcast(held, src=0)
        tensor.data.copy_(held)


def sharded_copy(model: nn.Module, mesh: DeviceMesh, *, bf16: bool = False) -> nn.Module:
    """A copy of `model` whose parameters are slices on `mesh`: one group per layer, one for the
    rest. `model` keeps its weights; they have to be equal on all processes."""
    known: dict[int, Any] = {  # deepcopy's memo: the copy borrows the weights until it is sharded
        id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad)
        for parameter in model.parameters()
    }
    sharded = copy.deepcopy(model, known)
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in decoder_layers(sharded):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(sharded, mesh=mesh, mp_policy=policy)
    return sharded


@torch.no_grad()
def gather_weights(sharded: nn.Module, whole: nn.Module) -> None:
    """Copies the weights of `sharded` into `whole`, on every process, one tensor at a time."""
    targets: dict[str, Tensor] = whole.state_dict()
    for name, value in sharded.state_dict().items():
        targets[name].copy_(value.full_tensor() if isinstance(value, DTensor) else value)


def leave_process_group() -> None:
    """The last act of a program that a launcher started; without launcher, nothing.

    After a failure it is better left out: the launcher ends the other processes.
    """
    if dist.is_initialized():
        dist.destroy_process_group()  # a thread left behind may abort the interpreter's exit
