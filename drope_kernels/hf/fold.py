"""A softmax temperature, multiplied into the weights that make the queries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drope_kernels.hf.families import decoder_of
from drope_kernels.hf.temperature import logit_factors

_ONE_PLUS_WEIGHT = ("gemma3_text",)  # families whose norms multiply by 1 + weight


@dataclass(frozen=True)
class Folding:
    """Parameters that replace a model's own, and what they stand for.

    Args:
        parameters: by their names in the model's state_dict, in the dtype of the originals.
        factors: of each layer, what its attention logits are multiplied by.
        rounding: the largest change of a weight, relative to it, by which storing it in 16 bits
            missed the product; 0 for float32.
    """

    parameters: dict[str, Tensor]
    factors: tuple[float, ...]
    rounding: float

    @property
    def temperature(self) -> float | list[float]:
        """One number where the layers agree."""
        first = self.factors[0]
        return first if set(self.factors) == {first} else list(self.factors)

    @property
    def changes(self) -> bool:
        return bool(self.parameters)


def fold(model: Any, beta: float = 1.0) -> Folding:
    """Folds every layer's temperature, times beta, into the last parameter linear in the queries.

    That is the weight of the queries' norm where there is one (Gemma's multiplies by 1 + weight),
    else the weight and the bias of their projection. Products are float32, rounded once. The model
    is left as it is.

    Args:
        model: a `PreTrainedModel` of `FAMILIES`; `set_temperature` and YaRN's attention factor
            made its layers' temperatures.
        beta: a further factor of all logits.

    Raises:
        ValueError: a product that its dtype cannot hold.
        NotImplementedError: a model of another family.
    """
    names = {module: name for name, module in model.named_modules()}
    factors = tuple(factor * beta for factor in logit_factors(model))
    decoder = decoder_of(model)
    parameters, rounding = {}, 0.0
    for layer, factor in zip(decoder.layers, factors, strict=True):
        if factor == 1.0:
            continue
        module = last_linear(layer.self_attn, "q")
        every_channel = torch.full((layer.self_attn.head_dim,), factor)
        one_plus = multiplies_by_one_plus(decoder.config, module)
        for name, parameter in module.named_parameters(recurse=False):
            exact = _effective(parameter, one_plus) * _along(every_channel, parameter)
            stored = _stored(exact, parameter.dtype, one_plus)
            full_name = f"{names[module]}.{name}"
            _check_finite(full_name, stored, factor)
            parameters[full_name] = stored
            rounding = max(rounding, _relative(_effective(stored, one_plus), exact))
    return Folding(parameters, factors, rounding)


def rescale(
    module: nn.Module, factors: Tensor, *, one_plus: bool, precision: torch.dtype | None = None
) -> None:
    """Multiplies channel d of every head that `module` makes by factors[d], (D,), in place.

    The results are rounded to `precision`; None: only to the dtype of the parameters.
    """
    for parameter in module.parameters(recurse=False):
        exact = _effective(parameter, one_plus) * _along(factors, parameter)
        stored = _stored(exact, precision or parameter.dtype, one_plus)
        parameter.data.copy_(stored)


def last_linear(attention: Any, side: str) -> nn.Module:
    """What makes an attention module's queries ("q") or keys ("k"): their norm, or projection."""
    norm: nn.Module | None = getattr(attention, f"{side}_norm", None)
    projection: nn.Module = getattr(attention, f"{side}_proj")
    return projection if norm is None else norm


def multiplies_by_one_plus(config: Any, module: nn.Module) -> bool:
    """Whether `module` is a norm of Gemma's kind."""
    return config.model_type in _ONE_PLUS_WEIGHT and not isinstance(module, nn.Linear)


def _effective(parameter: Tensor, one_plus: bool) -> Tensor:
    wide = parameter.detach().float()
    return wide + 1 if one_plus else wide


def _stored(exact: Tensor, dtype: torch.dtype, one_plus: bool) -> Tensor:
    return (exact - 1 if one_plus else exact).to(dtype)


def _along(factors: Tensor, parameter: Tensor) -> Tensor:
    """Factors (D,) repeated for the heads of a parameter (H * D, ...), to be multiplied with it."""
    heads = parameter.shape[0] // len(factors)
    column = factors.to(parameter.device, torch.float32).repeat(heads)
    return column.view(-1, *[1] * (parameter.dim() - 1))


def _relative(stored: Tensor, exact: Tensor) -> float:
    change = (stored - exact).abs() / exact.abs()
    return float(change.where(exact != 0, 0).max())


def _check_finite(name: str, stored: Tensor, factor: float) -> None:
    if not bool(stored.isfinite().all()):
        largest = math.log2(torch.finfo(stored.dtype).max)
        raise ValueError(
            f"{name}: expected finite weights after multiplying by the temperature {factor:g}, "
            f"got one beyond 2^{largest:.0f}, the end of {stored.dtype}; export in bfloat16 or "
            "float32"
        )
