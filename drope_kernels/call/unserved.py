"""What the schema of the ops has and no backend serves yet: refused by name, wherever it enters."""

from __future__ import annotations

from typing import Any

import torch

_WIDEST_WINDOW = 2**40  # beyond any two indices; wider ones would overflow an int64 sum with one
_REMEDIES = {
    "key_mask": "keys can be hidden at either end of a row with kv_start and kv_end, and padding "
    "left out with attention_varlen",
    "mask": "what is served is causal, window, q_start, kv_start, kv_end and attention_varlen; "
    "torch's scaled_dot_product_attention takes dense masks",
    "alibi": "what is served is rope, window, scale and softcap; torch's "
    "scaled_dot_product_attention takes biases",
}


def refuse_unserved(**arguments: Any) -> None:
    """NotImplementedError for the first of `arguments` that is not None."""
    for name, x in arguments.items():
        if x is not None:
            raise NotImplementedError(
                f"{name}: expected None, got {type(x).__name__}; no backend serves it yet: "
                f"{_REMEDIES[name]}"
            )


def served_window(left: int | None, right: int | None, *, causal: bool) -> int | None:
    """The window W of `AttentionInputs` that shows `left` and `right` keys beside the query's own.

    None is no limit. A causal call shows none to the right whatever `right` is.

    Raises:
        NotImplementedError: a full call that sees unequally far to its two sides.
    """
    if not causal and ((left is None) != (right is None) or (left is not None and left != right)):
        raise NotImplementedError(
            "window: expected as many keys to the left as to the right where causal=False, got "
            f"({-1 if left is None else left}, {-1 if right is None else right}) with -1 for no "
            "limit; no backend serves an uneven window yet: window=W shows W - 1 keys on either "
            "side, causal=True only those to the left"
        )
    return None if left is None else torch.sym_min(left, _WIDEST_WINDOW) + 1
