"""Context extension rules: how each turns theta and dim into rotation frequencies.

The formulas are those of transformers' `ROPE_INIT_FUNCTIONS`, evaluated in float64. Frequencies
are radians per position, dim / 2 of them, fastest first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import torch
from torch.fx.experimental.symbolic_shapes import guard_scalar

Number = TypeVar("Number", int, float)

_REMEDIES = {
    "theta": "10000.0 is the usual base",
    "attention_factor": "1.0 leaves the rotated channels as they are",
    "factor": "it is the length ratio, new length / trained length",
    "seq_len": "it is the current length in tokens",
}


class Scaling(Protocol):
    """A rule that replaces the plain frequencies theta ** (-2 i / dim)."""

    def frequencies(self, theta: float, dim: int) -> tuple[float, ...]:
        """dim / 2 frequencies in radians per position."""
        ...


def positive(name: str, value: float) -> None:
    """ValueError unless `value` is finite and > 0, TypeError unless it is a number."""
    remedy = _REMEDIES.get(name, "take it from the model's rope parameters")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}; {remedy}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0, got {value}; {remedy}")


def constant(number: Number) -> Number:
    """The number itself, also while a graph is compiled, where it would be a symbol.

    The graph is guarded on the value, so another `Rope` or head dimension compiles another graph.
    """
    return cast(Number, guard_scalar(number)) if torch.compiler.is_compiling() else number


def _factor(value: float) -> None:
    positive("factor", value)
    if value < 1:
        raise ValueError(
            f"factor: expected the length ratio, at least 1, got {value}; 1 / factor was meant?"
        )


def base_frequencies(theta: float, dim: int) -> tuple[float, ...]:
    """theta ** (-2 i / dim) for i < dim / 2."""
    return tuple(1.0 / theta ** (2 * i / dim) for i in range(dim // 2))


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation."""

    factor: float

    def __post_init__(self) -> None:
        _factor(self.factor)

    def frequencies(self, theta: float, dim: int) -> tuple[float, ...]:
        """Every frequency divided by the factor."""
        factor = constant(self.factor)
        return tuple(f / factor for f in base_frequencies(theta, dim))


@dataclass(frozen=True)
class NtkScaling:
    """NTK-aware scaling by a fixed factor."""

    factor: float

    def __post_init__(self) -> None:
        _factor(self.factor)

    def frequencies(self, theta: float, dim: int) -> tuple[float, ...]:
        """A larger theta: the fastest pair unchanged, the slowest divided by the factor."""
        return base_frequencies(_ntk_theta(theta, dim, constant(self.factor)), dim)


@dataclass(frozen=True)
class DynamicNtkScaling:
    """NTK-aware scaling at a given length."""

    factor: float
    seq_len: int
    max_position_embeddings: int

    def __post_init__(self) -> None:
        _factor(self.factor)
        positive("seq_len", self.seq_len)
        positive("max_position_embeddings", self.max_position_embeddings)

    def frequencies(self, theta: float, dim: int) -> tuple[float, ...]:
        """NTK with factor * L / L_max - (factor - 1), L at least L_max."""
        factor, limit = constant(self.factor), constant(self.max_position_embeddings)
        stretch = factor * max(constant(self.seq_len), limit) / limit - (factor - 1)
        return base_frequencies(_ntk_theta(theta, dim, stretch), dim)


def _ntk_theta(theta: float, dim: int, stretch: float) -> float:
    if dim < 4:
        raise ValueError(
            f"dim: expected at least 4 rotated channels for NTK scaling, got {dim}; Rope.pi has no "
            "such limit"
        )
    return float(theta * stretch ** (dim / (dim - 2)))


@dataclass(frozen=True)
class YarnScaling:
    """YaRN's "NTK-by-parts" frequencies."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        positive("factor", self.factor)
        positive("original_max_position_embeddings", self.original_max_position_embeddings)
        positive("beta_fast", self.beta_fast)
        positive("beta_slow", self.beta_slow)
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"beta_fast: expected more than beta_slow = {self.beta_slow}, got "
                f"{self.beta_fast}; the paper has 32 and 1"
            )

    def attention_factor(self, mscale: float | None, mscale_all_dim: float | None) -> float:
        """0.1 ln(factor) + 1, or the ratio of its two variants when both mscales are given."""
        if mscale and mscale_all_dim:
            return self._mscale(mscale) / self._mscale(mscale_all_dim)
        return self._mscale(1.0)

    def _mscale(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    def frequencies(self, theta: float, dim: int) -> tuple[float, ...]:
        """Interpolated below beta_slow turns in the original context, kept above beta_fast."""
        if theta <= 1:
            raise ValueError(
                f"theta: expected more than 1 with YaRN, got {theta}; 10000.0 is the usual base"
            )
        factor = constant(self.factor)
        low = self._pair_of(constant(self.beta_fast), theta, dim)
        high = self._pair_of(constant(self.beta_slow), theta, dim)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low if high != low else 0.001
        out = []
        for i, f in enumerate(base_frequencies(theta, dim)):
            ramp = min(max((i - low) / width, 0.0), 1.0)
            out.append(f / factor * ramp + f * (1 - ramp))
        return tuple(out)

    def _pair_of(self, num_turns: float, theta: float, dim: int) -> float:
        """The pair that turns `num_turns` times within the original context."""
        length = constant(self.original_max_position_embeddings)
        return dim * math.log(length / (num_turns * constant(math.tau))) / (2 * math.log(theta))


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: slow pairs divided by the factor, fast ones kept, a linear blend between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        positive("factor", self.factor)
        positive("low_freq_factor", self.low_freq_factor)
        positive("high_freq_factor", self.high_freq_factor)
        positive("original_max_position_embeddings", self.original_max_position_embeddings)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                "high_freq_factor: expected more than low_freq_factor = "
                f"{self.low_freq_factor}, got {self.high_freq_factor}; Llama 3.1 has 1 and 4"
            )

    def frequencies(self, theta: float, dim: int) -> tuple[float, ...]:
        """Blend by how many turns a pair makes within the original context."""
        factor, slow = constant(self.factor), constant(self.low_freq_factor)
        length = constant(self.original_max_position_embeddings)
        span = constant(self.high_freq_factor) - slow
        tau = constant(math.tau)
        out = []
        for f in base_frequencies(theta, dim):
            smooth = min(max((length * f / tau - slow) / span, 0.0), 1.0)
            out.append((1 - smooth) * f / factor + smooth * f)
        return tuple(out)


@dataclass(frozen=True)
class Strength:
    """Every frequency of another rule (None: the plain ones) times a number in [0, 1]."""

    strength: float
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(
                f"strength: expected a number in [0, 1], got {self.strength}; 0 removes positions, "
                "1 keeps them"
            )
        if isinstance(self.scaling, Strength):
            object.__setattr__(self, "strength", self.strength * self.scaling.strength)
            object.__setattr__(self, "scaling", self.scaling.scaling)

    def frequencies(self, theta: float, dim: int) -> tuple[float, ...]:
        """The inner rule's frequencies, scaled."""
        inner = (
            base_frequencies(theta, dim)
            if self.scaling is None
            else self.scaling.frequencies(theta, dim)
        )
        strength = constant(self.strength)
        return tuple(strength * f for f in inner)
