"""The public calls `attention`, `attention_varlen` and `explain`: validated here, run by the op."""

from __future__ import annotations

from typing import Any, Literal, Never, Unpack, overload

import torch
from torch import Tensor

from drope_kernels.call import ops, repeat, validate
from drope_kernels.call.arguments import (
    autocast,
    needs_grad,
    rope_arguments,
    scale_arguments,
    window_arguments,
)
from drope_kernels.call.dispatch import explain_spec
from drope_kernels.call.interop import through_dlpack
from drope_kernels.call.options import A, Array, AttentionOptions, PackedOptions, Window
from drope_kernels.call.unserved import refuse_unserved
from drope_kernels.rope import Rope


@overload
def attention(
    q: A,
    k: A,
    v: A,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions[A]],
) -> A: ...
@overload
def attention(
    q: A,
    k: A,
    v: A,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions[A]],
) -> tuple[A, A]: ...
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    rope: Rope | bool = False,
    causal: bool = True,
    scale: float | Array | None = None,
    window: Window = None,
    softcap: float | None = None,
    key_mask: Array | None = None,
    mask: Array | None = None,
    alibi: Array | None = None,
    positions: Array | None = None,
    kv_positions: Array | None = None,
    q_start: int | Array | None = None,
    kv_start: Array | None = None,
    kv_end: Array | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    **refused: Never,
) -> Array | tuple[Array, Array]:
    """softmax(scale * R q · R k) v in one fused pass, rotary or position-free.

    Differentiable in q, k, v and a tensor scale, once; deterministic forward. On the CPU few
    queries without gradient are summed in another order, so last bits may differ from a call with
    one. Under autocast q, k and v are cast to the autocast dtype. Accumulation, softmax and
    rotation are float32.

    Where it says tensor, arrays of one other library will do as well: NumPy, CuPy, JAX, anything
    with DLPack. That library's arrays come back, without a copy or a gradient on the way.

    Args:
        q: (B, Hq, Sq, D) float32, float16 or bfloat16 (float64 runs on the reference). Any strides
            with stride 1 in the last dimension: a transposed (B, S, H, D) tensor costs no copy.
        k: (B, Hkv, Skv, D), Hq a multiple of Hkv; q head h reads kv head h // (Hq / Hkv).
        v: (B, Hkv, Skv, Dv). k and v may be expanded (stride 0).
        rope: False, no rotation and no trace of it; True, `Rope()`; or a `Rope`.
        causal: query i, at key index q_start + i, sees no key behind it.
        scale: the whole multiplier of q·k, finite and > 0: a number, or a float32 tensor
            broadcastable to (B, Hq, Sq), one per head being (Hq, 1). None: D ** -0.5.
        window: W >= 1, the query sees the last W keys, its own included; with causal=False also
            fewer than W keys ahead. Or (left, right), keys beside its own, -1 for no limit; full
            calls with left != right are not served yet.
        softcap: s = softcap * tanh(s / softcap) on the scaled scores, in natural units.
        key_mask, mask, alibi: not served yet; anything but None is refused.
        positions: (B, Sq) integers or float32, rotation positions of the queries, |p| <= 2 ** 24;
            None: q_start + i. Without rope there is nothing they could change.
        kv_positions: (B, Skv), the same for the keys; None: j.
        q_start: key index of query 0, an int or (B,) int32, may be negative; None: Skv - Sq.
        kv_start: (B,) int32, first valid key of each batch row, in [0, Skv].
        kv_end: (B,) int32, end of the valid keys of each batch row, in [0, Skv].
        return_lse: also return the log-sum-exp of each row.
        backend: "auto" takes the best that serves the call on the tensors' device; a name of
            `available_backends()` takes that one or raises.

    Returns:
        out (B, Hq, Sq, Dv) in q's dtype and memory order. With return_lse also lse (B, Hq, Sq)
        float32 (float64 for float64 inputs), natural log, differentiable. A row that sees no key
        has out 0, lse -inf and gradients 0. A NaN in k or v that a query must not see by causality
        or window may reach it all the same where another query sees that key, as in torch's own
        attention; keys outside kv_start and kv_end reach nobody.

    Raises:
        ValueError, TypeError: naming the argument, what was expected, what came, and the remedy.
            Values of CPU tensors are checked; those of device tensors only with DROPE_CHECK=1.
        NotImplementedError: an argument that is not served yet; positions that require grad; a
            backward through the gradients; forward-mode and torch.func differentiation.

    Source: the fused forward and backward are FlashAttention-2's, arXiv 2307.08691; position-free
    use after recalibration is DroPE's, arXiv 2512.12167.
    """
    if not isinstance(q, Tensor):
        return through_dlpack(attention, locals())
    if refused:
        validate.refuse("attention", refused)
    validate.check_flag("return_lse", return_lse)
    key = None
    if not torch.compiler.is_compiling() and (
        key_mask is mask is alibi is positions is kv_positions is kv_start is kv_end is None
    ):
        key = repeat.key_of(q, k, v, rope, causal, scale, window, softcap, q_start, backend)
        known = None if key is None else repeat.attend_again(key, q, k, v)
        if known is not None:
            return known if return_lse else known[0]
    call = _dense_call(
        q,
        k,
        v,
        rope,
        causal,
        scale,
        window,
        softcap,
        key_mask,
        mask,
        alibi,
        positions,
        kv_positions,
        q_start,
        kv_start,
        kv_end,
        backend,
    )
    out, lse, *_ = ops.attend(*call)
    if key is not None:
        repeat.remember(key, call, rope)
    return (out, lse) if return_lse else out


