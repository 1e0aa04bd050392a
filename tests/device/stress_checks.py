"""Jobs of the stage stress: what a single correct call cannot show. Job names: "BACKEND CHECK".

Each check raises AssertionError, or returns what it measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import drope_kernels as dk
from bench.gpu.accelerator import StandIn
from bench.gpu.exact import relative_error
from bench.gpu.sm80 import SM80
from device.far_memory import FAR_CHECKS
from device.stress_shapes import SHAPES, Operands, Shape, operands

REPEATS, DRY_REPEATS = 200, 3
RELATIVE_LIMIT = 1e-2  # between two orders of the same sums in bfloat16
Check = Callable[[str, StandIn], dict[str, Any]]


@contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def is_dry(where: StandIn) -> bool:
    return where.device == "cpu"


def made(shape: Shape, where: StandIn, seed: int = 0) -> Operands:
    return operands(shape.small() if is_dry(where) else shape, where.device, seed)


def assert_same(name: str, first: Sequence[Tensor], again: Sequence[Tensor]) -> None:
    """Bit for bit, and finite but for the lse of empty rows."""
    for index, (x, y) in enumerate(zip(first, again, strict=True)):
        assert not x.isnan().any(), f"{name}: result {index} holds NaN"
        differing = int((x != y).sum())
        assert differing == 0, f"{name}: result {index} differs in {differing} elements"


def disturb(where: StandIn) -> None:
    """Other work beside the next call, so that its blocks start in another order."""
    with where.stream():
        x = torch.ones(512, 512, device=where.device, dtype=torch.bfloat16)
        for _ in range(2):
            x = (x @ x) * 1e-3


def repeat(name: str, where: StandIn, call: Callable[[], tuple[Tensor, ...]]) -> None:
    """The same call many times, poisoned memory and other work between: one result."""
    first = call()
    for index in range(DRY_REPEATS if is_dry(where) else REPEATS):
        if index % 4 == 1:
            disturb(where)
        if index % 16 == 2:
            where.poison()
        assert_same(f"{name}, repeat {index}", first, call())


def forward_repeats(shape: Shape) -> Check:
    def check(backend: str, where: StandIn) -> dict[str, Any]:
        data = made(shape, where)
        with torch.no_grad():
            repeat(shape.name, where, lambda: data.forward(backend))
        return {}

    return check


def backward_repeats(shape: Shape) -> Check:
    """Deterministic gradients do not change; the free ones stay within rounding of them."""

    def check(backend: str, where: StandIn) -> dict[str, Any]:
        data = made(shape, where)
        with deterministic():
            repeat(shape.name, where, lambda: data.train(backend))
            settled = data.train(backend)
        free = data.train(backend)
        worst = max(relative_error(x, y) for x, y in zip(free[2:], settled[2:], strict=True))
        assert worst <= RELATIVE_LIMIT, f"free gradients differ by {worst:.2g}"
        return {"largest_difference_of_free_gradients": worst}

    return check


def replays_follow_their_inputs(shape: Shape, training: bool) -> Check:
    """A captured graph, fed other inputs in place, equals the eager call on them."""

    def check(backend: str, where: StandIn) -> dict[str, Any]:
        data = made(shape, where)
        values = {seed: made(shape, where, seed).leaves for seed in (1, 0)}

        def call() -> tuple[Tensor, ...]:
            return data.train(backend) if training else data.forward(backend)

        with deterministic(), torch.set_grad_enabled(training):
            replay, results = where.capture(call)
            for leaves in values.values():
                for name, leaf in data.leaves.items():
                    leaf.data.copy_(leaves[name].data)
                replay()
                where.synchronize()
                replayed = [x.clone() for x in results]
                assert_same(f"{shape.name} replayed", replayed, call())
        return {}

    return check


def replayed_decode(backend: str, where: StandIn) -> dict[str, Any]:
    """Token by token through one graph: only cache_seqlens, q, k and v change between replays."""
    heads, dim, room = 2, 64, 24 if is_dry(where) else 700

    def zeros(count: int, length: int) -> Tensor:
        return torch.zeros(2, count, length, dim, device=where.device, dtype=torch.bfloat16)

    def cache() -> dict[str, Tensor]:
        return {"k_cache": zeros(heads, room), "v_cache": zeros(heads, room)}

    tokens = {"q": zeros(4 * heads, 1), "k": zeros(heads, 1), "v": zeros(heads, 1)}
    lengths = torch.zeros(2, device=where.device, dtype=torch.int32)
    captured, eager = cache(), cache()

    def step(caches: dict[str, Tensor]) -> tuple[Tensor, ...]:
        tensors: dict[str, Any] = {**tokens, **caches, "cache_seqlens": lengths}
        return (dk.attention_decode(**tensors, rope=True, backend=backend),)

    with torch.no_grad():
        replay, results = where.capture(lambda: step(captured))
        for length in range(0, room, 7):
            for x in tokens.values():
                x.normal_()
            lengths.fill_(length)
            replay()
            assert_same(f"token at {length}", results, step(eager))
    assert_same("caches", list(captured.values()), list(eager.values()))
    return {}


def two_streams(backend: str, where: StandIn) -> dict[str, Any]:
    """Calls of two shapes on two streams at once equal the same calls alone."""
    pair = [made(shape, where) for shape in (SHAPES[0], SHAPES[2])]
    with deterministic():
        alone = [data.train(backend) for data in pair]
        where.synchronize()
        for index in range(DRY_REPEATS if is_dry(where) else REPEATS // 4):
            together = []
            for data in pair:
                with where.stream():
                    together.append(data.train(backend))
            where.synchronize()
            for first, again in zip(alone, together, strict=True):
                assert_same(f"round {index}", first, again)
    return {}


def other_device(backend: str, where: StandIn) -> dict[str, Any]:
    """Tensors of a device that is not the current one."""
    if where.num_devices() < 2:
        return {"not_run": "there is one device"}
    here = made(SHAPES[0], where)
    there = Operands(
        {name: x.detach().to("cuda:1").requires_grad_() for name, x in here.leaves.items()},
        here.grad_out.to("cuda:1"),
        here.options,
        None,
    )
    with deterministic():
        results = [x.to(where.device) for x in there.train(backend)]
        assert_same("device 1", here.train(backend), results)
    return {}


def refusal_leaves_all_well(backend: str, where: StandIn) -> dict[str, Any]:
    """Refused calls raise, and the next call gives what it gave before."""
    data = made(SHAPES[0], where)
    before = data.train(backend)[0]
    q, k, v = (data.leaves[name].detach() for name in ("q", "k", "v"))
    refused = {
        "softcap": lambda: dk.attention(q, k, v, softcap=5.0, backend=backend),
        "float64": lambda: dk.attention(q.double(), k.double(), v.double(), backend=backend),
        "head_dim": lambda: dk.attention(q[..., :7], k[..., :7], v, backend=backend),
    }
    reasons = {}
    for name, call in refused.items():
        try:
            call()
            reasons[name] = "served"
        except ValueError as error:
            reasons[name] = str(error)[:200]
        assert_same(f"after {name}", (before,), (data.train(backend)[0],))
    return {"refusals": reasons}


def compiled(backend: str, where: StandIn) -> dict[str, Any]:
    """torch.compile(fullgraph=True), forward and backward, equals eager."""
    if backend == SM80:
        return {"not_run": "compiled calls know the backends of the build alone"}
    data = made(SHAPES[2], where)
    leaves = tuple(data.leaves.values())

    def call(*tensors: Tensor) -> Tensor:
        return dk.attention(*tensors, backend=backend, **data.options)

    graph = torch.compile(call, fullgraph=True)
    with deterministic():
        out = graph(*leaves)
        grads = torch.autograd.grad(out, leaves, data.grad_out)
        eager = data.train(backend)
    assert_same("compiled", (eager[0], *eager[2:]), (out.detach(), *grads))
    return {}


CHECKS: dict[str, Check] = {
    "refusal_leaves_all_well": refusal_leaves_all_well,
    **{f"forward_repeats_{shape.name}": forward_repeats(shape) for shape in SHAPES},
    **{f"backward_repeats_{shape.name}": backward_repeats(shape) for shape in SHAPES},
    "graph_forward": replays_follow_their_inputs(SHAPES[0], training=False),
    "graph_packed": replays_follow_their_inputs(SHAPES[5], training=False),
    "graph_training": replays_follow_their_inputs(SHAPES[2], training=True),
    "graph_decode": replayed_decode,
    "two_streams": two_streams,
    "other_device": other_device,
    **FAR_CHECKS,
    "compiled": compiled,
}


def run_job(job: str, where: StandIn) -> dict[str, Any]:
    if job == "list":
        return {"checks": list(CHECKS), "backends": list(where.backends)}
    backend, name = job.split()
    return CHECKS[name](backend, where)
