"""The GPU benchmark without a GPU: what is wrong is not timed, and what is right is."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import gpu_results
from bench.gpu import jobs as bench_jobs
from bench.gpu.accelerator import StandIn
from bench.gpu.cases import DRY_SHAPES, GpuCase
from bench.gpu.contenders import Contender
from bench.gpu.exact import gradient_errors
from bench.gpu.inputs import make_inputs, run_forward
from bench.gpu.peer_calls import PEERS
from bench.gpu.shapes import PeerCase, rope_cases
from drope_kernels import attention

ALL = gpu_results.all_cases()


# ---- the gate

ROPE = GpuCase(PeerCase(1, 4, 2, 40, 40, 16, causal=True, backward=True), rope=True)


def attend(rope: bool, factor: float = 1.0) -> Any:
    return lambda inputs: lambda q, k, v: attention(q, k * factor, v, rope=rope)


def gate(case: GpuCase, make: Any, rope: bool) -> dict[str, Any]:
    inputs = make_inputs(case.shape, "cpu", torch.float32)
    calls, rows = bench_jobs.gated(case, inputs, [Contender("one", make, rope)])
    assert ("one" in calls) == ("error" not in rows["one"])
    return rows["one"]


@pytest.mark.parametrize("rope", [False, True])
def test_right_contender_passes_with_its_gradients(rope: bool) -> None:
    row = gate(ROPE, attend(rope), rope)
    assert set(row["errors"]) == {"out", "dq", "dk", "dv"}
    assert max(row["errors"].values()) < 1e-5


@pytest.mark.parametrize(
    ("make", "rope"),
    [(attend(rope=False), True), (attend(rope=True), False), (attend(True, 1.1), True)],
)
def test_wrong_contender_is_not_timed(make: Any, rope: bool) -> None:
    assert "wrong result, not timed" in gate(ROPE, make, rope)["error"]


def test_gradient_that_is_not_rotated_back_is_wrong() -> None:
    class KeepRotated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad.roll(1, dims=-1)

    def make(inputs: Any) -> Any:
        return lambda q, k, v: attention(KeepRotated.apply(q), k, v, rope=True)

    assert "wrong result" in gate(ROPE, make, True)["error"]


def test_all_contenders_of_a_case_are_measured() -> None:
    rows = bench_jobs.measure(DRY_SHAPES[2], StandIn())
    assert [row["contender"] for row in rows] == ["reference", "reference_no_rope"]
    for row in rows:
        assert row["forward"]["p25_ms"] <= row["forward"]["median_ms"] <= row["forward"]["p75_ms"]
        assert row["terabytes_per_second"] > 0
        assert row["peak_bytes"] == {"forward": None}


# ---- peers


def test_peer_shapes_cover_the_targets() -> None:
    shapes = [case.shape for case in ALL]
    for shape in shapes:
        assert shape.num_heads_q % shape.num_heads_kv == 0
    trained = {(one.head_dim, one.seqlen_q) for one in shapes if one.causal and one.backward}
    for head_dim in (64, 128):
        assert {(head_dim, 2**power) for power in range(9, 16)} <= trained
    assert max(shape.seqlen_kv for shape in shapes) == 2**20
    grouped = [one for one in shapes if one.num_heads_q != one.num_heads_kv and not one.is_decode]
    assert grouped
    assert max(shape.seqlen_q for shape in rope_cases()) == 4096
    four_k = PeerCase(4, 16, 16, 4096, 4096, 128, causal=True, backward=True)
    assert four_k in shapes
    assert four_k.forward_flops == 4 * 4 * 16 * 4096 * 4096 * 128 / 2
    assert {peer.name for peer in PEERS} >= {"sdpa_flash", "sdpa_cudnn", "flex"}


SMALL = GpuCase(PeerCase(2, 4, 2, 40, 56, 16, causal=False, backward=True))


def torch_call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class TwoMilliseconds(StandIn):
    """A clock whose median is 2 ms, and a peer as the only contender."""

    def timer(self) -> Any:
        readings = itertools.cycle([3.0, 1.0, 2.0])

        def sample(call: Any) -> float:
            call()
            return next(readings)

        return sample


@pytest.fixture
def measure_small(monkeypatch: pytest.MonkeyPatch) -> Any:
    def measure(call: Any) -> dict[str, Any]:
        peer = Contender("peer", lambda inputs: call, rope=False)
        monkeypatch.setattr(bench_jobs, "chosen_contenders", lambda *arguments: [peer])
        (row,) = bench_jobs.measure(SMALL, TwoMilliseconds())
        return row

    return measure


def test_right_peer_is_timed(measure_small: Any) -> None:
    row = measure_small(torch_call)
    assert "error" not in row
    assert set(row["errors"]) == {"out", "dq", "dk", "dv"}
    assert max(row["errors"].values()) < 1e-5
    assert row["forward"]["median_ms"] == 2.0
    assert row["backward_tflops"] == SMALL.shape.forward_flops * 2.5 / 2.0 / 1e9


@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v: torch_call(q, k, v) * 1.05,
        lambda q, k, v: torch_call(q * 1.2, k, v),
        lambda q, k, v: torch_call(q, k.roll(1, dims=2), v),
        lambda q, k, v: torch_call(q, k, v) * float("nan"),
    ],
)
def test_wrong_peer_is_not_timed(wrong: Any, measure_small: Any) -> None:
    row = measure_small(wrong)
    assert "wrong result, not timed" in row["error"]
    assert "forward" not in row


def test_forward_only_peer_keeps_its_forward(measure_small: Any) -> None:
    row = measure_small(lambda q, k, v: torch_call(q, k, v).detach())
    assert row["forward_tflops"] > 0
    assert "RuntimeError" in row["error"]
    assert "backward" not in row


def test_wrong_gradient_is_seen() -> None:
    inputs = make_inputs(SMALL.shape, "cpu", torch.float32)
    out, leaves = run_forward(inputs, torch_call)
    grads = torch.autograd.grad(out, leaves, inputs.grad_out)
    assert max(gradient_errors(inputs, grads)) < 1e-5
    halved = (grads[0], grads[1] * 0.5, grads[2])
    assert [error > 0.02 for error in gradient_errors(inputs, halved)] == [False, True, False]
