"""A recalibration step of SmolLM2-135M's shapes: who runs it, do they agree, how long does it take.

Every contender is the same Trainer on the same position-free model and differs in its attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, TrainerCallback

from drope_kernels import hf
from drope_kernels.nn.loss import next_token_targets, token_losses
from drope_kernels.recalibrate import RecalibrationConfig, TokenRows, recalibrate

from .timing import Samples, clock_for

CONTEXT_LENGTH = 2048
BLOCKS, TIMED_STEPS = 3, 2  # each block has one step more, untimed, in front
GATE_LAYERS = 2  # eager attention at this length keeps its scores of every layer


@dataclass(frozen=True)
class StepCase:
    dtype: str  # fp32, or bf16 by autocast
    threads: int = 1
    context_length: int = CONTEXT_LENGTH
    num_layers: int = 30

    @property
    def name(self) -> str:
        threads = "thread" if self.threads == 1 else "threads"
        return f"recalibrate-{self.dtype}-SmolLM2-S{self.context_length}-{self.threads}{threads}"

    @property
    def bf16(self) -> bool:
        return self.dtype == "bf16"


def config_of(case: StepCase) -> LlamaConfig:
    """SmolLM2-135M's."""
    return LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=case.num_layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        bos_token_id=1,
        eos_token_id=2,
    )


def model_of(case: StepCase, attention: str) -> Any:
    """The same random weights for every contender."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config_of(case))
    if attention == "sdpa, identity rotation":  # cos 1 and sin 0 multiplied in, as the authors do
        model.set_attn_implementation("sdpa")
        rotary = model.model.rotary_emb
        rotary.inv_freq.zero_()
        return model
    hf.drop_positions(model)
    if attention == "drope_kernels":
        return hf.use_kernels(model)
    model.set_attn_implementation(attention)
    return model


CONTENDERS = ("drope_kernels", "sdpa", "sdpa, identity rotation")


def token_rows(case: StepCase, rows: int) -> TokenRows:
    generator = torch.Generator().manual_seed(1)
    return TokenRows(torch.randint(0, 49_152, (rows, case.context_length), generator=generator))


# ---- gate --------------------------------------------------------------------------------------
def gradient_errors(case: StepCase) -> dict[str, tuple[float, float]]:
    """Per tensor, relative rms of ours and of eager in the same precision, against float64."""
    case = replace(case, num_layers=GATE_LAYERS)
    truth = _gradients(case, "eager", torch.float64)
    ours, peer = (_gradients(case, name, None) for name in ("drope_kernels", "eager"))

    def error(found: Tensor, name: str) -> float:
        return float((found.double() - truth[name]).norm() / truth[name].norm())

    return {name: (error(ours[name], name), error(peer[name], name)) for name in truth}


def _gradients(case: StepCase, attention: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Losses of the tokens, and gradients of the projections; dtype None: the case's precision."""
    model = model_of(case, attention)
    if dtype is not None:
        model.to(dtype)
    ids = token_rows(case, 1).input_ids
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=case.bf16 and dtype is None)
    with autocast:
        logits = model(input_ids=ids, use_cache=False).logits
    losses = token_losses(logits, next_token_targets(ids))
    losses.mean().backward()
    named = {
        f"{name} of layer {index}": getattr(layer.self_attn, name).weight.grad
        for index, layer in enumerate(model.model.layers)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    return {"losses": losses.detach(), **named}


def check_gate(case: StepCase) -> float:
    """The worst of our errors.

    Raises:
        AssertionError: one is more than twice that of the peer.
    """
    errors = gradient_errors(case)
    wrong = {name: pair for name, pair in errors.items() if not pair[0] <= 2 * pair[1] + 2e-6}
    if wrong:
        raise AssertionError(f"{case.name} is not timed: (ours, eager's) errors {wrong}")
    return max(ours for ours, _ in errors.values())


# ---- time --------------------------------------------------------------------------------------
class StepClock(TrainerCallback):
    """Seconds of each optimiser step but the first: data, forward, backward, clipping, AdamW."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.begin = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begin = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds.append(self.clock() - self.begin)


def time_steps(case: StepCase) -> dict[str, Samples]:
    """Blocks of a few steps of each contender in turn, so that noise hits all alike."""
    models = {name: model_of(case, name) for name in CONTENDERS}
    samples = {name: Samples() for name in CONTENDERS}
    steps = 1 + TIMED_STEPS
    config = RecalibrationConfig(
        batch_size=1,
        context_length=case.context_length,
        steps=steps,
        schedule="constant",
        learning_rate=1e-5,
        bf16=case.bf16,
        use_cpu=True,
    )
    data = token_rows(case, steps)
    for _ in range(BLOCKS):
        for name, model in models.items():
            clock = StepClock(clock_for(case.threads))
            recalibrate(model, data, config, callbacks=[clock], description=None)
            samples[name].seconds += clock.seconds[1:]
    return samples


@dataclass(frozen=True)
class AttentionAlone:
    """Seconds of a step's attention, forward and backward of all layers, out of the model."""

    ours: float
    sdpa: float

    def bound(self, step_with_sdpa: float) -> float:
        """Amdahl's: how much faster a step gets whose attention alone changes."""
        return step_with_sdpa / (step_with_sdpa - self.sdpa + self.ours)


def attention_runs(case: StepCase) -> dict[str, Callable[[], object]]:
    """One layer's attention, called as transformers calls it."""
    model = model_of(replace(case, num_layers=1), "drope_kernels")
    module = model.model.layers[0].self_attn.train()
    generator = torch.Generator().manual_seed(2)
    dtype = torch.bfloat16 if case.bf16 else torch.float32

    def draw(heads: int) -> Tensor:
        rows = torch.randn((1, case.context_length, heads, 64), generator=generator)
        return rows.to(dtype).transpose(1, 2).requires_grad_()

    q, k, v = draw(9), draw(3), draw(3)
    grad_out = torch.randn((1, case.context_length, 9, 64), generator=generator).to(dtype)

    def run(name: str) -> object:
        attend = AttentionInterface()[name]
        out, _ = attend(module, q, k, v, None, scaling=module.scaling)
        return torch.autograd.grad(out, (q, k, v), grad_out)

    return {name: functools.partial(run, name) for name in ("drope_kernels", "sdpa")}
