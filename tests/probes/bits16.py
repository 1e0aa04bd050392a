"""16-bit floating point as bit patterns: numpy has no bfloat16."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def bfloat16_bits(values: ArrayLike) -> NDArray[np.uint16]:
    """Rounds finite float32 values to nearest even."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bfloat16_values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float16_bits(values: ArrayLike) -> NDArray[np.uint16]:
    """Rounds to nearest even; too large becomes infinity."""
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype=np.float32).astype(np.float16).view(np.uint16)


def element_bits(values: ArrayLike, is_float16: bool) -> NDArray[np.uint16]:
    return float16_bits(values) if is_float16 else bfloat16_bits(values)
