"""How a tokenizer begins texts: training, samples and evaluation all do as it does."""

from __future__ import annotations

from typing import Any


def first_token(tokenizer: Any) -> int | None:
    """The token that this tokenizer puts before every text, or None."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    starts = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    return int(ids[0]) if starts else None
