"""A suite that cannot fail proves nothing: each planted error must be rejected by `check_case`.

The errors go into the reference backend, whose two functions are replaced for one test; the
yardstick is computed before. Every error is one that a kernel of ours could really have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import BY_NAME
from checker import check_case, peer_results, yardstick
from tolerance import MismatchError
from torch import Tensor

from drope_kernels.backends import reference
from drope_kernels.spec.spec import AttentionInputs, Rotation

Results = tuple[Tensor, ...]
INTACT_FORWARD, INTACT_BACKWARD, INTACT_ROTATE, INTACT_EXPONENT = (
    reference.forward,
    reference.backward,
    reference.rotate,
    reference.exponent,
)
LN2 = math.log(2)
LOG2E = 1 / LN2


@dataclass(frozen=True)
class Planted:
    """An error, the case that must reveal it, and the functions of the backend it replaces."""

    case: str
    forward: Callable[..., Results] = INTACT_FORWARD
    backward: Callable[..., Results] = INTACT_BACKWARD
    rotate: Callable[..., Tensor] = INTACT_ROTATE
    exponent: Callable[..., Tensor] = INTACT_EXPONENT
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


def misread(change: Callable[[AttentionInputs], AttentionInputs]) -> dict[str, Any]:
    """A backend that consistently computes another call than the one it was given."""

    def forward(inputs: AttentionInputs, *, save_prepared: bool) -> Results:
        return INTACT_FORWARD(change(inputs), save_prepared=save_prepared)

    def backward(inputs: AttentionInputs, *given: Any, need_grad_scale: bool) -> Results:
        return INTACT_BACKWARD(change(inputs), *given, need_grad_scale=need_grad_scale)

    return {"forward": forward, "backward": backward}


# --- rotation ------------------------------------------------------------------------------------


def turn(
    x: Tensor,
    positions: Tensor,
    rotation: Rotation,
    *,
    inverse: bool = False,
    angles: Callable[[Tensor, Tensor], Tensor] = lambda turns, at: at * turns.double().sum(0),
    table_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Half-split rotation by one shared table, in the ways a kernel may get it wrong."""
    angle = 2 * math.pi * angles(rotation.turns[:, 0], positions[:, None, :, None])
    sign = -1 if inverse else 1
    cos, sin = (t.to(table_dtype).to(x.dtype) for t in (angle.cos(), sign * angle.sin()))
    turning, still = x[..., : rotation.dim], x[..., rotation.dim :]
    x1, x2 = turning.chunk(2, dim=-1)
    turned = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
    return torch.cat((rotation.attention_factor * turned, still), dim=-1)


def rotate_bf16_tables(*given: Any, **options: Any) -> Tensor:
    return turn(*given, **options, table_dtype=torch.bfloat16)


def rotate_in_bf16(x: Tensor, *given: Any, **options: Any) -> Tensor:
    """Tables, products and sums in bf16: eager model code under bf16."""
    return turn(x.bfloat16(), *given, **options, table_dtype=torch.bfloat16).to(x.dtype)


def rotate_float32_angles(*given: Any, **options: Any) -> Tensor:
    return turn(*given, **options, angles=lambda turns, at: (at.float() * turns[0]).double())


def rotate_back_bf16_tables(*given: Any, inverse: bool = False) -> Tensor:
    return rotate_bf16_tables(*given, inverse=True) if inverse else INTACT_ROTATE(*given)


def rotate_back_nothing(*given: Any, inverse: bool = False) -> Tensor:
    return given[0] if inverse else INTACT_ROTATE(*given)


def rotate_back_the_same_way(*given: Any, inverse: bool = False) -> Tensor:
    return INTACT_ROTATE(*given)


def rotate_back_without_factor(
    x: Tensor, positions: Tensor, rotation: Rotation, *, inverse: bool = False
) -> Tensor:
    if inverse:
        rotation = replace(rotation, attention_factor=1.0)
    return INTACT_ROTATE(x, positions, rotation, inverse=inverse)


def other_pairing(inputs: AttentionInputs) -> AttentionInputs:
    assert inputs.rotation is not None
    return replace(
        inputs, rotation=replace(inputs.rotation, interleaved=not inputs.rotation.interleaved)
    )


