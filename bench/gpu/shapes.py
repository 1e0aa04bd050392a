"""The shapes at which peers are measured, and what a call of each costs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

TOKENS = 16_384  # per batch where a length allows it
CHANNELS = 2048  # num_heads_q * head_dim
HEAD_DIMS = (128, 64)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768)
BYTES = 2  # bfloat16


@dataclass(frozen=True)
class PeerCase:
    """q (batch, num_heads_q, seqlen_q, head_dim), k and v (batch, num_heads_kv, seqlen_kv, ...)."""

    batch: int
    num_heads_q: int
    num_heads_kv: int
    seqlen_q: int
    seqlen_kv: int
    head_dim: int
    causal: bool
    backward: bool  # measure the backward pass as well

    @property
    def label(self) -> str:
        kind = "decode" if self.is_decode else "causal" if self.causal else "full"
        heads = f"H{self.num_heads_q}"
        if self.num_heads_kv != self.num_heads_q:
            heads += f"/{self.num_heads_kv}"
        return f"{kind} D{self.head_dim} B{self.batch} {heads} S{self.seqlen_kv}"

    @property
    def is_decode(self) -> bool:
        return self.seqlen_q == 1

    @property
    def forward_flops(self) -> float:
        """Two products of 2 flops; causal counts the visible half."""
        scores = self.batch * self.num_heads_q * self.seqlen_q * self.seqlen_kv
        return 4 * scores * self.head_dim * (0.5 if self.causal else 1.0)

    @property
    def backward_flops(self) -> float:
        """Five products against two."""
        return 2.5 * self.forward_flops

    @property
    def kv_bytes(self) -> int:
        return 2 * self.batch * self.num_heads_kv * self.seqlen_kv * self.head_dim * BYTES

    @property
    def tensor_bytes(self) -> int:
        """q, k, v, out and, for the backward, their gradients."""
        q_bytes = self.batch * self.num_heads_q * self.seqlen_q * self.head_dim * BYTES
        forward = 2 * q_bytes + self.kv_bytes
        return 2 * forward if self.backward else forward


def prefill(
    seqlen: int,
    head_dim: int,
    *,
    causal: bool = True,
    kv_group: int = 1,
    num_heads: int | None = None,
    backward: bool = True,
) -> PeerCase:
    heads = CHANNELS // head_dim if num_heads is None else num_heads
    batch = max(1, TOKENS // seqlen)
    return PeerCase(batch, heads, heads // kv_group, seqlen, seqlen, head_dim, causal, backward)


def decode(batch: int, seqlen: int, head_dim: int, num_heads_kv: int) -> PeerCase:
    return PeerCase(batch, 32, num_heads_kv, 1, seqlen, head_dim, False, False)


def decode_cases() -> list[PeerCase]:
    """Caches of 256 MiB and more, with 4:1 and without grouped heads."""
    return [
        decode(batch, seqlen, dim, heads)
        for dim in HEAD_DIMS
        for batch, seqlen, heads in (
            (2 * 128 // dim, 32_768, 8),
            (16 * 128 // dim, 8192, 8),
            (4 * 128 // dim, 8192, 32),
            (1 * 128 // dim, 131_072, 8),
        )
    ]


def rope_cases() -> list[PeerCase]:
    """Where the peers' separate rotary kernel is compared: causal, up to 4k."""
    lengths = [length for length in LENGTHS if length <= 4096]
    return [prefill(length, dim) for dim, length in product(HEAD_DIMS, lengths)]
