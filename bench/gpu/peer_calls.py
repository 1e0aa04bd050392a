"""The peers: torch's fused attentions, FlexAttention, and flash-attn 3 and 4 where importable."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu.shapes import PeerCase

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, H, S, D) all round
MAX_FLEX_LENGTH = 32_768  # its block mask grows with the square of the length


@dataclass(frozen=True)
class Peer:
    """make(case) gives the call for one shape, or raises what the report then says."""

    name: str
    make: Callable[[PeerCase], Attention]


def sdpa(backend: SDPBackend) -> Callable[[PeerCase], Attention]:
    def make(case: PeerCase) -> Attention:
        grouped = case.num_heads_q != case.num_heads_kv

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    q, k, v, is_causal=case.causal, enable_gqa=grouped
                )

        return call

    return make


def flex(case: PeerCase) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.seqlen_q > MAX_FLEX_LENGTH:
        raise NotImplementedError(f"not asked beyond {MAX_FLEX_LENGTH} queries")
    torch.compiler.reset()  # one fresh compilation a shape, within the recompile limit
    mask = None
    if case.causal:
        mask = create_block_mask(
            lambda b, h, q_index, kv_index: q_index >= kv_index,
            None,
            None,
            case.seqlen_q,
            case.seqlen_kv,
            device="cuda",
        )
    grouped = case.num_heads_q != case.num_heads_kv
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=grouped)


def flash_attn(module_names: tuple[str, ...]) -> Callable[[PeerCase], Attention]:
    """flash-attn's own layout is (B, S, H, D); the transposed views cost nothing."""

    def make(case: PeerCase) -> Attention:
        module = import_first(module_names)
        function = module.flash_attn_func
        if case.is_decode:  # the entry that splits the keys, where there is one
            function = getattr(module, "flash_attn_with_kvcache", function)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=case.causal)
            out = result[0] if isinstance(result, tuple) else result
            return out.transpose(1, 2)

        return call

    return make


def import_first(module_names: tuple[str, ...]) -> Any:
    reasons = []
    for name in module_names:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(f"{name}: {error}")
    raise ImportError("; ".join(reasons))


PEERS = [
    Peer("sdpa_cudnn", sdpa(SDPBackend.CUDNN_ATTENTION)),
    Peer("sdpa_flash", sdpa(SDPBackend.FLASH_ATTENTION)),
    Peer("flash_attn_3", flash_attn(("flash_attn_interface", "flash_attn_3.flash_attn_interface"))),
    Peer("flash_attn_4", flash_attn(("flash_attn.cute",))),
    Peer("flex", flex),
]


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, H, S, D) rotated in float32 with (S, D/2) tables, rounded once."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


def rotary_tables(seqlen: int, head_dim: int, device: str) -> tuple[Tensor, Tensor]:
    frequency = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(seqlen, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float().to(device), angle.sin().float().to(device)
