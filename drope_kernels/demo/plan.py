"""What the demo does, as data: trainings and measurements, in two lanes that can run together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from drope_kernels.demo.config import DemoConfig
from drope_kernels.evaluate.baselines import ROPE_METHODS, RopeMethod

Data = Literal["pretraining", "recalibration"]

# Rough cost in training steps, only for the total progress bar.
STEPS_PER_MEASUREMENT = 350


@dataclass(frozen=True)
class Training:
    """Trains weights `name`; from the weights `start`, or from scratch."""

    name: str
    title: str
    start: str | None
    rope: bool
    steps: int
    rate: float
    data: tuple[Data, ...]  # every stage that uses one sees the same sequences

    @property
    def cost(self) -> int:
        return self.steps


@dataclass(frozen=True)
class Measurement:
    """Sweeps the weights `weights` under one choice of positions and temperature."""

    title: str  # the row's name
    weights: str
    method: RopeMethod | None  # None: no positions
    temperature: float = 0.0  # c of LogScale

    @property
    def cost(self) -> int:
        return STEPS_PER_MEASUREMENT


@dataclass(frozen=True)
class TemperatureFit:
    """Fits the temperature of the weights `weights` on text that no row is measured on."""

    title: str
    weights: str

    @property
    def cost(self) -> int:
        return STEPS_PER_MEASUREMENT


Stage = Training | Measurement | TemperatureFit

ROPE = "RoPE as is"
DROPPED = "dropped, not recalibrated"
DROPE = "DroPE"
NOPE = "NoPE from scratch"
CONTROL = "control: RoPE kept"


def rope_row(method: RopeMethod) -> str:
    return ROPE if method == "as is" else f"RoPE + {method}"


def with_temperature(row: str, c: float) -> str:
    return f"{row}, c={c:g}"


def pretraining(config: DemoConfig) -> Training:
    return Training(
        name="rope",
        title="pretrain with RoPE",
        start=None,
        rope=True,
        steps=config.pretrain_steps,
        rate=config.pretrain_rate,
        data=("pretraining",),
    )


def recalibration(config: DemoConfig) -> Training:
    return Training(
        name="drope",
        title="drop, recalibrate",
        start="rope",
        rope=False,
        steps=config.recalibration_steps,
        rate=config.recalibration_rate,
        data=("recalibration",),
    )


def control(config: DemoConfig) -> Training:
    """Recalibration's tokens and schedule, without the drop."""
    return replace(recalibration(config), name="control", title="continue with RoPE", rope=True)


def from_scratch(config: DemoConfig) -> Training:
    """Position-free from the start, on the tokens of pretraining and recalibration together."""
    return Training(
        name="nope",
        title="train NoPE from scratch",
        start=None,
        rope=False,
        steps=config.total_steps,
        rate=config.pretrain_rate,
        data=("pretraining", "recalibration"),
    )


def lanes(config: DemoConfig) -> list[list[Stage]]:
    """Two lists of stages; the second waits for the first one's pretrained weights."""
    rope_rows = [Measurement(rope_row(method), "rope", method) for method in ROPE_METHODS]
    drope_rows = [
        Measurement(with_temperature(DROPE, c), "drope", None, c) for c in config.temperatures
    ]
    first: list[Stage] = [
        pretraining(config),
        recalibration(config),
        *rope_rows,
        Measurement(DROPPED, "rope", None),
        Measurement(DROPE, "drope", None),
        *drope_rows,
        TemperatureFit("fit the temperature", "drope"),
    ]
    c = config.temperatures[0]
    second: list[Stage] = [
        from_scratch(config),
        control(config),
        Measurement(NOPE, "nope", None),
        Measurement(with_temperature(NOPE, c), "nope", None, c),
        Measurement(CONTROL, "control", "as is"),
        Measurement(f"{CONTROL} + YaRN", "control", "YaRN"),
    ]
    return [first, second]


def row_order(config: DemoConfig) -> list[str]:
    """Row names in the order of the report: as planned."""
    stages = [stage for lane in lanes(config) for stage in lane]
    return [stage.title for stage in stages if isinstance(stage, Measurement)]
