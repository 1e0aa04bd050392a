"""What the calls of a case are given, and the gate that their results must pass."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.gpu import exact
from bench.gpu.peer_calls import Attention
from bench.gpu.shapes import PeerCase


def make_inputs(case: PeerCase, device: str, dtype: torch.dtype) -> exact.Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def draw(num_heads: int, seqlen: int) -> Tensor:
        shape = (case.batch, num_heads, seqlen, case.head_dim)
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    q, grad_out = (draw(case.num_heads_q, case.seqlen_q) for _ in range(2))
    k, v = (draw(case.num_heads_kv, case.seqlen_kv) for _ in range(2))
    return exact.Inputs(q, k, v, grad_out, case.causal)


def gate(errors: dict[str, float]) -> dict[str, float]:
    """Raises ValueError when a result is wrong: it is then not timed."""
    if not exact.within_limit(list(errors.values())):
        raise ValueError(f"wrong result, not timed: relative errors {errors}")
    return errors


def run_forward(inputs: exact.Inputs, call: Attention) -> tuple[Tensor, list[Tensor]]:
    """Output with its graph, and the leaves q, k, v."""
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    q, k, v = leaves
    return call(q, k, v), leaves
