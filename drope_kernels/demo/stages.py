"""Doing one stage: train weights, sweep a row, fit a temperature. Weights pass through files."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from drope_kernels.demo.config import NORM_EPS, THETA, DemoConfig
from drope_kernels.demo.corpus import Corpus
from drope_kernels.demo.mixture import training_sequences
from drope_kernels.demo.plan import Measurement, TemperatureFit, Training
from drope_kernels.evaluate import (
    SplitModel,
    SweepData,
    SweepRow,
    draw_sweep,
    fit_log_slope,
    fit_temperature,
    rope_at_length,
    run_sweep,
    text_windows,
    window_losses,
)
from drope_kernels.nn import DecoderLM
from drope_kernels.nn.config import DecoderConfig
from drope_kernels.recalibrate import RecalibrationConfig, TokenRows, recalibrate
from drope_kernels.rope import Rope
from drope_kernels.scale import LogScale

SINGLE, AMONG_FOUR = "1 needle", "4 needles"
TASKS = {SINGLE: 1, AMONG_FOUR: 4}
TUNING_SHARE = 4  # one part in four of the held-out text is for the temperature fit only
WAIT_SECONDS = 0.2

Advance = Callable[[int], None]


class Workplace:
    """Corpus, settings and the folder that holds trained weights."""

    def __init__(self, config: DemoConfig, corpus: Corpus, folder: Path) -> None:
        self.config, self.corpus, self.folder = config, corpus, folder
        split = len(corpus.held_out) // TUNING_SHARE
        self.tuning_text, self.test_text = corpus.held_out[:split], corpus.held_out[split:]

    def weights(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def load(self, name: str) -> DecoderLM:
        """The model `name`; waits for another lane that is still training it."""
        while not self.weights(name).exists():
            parent = multiprocessing.parent_process()
            if parent is None or not parent.is_alive():
                raise FileNotFoundError(
                    f"{self.weights(name)}: not there, and nobody is left to train it"
                )
            time.sleep(WAIT_SECONDS)
        return DecoderLM.load(self.weights(name), backend=self.config.backend)


def train(stage: Training, place: Workplace, advance: Advance) -> DecoderLM:
    """Trains on the stage's sequences and saves the weights."""
    config = place.config
    if stage.start is None:
        torch.manual_seed(config.seed)
        model = DecoderLM(model_config(config, place.corpus))
    else:
        model = place.load(stage.start)
    model.set_positions(Rope(theta=THETA) if stage.rope else False)
    run = RecalibrationConfig(
        batch_size=config.batch_size,
        context_length=config.context,
        steps=stage.steps,
        learning_rate=stage.rate,
        warmup=0.04,
        min_lr_ratio=0.1,
        seed=config.seed,
        use_cpu=True,
        output_dir=str(place.folder / f"{stage.name}-run"),
    )
    data = training_rows(stage, place)
    recalibrate(model, data, run, callbacks=[StepReport(advance)], description=None)
    model.save(place.weights(stage.name))
    return model


def model_config(config: DemoConfig, corpus: Corpus) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=corpus.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        rope=Rope(theta=THETA),
        smear_keys=True,
        embedding_norm=True,
        tie_embeddings=True,
        norm_eps=NORM_EPS,
        init_std=config.hidden_size**-0.5,  # with 0.02 the needle task is not learned in time
        backend=config.backend,
    )


def training_rows(stage: Training, place: Workplace) -> TokenRows:
    """The sequences of the stage, in rows for the trainer."""
    config = place.config
    parts = []
    drawn = {
        "pretraining": (config.pretrain_steps, 2 * config.seed),
        "recalibration": (config.recalibration_steps, 2 * config.seed + 1),
    }
    for steps, seed in (drawn[part] for part in stage.data):
        count = steps * config.batch_size
        parts.append(training_sequences(place.corpus, config.context, count, seed))
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return TokenRows(columns["input_ids"], loss_weights=columns["loss_weights"])


def sweep_data(place: Workplace) -> SweepData:
    """The same cases and windows for every row and every seed of training."""
    config = place.config
    tasks = {name: place.corpus.needle_task(count) for name, count in TASKS.items()}
    cases = dict.fromkeys(config.lengths, config.num_cases)
    return draw_sweep(
        tasks, place.test_text, cases, config.num_windows, config.num_last_targets, seed=0
    )


def measure(stage: Measurement, place: Workplace, data: SweepData, advance: Advance) -> SweepRow:
    """One row of the report."""
    model = place.load(stage.weights)
    context = place.config.context
    scale = LogScale(stage.temperature, context) if stage.temperature else None

    def model_at(length: int) -> SplitModel:
        rope: Rope | bool = False
        if stage.method is not None:
            rope = rope_at_length(stage.method, length, context, THETA)
        model.set_positions(rope)
        model.set_scale(scale, length)
        return SplitModel(model.model, model.lm_head)

    return run_sweep(stage.title, model_at, data, on_cell=lambda: advance(1))


def fit(stage: TemperatureFit, place: Workplace, advance: Advance) -> dict[str, Any]:
    """The multiplier with the least loss per length, and c of 1 + c ln(length / C) through them."""
    config = place.config
    model = place.load(stage.weights)
    model.set_positions(False)
    count = max(1, config.num_windows // TUNING_SHARE)
    windows = text_windows(place.tuning_text, config.longest, count)
    betas = {}
    for length in config.lengths[1:]:
        pieces = windows.reshape(-1, length)
        betas[length] = fit_temperature(partial(_loss, model, pieces))
        advance(1)
    return {"betas": betas, "c": fit_log_slope(betas, config.context)}


def _loss(model: DecoderLM, pieces: Tensor, beta: float) -> float:
    model.set_scale(beta * model.attentions[0].head_dim ** -0.5)
    return float(window_losses(SplitModel(model.model, model.lm_head), pieces).mean())


class StepReport(TrainerCallback):
    """Passes each finished step on."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.advance(1)
