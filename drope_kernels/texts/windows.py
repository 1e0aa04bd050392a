"""Windows of a text: what every model that is compared reads."""

from __future__ import annotations

import torch
from torch import Tensor


def text_windows(text: Tensor, length: int, count: int) -> Tensor:
    """(count, length) windows spread evenly over text (T,), not overlapping."""
    if count < 1 or length * count > len(text):
        raise ValueError(
            f"text: expected at least length * count = {length * count} tokens and count >= 1, "
            f"got {len(text)} tokens, count={count}"
        )
    stride = len(text) // count
    return torch.stack([text[i * stride : i * stride + length] for i in range(count)])
