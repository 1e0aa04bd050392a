"""What the host decides before a CUDA launch (csrc/cuda/heuristics.h): tables and properties."""

from __future__ import annotations

import ctypes
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from repository import ROOT

SOURCE = Path(__file__).with_name("heuristics.cpp")
MIB = 1 << 20
H100_SLOTS = 2 * 132
int64 = ctypes.c_int64


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("heuristics") / "heuristics.so"
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{ROOT}/csrc"]
    subprocess.run(["g++", *flags, str(SOURCE), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("persistent_blocks", "section_heads", "schedule"):
        loaded[name].restype = int64
    loaded.head_dim_of.argtypes = [ctypes.c_int, int64, int64]
    loaded.decode_block_rows.argtypes = [ctypes.c_int, int64]
    loaded.decode_splits.argtypes = [int64] * 3
    loaded.persistent_blocks.argtypes = [int64, ctypes.c_int, ctypes.c_int]
    loaded.section_heads.argtypes = [int64] * 3
    loaded.schedule.argtypes = [*[int64] * 6, ctypes.c_void_p]
    return loaded


# (head_dim, head_dim_v): the HEAD_DIM of sm_80, of sm_90 (0: no kernel)
HEAD_DIMS = {
    (8, 8): (64, 64),
    (64, 64): (64, 64),
    (64, 72): (96, 128),
    (80, 80): (96, 128),
    (96, 8): (96, 128),
    (104, 64): (128, 128),
    (128, 128): (128, 128),
    (136, 128): (256, 0),
    (128, 192): (256, 0),
    (256, 256): (256, 0),
    (264, 64): (0, 0),
}


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
def test_smallest_config_that_holds_both_head_dims(
    host: ctypes.CDLL, dims: tuple[int, int]
) -> None:
    assert (host.head_dim_of(80, *dims), host.head_dim_of(90, *dims)) == HEAD_DIMS[dims]


def test_decode_widens_its_tile_only_where_it_has_the_registers(host: ctypes.CDLL) -> None:
    rows = [host.decode_block_rows(d, group) for d in (64, 128, 256) for group in (1, 16, 17, 64)]
    assert rows == [16, 16, 32, 32] * 2 + [16] * 4


# (tiles of queries, kv blocks, slots): splits
SPLITS = {
    (0, 100, H100_SLOTS): 1,
    (8, 0, H100_SLOTS): 1,
    (8, 1, H100_SLOTS): 1,
    (1, 2, 1): 1,  # nobody to share with
    (8, 4, H100_SLOTS): 4,  # even short rows: one block each, and the merge
    (8, 64, H100_SLOTS): 32,
    (8, 512, H100_SLOTS): 32,
    (8, 2048, H100_SLOTS): 33,
    (1, 16384, H100_SLOTS): 128,
    (132, 512, H100_SLOTS): 2,
    (H100_SLOTS, 512, H100_SLOTS): 1,
    (H100_SLOTS + 1, 512, H100_SLOTS): 16,  # one tile too many: instead of a second wave
    (10**6, 512, H100_SLOTS): 1,
}


def test_splits_of_decode(host: ctypes.CDLL) -> None:
    assert {case: host.decode_splits(*case) for case in SPLITS} == SPLITS


@pytest.mark.parametrize("num_tiles", [1, 7, 32, 100, 300])
def test_splitting_never_costs_more_than_not_splitting(host: ctypes.CDLL, num_tiles: int) -> None:
    """The chosen number against every other, by the cost written out once more."""

    def cost(splits: int, num_kv_blocks: int) -> float:
        waves = -(-num_tiles * splits // H100_SLOTS)
        merging = 0.0 if splits == 1 else 1.0 + 0.05 * splits
        return waves * (-(-num_kv_blocks // splits) + 2.0) + merging

    for num_kv_blocks in (1, 2, 5, 63, 64, 500, 4096):
        chosen = host.decode_splits(num_tiles, num_kv_blocks, H100_SLOTS)
        candidates = range(1, min(num_kv_blocks, 128) + 1)
        best = min(cost(splits, num_kv_blocks) for splits in candidates)
        assert cost(chosen, num_kv_blocks) == pytest.approx(best)


def test_persistent_blocks(host: ctypes.CDLL) -> None:
    assert host.persistent_blocks(10, 132, 1) == 10
    assert host.persistent_blocks(1000, 132, 1) == 132
    assert host.persistent_blocks(1000, 132, 2) == 264
    assert host.persistent_blocks(0, 132, 1) == 0


def test_heads_of_a_section_fit_into_their_share_of_l2(host: ctypes.CDLL) -> None:
    one_head = 8192 * 256 * 2  # keys and values of 8192 rows at D = 128: 4 MiB
    assert host.section_heads(50 * MIB, one_head, 64) == 7
    assert host.section_heads(50 * MIB, one_head, 4) == 4
    assert host.section_heads(50 * MIB, 100 * one_head, 64) == 1
    assert host.section_heads(50 * MIB, 0, 64) == 64
    assert host.section_heads(0, one_head, 64) == 1


def tiles(host: ctypes.CDLL, *arguments: int) -> np.ndarray:
    num_q_blocks, num_heads_q, _, batch, _, _ = arguments
    result = np.full((num_q_blocks * num_heads_q * batch, 3), -1, np.int32)
    assert host.schedule(*arguments, result.ctypes.data) == len(result)
    return result


SCHEDULES = {
    "one": (1, 1, 1, 1, 1000, MIB),
    "all_in_l2": (5, 4, 2, 3, 1000, MIB),
    "a_head_at_a_time": (5, 4, 2, 3, MIB, MIB),
    "ragged_sections": (3, 14, 7, 3, MIB // 4, MIB),  # 2 kv heads a section, of 21
    "no_keys": (3, 4, 4, 2, 0, MIB),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_visits_every_tile_once(host: ctypes.CDLL, name: str) -> None:
    num_q_blocks, num_heads_q, _, batch, _, _ = SCHEDULES[name]
    visited = tiles(host, *SCHEDULES[name])
    expected = np.stack(np.meshgrid(range(num_q_blocks), range(num_heads_q), range(batch)), -1)
    assert sorted(map(tuple, visited)) == sorted(map(tuple, expected.reshape(-1, 3)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_takes_sections_in_turn_and_the_longest_tiles_first(
    host: ctypes.CDLL, name: str
) -> None:
    num_q_blocks, num_heads_q, num_heads_kv, batch, kv_bytes, l2_bytes = SCHEDULES[name]
    per_section = host.section_heads(l2_bytes, kv_bytes, num_heads_kv * batch)
    group = num_heads_q // num_heads_kv
    order = [
        ((b * num_heads_q + head) // group // per_section, num_q_blocks - 1 - q_block)
        for q_block, head, b in tiles(host, *SCHEDULES[name]).tolist()
    ]
    assert all(before <= after for before, after in pairwise(order))
