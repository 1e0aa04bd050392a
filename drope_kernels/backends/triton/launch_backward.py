"""Backward: the terms of the queries, then dk and dv, then dq and the gradient of the scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from drope_kernels.backends.lse_state import lse_of
from drope_kernels.backends.triton.backward import backward_kernel
from drope_kernels.backends.triton.backward_dq import backward_dq_kernel
from drope_kernels.backends.triton.config import (
    BackwardConfig,
    backward_config,
    backward_dq_config,
    delta_config,
    family_of,
)
from drope_kernels.backends.triton.delta import SavedTerms, delta_kernel
from drope_kernels.backends.triton.launch import (
    architecture_of,
    dot_precision,
    num_blocks,
    on_device_of,
    padded,
    short_rows,
    tma_of,
    with_tma,
)
from drope_kernels.backends.triton.params import (
    every_key_is_seen,
    every_query_sees,
    mask_params,
    range_params,
    rotary_params,
    rows_of,
    scale_params,
    shape_params,
)
from drope_kernels.backends.triton.schedule import tile_schedule
from drope_kernels.backends.triton.unspecialized import unspecialized
from drope_kernels.spec.layout import empty_grad_scale, empty_gradients
from drope_kernels.spec.spec import AttentionInputs

_TALLEST_TILE = 128  # of queries


def backward(
    inputs: AttentionInputs,
    out: Tensor,
    softmax_state: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    *,
    need_grad_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in the order and dtype of q, k, v; dscale (B, Hq, Sq), size 0 if unneeded.

    inputs.q and inputs.k are the rotated ones where the call rotates.
    """
    grad_q, grad_k, grad_v = empty_gradients(inputs, out)
    grad_scale = empty_grad_scale(inputs, needed=need_grad_scale)
    lse = lse_of(softmax_state)
    with on_device_of(lse):
        call = _Call(inputs, short_rows(grad_out))
        if lse.numel():
            call.find_terms(short_rows(out), lse.contiguous(), grad_lse)
        if inputs.k.numel():
            call.find_grad_keys(grad_k, grad_v)
        if lse.numel():
            call.find_grad_queries(grad_q, grad_scale if grad_scale.numel() else None)
    return grad_q, grad_k, grad_v, grad_scale


