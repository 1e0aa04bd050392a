"""The setting of the demo. All of it was fixed before the run whose numbers are reported."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

THETA = 10_000.0
NORM_EPS = 1e-6


@dataclass(frozen=True)
class DemoConfig:
    seed: int = 0
    context: int = 64  # C, tokens
    factors: tuple[int, ...] = (1, 2, 4, 8, 16)  # evaluated lengths / C
    pretrain_steps: int = 2500
    recalibration_steps: int = 3000
    batch_size: int = 8
    pretrain_rate: float = 3e-3
    recalibration_rate: float = 1.5e-3
    temperatures: tuple[float, ...] = (0.2, 0.4)  # c of LogScale; none is selected
    num_cases: int = 100  # needle cases of one task at one length
    num_windows: int = 32  # text windows of the greatest length
    num_last_targets: int = 32
    hidden_size: int = 64
    intermediate_size: int = 160
    num_layers: int = 3
    num_heads: int = 4
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("context", "pretrain_steps", "recalibration_steps", "batch_size", "num_cases"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed: expected a number >= 0, got {self.seed}")

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.context * factor for factor in self.factors)

    @property
    def longest(self) -> int:
        return self.lengths[-1]

    @property
    def total_steps(self) -> int:
        return self.pretrain_steps + self.recalibration_steps

    def quick(self) -> DemoConfig:
        """Every stage in seconds, to see that the line works; the numbers then mean nothing."""
        return replace(
            self,
            pretrain_steps=min(self.pretrain_steps, 12),
            recalibration_steps=min(self.recalibration_steps, 6),
            factors=(1, 2, 4),
            num_cases=8,
            num_windows=4,
            num_layers=1,
        )

    def settings(self) -> dict[str, Any]:
        """Plain data for the report."""
        plain = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}
