"""The kernels as on sm_90, where they read keys, values and gradients by TMA: interpreted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BY_NAME
from checker import INTERPRETED, check_case

from drope_kernels.backends.triton import launch_backward, launch_forward

CASES = (
    *("regular", "length_111_full", "tail_of_keys", "gqa_4_to_1", "single_query"),
    *("head_dim_80", "head_dim_128", "head_dim_256", "narrow_values"),
    *("window_16", "right_padded", "left_padded", "static_cache_rope", "every_row_empty"),
    *("transposed_rope", "fused_projection", "huge_entries", "scale_per_row_rope"),
    *("rope_partial_interleaved", "softcap_rope_rows", "packed_rope", "packed_empty_sequences"),
)


class Counted:
    """Calls of a launcher's `tma_of`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.count = function, 0

    def __call__(self, *arguments: Any) -> Any:
        self.count += 1
        return self.function(*arguments)


@pytest.mark.parametrize("name", CASES)
def test_case_by_tma(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    counted = []
    for launcher in (launch_forward, launch_backward):
        counted.append(Counted(launcher.tma_of))
        monkeypatch.setattr(launcher, "tma_of", counted[-1])
        monkeypatch.setattr(launcher, "architecture_of", lambda _: 90)
    check_case(BY_NAME[name], torch.bfloat16, INTERPRETED)
    assert all(one.count >= 2 for one in counted)
