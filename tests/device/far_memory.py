"""Tensors of more than 2^31 elements, and more batch rows than a grid's second dimension holds.

A call whose work lies at the far end must equal the same work cut out and put at the near end,
whose indices are small; the named cases say that those are right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import drope_kernels as dk
from bench.gpu.accelerator import StandIn
from bench.gpu.exact import relative_error

DIM = 128
FAR = (1 << 24) + 192  # rows of 128 channels: just over 2^31 elements
NEAR = 512  # rows at the far end that are compared
ROWS = 70_000  # batch rows: over 65535
RELATIVE_LIMIT = 1e-2


def sizes(where: StandIn) -> tuple[int, int, int]:
    """FAR, NEAR, ROWS, or a dry run's."""
    return (FAR, NEAR, ROWS) if where.device == "cuda" else (300, 40, 50)


def normal(where: StandIn, *size: int) -> Tensor:
    return torch.randn(size, device=where.device, dtype=torch.bfloat16)


def train(backend: str, leaves: tuple[Tensor, ...], grad: Tensor, **options: Any) -> list[Tensor]:
    """out, dq, dk, dv."""
    leaves = tuple(x.detach().requires_grad_() for x in leaves)
    out = dk.attention(*leaves, backend=backend, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def compare(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    errors = {name: relative_error(far, near) for name, (far, near) in pairs.items()}
    wrong = {name: error for name, error in errors.items() if not error <= RELATIVE_LIMIT}
    assert not wrong, f"the far end differs: {wrong}"
    return {"relative_differences": errors}


def far_keys(backend: str, where: StandIn) -> dict[str, Any]:
    """The last keys of a long row; the gradients of all others are 0."""
    length, near, _ = sizes(where)
    q, grad = normal(where, 1, 1, 64, DIM), normal(where, 1, 1, 64, DIM)
    k, v = normal(where, 1, 1, length, DIM), normal(where, 1, 1, length, DIM)
    start = torch.tensor([length - near], dtype=torch.int32, device=where.device)
    far = train(backend, (q, k, v), grad, causal=False, kv_start=start)
    end = slice(length - near, length)
    cut = train(backend, (q, k[:, :, end], v[:, :, end]), grad, causal=False)
    for name, x in (("dk", far[2]), ("dv", far[3])):
        assert not x[:, :, : length - near].any(), f"{name} of keys that nobody sees is not 0"
    pairs = {"out": (far[0], cut[0]), "dq": (far[1], cut[1])}
    pairs |= {"dk": (far[2][:, :, end], cut[2]), "dv": (far[3][:, :, end], cut[3])}
    return compare(pairs)


def far_queries(backend: str, where: StandIn) -> dict[str, Any]:
    """Rows do not depend on each other: the last queries equal a call of their own."""
    length, near, _ = sizes(where)
    q, grad = normal(where, 1, 1, length, DIM), normal(where, 1, 1, length, DIM)
    k, v = normal(where, 1, 1, 192, DIM), normal(where, 1, 1, 192, DIM)
    far = train(backend, (q, k, v), grad, causal=False)
    end = slice(length - near, length)
    cut = train(backend, (q[:, :, end], k, v), grad[:, :, end], causal=False)
    return compare({"out": (far[0][:, :, end], cut[0]), "dq": (far[1][:, :, end], cut[1])})


def far_batch(backend: str, where: StandIn) -> dict[str, Any]:
    """Many batch rows, position-free and rotary; offsets over 2^31 by the batch's stride alone."""
    length, _, rows = sizes(where)
    per_row = -(-length // rows)  # tokens; rows * per_row * DIM exceeds 2^31 elements
    shape = (rows, 1, per_row, DIM)
    q, k, v, grad = (normal(where, *shape) for _ in range(4))
    found = {}
    for rope in (False, True):
        far = train(backend, (q, k, v), grad, rope=rope)
        last = slice(rows - 3, rows)
        cut = train(backend, (q[last], k[last], v[last]), grad[last], rope=rope)
        pairs = zip(("out", "dq", "dk", "dv"), far, cut, strict=True)
        found[f"rope {rope}"] = compare({name: (x[last], y) for name, x, y in pairs})
        del far
    return found


FAR_CHECKS: dict[str, Callable[[str, StandIn], dict[str, Any]]] = {
    "far_keys": far_keys,
    "far_queries": far_queries,
    "far_batch": far_batch,
}