def q_rounded_twice(inputs: AttentionInputs, *, save_prepared: bool) -> Results:
    """A factor applied to q in the input dtype before it rotates, and undone later."""
    return INTACT_FORWARD(replace(inputs, q=inputs.q * 11 / 11), save_prepared=save_prepared)


# --- results -------------------------------------------------------------------------------------


def lse_in_base_2(inputs: AttentionInputs, *, save_prepared: bool) -> Results:
    out, lse, *kept = INTACT_FORWARD(inputs, save_prepared=save_prepared)
    return out, lse / LN2, *kept


def log_sum_misread(inputs: AttentionInputs, *given: Any, need_grad_scale: bool) -> Results:
    """Backward that reads L, which is to base 2, as a natural logarithm."""
    out, state, *grads = given
    state = torch.stack((state[0], state[1] / LN2))
    return INTACT_BACKWARD(inputs, out, state, *grads, need_grad_scale=need_grad_scale)


def exponent_clamped(t: Tensor, row_max: Tensor, factor: float | Tensor) -> Tensor:
    """fma(c', t, -round(c' a)), and what the rounding leaves above 0 cut off, as in forward."""
    factor = torch.as_tensor(factor * LOG2E, dtype=t.dtype)
    base = (factor * row_max).double()
    return (factor.double() * t.double() - base).to(t.dtype).clamp_(max=0.0)


def exponent_of_products(t: Tensor, row_max: Tensor, factor: float | Tensor) -> Tensor:
    """Two rounded products, and their difference."""
    return factor * LOG2E * t - factor * LOG2E * row_max


def forward_by_lse(inputs: AttentionInputs, *, save_prepared: bool) -> Results:
    """P = 2^(s - lse), for a reference that has the row's lse at hand."""
    out, lse, *_ = INTACT_FORWARD(inputs, save_prepared=False)
    scores = reference._Scores(inputs, inputs.q, inputs.k)
    s, lse_rows = scores.t * scores.factor, scores.rows(lse.unsqueeze(-1))
    rounded = out.copy_(scores.heads((s - lse_rows).exp() @ scores.v))
    return rounded, *INTACT_FORWARD(inputs, save_prepared=save_prepared)[1:]


def backward_by_lse(inputs: AttentionInputs, *given: Any, need_grad_scale: bool) -> Results:
    """P = 2^(c' t - lse): one number a row, rounded to float32."""
    out, state, *grads = given
    lse = state[0] * (inputs.scale * LOG2E) + state[1]
    given = (out, torch.stack((torch.zeros_like(lse), lse)), *grads)
    return INTACT_BACKWARD(inputs, *given, need_grad_scale=need_grad_scale)


def lse_gradient_ignored(
    inputs: AttentionInputs, out: Tensor, state: Tensor, grad_out: Tensor, _: Tensor, **rest: bool
) -> Results:
    return INTACT_BACKWARD(inputs, out, state, grad_out, None, **rest)


def lse_gradient_added(
    inputs: AttentionInputs,
    out: Tensor,
    state: Tensor,
    grad_out: Tensor,
    dlse: Tensor,
    **rest: bool,
) -> Results:
    return INTACT_BACKWARD(inputs, out, state, grad_out, -dlse, **rest)


def dscale_before_the_cap(inputs: AttentionInputs, *given: Any, need_grad_scale: bool) -> Results:
    """dscale from P (dP - delta) without softcap's own derivative; one head group only."""
    out, state, grad_out, grad_lse = given
    dq, dk, dv, _ = INTACT_BACKWARD(inputs, *given, need_grad_scale=need_grad_scale)
    assert isinstance(inputs.scale, Tensor)
    assert inputs.softcap is not None
    group = inputs.q.shape[1] // inputs.k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (inputs.k, inputs.v))
    dot = inputs.q.float() @ k.transpose(-1, -2)
    s = inputs.softcap * torch.tanh(inputs.scale[..., None] * dot / inputs.softcap)
    lse = inputs.softcap * state[0] + LN2 * state[1]
    p = (s.masked_fill(~reference.visible(inputs)[:, None], -math.inf) - lse[..., None]).exp()
    delta = (grad_out.float() * out.float()).sum(-1) - grad_lse
    grad_p = grad_out.float() @ v.transpose(-1, -2)
    return dq, dk, dv, (p * (grad_p - delta[..., None]) * dot).sum(-1)


