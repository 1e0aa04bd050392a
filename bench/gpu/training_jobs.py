"""Jobs of the stage train: a decoder is pretrained with RoPE, dropped and recalibrated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu.accelerator import StandIn
from bench.gpu.sm80 import SM80

LOG_STEPS = 5


@dataclass(frozen=True)
class Sizes:
    """A decoder of about 0.1 billion parameters, or a dry run's."""

    vocab_size: int = 4096
    hidden_size: int = 1024
    num_layers: int = 8
    num_heads: int = 8  # of 128 channels
    num_kv_heads: int = 4
    context_length: int = 4096
    batch_size: int = 4
    steps: int = 40


SMALL = Sizes(
    vocab_size=64,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    context_length=48,
    batch_size=4,
    steps=20,
)


def sequences(sizes: Sizes) -> Tensor:
    """(rows, context) tokens that a model can learn: a fixed successor, now and then a jump."""
    generator = torch.Generator().manual_seed(0)
    successor = torch.randperm(sizes.vocab_size, generator=generator)
    rows = sizes.batch_size * sizes.steps
    tokens = torch.randint(sizes.vocab_size, (rows, sizes.context_length), generator=generator)
    jump = torch.rand(tokens.shape, generator=generator) < 0.1
    for column in range(1, sizes.context_length):
        follows = successor[tokens[:, column - 1]]
        tokens[:, column] = torch.where(jump[:, column], tokens[:, column], follows)
    return tokens


def train(model: Any, sizes: Sizes, where: StandIn) -> dict[str, Any]:
    """Losses of the first and the last logged steps, tokens per second, peak memory."""
    from drope_kernels.recalibrate import RecalibrationConfig, TokenRows, recalibrate

    config = RecalibrationConfig(
        batch_size=sizes.batch_size,
        context_length=sizes.context_length,
        steps=sizes.steps,
        learning_rate=1e-3,
        bf16=where.device == "cuda",
        use_cpu=where.device == "cpu",
        loss_chunk=min(1024, sizes.context_length),
        log_steps=LOG_STEPS,
    )
    if where.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result = recalibrate(model, TokenRows(sequences(sizes)), config, description=None)
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    found: dict[str, Any] = {
        "losses": losses,
        "tokens_per_second": result.tokens / result.seconds,
        "seconds_trained": result.seconds,
        "steps": result.steps,
    }
    if where.device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def run_job(job: str, where: StandIn) -> dict[str, Any]:
    """The job is the backend's name, or "list": pretraining, the drop, then recalibration."""
    from drope_kernels.nn import DecoderLM
    from drope_kernels.nn.config import DecoderConfig

    if job == "list":
        return {"backends": [name for name in where.backends if name != SM80]}
    sizes = SMALL if where.device == "cpu" else Sizes()
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=3 * sizes.hidden_size,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        backend=job,
    )
    model = DecoderLM(config)
    found = {"parameters": sum(x.numel() for x in model.parameters())}
    parts = {"with_rope": train(model, sizes, where)}
    model.drop_positions()
    parts["dropped"] = train(model, sizes, where)
    first, last = parts["with_rope"]["losses"][0], parts["with_rope"]["losses"][-1]
    assert last < first, f"the loss does not fall: {parts['with_rope']['losses']}"
    dropped = parts["dropped"]["losses"]
    assert dropped[-1] < first, f"the loss does not come back after the drop: {dropped}"
    return {**found, **parts}
