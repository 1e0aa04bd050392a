"""attention_decode by the CUDA kernels on the emulated device: which operations, which schedules.

What comes out is test_decode's to check, on the emulated backends too.
"""

from __future__ import annotations

import pytest
import torch
from checker import EMULATED
from decodes import DECODES, DecodeCase, check_decode
from emulation.attention import SM80, EmulatedBackend, emulated
from emulation.library import LATEST, RANDOM

pytestmark = pytest.mark.usefixtures("backends")

Backends = dict[str, EmulatedBackend]
BF16 = torch.bfloat16
BY_NAME = {case.name: case for case in DECODES}


@pytest.mark.parametrize("name", ["one_token", "chunk_rope", "pages_rotated"])
@pytest.mark.parametrize("backend", EMULATED)
def test_decode_runs_on_tensor_cores(backends: Backends, backend: str, name: str) -> None:
    check_decode(BY_NAME[name], BF16, backend)
    ((function, counts),) = backends[backend].launches
    assert function == "cuda_attention_decode"
    assert counts["mma"] > 0
    assert counts["ldmatrix"] > 0
    assert counts["cp_async"] > 0


@pytest.mark.parametrize("completion", [LATEST, RANDOM], ids=["latest", "random"])
@pytest.mark.parametrize("case", DECODES[1:4] + DECODES[-5:], ids=lambda case: case.name)
def test_decode_under_other_schedules(
    backends: Backends, case: DecodeCase, completion: int
) -> None:
    with emulated(backends[SM80.name], completion, seed=7):
        check_decode(case, BF16, SM80.name)
