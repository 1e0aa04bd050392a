"""The layout stage's expectations, and that its comparisons notice a wrong map.

A synthetic device answers each probe; it is written from the instruction's text, element by
element, not from the index arrays under test.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from probes import copy as probes_copy
from probes import sm80 as probes_sm80
from probes import wgmma as probes_wgmma
from probes.bits16 import bfloat16_bits, bfloat16_values
from probes.fragments import to_matrix, wgmma_a_map, wgmma_d_map
from probes.operands import K_MAJOR, MN_MAJOR, SPANS, Operand, swizzle
from probes.probe import Array, Case, compare
from probes.worker import PROBES


def swapped(array: Array, axis: int, first: int, second: int) -> Array:
    order = np.arange(array.shape[axis])
    order[[first, second]] = second, first
    return np.take(array, order, axis=axis)


def assert_caught(case: Case, outputs: list[Array]) -> None:
    result = compare(case, outputs)
    assert not result.passed
    assert result.observed is not None
    assert result.first_wrong[0]["expected"] != result.first_wrong[0]["observed"]


def test_every_probe_says_what_it_asks() -> None:
    assert len({probe.name for probe in PROBES}) == len(PROBES)
    for probe in PROBES:
        assert probe.question.endswith("?")
        assert probe.expectation
        assert probe.source
        cases = probe.cases()
        assert len({case.label for case in cases}) in {len(cases), len(cases) // 2}


def ldmatrix_device(image: Array, offsets: Array, num_matrices: int, trans: bool) -> Array:
    registers = np.zeros((32, 4), dtype=np.uint32)
    for matrix in range(num_matrices):
        rows = [image[offsets[8 * matrix + row] // 2 :][:8] for row in range(8)]
        for lane in range(32):
            fixed, pair = lane // 4, 2 * (lane % 4)
            low = rows[pair][fixed] if trans else rows[fixed][pair]
            high = rows[pair + 1][fixed] if trans else rows[fixed][pair + 1]
            registers[lane, matrix] = int(low) | int(high) << 16
    return registers


@pytest.mark.parametrize("form", range(4))
def test_ldmatrix_map(form: int) -> None:
    case = probes_sm80.ldmatrix_cases()[form]
    run = case.runs[0]
    assert run.b is not None
    registers = ldmatrix_device(run.a, run.b, 4 if form % 2 else 2, form >= 2)
    assert compare(case, [registers]).passed
    assert_caught(case, [swapped(registers, 1, 0, 1)])
    assert_caught(case, [swapped(registers, 0, 1, 4)])


def test_stmatrix_map() -> None:
    for case, source in zip(
        probes_copy.stmatrix_cases(), probes_sm80.ldmatrix_cases(), strict=True
    ):
        # What ldmatrix reads back from the stored image are the registers that were stored.
        run, num_matrices = case.runs[0], int(case.label[1])
        assert run.b is not None
        image, trans = case.expected, "trans" in case.label
        registers = ldmatrix_device(image, run.b, num_matrices, trans)
        stored = run.a.reshape(32, 4)[:, :num_matrices]
        np.testing.assert_array_equal(registers[:, :num_matrices], stored)
        assert compare(case, [image]).passed
        assert_caught(case, [image[::-1].copy()])
        assert source.label == case.label


def mma_device(fragments: Array) -> Array:
    """m16n8k16 of (blocks, 32, 6) registers."""
    out = np.zeros((len(fragments), 32, 4), dtype=np.float32)
    halves = bfloat16_values(fragments.view(np.uint16)).reshape(-1, 32, 6, 2)
    for block, values in enumerate(halves):
        a, b = np.zeros((16, 16)), np.zeros((16, 8))
        for lane in range(32):
            g, t = lane // 4, lane % 4
            for e in range(2):
                a[g, 2 * t + e], a[g + 8, 2 * t + e] = values[lane, 0, e], values[lane, 1, e]
                a[g, 2 * t + 8 + e], a[g + 8, 2 * t + 8 + e] = (
                    values[lane, 2, e],
                    values[lane, 3, e],
                )
                b[2 * t + e, g], b[2 * t + 8 + e, g] = values[lane, 4, e], values[lane, 5, e]
        d = a @ b
        for lane in range(32):
            g, t = lane // 4, lane % 4
            out[block, lane] = d[g, 2 * t], d[g, 2 * t + 1], d[g + 8, 2 * t], d[g + 8, 2 * t + 1]
    return out


def test_mma_map() -> None:
    case = probes_sm80.mma_cases()[0]
    fragments = case.runs[0].a
    assert compare(case, [mma_device(fragments)]).passed
    assert_caught(case, [mma_device(swapped(fragments, 2, 1, 2))])  # A's middle registers
    assert_caught(case, [mma_device(swapped(fragments, 2, 4, 5))])  # B's two registers
    assert_caught(case, [swapped(mma_device(fragments), 2, 1, 2)])  # accumulators


def test_conversions_round_to_nearest_even_low_half_first() -> None:
    bf16, f16, ex2 = probes_sm80.convert_cases()
    pairs = bf16.runs[0].a
    out = np.zeros((len(pairs), 3), dtype=np.uint32)
    bits = bfloat16_bits(pairs).astype(np.uint32)
    with np.errstate(over="ignore"):
        halves = pairs.astype(np.float16).view(np.uint16).astype(np.uint32)
        power = np.exp2(pairs[:, 0])
    out[:, 0] = bits[:, 0] | bits[:, 1] << 16
    out[:, 1] = halves[:, 0] | halves[:, 1] << 16
    power[power < 2.0**-126] = 0
    out[:, 2] = power.view(np.uint32)
    for case in (bf16, f16, ex2):
        assert compare(case, [out]).passed
    exchanged = out.copy()
    exchanged[:, 0] = bits[:, 1] | bits[:, 0] << 16
    assert_caught(bf16, [exchanged])
    truncated = out.copy()
    truncated[:, 0] = (pairs.view(np.uint32)[:, 0] >> 16) | (bits[:, 1] << 16)
    assert_caught(bf16, [truncated])
    coarse = out.copy()
    coarse[:, 2] = (power * np.float32(1 + 1e-5)).view(np.uint32)
    assert_caught(ex2, [coarse])


def test_operand_layout_by_hand() -> None:
    """Spots worked out from the canonical layouts, 16-bit elements."""
    k_major = Operand(64, 64, K_MAJOR, 128).offsets()
    assert k_major[0, 0] == 0
    assert k_major[9, 3] == (1024 + 128 + 6) ^ (1 << 4)
    assert k_major[15, 17] == (1024 + 7 * 128 + 32 + 2) ^ (7 << 4)
    mn_major = Operand(128, 64, MN_MAJOR, 128).offsets()
    assert mn_major[64, 0] == 64 * 128  # next slab: all k rows of 128 bytes further
    assert mn_major[3, 10] == (10 * 128 + 6) ^ (2 << 4)
    assert Operand(64, 64, MN_MAJOR, 64).step_offsets == [0, 1024, 2048, 3072]
    assert Operand(64, 64, K_MAJOR, 64).step_offsets == [0, 32, 64 * 64, 64 * 64 + 32]
    none = Operand(64, 16, K_MAJOR, 0).offsets()
    assert (none[1, 0], none[8, 0], none[0, 8]) == (16, 256, 128)
    assert int(swizzle(np.array([0x380]), 32)[0]) == 0x380 ^ 0x10


@pytest.mark.parametrize(("major", "span"), list(product((K_MAJOR, MN_MAJOR), SPANS)))
@pytest.mark.parametrize("mn", [64, 80, 96, 176, 256])
def test_operand_layout_holds_every_element_once(mn: int, major: int, span: int) -> None:
    operand = Operand(mn, 64, major, span)
    offsets = operand.offsets()
    assert offsets.min() >= 0
    assert offsets.max() < operand.image_bytes
    assert len(np.unique(offsets)) == offsets.size
    assert operand.image_bytes <= 64 * 1024
    parameters = operand.parameters()
    assert len(parameters) == 8
    assert all(value % 16 == 0 for value in parameters[1:])


def wgmma_device(a: Array, b: Array) -> Array:
    """(128, n/2) accumulators of a (64, k) and b (n, k)."""
    d, n = (a @ b.T).astype(np.float32), b.shape[0]
    out = np.zeros((128, n // 2), dtype=np.float32)
    for thread, j, h, e in product(range(128), range(n // 8), range(2), range(2)):
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * h
        out[thread, 4 * j + 2 * h + e] = d[row, 8 * j + 2 * (thread % 4) + e]
    return out


def test_accumulator_map() -> None:
    for case in probes_wgmma.accumulator_cases():
        n = int(case.label[1:])
        a, b = np.zeros((64, 2)), np.zeros((n, 2))
        a[:, 0], a[:, 1], b[:, 0], b[:, 1] = 1, np.arange(64), np.arange(n), 256
        out = wgmma_device(a, b)
        assert compare(case, [out]).passed
        assert_caught(case, [swapped(out, 1, 1, 2)])
        assert_caught(case, [np.full_like(out, np.nan)])


def test_a_register_map_permuted_is_caught() -> None:
    case = probes_wgmma.a_register_cases()[0]
    row, k = wgmma_a_map()

    def device(order: list[int]) -> list[Array]:
        outputs = []
        for run in case.runs:
            values = bfloat16_values(run.a.view(np.uint16).reshape(128, 4, 2))[:, order]
            a = np.zeros((64, 16), dtype=np.float32)
            a[row, k] = values
            outputs.append(wgmma_device(a, np.eye(64, 16)))
        return outputs

    assert compare(case, device([0, 1, 2, 3])).passed
    assert_caught(case, device([0, 2, 1, 3]))


@pytest.mark.parametrize("case", probes_wgmma.operand_map_cases(), ids=lambda case: case.label)
def test_operand_map_wrong_layout_is_caught(case: Case) -> None:
    """A device that reads the digits where the layout says, and one that swizzles otherwise."""
    name = case.label[2:]
    major = K_MAJOR if name.startswith("K") else MN_MAJOR
    span = int(name.split()[-1])

    def device(operand: Operand) -> list[Array]:
        outputs = []
        for run in case.runs:
            image = run.a if case.label.startswith("A") else run.b
            assert image is not None
            matrix = bfloat16_values(image)[operand.offsets() // 2 % len(image)]
            eye = np.eye(64, 16)
            pair = (matrix, eye) if case.label.startswith("A") else (eye, matrix)
            outputs.append(wgmma_device(*pair))
        return outputs

    assert compare(case, device(Operand(64, 16, major, span))).passed
    for other in set(SPANS) - {span}:
        assert_caught(case, device(Operand(64, 16, major, other)))


def test_products_are_exact_and_checked() -> None:
    cases = probes_wgmma.product_cases()
    assert len(cases) == 4 * len(probes_wgmma.INSTRUCTIONS)
    case = cases[0]
    out = np.zeros((128, 32), dtype=np.float32)
    out[:] = case.expected[wgmma_d_map(64)]
    np.testing.assert_array_equal(to_matrix(out), case.expected)
    assert compare(case, [out]).passed
    out[5, 5] += 1
    assert compare(case, [out]).num_wrong == 1


@pytest.mark.parametrize("index", range(len(probes_copy.BOXES)))
def test_tensor_boxes(index: int) -> None:
    box = probes_copy.BOXES[index]
    case = probes_copy.tensor_load_cases()[index]
    tensor = case.runs[0].a.reshape(box.dims[::-1])
    padded = np.pad(tensor, [(size, size) for size in box.box[::-1]])
    window = tuple(
        slice(size + at, size + at + size) for at, size in zip(box.at, box.box, strict=True)
    )
    dense = padded[window[::-1]].reshape(-1)
    image = np.zeros_like(dense)
    for element in range(len(dense)):
        byte = element * box.element_bytes
        if box.span:
            byte ^= (byte >> 7 & box.span // 16 - 1) << 4
        image[byte // box.element_bytes] = dense[element]
    assert compare(case, [image]).passed
    assert_caught(case, [np.roll(image, 1)])
    if box.span:
        assert_caught(case, [dense])
    store = probes_copy.tensor_store_cases()[index]
    assert compare(store, [store.expected]).passed
    assert (store.expected != store.runs[0].out).sum() == (box.places()[0] >= 0).sum()
    assert_caught(store, [store.runs[0].out])


def test_mbarrier_note_list_matches_the_kernel() -> None:
    source = Path(probes_copy.__file__).parent / "kernels" / "sm90_copy.cu"
    assert source.read_text().count("*note++ =") == len(probes_copy.MBARRIER_NOTES)
