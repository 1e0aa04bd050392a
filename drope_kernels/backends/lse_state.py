"""softmax_state of kernels that still keep an lse: to go with the last of them.

a is 0 and L the natural lse itself (+inf for -inf), so that nothing is rounded on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor


def state_of(lse: Tensor, *, needed: bool) -> Tensor:
    if not needed:
        return lse.new_empty(0)
    return torch.stack((torch.zeros_like(lse), lse.masked_fill(lse == -torch.inf, torch.inf)))


def lse_of(softmax_state: Tensor) -> Tensor:
    lse = softmax_state[1]
    return lse.masked_fill(lse == torch.inf, -torch.inf)