def dscale_with_the_scale(inputs: AttentionInputs, *given: Any, need_grad_scale: bool) -> Results:
    """dscale summed over s instead of q.k."""
    dq, dk, dv, dscale = INTACT_BACKWARD(inputs, *given, need_grad_scale=need_grad_scale)
    return dq, dk, dv, dscale * inputs.scale


def unwritten(which: int, function: Callable[..., Results]) -> Callable[..., Results]:
    """One element of one result never stored: what torch.empty held is still there."""

    def broken(*given: Any, **options: Any) -> Results:
        results = list(function(*given, **options))
        fresh = torch.empty_like(results[which])
        fresh[..., :-1] = results[which][..., :-1]
        fresh.flatten(0, -2)[1:, -1] = results[which].flatten(0, -2)[1:, -1]
        results[which] = fresh
        return tuple(results)

    return broken


# --- masks and scales ----------------------------------------------------------------------------


def one_more_key(inputs: AttentionInputs) -> AttentionInputs:
    assert isinstance(inputs.q_start, int)
    return replace(inputs, q_start=inputs.q_start + 1)


def aligned_at_the_top(inputs: AttentionInputs) -> AttentionInputs:
    return replace(inputs, q_start=0)


def wider_window(inputs: AttentionInputs) -> AttentionInputs:
    assert inputs.window is not None
    return replace(inputs, window=inputs.window + 1)


def narrower_window(inputs: AttentionInputs) -> AttentionInputs:
    assert inputs.window is not None
    return replace(inputs, window=inputs.window - 1)


def later_end(inputs: AttentionInputs) -> AttentionInputs:
    assert inputs.kv_end is not None
    return replace(inputs, kv_end=(inputs.kv_end + 1).clamp(max=inputs.k.shape[2]))


def later_start(inputs: AttentionInputs) -> AttentionInputs:
    assert inputs.kv_start is not None
    return replace(inputs, kv_start=inputs.kv_start + 1)


def heads_dealt_in_turn(inputs: AttentionInputs) -> AttentionInputs:
    """kv head h % Hkv instead of h // group, forward only (its gradients go astray too)."""
    order = torch.arange(inputs.q.shape[1]) % inputs.k.shape[1]
    return replace(inputs, k=inputs.k[:, order], v=inputs.v[:, order])


def scale_without_log2e(inputs: AttentionInputs) -> AttentionInputs:
    return replace(inputs, scale=inputs.scale * LN2)


def softcap_in_base_2(inputs: AttentionInputs) -> AttentionInputs:
    assert inputs.softcap is not None
    return replace(inputs, softcap=inputs.softcap * LN2)


def scale_folded_into_q(inputs: AttentionInputs) -> AttentionInputs:
    """q rounded with the scale in it. dq misses the scale then, but out is already wrong."""
    return replace(inputs, q=(inputs.q * inputs.scale).to(inputs.q.dtype), scale=1.0)


