"""`Rope`: which rotation a call applies, and the table of turns that every backend reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from drope_kernels.frequencies import (
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    NtkScaling,
    Scaling,
    Strength,
    YarnScaling,
    base_frequencies,
    constant,
    positive,
)

Table = tuple[tuple[float, ...], ...]
_FASTEST = 2.0**20  # radians per position: float32 still holds the turns at position 2 ** 24


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: pair i of a head turns by position * inv_freq[i] radians.

    Immutable and hashable; build it once and pass it to every call. The leading `dim` channels of
    q and k rotate, the rest stay. Source: RoFormer, arXiv 2104.09864, section 3.2.

    Args:
        theta: base of the frequencies, inv_freq[i] = theta ** (-2 i / dim).
        dim: rotated channels, even, at most the head dimension; None: all of them.
        interleaved: pairs are channels (2 i, 2 i + 1); default (i, i + dim / 2) as in transformers.
        scaling: a context extension rule; use the constructors `pi`, `ntk`, `dynamic_ntk`, `yarn`,
            `llama3`.
        inv_freq: radians per position instead of theta and scaling: dim / 2 numbers, or one row
            per kv head (Hkv, dim / 2); a tensor or nested sequences of finite numbers. 0 leaves a
            pair unrotated: partial rotation and per-head dropping are tables with zeros.
        attention_factor: multiplies the rotated channels of q and of k (YaRN's mscale).

    Raises:
        ValueError, TypeError: an argument outside its range.
        NotImplementedError: an inv_freq that requires grad.
    """

    theta: float = 10_000.0
    dim: int | None = None
    interleaved: bool = False
    scaling: Scaling | None = None
    inv_freq: Tensor | Sequence[Any] | Table | None = None
    attention_factor: float = 1.0
    _turns: dict[tuple[int, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        positive("theta", self.theta)
        positive("attention_factor", self.attention_factor)
        if self.theta < 1 / _FASTEST:
            raise ValueError(
                f"theta: expected at least {1 / _FASTEST:.3g}, got {self.theta}; 10000.0 is the "
                "usual base"
            )
        if not isinstance(self.interleaved, bool):
            raise TypeError(
                "interleaved: expected True or False, got "
                f"{type(self.interleaved).__name__}; True pairs channels (2 i, 2 i + 1)"
            )
        if self.dim is not None:
            _check_dim(self.dim)
        if self.inv_freq is not None:
            if self.scaling is not None and not isinstance(self.scaling, Strength):
                raise ValueError(
                    "scaling: expected None when inv_freq is given, got "
                    f"{self.scaling}; scale the table itself"
                )
            table = _as_table(self.inv_freq)
            if self.dim is not None and self.dim != 2 * len(table[0]):
                raise ValueError(
                    f"inv_freq: expected dim / 2 = {self.dim // 2} numbers per row, got "
                    f"{len(table[0])}; leave dim out, the table sets it"
                )
            object.__setattr__(self, "inv_freq", table)

    @classmethod
    def pi(cls, factor: float, **rope: Any) -> Rope:
        """Position interpolation: every frequency divided by factor >= 1.

        Source: arXiv 2306.15595, section 3.2; transformers' rope_type "linear". Further keywords
        (theta, dim, interleaved) as in `Rope`.
        """
        return cls(scaling=LinearScaling(factor), **rope)

    @classmethod
    def ntk(cls, factor: float, **rope: Any) -> Rope:
        """NTK-aware scaling by a fixed factor: theta * factor ** (dim / (dim - 2)).

        Source: bloc97, 2023, as in YaRN, arXiv 2309.00071, definition 1.
        """
        return cls(scaling=NtkScaling(factor), **rope)

    @classmethod
    def dynamic_ntk(
        cls, factor: float, *, seq_len: int, max_position_embeddings: int, **rope: Any
    ) -> Rope:
        """NTK-aware scaling at the current length; no change up to max_position_embeddings.

        Source: emozilla, 2023; transformers' rope_type "dynamic".
        """
        return cls(scaling=DynamicNtkScaling(factor, seq_len, max_position_embeddings), **rope)

    @classmethod
    def yarn(
        cls,
        factor: float,
        *,
        original_max_position_embeddings: int,
        attention_factor: float | None = None,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        mscale: float | None = None,
        mscale_all_dim: float | None = None,
        truncate: bool = True,
        **rope: Any,
    ) -> Rope:
        """YaRN: fast pairs kept, slow pairs interpolated, a ramp between, and attention_factor.

        Source: arXiv 2309.00071, section 3.2 and equation 15; transformers' rope_type "yarn" with
        its parameter names and defaults. attention_factor None: 0.1 ln(factor) + 1, or from mscale
        and mscale_all_dim.
        """
        scaling = YarnScaling(
            factor, original_max_position_embeddings, beta_fast, beta_slow, truncate
        )
        if attention_factor is None:
            attention_factor = scaling.attention_factor(mscale, mscale_all_dim)
        return cls(scaling=scaling, attention_factor=attention_factor, **rope)

    @classmethod
    def llama3(
        cls,
        factor: float,
        *,
        low_freq_factor: float,
        high_freq_factor: float,
        original_max_position_embeddings: int,
        **rope: Any,
    ) -> Rope:
        """Llama 3.1's piecewise scaling; transformers' rope_type "llama3" with its names."""
        return cls(
            scaling=Llama3Scaling(
                factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
            ),
            **rope,
        )

    def with_strength(self, strength: float) -> Rope:
        """The same rotation with every angle multiplied by `strength` in [0, 1]; 0: no rotation.

        attention_factor stays. Strengths multiply: r.with_strength(a).with_strength(b) is a * b.
        """
        return replace(self, scaling=Strength(strength, self.scaling))

    @property
    def num_tables(self) -> int:
        """1, or the number of kv heads of a table per head."""
        return 1 if self.inv_freq is None else len(self._table())

    def rotary_dim(self, head_dim: int) -> int:
        """How many leading channels of a head rotate; ValueError if head_dim has fewer."""
        if self.inv_freq is not None:
            dim = 2 * len(self._table()[0])
        else:
            dim = head_dim if self.dim is None else self.dim
        if dim > head_dim or dim % 2:
            raise ValueError(
                f"rope: expected an even dim of at most head_dim = {head_dim}, got {dim}; "
                "pass Rope(dim=...)"
            )
        return dim

    def frequencies(self, head_dim: int) -> Table:
        """inv_freq in radians per position: 1 or Hkv rows of rotary_dim / 2 float64 numbers."""
        dim = constant(self.rotary_dim(head_dim))
        if self.inv_freq is not None:
            strength = 1.0
            if isinstance(self.scaling, Strength):
                strength = constant(self.scaling.strength)
            return tuple(tuple(strength * constant(f) for f in row) for row in self._table())
        theta = constant(self.theta)
        if self.scaling is None:
            return (base_frequencies(theta, dim),)
        return (self.scaling.frequencies(theta, dim),)

    def turns(self, head_dim: int, device: torch.device) -> Tensor:
        """inv_freq / 2 pi as a float32 high part and what it lost: (2, 1 or Hkv, rotary_dim / 2).

        Two float32 numbers carry 48 bits, so position * turns is exact enough at any position up
        to 2 ** 24 where float32 angles are not. Cached per head_dim and device.
        """
        if torch.compiler.is_compiling():
            return self._build_turns(head_dim, device)
        cached = self._turns.get((head_dim, device))
        if cached is None:
            with torch.inference_mode(False):  # an inference tensor could not be saved for backward
                cached = self._build_turns(head_dim, device)
            if type(cached) is Tensor:  # not a fake one of a tracer
                self._turns[(head_dim, device)] = cached
        return cached

    def _build_turns(self, head_dim: int, device: torch.device) -> Tensor:
        tau = constant(math.tau)
        rows = [[f / tau for f in row] for row in self.frequencies(head_dim)]
        # Veltkamp's split: keeps the leading 24 bits of each float64.
        high = [[t * 536870913.0 - (t * 536870913.0 - t) for t in row] for row in rows]
        low = [[t - h for t, h in zip(*pair, strict=True)] for pair in zip(rows, high, strict=True)]
        return torch.tensor([high, low], dtype=torch.float32, device=device)

    def _table(self) -> Table:
        assert isinstance(self.inv_freq, tuple)
        return self.inv_freq


def _check_dim(dim: int) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(
            f"dim: expected an even int, got {type(dim).__name__}; None rotates every channel"
        )
    if dim < 2 or dim % 2:
        raise ValueError(
            f"dim: expected an even number of channels >= 2, got {dim}; None rotates every "
            "channel, rope=False none"
        )


def _as_table(inv_freq: Tensor | Sequence[Any]) -> Table:
    """Nested tuples of floats, one row per table."""
    if isinstance(inv_freq, Tensor):
        if inv_freq.requires_grad:
            raise NotImplementedError(
                "inv_freq: expected numbers, got a tensor that requires grad; frequencies have no "
                "gradient here, pass inv_freq.detach()"
            )
        if inv_freq.ndim not in (1, 2):
            raise ValueError(
                "inv_freq: expected (dim / 2) numbers or (Hkv, dim / 2) of them, got shape "
                f"{tuple(inv_freq.shape)}; give one row, or one row per kv head"
            )
        inv_freq = inv_freq.double().tolist()
    rows = list(inv_freq) if isinstance(inv_freq, (list, tuple)) else [inv_freq]
    if not any(isinstance(row, (list, tuple)) for row in rows):
        rows = [rows]
    others = {type(f) for row in rows for f in (row if isinstance(row, (list, tuple)) else [row])}
    if not all(issubclass(kind, (int, float)) for kind in others):
        names = ", ".join(sorted(kind.__name__ for kind in others))
        raise TypeError(f"inv_freq: expected numbers, got {names}; pass lists of them or a tensor")
    lengths = sorted({len(row) for row in rows})
    if len(lengths) != 1 or lengths[0] == 0:
        raise ValueError(
            "inv_freq: expected (dim / 2) numbers or (Hkv, dim / 2) of them, got "
            f"{len(rows)} row(s) of lengths {lengths}; give one row, or one per kv "
            "head, all of one length"
        )
    table = tuple(tuple(float(f) for f in row) for row in rows)
    if not all(math.isfinite(f) for row in table for f in row):
        raise ValueError(
            "inv_freq: expected finite numbers, got NaN or infinity; 0 leaves a pair unrotated"
        )
    fastest = max(abs(f) for row in table for f in row)
    if fastest > _FASTEST:
        raise ValueError(
            f"inv_freq: expected at most {_FASTEST:.3g} radians per position, got {fastest:.3g}; "
            "more than pi only aliases at integer positions"
        )
    return table


DEFAULT_ROPE = Rope()  # what rope=True means
