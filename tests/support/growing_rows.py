"""Rows whose scores grow along the keys: a running softmax moves its reference again and again."""

from __future__ import annotations

import torch

from drope_kernels import attention


def check_growing_rows() -> None:
    """AssertionError unless the CPU agrees with float64 where each block outgrows the last."""
    length, dim = 640, 64
    generator = torch.Generator().manual_seed(1)
    q = torch.ones(1, 1, 32, dim, dtype=torch.bfloat16)
    steps = torch.arange(length) // 64 * 4.0
    k = steps[None, None, :, None].expand(1, 1, length, dim).bfloat16()
    v = torch.randn(1, 1, length, dim, generator=generator).bfloat16()
    # One key a block that almost ties with the next block's: the earlier output still counts.
    k[:, :, 63::64] += torch.tensor(4.0, dtype=torch.bfloat16)
    out, lse = attention(q, k, v, causal=False, return_lse=True, backend="cpu")
    scores = (q.double() @ k.double().mT) * dim**-0.5
    expected = scores.softmax(-1) @ v.double()
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=2**-8)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-5)
