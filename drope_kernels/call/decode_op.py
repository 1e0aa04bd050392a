"""The op `drope::attention_decode`: append and attend in one call, caches written in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drope_kernels.call.check_values import check_decode_values
from drope_kernels.call.dispatch import select
from drope_kernels.call.ops import LIBRARY, without_autocast
from drope_kernels.call.unserved import refuse_unserved, served_window
from drope_kernels.spec.layout import empty_in_order_of, empty_lse, is_aligned
from drope_kernels.spec.spec import AttentionSpec, DecodeInputs, Rotation

LIBRARY.define(
    "attention_decode(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, "
    "Tensor cache_seqlens, Tensor? page_table, Tensor? scale_rows, float scale, "
    "SymInt? window_left, SymInt? window_right, float? softcap, Tensor? key_mask, Tensor? alibi, "
    "Tensor? kv_start, "
    "Tensor? turns, bool interleaved, float attention_factor, bool rotated_cache, str backend)"
    " -> (Tensor out, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def gather_inputs(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    scale_rows: Tensor | None,
    scale: float,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    key_mask: Tensor | None,
    alibi: Tensor | None,
    kv_start: Tensor | None,
    turns: Tensor | None,
    interleaved: bool,
    attention_factor: float,
    rotated_cache: bool,
) -> DecodeInputs:
    """The flat arguments of the op as `DecodeInputs`.

    Raises:
        NotImplementedError: an argument that the schema has and no backend serves yet.
    """
    refuse_unserved(key_mask=key_mask, alibi=alibi)
    rotation = None
    if turns is not None:
        rotation = Rotation(turns, interleaved, attention_factor, None, None)
    return DecodeInputs(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens,
        page_table,
        scale if scale_rows is None else scale_rows,
        served_window(window_left, window_right, causal=True),
        softcap,
        kv_start,
        rotation,
        rotated_cache,
    )


def spec_of(inputs: DecodeInputs) -> AttentionSpec:
    """What backend selection may look at."""
    q, rotation = inputs.q, inputs.rotation
    return AttentionSpec(
        device=q.device.type,
        device_index=q.device.index or 0,
        dtype=q.dtype,
        batch=q.shape[0],
        num_heads_q=q.shape[1],
        num_heads_kv=inputs.k_cache.shape[1],
        seqlen_q=q.shape[2],
        seqlen_kv=inputs.capacity,
        head_dim=q.shape[3],
        head_dim_v=inputs.v_cache.shape[3],
        causal=True,
        window=inputs.window is not None,
        softcap=inputs.softcap is not None,
        kv_range=True,
        row_scale=isinstance(inputs.scale, Tensor),
        rotary_dim=0 if rotation is None else rotation.dim,
        interleaved=rotation is not None and rotation.interleaved,
        varlen=False,
        decode=True,
        needs_grad=False,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        aligned=is_aligned(inputs.k_cache) and is_aligned(inputs.v_cache),
    )


def _attention_decode(*call: Any) -> tuple[Tensor, Tensor]:
    *arguments, backend = call
    inputs = gather_inputs(*arguments)
    chosen = select(spec_of(inputs), backend)
    check_decode_values(inputs)
    with without_autocast(inputs.q.device.type):
        return chosen.decode(inputs)


def _attention_decode_fake(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return empty_in_order_of(q, (*q.shape[:3], v_cache.shape[3])), empty_lse(q)


LIBRARY.impl("attention_decode", _attention_decode, "CompositeExplicitAutograd")
torch.library.register_fake("drope::attention_decode", _attention_decode_fake, lib=LIBRARY)

attention_decode = torch.ops.drope.attention_decode.default
