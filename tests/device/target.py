"""Small calls for the tools that watch a process: python -m device.target DEVICE BACKEND NAME...

Each name is one call of TARGETS; the last line says that all of them ran.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import drope_kernels as dk
from bench.gpu.sm80 import SM80, register_sm80
from device import DONE
from device.stress_shapes import Shape, operands


@dataclass(frozen=True)
class Target:
    """run(device, backend) makes one call."""

    run: Callable[[str, str], object]


def forward(shape: Shape) -> Target:
    def run(device: str, backend: str) -> object:
        with torch.no_grad():
            return operands(shape, device).forward(backend)

    return Target(run)


def train(shape: Shape) -> Target:
    return Target(lambda device, backend: operands(shape, device).train(backend))


def decode(
    batch: int, length: int, heads_q: int, heads_kv: int, dim: int, page: int | None = None
) -> Target:
    """A cache of `length` keys a row that takes one more; in shuffled pages or in one piece."""

    def run(device: str, backend: str) -> object:
        def normal(*size: int) -> Tensor:
            return torch.randn(size, device=device, dtype=torch.bfloat16)

        room = length + 64
        shape = (batch, heads_kv, room, dim)
        table = None
        if page is not None:
            pages = -(-room // page)
            order = torch.randperm(batch * pages)  # on the CPU: initcheck doubts torch's sorting
            table = order.view(batch, pages).int().to(device)
            shape = (batch * pages, heads_kv, page, dim)
        with torch.no_grad():
            return dk.attention_decode(
                normal(batch, heads_q, 1, dim),
                normal(*shape),
                normal(*shape),
                k=normal(batch, heads_kv, 1, dim),
                v=normal(batch, heads_kv, 1, dim),
                cache_seqlens=torch.full((batch,), length, device=device, dtype=torch.int32),
                page_table=table,
                rope=True,
                backend=backend,
            )

    return Target(run)


SMALL = Shape("small", batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=200, seqlen_kv=333)
LARGE = Shape("large", batch=4, num_heads_q=16, num_heads_kv=16, seqlen_q=4096, seqlen_kv=4096)
TARGETS = {
    "forward_128": forward(SMALL),
    "forward_64_rope": forward(replace(SMALL, head_dim=64, rope=True)),
    "forward_256": forward(replace(SMALL, head_dim=256)),
    "train_128_rope": train(replace(SMALL, rope=True)),
    "train_64_window_rows": train(replace(SMALL, head_dim=64, window=70, row_scale=True)),
    "train_96_packed": train(replace(SMALL, head_dim=96, seqlens=(130, 0, 77, 1))),
    "decode_pages": decode(3, 500, 8, 2, 128, page=16),
    "decode": decode(3, 777, 4, 4, 64),
    "large_train_128": train(LARGE),
    "large_train_64": train(replace(LARGE, head_dim=64, num_heads_q=32, num_heads_kv=32)),
    "large_decode": decode(16, 8192, 32, 8, 128),
}


def main(arguments: list[str]) -> None:
    device, backend, *names = arguments
    if backend == SM80:
        register_sm80()
    torch.manual_seed(0)
    for name in names:
        TARGETS[name].run(device, backend)
    if device == "cuda":
        torch.cuda.synchronize()
    print(DONE, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
