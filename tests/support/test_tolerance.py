"""The tolerance rule itself: what it lets through and what it rejects, on both of its lines."""

from __future__ import annotations

import pytest
import torch
from tolerance import MismatchError, check_tensor
from torch import Tensor


def noise(seed: int, size: float, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(8, 512, generator=generator, dtype=dtype)


REF = noise(0, 1.0, torch.float64)
PEER = (REF + noise(1, 1e-4)).float()


@pytest.mark.parametrize(("factor", "passes"), [(0.0, True), (1.4, True), (1.6, False)])
def test_rms_may_be_half_again_the_peers(factor: float, passes: bool) -> None:
    ours = (REF + noise(2, 1e-4) * factor).float()
    if passes:
        check_tensor("out", ours, PEER, REF)
        return
    with pytest.raises(MismatchError, match=r"out: .*rms error 0\.00015\d+ \(limit 0\.00015"):
        check_tensor("out", ours, PEER, REF)


@pytest.mark.parametrize(("factor", "passes"), [(1.9, True), (2.2, False)])
def test_one_element_may_be_twice_as_far_as_the_peers_worst(factor: float, passes: bool) -> None:
    ours = REF.float()
    ours[3, 77] += factor * float((PEER.double() - REF).abs().max())
    if passes:
        check_tensor("dq", ours, PEER, REF)
        return
    with pytest.raises(MismatchError, match=r"dq: max error .* worst at \[3, 77\]: got"):
        check_tensor("dq", ours, PEER, REF)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nothing_may_be_nan_or_wrongly_infinite(value: float) -> None:
    ours = PEER.clone()
    ours[1, 2] = value
    with pytest.raises(MismatchError, match=r"1 of 4096 .* first at \[1, 2\]"):
        check_tensor("dv", ours, PEER, REF)


def test_infinities_of_the_yardstick_must_be_met() -> None:
    ref, ours = REF.clone(), PEER.clone()
    ref[0, 0] = ours[0, 0] = -torch.inf
    check_tensor("lse", ours, ours, ref)
    with pytest.raises(MismatchError, match="wrongly infinite"):
        check_tensor("lse", PEER, PEER, ref)


@pytest.mark.parametrize("wrong", [PEER[:, :-1], PEER.half()])
def test_shape_and_dtype_are_part_of_the_result(wrong: Tensor) -> None:
    with pytest.raises(MismatchError, match="expected"):
        check_tensor("out", wrong, PEER, REF)


def test_a_tensor_of_cancelled_terms_is_held_to_the_rounding_of_the_terms() -> None:
    ref = torch.zeros_like(REF)
    check_tensor("dq", noise(1, 1e-7), ref.float(), ref, cancellation=1e-6)
    with pytest.raises(MismatchError):
        check_tensor("dq", noise(1, 1e-5), ref.float(), ref, cancellation=1e-6)
    with pytest.raises(MismatchError):  # the bound does not loosen a tensor that has a size
        check_tensor("dq", (REF + noise(2, 1e-3)).float(), PEER, REF, cancellation=1e-2)


def test_lse_near_zero_is_compared_in_units_of_one() -> None:
    ref = torch.full((8,), 1e-3, dtype=torch.float64)
    peer, ours = ref.float(), (ref + 5e-7).float()
    check_tensor("lse", ours, peer, ref, unit=1.0)
    with pytest.raises(MismatchError):
        check_tensor("out", ours, peer, ref)


def test_two_ties_may_round_the_other_way_where_the_peer_is_exact() -> None:
    ref = torch.ones(4096, dtype=torch.float64)
    peer, ours = ref.bfloat16(), ref.bfloat16()
    ours[[5, 700]] += torch.finfo(torch.bfloat16).eps
    check_tensor("dv", ours, peer, ref)
    ours[:9] += torch.finfo(torch.bfloat16).eps
    with pytest.raises(MismatchError, match="rms"):
        check_tensor("dv", ours, peer, ref)
