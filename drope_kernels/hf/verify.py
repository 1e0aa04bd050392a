"""`verify_export`: whether stock transformers computes the same at any position."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from drope_kernels.console.paths import user_path
from drope_kernels.hf.families import decoder_of
from drope_kernels.hf.fold import last_linear, multiplies_by_one_plus, rescale
from drope_kernels.hf.loading import load_model
from drope_kernels.hf.rotation import layer_types
from drope_kernels.hf.temperature import logit_factors

FARTHEST = 1_000_000  # position
SHIFTS = (1, 1000, FARTHEST)
OUTLIER = 400.0  # entries of this size occur in the queries and keys of trained models
LENGTH = 48  # tokens of a probe
_USUAL = torch.arange(LENGTH)  # positions
# Of the largest logit: float32 rounds 2^-24, some hundred times in a row.
FLOAT32_LIMIT = 1e-4
SAME_PRECISION_LIMIT = 2.0  # times the live model's error: two such may add up
ROUNDING_LIMIT = 3.0  # times that of another rounding, of as few weights as a head has channels


@dataclass(frozen=True)
class Check:
    """One measured property of a checkpoint in one dtype: it holds if found <= limit."""

    name: str
    dtype: str
    found: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.found <= self.limit

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        found = f"{self.found:.3g} (at most {self.limit:.3g})"
        return f"{verdict:<6}  {self.dtype:<8}  {self.name}: {found}"


@dataclass(frozen=True)
class VerificationReport:
    """What `verify_export` found."""

    path: Path
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))


class VerificationError(RuntimeError):
    """A checkpoint that is not position-free, or not the model it was made from."""

    def __init__(self, report: VerificationReport) -> None:
        super().__init__(f"verification failed:\n{report}")
        self.report = report


@torch.no_grad()
def verify_export(path: str | Path, model: Any = None) -> VerificationReport:
    """Loads a checkpoint with stock transformers and measures whether it is position-free.

    In float32, and in the dtype it is stored in where that has 16 bits, else bfloat16:

    - its own rotation changes no entry of random queries with one channel of size 400, at
      positions up to 1e6;
    - its logits are bit for bit the same under shifted and spread position ids;
    - so they are when a channel of the queries and one of the keys has entries of size 400, their
      partners being as much smaller, so that nothing else changes;
    - its logits are those of the live model. In 16 bits: their error is at most twice that of the
      live model in the same dtype (rms, against float32). In float32: the largest is at most 1e-4
      of the largest logit or, of a checkpoint stored in 16 bits, their rms at most three times what
      rounding weights like those that took the temperature does.

    Args:
        path: a directory that `export` wrote.
        model: the model it was made from, in the same dtype; None: what `load_model` makes of the
            directory, which leaves the rotation out.

    Raises:
        FileNotFoundError: no such directory, or no model in it.
        ValueError: weights that are no numbers, by name.
        NotImplementedError: a model of another family.
    """
    path = user_path(path)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"path: expected an exported model, got {path} without config.json")
    stored = AutoConfig.from_pretrained(path, local_files_only=True).dtype or torch.float32
    live = load_model(path, dtype=stored, attn_implementation="eager") if model is None else model
    check_finite(live)
    tokens = _probe(live)
    with _evaluating(live):
        expected = _Expected.of(live, tokens, stored)
    checks = [
        check
        for dtype in (torch.float32, expected.half)
        for check in _checks_in(path, tokens, dtype, expected)
    ]
    return VerificationReport(path, tuple(checks))


def check_finite(model: Any) -> None:
    """ValueError for an inf or NaN among the weights: what reads none of them computes as ever."""
    for name, weight in model.state_dict().items():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            number = int((~weight.isfinite()).sum())
            raise ValueError(
                f"model: expected finite weights, got {number} inf or NaN in {name}; take an "
                "earlier checkpoint, or save it in a dtype that holds them"
            )


@dataclass(frozen=True)
class _Expected:
    """What the live model computes: logits (S, V) float32."""

    device: torch.device
    half: torch.dtype  # the one with 16 bits
    exact: Tensor  # computed in float32
    in_half: Tensor
    rounded: Tensor | None  # in float32, the queries' weights rounded once more; None: not needed

    @classmethod
    def of(cls, live: Any, tokens: Tensor, stored: torch.dtype) -> _Expected:
        half = torch.bfloat16 if stored == torch.float32 else stored
        wide, narrow = _in_dtype(live, torch.float32), _in_dtype(live, half)
        exact, in_half = _logits(wide, tokens, _USUAL), _logits(narrow, tokens, _USUAL)
        rounded = None
        if stored == half:
            wide = copy.deepcopy(wide) if wide is live else wide
            _round_once(wide, half)
            rounded = _logits(wide, tokens, _USUAL)
        return cls(live.device, half, exact, in_half, rounded)


def _in_dtype(live: Any, dtype: torch.dtype) -> Any:
    """The model itself, or a copy."""
    if live.dtype == dtype:
        return live
    model = copy.deepcopy(live).to(dtype)
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):  # Gemma's: 16 bits have rounded the buffer
            module.embed_scale.fill_(module.scalar_embed_scale)
    return model


def _checks_in(
    path: Path, tokens: Tensor, dtype: torch.dtype, expected: _Expected
) -> Iterator[Check]:
    stock = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", local_files_only=True
    ).to(expected.device)
    name = str(dtype).removeprefix("torch.")
    yield Check("entries that its rotation changes", name, _turned_entries(stock), 0)
    logits, moved = _at_positions(stock, tokens)
    yield Check("logits under shifted positions", name, moved, 0)
    exact = expected.exact
    error = logits - exact
    if dtype == expected.half:
        ratio = _ratio(error, expected.in_half - exact)
        yield Check("error, by the live model's own", name, ratio, SAME_PRECISION_LIMIT)
    elif expected.rounded is not None:
        ratio = _ratio(error, expected.rounded - exact)
        yield Check("error, by that of one rounding", name, ratio, ROUNDING_LIMIT)
    else:
        distance = float(error.abs().max() / exact.abs().max())
        yield Check("error, by the largest logit", name, distance, FLOAT32_LIMIT)
    _enlarge_channels(stock, tokens)
    _, moved = _at_positions(stock, tokens)
    yield Check(f"the same with channels of size {OUTLIER:.0f}", name, moved, 0)


def _round_once(model: Any, precision: torch.dtype) -> None:
    """Does to a float32 model's queries what folding its temperature into 16 bits does, in place.

    With other roundings: of weights times a temperature that is 3 % higher.
    """
    for layer, factor in zip(decoder_of(model).layers, logit_factors(model), strict=True):
        module = last_linear(layer.self_attn, "q")
        factors = torch.full((layer.self_attn.head_dim,), factor * 1.03)
        one_plus = multiplies_by_one_plus(model.config, module)
        rescale(module, factors, one_plus=one_plus, precision=precision)
        rescale(module, 1 / factors, one_plus=one_plus)


def _probe(model: Any) -> Tensor:
    """(1, LENGTH) random tokens."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    return torch.randint(vocabulary, (1, LENGTH), generator=generator).to(model.device)


