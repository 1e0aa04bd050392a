"""Questions about sm_90 data movement: stmatrix, mbarrier, bulk and tensor copies, setmaxnreg."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probes.bits16 import bfloat16_bits
from probes.operands import TENSOR_MAP_SWIZZLE, swizzle
from probes.probe import Array, Case, Probe, Run
from probes.sm80 import (
    FORMS,
    POISON_16,
    SEED,
    gemm_cases,
    matrix_slots,
    reduce_case,
    row_order,
)

# What mbarrier_kernel notes, in order.
MBARRIER_NOTES = (
    ("fresh barrier of count 2, parity 0 complete", 0),
    ("fresh barrier, parity 1 complete", 1),
    ("after one arrival, parity 0 complete", 0),
    ("after two arrivals, parity 0 complete", 1),
    ("then parity 1 complete", 0),
    ("after two more arrivals, parity 1 complete", 1),
    ("then parity 0 complete (the third phase is open)", 0),
    ("64 bytes expected, 32 copied: parity 0 complete", 0),
    ("the other 32 copied: parity 0 completes", 1),
    ("both copies are visible", 1),
    ("copy issued before its bytes are expected: parity 1 completes", 1),
    ("that copy is visible", 1),
    ("expect_tx without arrival, bytes copied: parity 0 complete", 0),
    ("then an arrival: parity 0 completes", 1),
)


def stmatrix_cases() -> list[Case]:
    slots = np.arange(256, dtype=np.uint16)
    offsets = (16 * row_order()).astype(np.int32)
    cases = []
    for i, form in enumerate(FORMS):
        num_matrices = int(form[1])
        places = matrix_slots(form)[:, :num_matrices]
        expected = np.full(256, POISON_16, dtype=np.uint16)
        expected[places] = slots.reshape(32, 4, 2)[:, :num_matrices]
        run = Run(slots.view(np.uint32), np.zeros(256, np.uint16), [i], offsets)
        cases.append(Case(form, "probe_stmatrix", [run], expected))
    return cases


def smem_base_cases() -> list[Case]:
    run = Run(np.zeros(0, np.int32), np.full(1, -1, dtype=np.int32))
    expected = np.zeros(1, dtype=np.int32)
    return [Case("address mod 1024", "probe_smem_base", [run], expected, lambda out: out[0] % 1024)]


def mbarrier_cases() -> list[Case]:
    source = np.random.default_rng(SEED).integers(1, 256, 128).astype(np.uint8)
    expected = np.array([answer for _, answer in MBARRIER_NOTES], dtype=np.int32)
    run = Run(source, np.full(len(expected), -1, dtype=np.int32))
    return [Case("phases and bytes", "probe_mbarrier", [run], expected)]


def bulk_cases() -> list[Case]:
    n = 1024
    source = np.random.default_rng(SEED).integers(-9, 9, n).astype(np.float32)
    before = np.arange(2 * n, dtype=np.float32)
    expected = np.concatenate([2 * source, before[n:] + 2 * source])
    return [Case("round trip", "probe_bulk", [Run(source, before, [n])], expected)]


@dataclass(frozen=True)
class Box:
    """One tensor copy. Dimensions innermost first; span: swizzle span in bytes."""

    label: str
    dims: tuple[int, ...]
    box: tuple[int, ...]
    at: tuple[int, ...]
    span: int = 0
    element_bytes: int = 2

    def parameters(self, is_float: bool = False, add: bool = False) -> list[int]:
        """A TensorCase of sm90_copy.cu."""
        sizes = [[*shape, 0, 0, 0][:4] for shape in (self.dims, self.box, self.at)]
        swizzle_mode = TENSOR_MAP_SWIZZLE[self.span]
        head = [len(self.dims), self.element_bytes, swizzle_mode, int(is_float), int(add)]
        return head + sizes[0] + sizes[1] + sizes[2]

    def places(self) -> tuple[Array, Array]:
        """For the elements of the box in order: index into the tensor (-1 outside it) and index
        into the shared-memory image."""
        grid = np.indices(self.box[::-1]).reshape(len(self.box), -1)[::-1]  # innermost first
        coordinates = grid + np.array(self.at)[:, None]
        extents = np.array(self.dims)[:, None]
        inside = ((coordinates >= 0) & (coordinates < extents)).all(axis=0)
        pitch = np.cumprod([1, *self.dims[:-1]])[:, None]
        in_tensor = np.where(inside, (coordinates * pitch).sum(axis=0), -1)
        offset = np.arange(grid.shape[1]) * self.element_bytes
        return in_tensor, swizzle(offset, self.span) // self.element_bytes


BOXES = [
    Box("2d inside", (104, 30), (24, 8), (8, 3)),
    Box("2d over both ends", (104, 30), (24, 8), (96, 26)),
    Box("2d negative start", (104, 30), (24, 8), (-8, -3)),
    Box("2d swizzle 32", (104, 30), (16, 16), (96, 20), 32),
    Box("2d swizzle 64", (104, 30), (32, 16), (80, 20), 64),
    Box("2d swizzle 128", (104, 30), (64, 16), (64, 20), 128),
    Box("2d swizzle 128, rows of 64 bytes", (104, 30), (32, 16), (0, 0), 128),
    Box("2d swizzle 128, float32", (40, 20), (32, 16), (32, 8), 128, 4),
    Box("3d slabs, swizzle 128", (64, 20, 3), (64, 8, 2), (0, 16, 2), 128),
    Box("4d heads, ragged end", (64, 12, 2, 3), (64, 8, 1, 1), (0, 8, 1, 2), 128),
]


def tensor_load_cases() -> list[Case]:
    """The tensor holds its own element numbers from 1, so that the image is the observed map."""
    cases = []
    for box in BOXES:
        dtype = np.float32 if box.element_bytes == 4 else np.uint16
        tensor = (1 + np.arange(np.prod(box.dims))).astype(dtype)
        in_tensor, in_image = box.places()
        expected = np.zeros(len(in_image), dtype=dtype)
        expected[in_image] = np.where(in_tensor >= 0, tensor[in_tensor], 0)
        run = Run(tensor, np.full(len(in_image), 7, dtype=dtype), box.parameters())
        cases.append(Case(box.label, "probe_tensor_load", [run], expected))
    return cases


def tensor_store_cases() -> list[Case]:
    cases = []
    for box in BOXES:
        dtype = np.float32 if box.element_bytes == 4 else np.uint16
        in_tensor, in_image = box.places()
        image = (1 + np.arange(len(in_image))).astype(dtype)
        before = np.full(np.prod(box.dims), 60_000, dtype=dtype)
        expected = before.copy()
        inside = in_tensor >= 0
        expected[in_tensor[inside]] = image[in_image[inside]]
        run = Run(image, before, box.parameters())
        cases.append(Case(box.label, "probe_tensor_store", [run], expected))
    return cases


def tensor_add_cases() -> list[Case]:
    """float32 and bfloat16; small integers, so that every sum is exact."""
    cases = []
    for box in BOXES:
        in_tensor, in_image = box.places()
        image = (np.arange(len(in_image)) % 13).astype(np.float32)
        before = (np.arange(np.prod(box.dims)) % 7).astype(np.float32)
        expected = before.copy()
        inside = in_tensor >= 0
        expected[in_tensor[inside]] += image[in_image[inside]]
        arrays: list[Array] = [image, before, expected]
        if box.element_bytes == 2:
            arrays = [bfloat16_bits(array) for array in arrays]
        run = Run(arrays[0], arrays[1], box.parameters(is_float=True, add=True))
        cases.append(Case(box.label, "probe_tensor_store", [run], arrays[2]))
    return cases


def setmaxnreg_cases() -> list[Case]:
    source = np.arange(2 * 200 * 128, dtype=np.float32).reshape(2, 200, 128)
    run = Run(source, np.zeros_like(source))
    return [Case("200 live values", "probe_setmaxnreg", [run], source[:, ::-1].copy())]


PROBES = [
    Probe(
        "stmatrix",
        "Is stmatrix the inverse of ldmatrix, .trans included?",
        "Yes: the same slot map, written instead of read; nothing else is touched.",
        "Warp-level matrix store instruction: stmatrix",
        "sm_90a",
        stmatrix_cases,
    ),
    Probe(
        "smem_base",
        "Does dynamic shared memory, alone in a kernel, begin on a multiple of 1024 bytes?",
        "Yes: swizzled tiles at its start need no alignment by hand.",
        "State Spaces: shared; Matrix descriptor: base offset",
        "sm_90a",
        smem_base_cases,
    ),
    Probe(
        "mbarrier",
        "When does a phase complete, which parity passes, how do bytes count?",
        "; ".join(f"{note}: {'yes' if answer else 'no'}" for note, answer in MBARRIER_NOTES),
        "mbarrier: Phase of the mbarrier object; Tracking asynchronous operations",
        "sm_90a",
        mbarrier_cases,
    ),
    Probe(
        "bulk",
        "Bulk load, ordinary stores, proxy fence, bulk store and float32 add: right end to end?",
        "Equal.",
        "Bulk copy: cp.async.bulk, cp.reduce.async.bulk",
        "sm_90a",
        bulk_cases,
    ),
    Probe(
        "tensor_load",
        "Box order, swizzle, zero fill beyond each end, bytes counted for a clipped box?",
        "Dense box, innermost fastest, XOR of address bits 4-6 by 7-9 (fewer for 64 and 32); "
        "zeros outside; the full box completes the barrier.",
        "Tensor copy: cp.async.bulk.tensor; Swizzling modes; Out-of-boundary access",
        "sm_90a",
        tensor_load_cases,
    ),
    Probe(
        "tensor_store",
        "Does a store read the same image and skip what lies outside the tensor?",
        "Yes.",
        "Tensor copy: cp.async.bulk.tensor",
        "sm_90a",
        tensor_store_cases,
    ),
    Probe(
        "tensor_add",
        "Does the tensor reduction add in the map's type and skip what lies outside?",
        "Yes, float32 and bfloat16.",
        "Tensor copy: cp.reduce.async.bulk.tensor",
        "sm_90a",
        tensor_add_cases,
    ),
    Probe(
        "reduce_wide",
        "Does a vector red.add add every element where it belongs?",
        "Equal to the integer sums, two and four floats wide.",
        "red",
        "sm_90a",
        lambda: [
            reduce_case(f"v{width}", "probe_reduce_wide", width, [64, 7, width]) for width in (2, 4)
        ],
    ),
    Probe(
        "setmaxnreg",
        "Do two warpgroups keep 200 live values after inc 240 while the first is at 24?",
        "Yes, without local memory.",
        "setmaxnreg",
        "sm_90a",
        setmaxnreg_cases,
    ),
    Probe(
        "gemm_sm90",
        "Do TMA ring, mbarriers, setmaxnreg and batched wgmma make a product, ragged edges "
        "included?",
        "Equal to the integer product.",
        "end to end",
        "sm_90a",
        lambda: gemm_cases("probe_gemm_sm90", [(128, 128, 64), (200, 136, 200), (257, 392, 1024)]),
    ),
]
