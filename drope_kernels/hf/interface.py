"""Our `AttentionInterface` function: a layer's attention by `drope_kernels`, keywords honoured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from drope_kernels.attention import attention, attention_varlen
from drope_kernels.hf.ranges import KeyRanges
from drope_kernels.rope import Rope

# Callers' keywords that no attention reads. Any other one that is set is refused: it may matter.
_WITHOUT_EFFECT_HERE = frozenset(
    {
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "seq_idx",
        "token_type_ids",
        "use_cache",
    }
)
_REFUSED = {
    "position_bias": "additive biases are not supported, use the eager attention",
    "s_aux": "attention sinks are not supported, use the eager attention",
    "cache": "paged caches are not supported, use a dynamic or static cache",
    "output_attentions": "attention weights are never formed, use the eager attention for them",
    "head_mask": "masks of heads are not supported, use the eager attention",
    "layer_head_mask": "masks of heads are not supported, use the eager attention",
}
_UNKNOWN = "its meaning is not known here and it may change the attention, leave it out"


@dataclass(frozen=True)
class KernelChoice:
    """What `use_kernels` settled for a layer: its attention module's attribute `drope_kernels`."""

    backend: str = "auto"
    rope: Rope | None = None  # None: queries and keys arrive rotated


_DEFAULT = KernelChoice()


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: KeyRanges | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Args:
        module: the attention module.
        query: (B, Hq, Sq, D).
        key: (B, Hkv, Skv, D), the cached ones included.
        value: (B, Hkv, Skv, Dv).
        attention_mask: of `key_ranges`; None: no mask was made, as encoders call it.
        dropout: must be 0.
        scaling: multiplier of q·k; None: D ** -0.5.
        sliding_window, is_causal: must agree with the mask.
        softcap: as in `attention`.
        position_ids: (1 or B, Sq), read where the kernel rotates.
        cu_seq_lens_q, cu_seq_lens_k: (num_seqs + 1,), sequences packed in one row.

    Returns:
        out (B, Sq, Hq, Dv), and None for the weights.

    Raises:
        NotImplementedError: a keyword that cannot be honoured, by name.
        ValueError: keywords that contradict each other.
    """
    _refuse_unknown(kwargs)
    if dropout:
        raise NotImplementedError(
            f"dropout: expected 0, got {dropout}; set attention_dropout=0 in the config"
        )
    ranges = _checked_ranges(module, query, key, attention_mask, sliding_window, is_causal)
    choice: KernelChoice = getattr(module, "drope_kernels", _DEFAULT)
    options: dict[str, Any] = {
        "causal": ranges.causal,
        "window": ranges.window,
        "scale": scaling,
        "softcap": softcap,
        "backend": choice.backend,
    }
    positions = None
    if choice.rope is not None:
        options["rope"] = choice.rope
        starts_here = isinstance(ranges.q_start, int) and ranges.q_start == 0
        if position_ids is not None and starts_here and query.shape[2] == key.shape[2]:
            positions = position_ids.expand(query.shape[0], -1)
        # Else indices do for positions: `check_positions` saw that they differ by a row's number.
    cu_seqlens = _packed(ranges, query, cu_seq_lens_q, cu_seq_lens_k)
    if cu_seqlens is None:
        out = attention(
            query,
            key,
            value,
            q_start=ranges.q_start,
            kv_start=ranges.kv_start,
            kv_end=ranges.kv_end,
            positions=positions,
            kv_positions=positions,
            **options,
        )
        return out.transpose(1, 2).contiguous(), None
    batch, _, seqlen, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # (B * S, H, D)
    if positions is not None:
        positions = positions.flatten()
    out = attention_varlen(
        q, k, v, *cu_seqlens, positions=positions, kv_positions=positions, **options
    )
    return out.unflatten(0, (batch, seqlen)).contiguous(), None


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    for name, given in kwargs.items():
        if given is None or given is False or name in _WITHOUT_EFFECT_HERE:
            continue
        got = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
        raise NotImplementedError(
            f"{name}: expected None, got {got}; {_REFUSED.get(name, _UNKNOWN)}"
        )


def _checked_ranges(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    ranges: KeyRanges | None,
    sliding_window: int | None,
    is_causal: bool | None,
) -> KeyRanges:
    """The ranges, made for these queries and keys and not contradicted by keywords."""
    q_length, kv_length = query.shape[2], key.shape[2]
    if ranges is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and q_length != kv_length:
            raise ValueError(
                f"attention_mask: expected key ranges for {q_length} queries and {kv_length} keys, "
                "got None; it does not say where the queries are"
            )
        if sliding_window is not None:
            raise NotImplementedError(
                f"sliding_window: expected None in a layer without a mask, got {sliding_window}; "
                "windows come from the mask that the model makes"
            )
        return KeyRanges(q_length, kv_length, causal)
    if not isinstance(ranges, KeyRanges):
        got = f"shape {tuple(ranges.shape)}" if isinstance(ranges, Tensor) else type(ranges)
        raise NotImplementedError(
            "attention_mask: expected a 2-D mask of valid tokens, or None, got a prepared one "
            f"({got}); these kernels take no dense masks, use the eager or sdpa attention"
        )
    if (ranges.q_length, ranges.kv_length) != (q_length, kv_length):
        raise ValueError(
            f"attention_mask: expected one for {q_length} queries and {kv_length} keys, got one "
            f"for {ranges.q_length} and {ranges.kv_length}; this layer's cache differs from the "
            "one the mask was made for"
        )
    if is_causal is not None and is_causal != ranges.causal:
        raise ValueError(
            f"is_causal: expected {ranges.causal} as in the model's mask, got {is_causal}; set "
            "is_causal in the config instead"
        )
    if ranges.causal and sliding_window is not None and sliding_window != ranges.window:
        raise ValueError(
            f"sliding_window: expected {ranges.window} as in the model's mask, got "
            f"{sliding_window}; the layer and its mask disagree"
        )
    return ranges


def _packed(
    ranges: KeyRanges,
    query: Tensor,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """cu_seqlens of queries and keys where rows are packed."""
    if cu_seq_lens_q is None:
        return None if ranges.cu_seqlens is None else (ranges.cu_seqlens, ranges.cu_seqlens)
    if cu_seq_lens_k is None:
        cu_seq_lens_k = cu_seq_lens_q
    if query.shape[0] != 1 or ranges.kv_start is not None or ranges.kv_end is not None:
        raise ValueError(
            "cu_seq_lens_q: expected sequences packed in one row without padding, got "
            f"{query.shape[0]} rows{' with padding' if ranges.kv_end is not None else ''}; leave "
            "out attention_mask, or cu_seq_lens_q and cu_seq_lens_k"
        )
    if ranges.q_length != ranges.kv_length:
        raise ValueError(
            f"cu_seq_lens_q: expected no cached keys, got {ranges.kv_length} keys for "
            f"{ranges.q_length} queries; pass use_cache=False"
        )
    return cu_seq_lens_q.int(), cu_seq_lens_k.int()
