"""What a `DecoderLM` is: sizes, switches and positions, as plain data that JSON can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from drope_kernels.frequencies import (
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    NtkScaling,
    Scaling,
    Strength,
    YarnScaling,
)
from drope_kernels.rope import Rope

QKNorm = Literal["full", "head"]
PositionChoice = Rope | bool

_SCALINGS: dict[str, type] = {
    rule.__name__: rule
    for rule in (
        LinearScaling,
        NtkScaling,
        DynamicNtkScaling,
        YarnScaling,
        Llama3Scaling,
        Strength,
    )
}


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}")


@dataclass
class DecoderConfig:
    """Sizes and switches of a `DecoderLM`; the defaults beyond the sizes are plain Llama.

    `rope` is a `Rope`, True (`Rope()`), False (position-free), or one of these per layer.
    `qk_norm` and `smear_keys` as in `DropeAttention`; `embedding_norm` adds an RMSNorm on the
    embedding. `init_std` is the standard deviation of the initial linear and embedding weights;
    Llama's 0.02 is near the default at hidden sizes about 2,500 and far too small for a tiny model.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None  # None: num_heads
    head_dim: int | None = None  # None: hidden_size // num_heads
    rope: PositionChoice | list[PositionChoice] = True
    qk_norm: QKNorm | None = None
    smear_keys: bool = False
    embedding_norm: bool = False
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_eps: float = 1e-6
    init_std: float | None = None  # None: hidden_size ** -0.5
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
            self._check_positive(name)
        for name in ("num_kv_heads", "head_dim"):
            if getattr(self, name) is not None:
                self._check_positive(name)
        if isinstance(self.rope, list) and len(self.rope) != self.num_layers:
            raise ValueError(
                f"rope: expected one choice per layer ({self.num_layers}), got {len(self.rope)}"
            )

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected an int >= 1, got {value!r}")

    def rope_of_layer(self, layer: int) -> PositionChoice:
        return self.rope[layer] if isinstance(self.rope, list) else self.rope

    @classmethod
    def from_llama(cls, config: LlamaLike, **changes: Any) -> DecoderConfig:
        """The `DecoderConfig` of a transformers `LlamaConfig`; `changes` replace single fields.

        Raises ValueError for what this decoder does not compute: another activation, attention
        dropout, or a rope_type other than default, linear, yarn, llama3.
        """
        if config.hidden_act != "silu":
            raise ValueError(f"hidden_act: expected 'silu', got {config.hidden_act!r}")
        if config.attention_dropout:
            raise ValueError(f"attention_dropout: expected 0, got {config.attention_dropout}")
        fields: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_layers": config.num_hidden_layers,
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "rope": _rope_from_llama(dict(config.rope_parameters)),
            "tie_embeddings": config.tie_word_embeddings,
            "attention_bias": config.attention_bias,
            "mlp_bias": config.mlp_bias,
            "norm_eps": config.rms_norm_eps,
            "init_std": config.initializer_range,
        }
        return cls(**(fields | changes))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is the inverse."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        ropes = self.rope if isinstance(self.rope, list) else [self.rope]
        if all(rope == ropes[0] for rope in ropes):
            return plain | {"rope": _rope_to_plain(ropes[0])}
        return plain | {"rope": [_rope_to_plain(rope) for rope in ropes]}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> DecoderConfig:
        """Inverse of `to_dict`; ValueError names an unknown field."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(plain) - known):
            raise ValueError(
                f"config: unknown fields {unknown}; was it written by a newer version?"
            )
        rope = plain.get("rope", True)
        parsed = [_rope_from_plain(one) for one in rope] if isinstance(rope, list) else None
        return cls(**(dict(plain) | {"rope": parsed or _rope_from_plain(rope)}))


class LlamaLike(Protocol):
    """The fields of transformers' `LlamaConfig` that matter here."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: Any
    head_dim: Any
    hidden_act: str
    rms_norm_eps: float
    initializer_range: float
    tie_word_embeddings: bool
    attention_bias: bool
    attention_dropout: Any
    mlp_bias: bool
    rope_parameters: Any


def _rope_from_llama(parameters: dict[str, Any]) -> Rope:
    """`rope_parameters` of transformers 5 to a `Rope`; the keys keep their names."""
    kind = parameters.pop("rope_type", "default")
    parameters["theta"] = parameters.pop("rope_theta", 10_000.0)
    builders: dict[str, Callable[..., Rope]] = {
        "default": Rope,
        "linear": Rope.pi,
        "yarn": Rope.yarn,
        "llama3": Rope.llama3,
    }
    if kind not in builders:
        raise ValueError(
            f"rope_type: expected one of {sorted(builders)}, got {kind!r}; pass rope=... instead"
        )
    return builders[kind](**parameters)


def _rope_to_plain(rope: PositionChoice) -> Any:
    if isinstance(rope, bool):
        return rope
    return {
        "theta": rope.theta,
        "dim": rope.dim,
        "interleaved": rope.interleaved,
        "scaling": _scaling_to_plain(rope.scaling),
        "inv_freq": rope.inv_freq,
        "attention_factor": rope.attention_factor,
    }


def _rope_from_plain(plain: Any) -> PositionChoice:
    if isinstance(plain, bool):
        return plain
    return Rope(**(plain | {"scaling": _scaling_from_plain(plain["scaling"])}))


def _scaling_to_plain(scaling: Scaling | None) -> Any:
    if scaling is None:
        return None
    fields = dict(vars(scaling))
    if isinstance(scaling, Strength):
        fields["scaling"] = _scaling_to_plain(scaling.scaling)
    return {"rule": type(scaling).__name__, **fields}


def _scaling_from_plain(plain: Any) -> Any:
    if plain is None:
        return None
    fields = {name: value for name, value in plain.items() if name != "rule"}
    if "scaling" in fields:
        fields["scaling"] = _scaling_from_plain(fields["scaling"])
    check_choice("rule", plain["rule"], tuple(_SCALINGS))
    return _SCALINGS[plain["rule"]](**fields)
