"""Questions about the sm_80 instructions."""

from __future__ import annotations

import numpy as np

from probes.bits16 import bfloat16_bits, element_bits, float16_bits
from probes.fragments import ldmatrix_map, mma_a_map, mma_b_map, mma_d_map
from probes.probe import Array, Case, Probe, Run

SEED = 20260101
FORMS = ("x2", "x4", "x2.trans", "x4.trans")
POISON_16 = 0xEEEE


def row_order() -> Array:
    """A permutation of the 32 matrix rows, so that a lane's address cannot be guessed."""
    return np.random.default_rng(SEED).permutation(32)


def halves(outputs: list[Array]) -> Array:
    """32-bit registers as their 16-bit halves, low half first."""
    registers = outputs[0]
    return registers.view(np.uint16).reshape(*registers.shape, 2)


def matrix_slots(form: str) -> Array:
    """Image index that each slot holds after ldmatrix of a permuted image, (32, 4, 2)."""
    row, column = ldmatrix_map(trans="trans" in form)
    num_matrices = int(form[1])
    slots = np.zeros((32, 4, 2), dtype=np.uint16)
    for matrix in range(num_matrices):
        slots[:, matrix] = row_order()[8 * matrix + row] * 8 + column
    return slots


def ldmatrix_cases() -> list[Case]:
    image = np.arange(256, dtype=np.uint16)
    offsets = (16 * row_order()).astype(np.int32)
    out = np.zeros((32, 4), dtype=np.uint32)
    return [
        Case(form, "probe_ldmatrix", [Run(image, out, [i], offsets)], matrix_slots(form), halves)
        for i, form in enumerate(FORMS)
    ]


def mma_cases() -> list[Case]:
    """One A slot is 1 at a time while B's slots hold 1..128, so that the product names, for every
    accumulator, the B slot that this A slot met."""
    a_row, a_k = (index.reshape(256) for index in mma_a_map())
    b_k, b_column = (index.reshape(128) for index in mma_b_map())
    d_row, d_column = (index.reshape(128) for index in mma_d_map())
    b_slot = np.zeros((16, 8), dtype=np.int64)
    b_slot[b_k, b_column] = np.arange(1, 129)
    met = b_slot[a_k[:, None], d_column[None, :]]
    expected = np.where(a_row[:, None] == d_row[None, :], met, 0).astype(np.float32)

    a_values = np.eye(256).reshape(256, 32, 8)
    b_values = np.broadcast_to(np.arange(1, 129).reshape(32, 4), (256, 32, 4))
    values = np.concatenate([a_values, b_values], axis=2)
    out = np.full((256, 32, 4), np.nan, dtype=np.float32)
    cases = []
    for is_float16, label in enumerate(("bf16", "f16")):
        fragments = element_bits(values, bool(is_float16)).view(np.uint32)
        run = Run(fragments, out, [256, is_float16])
        cases.append(
            Case(label, "probe_mma", [run], expected, lambda outputs: outputs[0].reshape(256, 128))
        )
    return cases


def cp_async_cases() -> list[Case]:
    source = np.random.default_rng(SEED).integers(1, 256, (2, 32, 16)).astype(np.uint8)
    out = np.zeros_like(source)
    cases = []
    for label, sizes in (
        ("all or nothing", 16 * (np.arange(32) % 3 > 0)),
        ("any size", np.arange(32) % 17),
    ):
        expected = np.where(np.arange(16) < sizes[:, None], source, 0).astype(np.uint8)
        run = Run(source, out, b=sizes.astype(np.int32))
        cases.append(Case(label, "probe_cp_async", [run], expected))
    return cases


def halves_of(outputs: list[Array], column: int) -> Array:
    return outputs[0][:, column].copy().view(np.uint16).reshape(-1, 2)


def convert_cases() -> list[Case]:
    rng = np.random.default_rng(SEED)
    random = rng.standard_normal((1000, 2)) * 2.0 ** rng.integers(-8, 8, (1000, 2))
    halfway = bfloat16_bits(random[:20]).astype(np.uint32) << 16 | 0x8000
    special = np.array([[0.0, -0.0], [np.inf, -np.inf], [65504.0, 65520.0], [-140.0, 1.0]])
    pairs = np.concatenate([random, halfway.view(np.float32), special]).astype(np.float32)
    run = Run(pairs, np.zeros((len(pairs), 3), dtype=np.uint32), [len(pairs)])
    with np.errstate(over="ignore"):
        power = np.exp2(pairs[:, 0].astype(np.float64)).astype(np.float32)
    power[power < 2.0**-126] = 0.0  # flushed

    finite = np.isfinite(power)
    bf16, f16 = bfloat16_bits(pairs), float16_bits(pairs)
    return [
        Case("cvt.rn.bf16x2", "probe_convert", [run], bf16, lambda out: halves_of(out, 0)),
        Case("cvt.rn.f16x2", "probe_convert", [run], f16, lambda out: halves_of(out, 1)),
        Case(
            "ex2.approx.ftz",
            "probe_convert",
            [run],
            power[finite],
            lambda out: out[0][:, 2].copy().view(np.float32)[finite],
            relative_tolerance=2.0**-21,
        ),
    ]


