"""`merge_attention`: one attention out of several over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from drope_kernels.call.interop import through_dlpack
from drope_kernels.call.options import A
from drope_kernels.call.validate_decode import check_parts


def merge_attention(outs: Sequence[A], lses: Sequence[A]) -> tuple[A, A]:
    """Join partial results of the same queries over disjoint keys.

    out = sum_n exp(lse_n - lse) out_n with lse = log sum_n exp(lse_n): what one call over all the
    keys would give. Differentiable in everything; parts that saw no key add nothing, whatever
    their out holds, and get gradient 0: rows whose lse is -inf, or +inf as FlashAttention-2 writes.

    One lse a part is all that is known of the size of its scores, and it is rounded: in float32 by
    up to |lse| / 2 ** 24, which is the relative error of the part's weight. That is 1e-3 at scores
    of 2e4 and 0.1 at 2e6; one call over all keys, decode's own splits included, has no such loss.

    Source: online softmax, arXiv 1805.02867; FlashAttention-2, section 3.1.

    Args:
        outs: N >= 1 tensors (..., S, Dv) of one dtype, or arrays, as `attention` returns them.
        lses: N tensors (..., S), natural log, float32 or float64.

    Returns:
        out (..., S, Dv) in the dtype of outs and lse (..., S); a row empty in every part has out 0
        and lse -inf.

    Raises:
        ValueError, TypeError: the lists are empty, differ in length, or their shapes disagree.
    """
    if isinstance(outs, list | tuple) and outs and not isinstance(outs[0], Tensor):
        return through_dlpack(merge_attention, locals())
    return _merge(outs, lses)


def _merge(outs: Any, lses: Any) -> Any:
    """`merge_attention` of tensors, which are yet to be checked."""
    check_parts(outs, lses)
    lse_parts = torch.stack(tuple(lses))  # (N, ..., S)
    unseen = lse_parts.isinf()
    lse_parts = lse_parts.masked_fill(unseen, -torch.inf)
    row_max = lse_parts.detach().amax(0)
    row_max = row_max.masked_fill(row_max == -torch.inf, 0.0)
    weight = torch.exp(lse_parts - row_max)
    row_sum = weight.sum(0)
    empty = row_sum == 0
    row_sum = row_sum.masked_fill(empty, 1.0)  # before the division: its gradient stays finite
    parts = torch.stack(tuple(outs)).to(weight.dtype).masked_fill(unseen.unsqueeze(-1), 0.0)
    out = (weight.unsqueeze(-1) * parts).sum(0) / row_sum.unsqueeze(-1)
    lse = (row_max + row_sum.log()).masked_fill(empty, -torch.inf)
    return out.to(outs[0].dtype), lse
