"""Ours and the peers as one kind of call, and what each must return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import drope_kernels as dk
from bench.gpu import exact
from bench.gpu.cases import GpuCase
from bench.gpu.peer_calls import PEERS, Attention, rotary_tables, rotate_half_split


@dataclass(frozen=True)
class Contender:
    """rope: whether its result is that of rotated q and k."""

    name: str
    make: Callable[[exact.Inputs], Attention]
    rope: bool


def contenders(case: GpuCase, backends: list[str], flex: bool) -> list[Contender]:
    """Ours first; `flex` alone is the peer of its own group, since it compiles at every shape."""
    found = [Contender(name, ours(case, name, case.rope), case.rope) for name in backends]
    if case.rope:
        found += [Contender(f"{name}_no_rope", ours(case, name, False), False) for name in backends]
    for peer in PEERS:
        if (peer.name == "flex") == flex and case.page_size is None:
            make = peer.make
            found.append(Contender(peer.name, of_peer(case, make), case.rope))
    return found


def ours(case: GpuCase, backend: str, rope: bool) -> Callable[[exact.Inputs], Attention]:
    if case.shape.is_decode:
        return lambda inputs: our_decode(case, inputs, backend, rope)
    return lambda inputs: (
        lambda q, k, v: dk.attention(q, k, v, causal=case.shape.causal, rope=rope, backend=backend)
    )


def our_decode(case: GpuCase, inputs: exact.Inputs, backend: str, rope: bool) -> Attention:
    """Attends to a full cache of unrotated keys; the arguments k and v are the cache's own."""
    batch, _, seqlen, _ = inputs.k.shape
    device = inputs.k.device
    ends = torch.full((batch,), seqlen, device=device, dtype=torch.int32)
    caches, table = [inputs.k, inputs.v], None
    if case.page_size is not None:
        pages = seqlen // case.page_size
        order = torch.randperm(batch * pages, device=device).view(batch, pages)
        caches = [in_pages(x, order, case.page_size) for x in caches]
        table = order.int()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        del k, v
        return dk.attention_decode(
            q, *caches, cache_seqlens=ends, page_table=table, rope=rope, backend=backend
        )

    return call


def in_pages(cache: Tensor, order: Tensor, page_size: int) -> Tensor:
    """(B, Hkv, S, D) to (num_pages, Hkv, page_size, D), row b's pages at order[b]."""
    pool = cache.new_empty((order.numel(), cache.shape[1], page_size, cache.shape[3]))
    pool[order] = cache.unflatten(2, (-1, page_size)).transpose(1, 2)
    return pool


def of_peer(case: GpuCase, make: Callable[..., Attention]) -> Callable[[exact.Inputs], Attention]:
    """The peer, with the rotation as one compiled kernel in front where the case rotates."""

    def build(inputs: exact.Inputs) -> Attention:
        attend = make(case.shape)
        if not case.rope:
            return attend
        rotate = rotation(inputs)
        if inputs.q.is_cuda:
            torch.compiler.reset()  # one fresh compilation a shape, within the recompile limit
            rotate = torch.compile(rotate, dynamic=False)
        return lambda q, k, v: attend(*rotate(q, k), v)

    return build


def rotation(inputs: exact.Inputs) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Rotates q and k at the positions they have in the case; the last query is the last key's."""
    seqlen_q, seqlen_kv, dim = inputs.q.shape[2], inputs.k.shape[2], inputs.k.shape[3]
    cos, sin = rotary_tables(seqlen_kv, dim, str(inputs.k.device))
    first = seqlen_kv - seqlen_q

    def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        rotated_q = rotate_half_split(q, cos[first:], sin[first:])
        return rotated_q, rotate_half_split(k, cos, sin)

    return rotate


def expected_inputs(inputs: exact.Inputs, rope: bool) -> exact.Inputs:
    """What plain attention has to be given for the same result."""
    if not rope:
        return inputs
    q, k = rotation(inputs)(inputs.q, inputs.k)
    return exact.Inputs(q, k, inputs.v, inputs.grad_out, inputs.causal)


def restore(inputs: exact.Inputs, rope: bool) -> Callable[[Tensor], Tensor]:
    """Undoes the rotation in gradients (..., S, D); for as many queries as keys."""
    if not rope:
        return lambda gradient: gradient
    cos, sin = rotary_tables(inputs.k.shape[2], inputs.k.shape[3], str(inputs.k.device))
    return lambda gradient: rotate_half_split(gradient, cos, -sin)
