"""What `drope evaluate` will measure: models, their methods, lengths. No weights are read here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from drope_kernels.evaluate.hf_rope import ScaledMethod, scaling_refusal
from drope_kernels.hf.apply import is_position_free
from drope_kernels.hf.rotation import FAMILIES
from drope_kernels.hf.state import DropState

Method = Literal["as_is", "pi", "ntk", "dynamic_ntk", "yarn", "dropped", "drope_temperature"]
METHODS: tuple[Method, ...] = get_args(Method)
SCALED: dict[Method, ScaledMethod] = {
    "pi": "PI",
    "ntk": "NTK",
    "dynamic_ntk": "dynamic NTK",
    "yarn": "YaRN",
}
Positions = Literal["rope", "partly dropped", "position-free"]
# Of a compared model, unless methods are named: itself, and what makes the most of it.
COMPARED: dict[Positions, tuple[Method, ...]] = {
    "rope": ("as_is", "yarn"),
    "partly dropped": ("as_is",),
    "position-free": ("as_is", "drope_temperature"),
}
LEAST_LONGEST = 16  # tokens, for two buckets of positions


@dataclass(frozen=True)
class ModelPlan:
    """One model and the rows it gets."""

    name: str
    source: Path
    positions: Positions
    methods: tuple[Method, ...]
    refused: dict[Method, str]  # methods without a row, and why
    train_length: int  # tokens
    alone: bool = False  # no other model is in the report
    recalibration_tokens: int | None = None  # as its config records them
    max_positions: int | None = None  # as its config says

    @property
    def fits_temperature(self) -> bool:
        return "drope_temperature" in self.methods

    def same_within_training(self, method: Method) -> Method | None:
        """Another method of this plan that is the same model up to the training length."""
        if method == "drope_temperature":
            other: Method = "dropped" if self.positions == "rope" else "as_is"
        else:
            other = "as_is"
        scales = method in SCALED or method == "drope_temperature"
        return other if scales and other in self.methods else None

    def row(self, method: Method) -> str:
        """What the report calls this model under a method."""
        return self._form(method) if self.alone else f"{self.name}: {self._form(method)}"

    def _form(self, method: Method) -> str:
        if method in SCALED:
            return f"RoPE + {SCALED[method]}"
        if method == "as_is":
            return "RoPE as is" if self.positions == "rope" else self.positions
        form = "dropped" if self.positions == "rope" else self.positions
        return form if method == "dropped" else f"{form}, fitted temperature"


def positions_of(config: Any) -> Positions:
    """Whether a config's layers rotate."""
    if not getattr(config, "rope_parameters", None):
        raise ValueError(
            f"model: expected one with rope_parameters in its config, got type {config.model_type},"
            " whose positions are not rotations"
        )
    if is_position_free(config):
        return "position-free"
    return "partly dropped" if DropState.from_config(config).dropped_layers else "rope"


def train_length_of(config: Any, given: int | None) -> int:
    """The context of the last training, in tokens: as given, else as the config tells it.

    Raises:
        ValueError: nothing tells it.
    """
    if given is not None:
        if given < 2:
            raise ValueError(f"train-length: expected at least 2 tokens, got {given}")
        return given
    recorded = _recalibration(config).get("context_length")
    if recorded is not None:
        return int(recorded)
    known = getattr(config, "max_position_embeddings", None)
    if known is None or positions_of(config) != "rope" or scaling_refusal(config) is not None:
        raise ValueError(
            "train-length: expected a model whose config tells the context of its last training, "
            f"got one of type {config.model_type} ({positions_of(config)}, rope_parameters "
            f"{config.rope_parameters}), which may be longer or shorter than it says; pass "
            "--train-length"
        )
    return int(known)


