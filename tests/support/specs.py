"""A spec that the backends for GPUs serve, for tests to change one field of."""

from __future__ import annotations

import torch

from drope_kernels.spec.spec import AttentionSpec

SERVED = AttentionSpec(
    device="cuda",
    device_index=0,
    dtype=torch.bfloat16,
    batch=2,
    num_heads_q=8,
    num_heads_kv=2,
    seqlen_q=512,
    seqlen_kv=1024,
    head_dim=128,
    head_dim_v=128,
    causal=True,
    window=True,
    softcap=False,
    kv_range=True,
    row_scale=True,
    rotary_dim=64,
    interleaved=True,
    varlen=False,
    decode=False,
    needs_grad=True,
    deterministic=True,
    aligned=True,
)