@overload
def attention_varlen(
    q: A,
    k: A,
    v: A,
    cu_seqlens_q: A,
    cu_seqlens_k: A,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[PackedOptions[A]],
) -> A: ...
@overload
def attention_varlen(
    q: A,
    k: A,
    v: A,
    cu_seqlens_q: A,
    cu_seqlens_k: A,
    *,
    return_lse: Literal[True],
    **options: Unpack[PackedOptions[A]],
) -> tuple[A, A]: ...
def attention_varlen(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Array,
    cu_seqlens_k: Array,
    *,
    rope: Rope | bool = False,
    causal: bool = True,
    scale: float | Array | None = None,
    window: Window = None,
    softcap: float | None = None,
    key_mask: Array | None = None,
    alibi: Array | None = None,
    positions: Array | None = None,
    kv_positions: Array | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    **refused: Never,
) -> Array | tuple[Array, Array]:
    """`attention` over sequences packed one behind the other; none sees another.

    Sequence n is rows cu_seqlens_q[n] to cu_seqlens_q[n + 1] of q and the same of cu_seqlens_k in
    k and v; sequences may be empty. The last query of a sequence sits at its last key. Gradients,
    dtypes, errors and the arguments not named here are those of `attention`.

    Args:
        q: (total_q, Hq, D).
        k: (total_k, Hkv, D).
        v: (total_k, Hkv, Dv).
        cu_seqlens_q: (num_seqs + 1,) int32: 0, then the running end of each sequence.
        cu_seqlens_k: (num_seqs + 1,) int32, the same for keys.
        scale: as in `attention`; a tensor is broadcastable to (Hq, total_q).
        positions: (total_q,); None: counted from the start of the row's own sequence.
        kv_positions: (total_k,), likewise.

    Returns:
        out (total_q, Hq, Dv); with return_lse also lse (Hq, total_q).
    """
    if not isinstance(q, Tensor):
        return through_dlpack(attention_varlen, locals())
    if refused:
        validate.refuse("attention_varlen", refused)
    validate.check_flag("return_lse", return_lse)
    call = _packed_call(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        rope,
        causal,
        scale,
        window,
        softcap,
        key_mask,
        alibi,
        positions,
        kv_positions,
        backend,
    )
    out, lse, *_ = ops.attend(*call)
    out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse) if return_lse else out


