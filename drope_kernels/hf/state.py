"""`DropState`: what a config says about a model's positions, as it is saved with the weights."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

from drope_kernels.hf.qk_norm import FORMS

_FIELDS = ("dropped_layers", "qk_norm", "temperature", "rope_parameters")


@dataclass(frozen=True)
class DropState:
    """The dictionary `config.drope`, checked.

    Args:
        dropped_layers: indices of the layers without positions, ascending.
        qk_norm: form of the norms that these layers were given: "full", "head" or None.
        temperature: factor of every attention logit, as `set_temperature` took it.
        rope_parameters: of the config before it lost its positions; None: as the config has them.
        notes: every other key, kept as it is.
    """

    dropped_layers: tuple[int, ...] = ()
    qk_norm: str | None = None
    temperature: float = 1.0
    rope_parameters: dict[str, Any] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Any) -> DropState:
        """What `config.drope` says, or that nothing is dropped where there is none.

        Raises:
            ValueError: it is not what `into_config` writes.
        """
        recorded = getattr(config, "drope", None)
        if recorded is None:
            return cls()
        if not isinstance(recorded, dict) or not set(_FIELDS) <= set(recorded):
            raise ValueError(
                f"config.drope: expected a dictionary with {', '.join(_FIELDS)}, got {recorded!r}; "
                "take it out of config.json if the model has all its positions"
            )
        layers, form = recorded["dropped_layers"], recorded["qk_norm"]
        last = config.num_hidden_layers - 1
        if type(layers) is not list or not all(type(x) is int and 0 <= x <= last for x in layers):
            raise ValueError(
                f"config.drope: expected dropped_layers between 0 and {last}, got {layers}; the "
                "record is of another model"
            )
        if form is not None and form not in FORMS:
            raise ValueError(
                f"config.drope: expected a qk_norm of None, {' or '.join(map(repr, FORMS))}, got "
                f"{form!r}; a later version of drope_kernels may know it"
            )
        temperature = recorded["temperature"]
        if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
            raise ValueError(
                f"config.drope: expected a temperature > 0, got {temperature!r}; 1.0 is none"
            )
        return cls(
            tuple(sorted(set(layers))),
            form,
            float(temperature),
            copy.deepcopy(recorded["rope_parameters"]),
            {key: x for key, x in recorded.items() if key not in _FIELDS},
        )

    @property
    def is_stock(self) -> bool:
        """Whether a model in this state is as transformers builds it."""
        return not self.dropped_layers and self.temperature == 1.0

    def into_config(self, config: Any) -> None:
        """Writes `config.drope`, or removes it where there is nothing to say."""
        if self.is_stock and not self.notes:
            if hasattr(config, "drope"):
                del config.drope
            return
        config.drope = {
            "dropped_layers": list(self.dropped_layers),
            "qk_norm": self.qk_norm,
            "temperature": self.temperature,
            "rope_parameters": copy.deepcopy(self.rope_parameters),
            **self.notes,
        }