class _Call:
    """What the three kernels of a call are given."""

    def __init__(self, inputs: AttentionInputs, grad_out: Tensor) -> None:
        self.inputs = inputs
        self.q, self.k, self.v = map(short_rows, (inputs.q, inputs.k, inputs.v))
        self.grad_out = grad_out
        self.shape = shape_params(inputs)
        self.mask = mask_params(inputs)
        self.ranges = range_params(inputs)
        self.scale = scale_params(inputs)
        self.dims = padded(self.q.shape[3]), padded(self.v.shape[3])
        self.architecture = architecture_of(grad_out)
        self.terms = self._empty_terms()

    def _empty_terms(self) -> Tensor:
        """Has room for the last tile to be read whole, and rows that are aligned."""
        heads, seqlen = self.shape.batch * self.shape.num_heads_q, self.shape.seqlen_q
        num_terms = 2 if self.scale.rows is None else 3
        columns = -(-(seqlen + _TALLEST_TILE) // 16) * 16
        size = (num_terms, heads, columns)
        return torch.empty(size, dtype=torch.float32, device=self.q.device)

    def saved_terms(self) -> SavedTerms:
        return SavedTerms(self.terms, self.terms.stride(0), self.terms.stride(1))

    def find_terms(self, out: Tensor, lse: Tensor, grad_lse: Tensor | None) -> None:
        shape, head_dim_v = self.shape, out.shape[3]
        config = delta_config(self.dims[1])
        num_tiles = num_blocks(shape.seqlen_q, config.BLOCK_Q, shape.num_seqs)
        delta_kernel[(num_tiles * shape.batch * shape.num_heads_q,)](
            rows_of(out),
            rows_of(self.grad_out),
            lse,
            None if grad_lse is None else grad_lse.contiguous(),
            self.saved_terms(),
            unspecialized(shape),
            unspecialized(self.mask),
            self.ranges,
            self.scale,
            num_tiles,
            HEAD_DIM_V=head_dim_v,
            BLOCK_DIM_V=self.dims[1],
            **config._asdict(),
        )

    def find_grad_keys(self, grad_k: Tensor, grad_v: Tensor) -> None:
        shape, (dim, dim_v) = self.shape, self.dims
        use_tma = with_tma(self.architecture, self.q, self.grad_out)
        has_blind_queries = not every_query_sees(self.inputs)
        config = self.config(backward_config, has_blind_queries, use_tma)
        block = config.BLOCK_Q
        schedule = tile_schedule(
            num_blocks(shape.seqlen_kv, config.BLOCK_KV, shape.num_seqs),
            1,
            shape.batch * shape.num_heads_kv,
            _bytes_of_head(self.q, self.grad_out) * (shape.num_heads_q // shape.num_heads_kv),
        )
        backward_kernel[(schedule.num_tiles * shape.batch * shape.num_heads_kv,)](
            *self.operands(),
            tma_of(self.q, block, dim) if use_tma else None,
            tma_of(self.grad_out, block, dim_v) if use_tma else None,
            self.terms_tma(block) if use_tma else None,
            rows_of(grad_k),
            rows_of(grad_v),
            *self.parameters(),
            unspecialized(schedule),
            HAS_BLIND_QUERIES=has_blind_queries,
            **self.constants(),
            **config._asdict(),
        )

    def find_grad_queries(self, grad_q: Tensor, grad_scale: Tensor | None) -> None:
        shape, (dim, dim_v) = self.shape, self.dims
        use_tma = with_tma(self.architecture, self.k, self.v)
        has_unseen_keys = not every_key_is_seen(self.inputs)
        config = self.config(backward_dq_config, has_unseen_keys, use_tma)
        block = config.BLOCK_KV
        schedule = tile_schedule(
            num_blocks(shape.seqlen_q, config.BLOCK_Q, shape.num_seqs),
            shape.num_heads_q // shape.num_heads_kv,
            shape.batch * shape.num_heads_kv,
            _bytes_of_head(self.k, self.v),
        )
        backward_dq_kernel[(schedule.num_tiles * shape.batch * shape.num_heads_q,)](
            *self.operands(),
            tma_of(self.k, block, dim) if use_tma else None,
            tma_of(self.v, block, dim_v) if use_tma else None,
            rows_of(grad_q),
            grad_scale,
            *self.parameters(),
            unspecialized(schedule),
            HAS_UNSEEN_KEYS=has_unseen_keys,
            **self.constants(),
            **config._asdict(),
        )

    def config(
        self, choose: Callable[..., BackwardConfig], leaves_rows_out: bool, use_tma: bool
    ) -> BackwardConfig:
        has_extras = self.scale.rows is not None or self.inputs.softcap is not None
        by_pointer = family_of(self.architecture) == 90 and not use_tma
        is_heavy = has_extras or leaves_rows_out or by_pointer
        return choose(self.q.dtype, max(self.dims), use_tma=use_tma, is_heavy=is_heavy)

    def operands(self) -> tuple[Any, ...]:
        tensors = (self.q, self.k, self.v, self.grad_out)
        return *map(rows_of, tensors), self.saved_terms()

    def terms_tma(self, block: int) -> TensorDescriptor | None:
        """Zeros behind the last query. TMA begins at multiples of 16 bytes, sequences anywhere."""
        if self.shape.num_seqs > 0:
            return None
        num_terms, heads, _ = self.terms.shape
        size = [num_terms, heads, self.shape.seqlen_q]
        return TensorDescriptor(self.terms, size, list(self.terms.stride()), [1, 1, block])

    def parameters(self) -> tuple[Any, ...]:
        return (
            unspecialized(self.shape),
            unspecialized(self.mask),
            self.ranges,
            self.scale,
            rotary_params(self.inputs.rotation),
        )

    def constants(self) -> dict[str, Any]:
        rotation = self.inputs.rotation
        return {
            "HEAD_DIM": self.q.shape[3],
            "HEAD_DIM_V": self.v.shape[3],
            "BLOCK_DIM": self.dims[0],
            "BLOCK_DIM_V": self.dims[1],
            "ROTARY_DIM": 0 if rotation is None else rotation.dim,
            "INTERLEAVED": rotation is not None and rotation.interleaved,
            "HAS_SOFTCAP": self.inputs.softcap is not None,
            "PRECISION": dot_precision(self.q.dtype),
        }


def _bytes_of_head(*tensors: Tensor) -> int:
    return sum(x.shape[2] * x.shape[3] * x.element_size() for x in tensors)
