"""Calls of the Triton backend on tensors without values: one name, one call of realistic size.

A name is STEP-DTYPE-DIM-FEATURE, "forward-bfloat16-128-rope", or with other sizes behind it
STEP-DTYPE-DIM-FEATURE-BATCHxSEQLEN. `every_call` reaches all that the configuration tables hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from drope_kernels.spec.spec import AttentionInputs, DecodeInputs, Rotation

DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (16, 32, 64, 80, 128, 256)
NUM_HEADS_Q, NUM_HEADS_KV = 16, 4
ATTENTION = ("full", "causal", "rope", "ranges", "packed", "softcap", "rows")
STEPS = {
    "forward": ATTENTION,
    "training": ATTENTION,
    "decode": ("causal", "rope", "rotated", "pages", "chunk", "prompt"),
}


@dataclass(frozen=True)
class Size:
    batch: int
    seqlen: int


def every_call(step: str, dtype: str) -> tuple[str, ...]:
    return tuple(
        f"{step}-{dtype}-{dim}-{feature}" for dim, feature in product(HEAD_DIMS, STEPS[step])
    )


def prepare(name: str, backend: Any) -> Callable[[], object]:
    """What makes the call, its tensors there already."""
    step, dtype_name, dim, feature, *sizes = name.split("-")
    dtype = getattr(torch, dtype_name)
    size = Size(*map(int, sizes[0].split("x"))) if sizes else Size(4, 4096)
    if step == "decode":
        decoding = decode_inputs(dtype, int(dim), feature, size)
        return lambda: backend.decode(decoding)
    inputs = attention_inputs(dtype, int(dim), feature, size)
    if step == "forward":
        return lambda: backend.forward(inputs, save_prepared=False)
    return lambda: train(inputs, backend)


def train(inputs: AttentionInputs, backend: Any) -> None:
    out, lse, softmax_state, q, k = backend.forward(inputs, save_prepared=True)
    if inputs.rotation is not None:
        inputs = replace(inputs, q=q, k=k)
    need_grad_scale = isinstance(inputs.scale, Tensor)
    grads = torch.empty_like(out), torch.empty_like(lse)
    backend.backward(inputs, out, softmax_state, *grads, need_grad_scale=need_grad_scale)


def values(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rotation(dim: int, *, interleaved: bool = False) -> Rotation:
    turns = values(2, 1, dim // 2, dtype=torch.float32)
    return Rotation(turns, interleaved, 1.0, None, None)


def attention_inputs(dtype: torch.dtype, dim: int, feature: str, size: Size) -> AttentionInputs:
    q = values(size.batch, NUM_HEADS_Q, size.seqlen, dim, dtype=dtype)
    k, v = (values(size.batch, NUM_HEADS_KV, size.seqlen, dim, dtype=dtype) for _ in range(2))
    ints = values(size.batch, dtype=torch.int32)
    changes: dict[str, dict[str, Any]] = {
        "full": {"causal": False},
        "causal": {},
        "rope": {"rotation": rotation(dim)},
        "ranges": {"window": 1024, "q_start": ints, "kv_start": ints, "kv_end": ints},
        "packed": packed(q, k, v),
        "softcap": {"softcap": 30.0, "causal": False},
        "rows": {
            "scale": values(size.batch, NUM_HEADS_Q, size.seqlen, dtype=torch.float32),
            "rotation": rotation(dim, interleaved=True),
        },
    }
    plain = AttentionInputs(q, k, v, dim**-0.5, True, None, None, 0, None, None, None)
    return replace(plain, **changes[feature])


def packed(*operands: Tensor) -> dict[str, Any]:
    """The rows of the batch as sequences one after the other."""
    q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in operands)
    ends = values(len(operands[0]) + 1, dtype=torch.int32)
    changes = {"q": q, "k": k, "v": v, "rotation": rotation(q.shape[-1])}
    return {**changes, "cu_seqlens_q": ends, "cu_seqlens_k": ends}


def decode_inputs(dtype: torch.dtype, dim: int, feature: str, size: Size) -> DecodeInputs:
    num_new = {"chunk": 16, "prompt": 4096}.get(feature, 1)
    capacity, page_size = 2 * size.seqlen, 64
    q = values(size.batch, NUM_HEADS_Q, num_new, dim, dtype=dtype)
    caches, table = (size.batch, NUM_HEADS_KV, capacity), None
    if feature == "pages":
        pages_per_row = capacity // page_size
        caches = (size.batch * pages_per_row, NUM_HEADS_KV, page_size)
        table = values(size.batch, pages_per_row, dtype=torch.int32)
    k_cache, v_cache = (values(*caches, dim, dtype=dtype) for _ in range(2))
    k, v = (values(size.batch, NUM_HEADS_KV, num_new, dim, dtype=dtype) for _ in range(2))
    return DecodeInputs(
        q,
        k_cache,
        v_cache,
        k,
        v,
        values(size.batch, dtype=torch.int32),
        table,
        dim**-0.5,
        None,
        None,
        None,
        None if feature == "causal" else rotation(dim),
        feature == "rotated",
    )
