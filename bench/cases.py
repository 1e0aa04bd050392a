"""What is measured: one `BenchCase` per row of the tables."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class BenchCase:
    dtype: str
    head_dim: int
    seqlen: int
    num_heads_q: int = 8
    num_heads_kv: int = 8
    causal: bool = True
    rope: bool = False
    backward: bool = False  # forward + backward
    threads: int = 1

    @property
    def name(self) -> str:
        parts = [
            "train" if self.backward else "forward",
            self.dtype,
            f"D{self.head_dim}",
            f"S{self.seqlen}",
            f"H{self.num_heads_q}" + (f":{self.num_heads_kv}" if self.grouped else ""),
            "causal" if self.causal else "full",
        ]
        parts += ["rope"] if self.rope else []
        parts += [f"{self.threads}threads"] if self.threads > 1 else []
        return "-".join(parts)

    @property
    def grouped(self) -> bool:
        return self.num_heads_kv != self.num_heads_q

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def flops(self) -> float:
        """Useful operations: two products of 2 S S D per head, causal counted as half, and
        5 / 2 of the forward for the backward."""
        forward = 4.0 * self.num_heads_q * self.seqlen**2 * self.head_dim
        return forward * (0.5 if self.causal else 1.0) * (3.5 if self.backward else 1.0)


def tensors(case: BenchCase, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v: (1, H, S, D) standard normal."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> torch.Tensor:
        shape = (1, heads, case.seqlen, case.head_dim)
        return torch.randn(shape, generator=generator).to(case.torch_dtype)

    return draw(case.num_heads_q), draw(case.num_heads_kv), draw(case.num_heads_kv)


def grid(*, backward: bool) -> list[BenchCase]:
    """The cases of one direction: short to long, then what changes with heads, mask and rope."""
    cases: list[BenchCase] = []
    for dtype in ("fp32", "bf16"):
        for head_dim in (64, 128):
            base = BenchCase(dtype, head_dim, 4096, backward=backward)
            lengths = (512, 1024, 4096) if backward else (128, 512, 1024, 4096, 8192)
            cases += [replace(base, seqlen=length) for length in lengths]
            cases += [replace(base, rope=True), replace(base, num_heads_kv=2)]
            cases += [replace(base, seqlen=2048, causal=False)]
        cases.append(BenchCase(dtype, 64, 4096, backward=backward, threads=2))
        # A batch of 8 in a ViT-B: 12 heads, 14 x 14 patches and a class token.
        vit = BenchCase(dtype, 64, 197, num_heads_q=96, num_heads_kv=96, causal=False)
        cases.append(replace(vit, backward=backward))
    return cases


def long_grid() -> list[BenchCase]:
    """One head, up to 131072 keys: memory and throughput where a score matrix would not fit."""
    return [
        BenchCase(dtype, 64, length, num_heads_q=1, num_heads_kv=1, backward=backward)
        for dtype in ("fp32", "bf16")
        for backward in (False, True)
        for length in (16384, 32768, 65536, 131072)
    ]


@dataclass(frozen=True)
class DecodeCase:
    """One new token of a row that holds `seqlen` keys with it: bound by reading them."""

    dtype: str
    head_dim: int
    seqlen: int = 32768
    num_heads_q: int = 8
    num_heads_kv: int = 8
    rope: bool = False  # of a raw cache: keys rotate when read
    threads: int = 1

    @property
    def name(self) -> str:
        grouped = self.num_heads_kv != self.num_heads_q
        parts = [
            "decode",
            self.dtype,
            f"D{self.head_dim}",
            f"S{self.seqlen}",
            f"H{self.num_heads_q}" + (f":{self.num_heads_kv}" if grouped else ""),
        ]
        parts += ["rope"] if self.rope else []
        parts += [f"{self.threads}threads"] if self.threads > 1 else []
        return "-".join(parts)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def num_bytes(self) -> int:
        """Of the keys and values, each read once."""
        elements = 2 * self.num_heads_kv * self.seqlen * self.head_dim
        return elements * self.torch_dtype.itemsize

    @property
    def flops(self) -> float:
        """Two products of 2 S D per query head."""
        return 4.0 * self.num_heads_q * self.seqlen * self.head_dim


def decode_tensors(case: DecodeCase, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """q (1, Hq, 1, D), k and v (1, Hkv, S, D): standard normal."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(case.num_heads_q, 1)] + [(case.num_heads_kv, case.seqlen)] * 2
    return tuple(
        torch.randn((1, *shape, case.head_dim), generator=generator).to(case.torch_dtype)
        for shape in shapes
    )


def decode_grid() -> list[DecodeCase]:
    """MHA and GQA from memory, then a shorter row, rotation, and two threads."""
    cases: list[DecodeCase] = []
    for dtype in ("fp32", "bf16"):
        for head_dim in (64, 128):
            base = DecodeCase(dtype, head_dim)
            cases += [base, replace(base, num_heads_kv=2), replace(base, seqlen=4096)]
            cases += [replace(base, rope=True), replace(base, threads=2)]
    return cases
