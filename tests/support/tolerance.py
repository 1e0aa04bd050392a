"""How close is close enough: two limits, both taken from a peer in the same precision.

Against the float64 yardstick `ref`, rounded to the dtype of the tested tensor:

    max|ours - ref| <= 2 max|peer - ref| + 2 max|ref + 0.3 - 0.3 - ref| + 1e-6 max|ref|
    rms(ours - ref) <= 1.5 rms(peer - ref) + 1e-6 rms(ref)

No element is far off, nor all of them a little. The term with 0.3 is one rounding of a number of
that size; those with 1e-6 are 8 roundings in float32, where a peer may be lucky in a small tensor.
The first line is flash-attention's rule; the second catches what hides under it, such as bf16
angles or a factor that is slightly wrong everywhere. Where the peer is exact, the second would
reject a single tie rounded the other way: two such elements are always allowed.
"""

from __future__ import annotations

import torch
from torch import Tensor


class MismatchError(AssertionError):
    """A tensor that is further from the yardstick than its precision explains."""


def check_tensor(
    name: str,
    ours: Tensor,
    peer: Tensor,
    ref: Tensor,
    *,
    cancellation: float = 0.0,
    unit: float = 0.0,
    allowance: float = 0.0,
) -> None:
    """Raises MismatchError, with measures, limits and the worst index, unless ours passes.

    unit: the least size that the terms with 1e-6 take ref to have. 1 for a logarithm, in which an
    error is a relative error of what it is the logarithm of, however close to 0 it is itself.

    allowance: added to both limits, for tensors too small for a peer's error to be typical.

    cancellation: the largest error that one rounding of the terms of a sum can leave in an element
    whose exact value is 0. A tensor that is 0 only because everything cancels (the dq of queries
    that see a single key) gives the rule nothing to compare with; this bounds it instead.
    """
    if ours.shape != ref.shape or ours.dtype != peer.dtype:
        raise MismatchError(
            f"{name}: got {tuple(ours.shape)} {ours.dtype}, "
            f"expected {tuple(ref.shape)} {peer.dtype}"
        )
    ref = ref.to(ours.dtype)
    check_finiteness(name, ours, ref)
    finite = ref.isfinite()
    if not finite.any():
        return
    ref_64, ours_64, peer_64 = (
        torch.where(finite, tensor.double(), 0.0) for tensor in (ref, ours, peer)
    )
    error, peer_error = (ours_64 - ref_64).abs(), (peer_64 - ref_64).abs()
    one_rounding = torch.where(finite, (ref + 0.3 - 0.3 - ref).double(), 0.0).abs().max()
    limit_max = 2 * peer_error.max() + 2 * one_rounding + 1e-6 * max(ref_64.abs().max(), unit)
    limit_rms = 1.5 * rms(peer_error) + 1e-6 * max(rms(ref_64), unit)
    two_ties = torch.finfo(ours.dtype).eps * ref_64.abs().max() * (2 / ref.numel()) ** 0.5
    limit_rms = max(limit_rms, two_ties)
    if rms(ref_64) < 1e-3 * cancellation:
        limit_max = limit_rms = cancellation
    limit_max, limit_rms = limit_max + allowance, limit_rms + allowance
    if not (error.max() <= limit_max and rms(error) <= limit_rms):
        worst = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
        raise MismatchError(
            f"{name}: max error {error.max():.3g} (limit {limit_max:.3g}), "
            f"rms error {rms(error):.3g} (limit {limit_rms:.3g}); worst at {worst}: "
            f"got {ours_64[tuple(worst)]:.8g}, expected {ref_64[tuple(worst)]:.8g}"
        )


def check_finiteness(name: str, ours: Tensor, ref: Tensor) -> None:
    """Infinities must be where the yardstick has them, and nothing may be NaN."""
    wrong = ours.isnan() | (ours.isinf() | ref.isinf()) & (ours != ref)
    if wrong.any():
        index = wrong.nonzero()[0].tolist()
        raise MismatchError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are NaN or wrongly infinite; "
            f"first at {index}: got {ours[tuple(index)]}, expected {ref[tuple(index)]}"
        )


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