def explain(q: A, k: A, v: A, **options: Unpack[AttentionOptions[A]]) -> str:
    """Which backend would run `attention(q, k, v, **options)`, and why each other one would not.

    Runs nothing and reads no tensor values. Arguments and errors are those of `attention`.
    """
    if not isinstance(q, Tensor):
        return through_dlpack(explain, {"q": q, "k": k, "v": v, **options})
    options.pop("return_lse", None)  # type: ignore[typeddict-item]
    arguments: dict[str, Any] = {
        "rope": False,
        "causal": True,
        "backend": "auto",
        **dict.fromkeys(AttentionOptions.__annotations__.keys() - {"rope", "causal", "backend"}),
    }
    unknown = options.keys() - arguments.keys()
    if unknown:
        validate.refuse("explain", dict.fromkeys(unknown))
    arguments |= options
    *call, save_prepared, backend = _dense_call(q, k, v, **arguments)
    spec = ops.spec_of(ops.gather_inputs(*call), needs_grad=save_prepared)
    return explain_spec(spec, backend)


def _dense_call(
    q: Any,
    k: Any,
    v: Any,
    rope: Rope | bool,
    causal: bool,
    scale: Any,
    window: Window,
    softcap: float | None,
    key_mask: Any,
    mask: Any,
    alibi: Any,
    positions: Any,
    kv_positions: Any,
    q_start: Any,
    kv_start: Any,
    kv_end: Any,
    backend: str,
) -> tuple[Any, ...]:
    """The validated arguments of the op `drope::attention_fwd`."""
    q, k, v = autocast(q), autocast(k), autocast(v)
    validate.check_qkv(q, k, v)
    batch, num_heads_q, seqlen_q, _ = q.shape
    seqlen_kv = k.shape[2]
    validate.check_switches(causal, window, softcap, backend)
    refuse_unserved(key_mask=key_mask, mask=mask, alibi=alibi)
    validate.check_scale(scale, q, (batch, num_heads_q, seqlen_q), "(B, Hq, Sq)")
    validate.check_q_start(q_start, q)
    validate.check_index("kv_start", kv_start, q, batch, "an int32 tensor (B,)")
    validate.check_index("kv_end", kv_end, q, batch, "an int32 tensor (B,)")
    validate.check_positions("positions", positions, q, (batch, seqlen_q))
    validate.check_positions("kv_positions", kv_positions, q, (batch, seqlen_kv))
    if q_start is None:
        q_start = seqlen_kv - seqlen_q
    per_row = isinstance(q_start, Tensor)
    return (
        q,
        k,
        v,
        *scale_arguments(scale, q),
        causal,
        *window_arguments(window, causal=causal),
        softcap,
        key_mask,
        mask,
        alibi,
        q_start if per_row else None,
        0 if per_row else q_start,
        kv_start,
        kv_end,
        *rope_arguments(rope, q, k, positions, kv_positions),
        None,
        None,
        needs_grad(q, k, v, scale),
        backend,
    )


def _packed_call(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    rope: Rope | bool,
    causal: bool,
    scale: Any,
    window: Window,
    softcap: float | None,
    key_mask: Any,
    alibi: Any,
    positions: Any,
    kv_positions: Any,
    backend: str,
) -> tuple[Any, ...]:
    """The validated arguments of the op: one batch row that holds every sequence."""
    q, k, v = autocast(q), autocast(k), autocast(v)
    validate.check_qkv_packed(q, k, v)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    _, num_heads_q, total_q, _ = q.shape
    validate.check_switches(causal, window, softcap, backend)
    refuse_unserved(key_mask=key_mask, alibi=alibi)
    validate.check_scale(scale, q, (num_heads_q, total_q), "(Hq, total_q)")
    validate.check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, q)
    validate.check_positions("positions", positions, q, (total_q,))
    validate.check_positions("kv_positions", kv_positions, q, (k.shape[2],))
    return (
        q,
        k,
        v,
        *scale_arguments(scale, q),
        causal,
        *window_arguments(window, causal=causal),
        softcap,
        key_mask,
        None,
        alibi,
        None,
        0,
        None,
        None,
        *rope_arguments(
            rope,
            q,
            k,
            None if positions is None else positions.unsqueeze(0),
            None if kv_positions is None else kv_positions.unsqueeze(0),
        ),
        cu_seqlens_q,
        cu_seqlens_k,
        needs_grad(q, k, v, scale),
        backend,
    )
