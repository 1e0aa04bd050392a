"""The CUDA kernels on the emulated device: every named case, forward and backward.

emulated-sm80 runs the sm_80 kernels. emulated-sm90a runs the sm_90a forward where it serves the
call and the sm_80 backward, as an H100 does.
"""

from __future__ import annotations

import pytest
import torch
from cases import BY_NAME, CASES, Case
from checker import EMULATED, check_case
from emulation.attention import SM86, SM90A, EmulatedBackend, emulated
from emulation.library import LATEST, RANDOM

pytestmark = pytest.mark.usefixtures("backends")

Backends = dict[str, EmulatedBackend]
BF16, FP16 = torch.bfloat16, torch.float16
FORWARD, BACKWARD = "cuda_attention_forward", "cuda_attention_backward"

on_both = pytest.mark.parametrize("name", EMULATED)


def these(*names: str) -> pytest.MarkDecorator:
    cases = [BY_NAME[name] for name in names]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


# ---- the named cases ---------------------------------------------------------------------------
# All that the kernels refuse: what is skipped below is what stands here.
REFUSED = {
    "head_dim_7": "multiple of 8",
    "head_dim_33": "multiple of 8",
    "softcap": "softcap",
    "softcap_full": "softcap",
    "softcap_rope_rows": "softcap",
}
# On sm_90a, forward without wgmma: too wide for it, or no keys to multiply.
NO_WGMMA = {"head_dim_256", "every_row_empty", "no_keys", "no_keys_rope_rows"}
NOTHING_TO_DO = {"no_queries", "no_queries_rope", "no_batch", "packed_nothing"}


def check_served(case: Case, dtype: torch.dtype, name: str) -> None:
    """check_case, which skips what the backend refuses: that must be REFUSED, in those words."""
    try:
        check_case(case, dtype, name)
    except pytest.skip.Exception as skipped:
        if REFUSED.get(case.name, "nothing: this case is served") not in str(skipped):
            pytest.fail(f"refused: {skipped}")
        raise
    assert case.name not in REFUSED


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@on_both
def test_case(backends: Backends, name: str, case: Case) -> None:
    check_served(case, BF16, name)
    ran = dict(backends[name].launches)
    forward, backward = ran[FORWARD], ran[BACKWARD]
    assert backward["wgmma"] == backward["tensor_load"] == 0
    if case.name in NOTHING_TO_DO:
        assert forward["wgmma"] == forward["mma"] == 0
    elif name == SM90A.name and case.name not in NO_WGMMA:
        assert forward["wgmma"] > 0
        assert forward["tensor_load"] > 0
        assert forward["mbarrier_wait"] > 0
        assert forward["mma"] == forward["ldmatrix"] == 0
    elif case.name == "head_dim_256" or case.name not in NO_WGMMA:
        assert forward["mma"] > 0
        assert forward["ldmatrix"] > 0
        assert forward["cp_async"] > 0
        assert forward["wgmma"] == forward["tensor_load"] == forward["mbarrier_wait"] == 0


@these(
    "regular",
    "length_111_full",
    "head_dim_80",
    "head_dim_128",
    "wide_values",
    "window_16",
    "padded_both_sides_full",
    "fused_projection_rope",
    "huge_entries",
    "scale_per_row_rope",
    "rope_per_head_interleaved",
    "packed_rope",
)
@on_both
def test_case_in_float16(name: str, case: Case) -> None:
    check_case(case, FP16, name)


MODES_SAMPLE = (
    "regular",
    "tail_of_keys",
    "gqa_4_to_1",
    "head_dim_96",
    "head_dim_128",
    "right_padded",
    "scale_per_row_ranges",
    "rope_more_queries",
    "packed_cross_lengths",
)


@these(*MODES_SAMPLE)
@on_both
def test_case_when_all_completes_late(backends: Backends, name: str, case: Case) -> None:
    with emulated(backends[name], LATEST):
        check_case(case, BF16, name)


@these(*MODES_SAMPLE)
@on_both
def test_case_under_random_schedules(backends: Backends, name: str, case: Case) -> None:
    with emulated(backends[name], RANDOM, seed=len(case.name)):
        check_case(case, BF16, name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@on_both
def test_case_under_many_schedules(backends: Backends, name: str, case: Case, seed: int) -> None:
    with emulated(backends[name], RANDOM, 1000 * seed + len(case.name), deterministic=seed == 3):
        check_served(case, BF16, name)


@these("regular", "length_111", "gqa_4_to_1", "head_dim_256", "window_16", "packed_rope")
@on_both
def test_deterministic_case(backends: Backends, name: str, case: Case) -> None:
    """As every other case, and without the additions in global memory, whose order is open."""
    with emulated(backends[name], deterministic=True):
        check_case(case, BF16, name)
    assert dict(backends[name].launches)[BACKWARD]["red_global"] == 0


@these("regular", "head_dim_96", "head_dim_128", "head_dim_256")
def test_case_with_little_shared_memory(case: Case) -> None:
    """sm_86 and its kin allow a block 99 KiB."""
    check_case(case, BF16, SM86.name)
