"""`attention_decode`: append new keys to a cache and attend to all of it, in one call."""

from __future__ import annotations

from typing import Any, Literal, Never, Unpack, overload

from torch import Tensor

from drope_kernels.call import decode_op, validate
from drope_kernels.call.arguments import rope_arguments, scale_arguments, window_arguments
from drope_kernels.call.dispatch import check_name
from drope_kernels.call.interop import through_dlpack
from drope_kernels.call.options import A, Array, DecodeOptions, Window
from drope_kernels.call.unserved import refuse_unserved
from drope_kernels.call.validate_decode import check_decode
from drope_kernels.rope import Rope


@overload
def attention_decode(
    q: A,
    k_cache: A,
    v_cache: A,
    *,
    cache_seqlens: A,
    return_lse: Literal[False] = False,
    **options: Unpack[DecodeOptions[A]],
) -> A: ...
@overload
def attention_decode(
    q: A,
    k_cache: A,
    v_cache: A,
    *,
    cache_seqlens: A,
    return_lse: Literal[True],
    **options: Unpack[DecodeOptions[A]],
) -> tuple[A, A]: ...
def attention_decode(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    *,
    k: Array | None = None,
    v: Array | None = None,
    cache_seqlens: Array,
    page_table: Array | None = None,
    rope: Rope | bool = False,
    cache: Literal["raw", "rotated"] = "raw",
    scale: float | Array | None = None,
    window: Window = None,
    softcap: float | None = None,
    key_mask: Array | None = None,
    alibi: Array | None = None,
    kv_start: Array | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    **refused: Never,
) -> Array | tuple[Array, Array]:
    """Append k, v to the caches, then attend causally: the queries are the last Sq tokens.

    Row b then holds L = cache_seqlens[b] + Snew keys, and query i sits at key index L - Sq + i.
    cache_seqlens itself is not changed. There is no gradient. Arguments not named here are those
    of `attention`. Autocast changes nothing: the caches say which dtype the call computes in.

    Args:
        q: (B, Hq, Sq, D).
        k_cache: (B, Hkv, Smax, D), or with a page table (num_pages, Hkv, page_size, D). Written.
        v_cache: (B, Hkv, Smax, Dv), or (num_pages, Hkv, page_size, Dv). Written.
        k: (B, Hkv, Snew, D), unrotated keys to append; None: append nothing.
        v: (B, Hkv, Snew, Dv); given exactly when k is.
        cache_seqlens: (B,) int32, valid keys of each row before the append.
        page_table: (B, pages_per_row) int32; key j of row b lies in page page_table[b, j //
            page_size]. Entries beyond a row's keys are not read.
        rope: as in `attention`; token j of a row has position j.
        cache: "raw", the cache holds unrotated keys, which rotate when read: one cache serves
            rope=False and every scaling; "rotated", keys rotate when appended.
        scale: as in `attention`, over (B, Hq, Sq).
        kv_start: (B,) int32, first valid key of each row (left padding).

    Returns:
        out (B, Hq, Sq, Dv); with return_lse also lse (B, Hq, Sq).

    Raises:
        ValueError, TypeError: as in `attention`. An append that does not fit is refused before
            anything is written (CPU tensors; on devices the rows that do not fit are not written
            and their results are NaN). Arrays of other libraries that cannot be written are
            refused as caches to append to.
        NotImplementedError: an argument that is not served yet; an input requires grad outside
            torch.no_grad().
    """
    if not isinstance(q, Tensor):
        return through_dlpack(attention_decode, locals())
    if refused:
        validate.refuse("attention_decode", refused)
    validate.check_flag("return_lse", return_lse)
    call = _decode_call(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens,
        page_table,
        rope,
        cache,
        scale,
        window,
        softcap,
        key_mask,
        alibi,
        kv_start,
        backend,
    )
    out, lse = decode_op.attention_decode(*call)
    return (out, lse) if return_lse else out


def _decode_call(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any,
    v: Any,
    cache_seqlens: Any,
    page_table: Any,
    rope: Rope | bool,
    cache: Literal["raw", "rotated"],
    scale: Any,
    window: Window,
    softcap: float | None,
    key_mask: Any,
    alibi: Any,
    kv_start: Any,
    backend: str,
) -> tuple[Any, ...]:
    """The validated arguments of the op `drope::attention_decode`."""
    check_decode(q, k_cache, v_cache, k, v, cache_seqlens, page_table, cache)
    validate.check_switches(True, window, softcap, backend)
    refuse_unserved(key_mask=key_mask, alibi=alibi)
    check_name(backend)
    validate.check_scale(scale, q, tuple(q.shape[:3]), "(B, Hq, Sq)")
    validate.check_index("kv_start", kv_start, q, q.shape[0], "an int32 tensor (B,)")
    turns, interleaved, attention_factor, _, _ = rope_arguments(rope, q, k_cache, None, None)
    return (
        q,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens,
        page_table,
        *scale_arguments(scale, q),
        *window_arguments(window, causal=True),
        softcap,
        key_mask,
        alibi,
        kv_start,
        turns,
        interleaved,
        attention_factor,
        cache == "rotated",
        backend,
    )