FINE = (torch.float32, torch.float16)  # finer than bf16, so its error shows anywhere
BF16 = (torch.bfloat16,)
HALF = (torch.bfloat16, torch.float16)
PLANTED = {
    "bf16_cos_sin": Planted("rope_without_rounding", rotate=rotate_bf16_tables),
    "bf16_arithmetic": Planted("rope_without_rounding", rotate=rotate_in_bf16),
    "float32_angles": Planted("rope_million", rotate=rotate_float32_angles),
    "wrong_pairing": Planted("rope", **misread(other_pairing)),
    "wrong_pairing_interleaved": Planted("rope_interleaved", **misread(other_pairing)),
    "bf16_cos_sin_back": Planted("rope", rotate=rotate_back_bf16_tables, dtypes=FINE),
    "no_rotation_back": Planted("rope", rotate=rotate_back_nothing),
    "rotation_back_the_same_way": Planted("rope", rotate=rotate_back_the_same_way),
    "no_attention_factor_back": Planted("rope_attention_factor", rotate=rotate_back_without_factor),
    "q_rounded_twice": Planted("rope_without_rounding", forward=q_rounded_twice, dtypes=BF16),
    "lse_in_base_2": Planted("regular", forward=lse_in_base_2),
    "log_sum_misread_in_backward": Planted("regular", backward=log_sum_misread),
    "exponent_clamped": Planted("near_ties", exponent=exponent_clamped),
    "exponent_of_products": Planted("near_ties_full_gqa", exponent=exponent_of_products),
    "exponent_clamped_released": Planted("released", exponent=exponent_clamped),
    "p_by_lse": Planted("ties", forward=forward_by_lse),
    "p_by_lse_in_backward": Planted("near_ties", backward=backward_by_lse),
    "p_by_lse_in_backward_released": Planted("released_full", backward=backward_by_lse),
    "lse_gradient_ignored": Planted("regular", backward=lse_gradient_ignored),
    "lse_gradient_added": Planted("regular", backward=lse_gradient_added),
    "scale_without_log2e": Planted("regular", **misread(scale_without_log2e)),
    "softcap_in_base_2": Planted("softcap", **misread(softcap_in_base_2)),
    "scale_folded_into_q": Planted("scale_float", **misread(scale_folded_into_q), dtypes=HALF),
    "dscale_before_the_cap": Planted("softcap_rope_rows", backward=dscale_before_the_cap),
    "dscale_with_the_scale": Planted("scale_per_row", backward=dscale_with_the_scale),
    "causal_one_more_key": Planted("regular", **misread(one_more_key)),
    "causal_aligned_at_the_top": Planted("tail_of_queries", **misread(aligned_at_the_top)),
    "window_one_wider": Planted("window_16", **misread(wider_window)),
    "window_one_narrower": Planted("window_16_full", **misread(narrower_window)),
    "kv_end_one_later": Planted("right_padded", **misread(later_end)),
    "kv_start_one_later": Planted("padded_both_sides_full", **misread(later_start)),
    "unwritten_out": Planted("regular", forward=unwritten(0, INTACT_FORWARD)),
    "unwritten_lse": Planted("regular", forward=unwritten(1, INTACT_FORWARD)),
    "unwritten_dq": Planted("regular", backward=unwritten(0, INTACT_BACKWARD)),
    "unwritten_dk": Planted("regular", backward=unwritten(1, INTACT_BACKWARD)),
    "unwritten_dv": Planted("regular", backward=unwritten(2, INTACT_BACKWARD)),
    "unwritten_dscale": Planted("scale_per_row", backward=unwritten(3, INTACT_BACKWARD)),
}
EXPERIMENTS = [
    pytest.param(planted, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name, planted in PLANTED.items()
    for dtype in planted.dtypes
]


def check_with(planted: Planted, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME[planted.case]
    yardstick(case.name, dtype)  # from the intact backend
    peer_results(case.name, dtype)
    for name in ("forward", "backward", "rotate", "exponent"):
        monkeypatch.setattr(reference, name, getattr(planted, name))
    check_case(case, dtype, "reference")


@pytest.mark.parametrize(("planted", "dtype"), EXPERIMENTS)
def test_planted_error_is_caught(
    planted: Planted, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MismatchError):
        check_with(planted, dtype, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_same_machinery_without_an_error_passes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the rejections above come from the errors, not from the way they are planted."""
    unchanged = misread(lambda inputs: inputs)
    for name in sorted({planted.case for planted in PLANTED.values()}):
        check_with(Planted(name, **unchanged), dtype, monkeypatch)
    check_with(Planted("rope", rotate=turn), dtype, monkeypatch)


def test_unwritten_memory_is_nan() -> None:
    """The fixture reaches every way a backend allocates."""
    like = torch.ones(3, dtype=torch.bfloat16)
    fresh = (
        torch.empty(3),
        torch.empty_like(like),
        torch.empty_strided((2, 3), (3, 1)),
        like.new_empty(3),
        torch.empty(3, dtype=torch.float64),
    )
    assert all(tensor.isnan().all() for tensor in fresh)