def _logits(model: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    """(S, V) float32. The mask of ones keeps gaps in positions from meaning packed sequences."""
    output = model(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        position_ids=positions[None].to(tokens.device),
        use_cache=False,
    )
    return output.logits[0].float().cpu()


def _at_positions(model: Any, tokens: Tensor) -> tuple[Tensor, float]:
    """Logits (S, V) at the usual positions, and the largest change at any others."""
    others = [_USUAL + shift for shift in SHIFTS]
    # A common shift leaves what RoPE computes as it is, up to rounding; distances that grow do not.
    others.append(torch.linspace(0, FARTHEST, LENGTH).long())
    logits = _logits(model, tokens, _USUAL)
    changes = [(_logits(model, tokens, x) - logits).abs().max() for x in others]
    return logits, float(torch.stack(changes).nan_to_num(nan=math.inf).max())


def _turned_entries(model: Any) -> float:
    """How many entries of random queries a model's own rotation changes."""
    decoder = decoder_of(model)
    attention = decoder.layers[0].self_attn
    apply_rotary_pos_emb = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    positions = torch.linspace(0, FARTHEST, 512, device=model.device).long()[None]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 8, positions.shape[1], attention.head_dim, generator=generator)
    q[..., 0] *= OUTLIER
    q[..., attention.head_dim // 2] /= OUTLIER  # what the large channel is turned into
    q = q.to(model.device, model.dtype)
    turned = 0
    for layer_type in set(layer_types(decoder)):
        typed = {} if layer_type is None else {"layer_type": layer_type}
        cos, sin = decoder.rotary_emb(q, positions, **typed)
        after, _ = apply_rotary_pos_emb(q, q, cos, sin)
        turned += int((after != q).sum())
    return turned


def _enlarge_channels(model: Any, tokens: Tensor) -> None:
    """Brings one channel of every query and the one it would be turned into of every key to 400.

    In place. What is multiplied by a power of two on one side is divided by it on the other: the
    scores stay what they are, and only a rotation can see it.
    """
    peaks: dict[Any, Tensor] = {}
    attentions = [layer.self_attn for layer in decoder_of(model).layers]
    hooks = []
    for attention in attentions:
        for side in ("q", "k"):
            module, head_dim = last_linear(attention, side), attention.head_dim

            def record(module: Any, _: Any, output: Tensor, head_dim: int = head_dim) -> None:
                peaks[module] = output.float().abs().reshape(-1, head_dim).amax(0).cpu()

            hooks.append(module.register_forward_hook(record))
    _logits(model, tokens, _USUAL)
    for hook in hooks:
        hook.remove()
    for attention in attentions:
        q, k = last_linear(attention, "q"), last_linear(attention, "k")
        half = attention.head_dim // 2
        growth = torch.ones(attention.head_dim)  # of queries
        growth[0] = _power_of_two(OUTLIER / peaks[q][0])
        growth[half] = 1 / _power_of_two(OUTLIER / peaks[k][half])
        rescale(q, growth, one_plus=multiplies_by_one_plus(model.config, q))
        rescale(k, 1 / growth, one_plus=multiplies_by_one_plus(model.config, k))


def _power_of_two(x: Tensor) -> float:
    """The one next to x; 1 for a channel that is dead or not a number."""
    return 2.0 ** round(math.log2(float(x))) if 0 < float(x) < math.inf else 1.0


def _ratio(error: Tensor, peer: Tensor) -> float:
    """Of their rms."""
    smallest = torch.finfo(torch.float32).tiny  # where both are exact
    return float(error.square().mean().sqrt() / peer.square().mean().sqrt().clamp_min(smallest))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout for a while."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
