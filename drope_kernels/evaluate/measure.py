"""Measuring one loaded transformers model: a row for each method, the model unchanged after."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from drope_kernels.evaluate.hf_model import decoding_model
from drope_kernels.evaluate.hf_rope import scaled_rope
from drope_kernels.evaluate.loss import window_losses
from drope_kernels.evaluate.model_calls import DEFAULT_BATCH_TOKENS, LanguageModel
from drope_kernels.evaluate.plan import SCALED, Method, ModelPlan
from drope_kernels.evaluate.sweep import SweepData, SweepRow, run_sweep
from drope_kernels.evaluate.temperature import fit_log_slope, fit_temperature
from drope_kernels.hf import drop_positions, restore_positions, set_temperature
from drope_kernels.hf.state import DropState

LOWEST, HIGHEST = 0.8, 2.5  # betas that are searched
TOLERANCE = 0.02
FIT_CALLS = 10  # of the loss, for one length: as many as that range and tolerance have taken

Settle = Callable[[int], None]


@dataclass(frozen=True)
class FittedTemperature:
    """beta per length on the fit text, and c of beta = 1 + c ln(length / train_length)."""

    betas: dict[int, float]
    c: float
    train_length: int

    def beta(self, length: int) -> float:
        """What the row uses: the formula, not the beta fitted at that length."""
        return 1.0 + self.c * math.log(max(1.0, length / self.train_length))

    def as_json(self) -> dict[str, Any]:
        return {"betas": {str(length): beta for length, beta in self.betas.items()}, "c": self.c}

    @property
    def at_the_edge(self) -> list[int]:
        """Lengths whose beta is where the search ends: the least loss may lie beyond."""
        return [
            length
            for length, beta in self.betas.items()
            if min(beta - LOWEST, HIGHEST - beta) < 2 * TOLERANCE
        ]


@dataclass(frozen=True)
class Conditions:
    """What every model of a report is measured under."""

    data: SweepData
    fit_windows: SweepData  # text that no row is measured on
    advance: Callable[[str, int], None]  # told what was done, and how many tokens were read for it
    max_tokens: int = DEFAULT_BATCH_TOKENS

    def data_of(self, plan: ModelPlan, method: Method) -> SweepData:
        """What is measured for a row: up to the training length it may be that of another one."""
        known = plan.same_within_training(method) is not None
        return self.data.beyond(plan.train_length) if known else self.data

    def num_tokens(self, plan: ModelPlan) -> int:
        """How many tokens `measure_model` reads, at most."""
        beyond = self.fit_windows.beyond(plan.train_length).cell_tokens
        fit = FIT_CALLS * sum(beyond)
        rows = sum(sum(self.data_of(plan, method).cell_tokens) for method in plan.methods)
        return rows + fit * plan.fits_temperature


def measure_model(
    plan: ModelPlan, model: Any, conditions: Conditions
) -> Iterator[tuple[SweepRow, FittedTemperature | None]]:
    """The rows of a plan one by one, from a transformers model that is left as it came."""
    parts = decoding_model(model)
    rows: dict[Method, SweepRow] = {}
    for method in plan.methods:
        fit = fit_model(plan, model, conditions) if method == "drope_temperature" else None
        data, name = conditions.data_of(plan, method), plan.row(method)
        costs = iter(data.cell_tokens)

        def on_cell(name: str = name, costs: Iterator[int] = costs) -> None:
            conditions.advance(name, next(costs))

        with settled(plan, model, method, conditions, fit) as settle:

            def model_at(length: int, settle: Settle = settle) -> LanguageModel:
                settle(length)
                return parts

            rows[method] = run_sweep(name, model_at, data, conditions.max_tokens, on_cell)
        known = plan.same_within_training(method)
        if known is not None:
            rows[method] = rows[method].and_of(rows[known])
        yield rows[method], fit


def fit_model(plan: ModelPlan, model: Any, conditions: Conditions) -> FittedTemperature:
    """The temperature of a model without positions, at every length beyond its training."""
    parts = decoding_model(model)
    title = f"{plan.name}: fit the temperature"
    betas = {}
    with without_positions(plan, model), temperature(model) as set_beta:
        for length in conditions.data.beyond(plan.train_length).lengths:
            pieces = conditions.fit_windows.pieces(length)
            costs = [pieces.numel()] * FIT_CALLS

            def loss_at(beta: float, pieces: Tensor = pieces, costs: list[int] = costs) -> float:
                set_beta(beta)
                losses = window_losses(parts, pieces, conditions.max_tokens)
                conditions.advance(title, costs.pop() if costs else 0)
                loss = float(losses.double().mean())
                return loss if math.isfinite(loss) else math.inf

            betas[length] = fit_temperature(loss_at, LOWEST, HIGHEST, TOLERANCE)
            conditions.advance(title, sum(costs))  # calls that were not needed
    slope = fit_log_slope(betas, plan.train_length)
    return FittedTemperature(betas, slope, plan.train_length)


@contextmanager
def settled(
    plan: ModelPlan,
    model: Any,
    method: Method,
    conditions: Conditions,
    fit: FittedTemperature | None,
) -> Iterator[Settle]:
    """Gives a function that readies the model for inputs of a length; all is undone on leaving."""
    longest = conditions.data.lengths[-1]
    if method in SCALED:
        with scaled_rope(model, SCALED[method], plan.train_length, longest) as settle:
            yield settle
    elif method == "as_is":
        yield _as_it_is
    elif fit is None:
        with without_positions(plan, model):
            yield _as_it_is
    else:
        with without_positions(plan, model), temperature(model) as set_beta:
            yield lambda length: set_beta(fit.beta(length))


@contextmanager
def without_positions(plan: ModelPlan, model: Any) -> Iterator[None]:
    """The model without positions, which return on leaving if it had them."""
    if plan.positions != "rope":
        yield
        return
    recorded = copy.deepcopy(getattr(model.config, "drope", None))
    beta = DropState.from_config(model.config).temperature
    drop_positions(model)
    try:
        yield
    finally:
        restore_positions(model)
        set_temperature(model, beta)
        if recorded is not None:
            model.config.drope = recorded


@contextmanager
def temperature(model: Any) -> Iterator[Callable[[float], None]]:
    """Gives a function that multiplies the model's own temperature; undone on leaving."""
    own = DropState.from_config(model.config).temperature

    def set_beta(beta: float) -> None:
        set_temperature(model, own * beta)

    try:
        yield set_beta
    finally:
        set_temperature(model, own)


def _as_it_is(length: int) -> None:
    pass
