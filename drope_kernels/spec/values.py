"""Which values of a call the host may look at: index tensors on the CPU, others when asked to."""

from __future__ import annotations

import os

from torch import Tensor


def readable(x: Tensor | None) -> bool:
    """Whether the values of `x` may be read on the host."""
    return x is not None and (x.device.type == "cpu" or os.environ.get("DROPE_CHECK") == "1")