def widen_cases() -> list[Case]:
    """Every float16 but the NaNs."""
    bits = np.arange(1 << 16).astype(np.uint16)
    bits = bits[~np.isnan(bits.view(np.float16))]
    run = Run(bits, np.full(len(bits), np.nan, dtype=np.float32), [len(bits)])
    return [Case("cvt.f32.f16", "probe_widen", [run], bits.view(np.float16).astype(np.float32))]


def reduce_case(label: str, symbol: str, width: int, params: list[int]) -> Case:
    """Small integers added to each of a few slots from many blocks: every order gives one sum."""
    blocks, num_slots = params[:2]
    rng = np.random.default_rng(SEED)
    values = rng.integers(-50, 51, (blocks * 32, width)).astype(np.float32)
    before = rng.integers(-9, 10, (num_slots, width)).astype(np.float32)
    expected = before.copy()
    np.add.at(expected, np.arange(len(values)) % num_slots, values)
    return Case(label, symbol, [Run(values, before, params)], expected)


def reduce_cases() -> list[Case]:
    return [
        reduce_case(f"{num_slots} slots", "probe_reduce", 1, [64, num_slots])
        for num_slots in (1, 7, 2048)
    ]


def named_barrier_cases() -> list[Case]:
    rounds = 50
    round_index, thread = np.ogrid[:rounds, :64]
    expected = (round_index * 64 + 63 - thread).astype(np.int32)
    out = np.full((rounds, 64), -1, dtype=np.int32)
    run = Run(np.zeros(0, np.int32), out, [rounds])
    return [Case("handover", "probe_named_barrier", [run], expected)]


def gemm_run(m: int, n: int, k: int) -> tuple[Run, Array]:
    """Small integers: every sum is exact, so the result must be equal."""
    rng = np.random.default_rng(SEED)
    a, b = rng.integers(-3, 4, (m, k)), rng.integers(-3, 4, (n, k))
    out = np.full((m, n), np.nan, dtype=np.float32)
    run = Run(bfloat16_bits(a), out, [m, n, k], bfloat16_bits(b))
    return run, (a @ b.T).astype(np.float32)


def gemm_cases(symbol: str, shapes: list[tuple[int, int, int]]) -> list[Case]:
    cases = []
    for m, n, k in shapes:
        run, expected = gemm_run(m, n, k)
        cases.append(Case(f"{m}x{n}x{k}", symbol, [run], expected))
    return cases


PROBES = [
    Probe(
        "ldmatrix",
        "Which row address serves which matrix, and which element lands in which half register?",
        "Lanes 8i..8i+7 address matrix i; register i of lane l holds row l/4, columns 2(l%4) and "
        "+1; with .trans rows and columns change places.",
        "Warp-level matrix load instruction: ldmatrix",
        "sm_80",
        ldmatrix_cases,
    ),
    Probe(
        "mma_m16n8k16",
        "Which elements of A, B and D do the registers hold?",
        "The A, B and C/D figures of m16n8k16, 16-bit types.",
        "Matrix Fragments for mma.m16n8k16 with floating point type",
        "sm_80",
        mma_cases,
    ),
    Probe(
        "cp_async",
        "Does src-size zero-fill, and does wait_group count groups from the newest?",
        "Bytes from src-size to 16 are zero; wait_group 1 leaves only the newest group pending.",
        "Asynchronous copy: cp.async, cp.async.wait_group",
        "sm_80",
        cp_async_cases,
    ),
    Probe(
        "convert",
        "Which half does cvt's first source fill, how does it round, how exact is ex2?",
        "The first source fills the upper half, nearest even; ex2 within 2^-21, subnormals 0.",
        "cvt; ex2",
        "sm_80",
        convert_cases,
    ),
    Probe(
        "widen",
        "Is cvt from float16 to float32 exact, subnormals and infinities included?",
        "Yes.",
        "cvt",
        "sm_80",
        widen_cases,
    ),
    Probe(
        "reduce",
        "Does red.add from many blocks to one place lose nothing?",
        "Equal to the integer sum.",
        "red",
        "sm_80",
        reduce_cases,
    ),
    Probe(
        "named_barrier",
        "Do bar.arrive and bar.sync of one barrier hand data from two warps to two others?",
        "Yes, with the same count of 128 threads on both sides.",
        "bar, barrier",
        "sm_80",
        named_barrier_cases,
    ),
    Probe(
        "gemm_sm80",
        "Do cp.async ring, swizzled ldmatrix and mma make a product, ragged edges included?",
        "Equal to the integer product.",
        "end to end",
        "sm_80",
        lambda: gemm_cases("probe_gemm_sm80", [(64, 64, 64), (100, 136, 128), (257, 200, 320)]),
    ),
]