def parse_lengths(text: str, train_length: int) -> tuple[int, ...]:
    """ "1x,2x,4096" to rising numbers of tokens; `x` counts training lengths.

    Raises:
        ValueError: not such a list; lengths that do not divide the greatest one.
    """
    lengths = set()
    for word in text.split(","):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)(x?)\s*", word)
        length = float(found[1]) * (train_length if found[2] else 1) if found else 0.0
        if length < 2 or length != round(length):
            raise ValueError(
                f"lengths: expected whole numbers of tokens, or of training lengths as in 1x,2x, "
                f"got {word!r}"
            )
        lengths.add(round(length))
    longest = max(lengths)
    if longest < LEAST_LONGEST:
        raise ValueError(
            f"lengths: expected {LEAST_LONGEST} tokens or more as the greatest, got {longest}"
        )
    if any(longest % length for length in lengths):
        raise ValueError(
            f"lengths: expected divisors of the greatest one, so that all read the same text, got "
            f"{sorted(lengths)}"
        )
    return tuple(sorted(lengths))


def parse_methods(text: str | None) -> tuple[Method, ...] | None:
    """ "as_is,yarn" to names of `METHODS`; None stays None."""
    if text is None:
        return None
    return tuple(nearest_checked("methods", text.split(","), METHODS))


def nearest_checked(argument: str, words: Iterable[str], known: Sequence[Any]) -> list[Any]:
    """The words, each one of the known ones; ValueError names the nearest one."""
    checked = []
    for word in map(str.strip, words):
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{argument}: expected {', '.join(known)}, got {word!r}{hint}")
        checked.append(word)
    return list(dict.fromkeys(checked))


def plan_model(
    name: str,
    source: Path,
    config: Any,
    asked: Sequence[Method] | None,
    train_length: int,
    longest: int,
    *,
    compared: bool = False,
    alone: bool = True,
) -> ModelPlan:
    """The rows of one model: the methods that it can be measured with.

    Args:
        asked: methods named by the user; those for models of another kind are left out.
        train_length: of this model, tokens.
        longest: the greatest length, tokens.
        compared: whether another model is the one in question.
        alone: whether no other model is planned.
    """
    positions = positions_of(config)
    if asked is None:
        asked = COMPARED[positions] if compared else METHODS
    methods, refused = [], {}
    for method in METHODS:
        if method not in asked:
            continue
        why = _refusal(method, config, positions, beyond=longest > train_length)
        if why is None:
            methods.append(method)
        elif why:
            refused[method] = why
    max_positions = getattr(config, "max_position_embeddings", None)
    return ModelPlan(
        name,
        source,
        positions,
        tuple(methods),
        refused,
        train_length,
        alone,
        recalibration_tokens=_recalibration(config).get("tokens"),
        max_positions=max_positions,
    )


def check_asked(asked: Sequence[Method] | None, plans: Sequence[ModelPlan]) -> None:
    """ValueError for a method that no model can be measured with, and for a model without any."""
    for method in asked or ():
        if not any(method in plan.methods for plan in plans):
            reasons = {plan.name: plan.refused.get(method, plan.positions) for plan in plans}
            given = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise ValueError(f"methods: no model can be measured with {method} ({given})")
    for plan in plans:
        if not plan.methods:
            raise ValueError(
                f"methods: expected one that fits {plan.name} ({plan.positions}), got none; add "
                "as_is"
            )


def _refusal(method: Method, config: Any, positions: Positions, beyond: bool) -> str | None:
    """None: it can be measured; "": it says nothing of such a model; else why not."""
    if method == "as_is":
        return None
    if method in ("dropped", "drope_temperature"):
        if positions == "partly dropped" or (positions != "rope" and method == "dropped"):
            return ""
        if config.model_type not in FAMILIES:
            return f"expected one of {', '.join(FAMILIES)}, got {config.model_type}"
    if method != "dropped" and not beyond:
        return "no length exceeds the training length, so it is the model as it is"
    if method in ("dropped", "drope_temperature"):
        return None
    return scaling_refusal(config) if positions == "rope" else ""


def _recalibration(config: Any) -> dict[str, Any]:
    """What `drope recalibrate` left in the config."""
    return DropState.from_config(config).notes.get("recalibration") or {}
