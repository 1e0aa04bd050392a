"""Questions about wgmma: fragments, operand layouts, descriptors, fences."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from probes.bits16 import element_bits
from probes.fragments import to_matrix, wgmma_a_map, wgmma_d_map
from probes.operands import K_MAJOR, MN_MAJOR, SPANS, Operand
from probes.probe import Array, Case, Probe, Run
from probes.sm80 import SEED

DIGIT = 128  # element numbers travel as two digits, each exact in bfloat16
MAJOR_NAMES = ("K", "MN")


@dataclass(frozen=True)
class Instruction:
    """One compiled row of kEntries in sm90_wgmma.cu."""

    n: int
    a_in_registers: bool
    a_major: int
    b_major: int
    is_float16: bool = False

    @property
    def label(self) -> str:
        a = "registers" if self.a_in_registers else MAJOR_NAMES[self.a_major]
        kind = "f16" if self.is_float16 else "bf16"
        return f"n{self.n} {kind} A {a} B {MAJOR_NAMES[self.b_major]}"


def _shared(n: int, a_major: int, b_major: int, is_float16: bool = False) -> Instruction:
    return Instruction(n, False, a_major, b_major, is_float16)


def _registers(n: int, b_major: int, is_float16: bool = False) -> Instruction:
    return Instruction(n, True, K_MAJOR, b_major, is_float16)


INSTRUCTIONS = [
    *(_shared(64, a, b) for a, b in product((K_MAJOR, MN_MAJOR), repeat=2)),
    _shared(128, K_MAJOR, K_MAJOR),
    _shared(128, MN_MAJOR, MN_MAJOR),
    _shared(96, K_MAJOR, MN_MAJOR),
    _shared(80, K_MAJOR, K_MAJOR),
    _shared(176, K_MAJOR, K_MAJOR),
    _shared(192, K_MAJOR, MN_MAJOR),
    _shared(256, K_MAJOR, K_MAJOR),
    _shared(64, K_MAJOR, K_MAJOR, is_float16=True),
    _shared(128, K_MAJOR, MN_MAJOR, is_float16=True),
    _registers(64, K_MAJOR),
    _registers(64, MN_MAJOR),
    _registers(96, MN_MAJOR),
    _registers(128, K_MAJOR),
    _registers(128, MN_MAJOR),
    _registers(192, K_MAJOR),
    _registers(256, MN_MAJOR),
    _registers(64, MN_MAJOR, is_float16=True),
]


def a_fragments(a: Array) -> Array:
    """(64, k) 16-bit values -> (k/16, 128, 4) registers."""
    row, k = wgmma_a_map()
    steps = [a[row, k + 16 * step] for step in range(a.shape[1] // 16)]
    return np.stack(steps).view(np.uint32)[..., 0]


@dataclass(frozen=True)
class Options:
    """What a run may vary. scale_d: of the first step; initial: the accumulators before it."""

    scale_d: bool = False
    initial: int = 0
    with_proxy_fence: bool = True
    leading_bytes: int | None = None  # in place of the layout's own


def wgmma_run(
    instruction: Instruction,
    a_data: Array,
    b_data: Array,
    a_layout: Operand,
    b_layout: Operand,
    options: Options | None = None,
) -> Run:
    """a_data: image of A, or its fragments; b_data: image of B."""
    chosen = options or Options()
    params = [
        int(instruction.is_float16),
        instruction.n,
        int(instruction.a_in_registers),
        instruction.a_major,
        instruction.b_major,
        b_layout.num_steps,
        int(chosen.scale_d),
        chosen.initial,
        int(chosen.with_proxy_fence),
        *a_layout.parameters(chosen.leading_bytes),
        *b_layout.parameters(chosen.leading_bytes),
    ]
    out = np.full((128, instruction.n // 2), np.nan, dtype=np.float32)
    return Run(a_data, out, params, b_data)


def decode_matrix(outputs: list[Array]) -> Array:
    return to_matrix(outputs[0])


def product_case(instruction: Instruction, span: int, options: Options | None = None) -> Case:
    """A product of small integers in four k steps: exact, so it must be equal. What shared memory
    holds besides the operands is NaN."""
    chosen, k = options or Options(), 64
    rng = np.random.default_rng(SEED)
    a, b = rng.integers(-3, 4, (64, k)), rng.integers(-3, 4, (instruction.n, k))
    a_layout = Operand(64, k, instruction.a_major, span)
    b_layout = Operand(instruction.n, k, instruction.b_major, span)
    a_bits = element_bits(a, instruction.is_float16)
    b_image = b_layout.image(element_bits(b, instruction.is_float16))
    a_data = a_fragments(a_bits) if instruction.a_in_registers else a_layout.image(a_bits)
    run = wgmma_run(instruction, a_data, b_image, a_layout, b_layout, chosen)
    carried = chosen.initial if chosen.scale_d else 0
    expected = (a @ b.T + carried).astype(np.float32)
    label = f"{instruction.label}, swizzle {span}"
    return Case(label, "probe_wgmma", [run], expected, decode_matrix)


def product_cases() -> list[Case]:
    return [product_case(instruction, span) for instruction in INSTRUCTIONS for span in SPANS]


def digits(numbers: Array) -> list[Array]:
    """Element numbers as the bfloat16 bits of their low and of their high digit."""
    return [element_bits(digit, False) for digit in (numbers % DIGIT, numbers // DIGIT)]


def decode_numbers(outputs: list[Array], columns: int) -> Array:
    """(64, columns) element numbers from the two digit runs; -1 where none is readable."""
    low, high = (to_matrix(out)[:, :columns] for out in outputs)
    numbers = low + DIGIT * high
    return np.where(np.isfinite(numbers), numbers, -1).astype(np.int64)


def identity_b() -> tuple[Array, Operand]:
    """B (n = 64, k = 16) with ones where n == k: columns 0..15 of D are A."""
    layout = Operand(64, 16, K_MAJOR, 0)
    return layout.image(element_bits(np.eye(64, 16), False)), layout


def selecting_a() -> tuple[Array, Operand]:
    """A in registers with ones where m == k: rows 0..15 of D are B."""
    return a_fragments(element_bits(np.eye(64, 16), False)), Operand(64, 16, K_MAJOR, 0)


def a_register_cases() -> list[Case]:
    """Every half register holds its own number; D shows which one was A[m][k]."""
    row, k = wgmma_a_map()
    slot = np.arange(1024).reshape(128, 4, 2)
    expected = np.zeros((64, 16), dtype=np.int64)
    expected[row, k] = slot
    b_image, b_layout = identity_b()
    runs = [
        wgmma_run(
            _registers(64, K_MAJOR), digit.view(np.uint32)[..., 0], b_image, b_layout, b_layout
        )
        for digit in digits(slot)
    ]
    return [Case("n64", "probe_wgmma", runs, expected, lambda outputs: decode_numbers(outputs, 16))]


def accumulator_cases() -> list[Case]:
    """D[m][n] = n + 256 m: every accumulator names its element."""
    cases = []
    for n in (64, 80, 128, 176, 256):
        a, b = np.zeros((64, 16)), np.zeros((n, 16))
        a[:, 0], a[:, 1] = 1, np.arange(64)
        b[:, 0], b[:, 1] = np.arange(n), 256
        a_layout, b_layout = Operand(64, 16, K_MAJOR, 0), Operand(n, 16, K_MAJOR, 0)
        row, column = wgmma_d_map(n)
        run = wgmma_run(
            _shared(n, K_MAJOR, K_MAJOR),
            a_layout.image(element_bits(a, False)),
            b_layout.image(element_bits(b, False)),
            a_layout,
            b_layout,
        )
        expected = (column + 256 * row).astype(np.float32)
        cases.append(Case(f"n{n}", "probe_wgmma", [run], expected))
    return cases


def operand_map_cases() -> list[Case]:
    """Shared memory holds element numbers; D shows which one was read as A[m][k] or B[n][k]."""
    cases = []
    b_image, b_layout = identity_b()
    a_registers, a_layout = selecting_a()
    for major, span in product((K_MAJOR, MN_MAJOR), SPANS):
        tile = Operand(64, 16, major, span)
        name = f"{MAJOR_NAMES[major]}-major, swizzle {span}"
        images = digits(np.arange(tile.image_bytes // 2))
        expected = tile.offsets() // 2
        as_a = [
            wgmma_run(_shared(64, major, K_MAJOR), image, b_image, tile, b_layout)
            for image in images
        ]
        as_b = [
            wgmma_run(_registers(64, major), a_registers, image, a_layout, tile) for image in images
        ]
        cases.append(
            Case(f"A {name}", "probe_wgmma", as_a, expected, lambda out: decode_numbers(out, 16))
        )
        cases.append(
            Case(
                f"B {name}",
                "probe_wgmma",
                as_b,
                expected,
                lambda out: decode_numbers(out, 64)[:16].T,
            )
        )
    return cases


def scale_d_cases() -> list[Case]:
    instructions = (_shared(64, K_MAJOR, K_MAJOR), _registers(64, MN_MAJOR))
    return [
        product_case(instruction, 128, Options(scale_d=scale_d, initial=7))
        for instruction in instructions
        for scale_d in (False, True)
    ]


def unused_leading_cases() -> list[Case]:
    instruction = _shared(64, K_MAJOR, K_MAJOR)
    return [
        product_case(instruction, span, Options(leading_bytes=leading))
        for span in (128, 64, 32)
        for leading in (16, 4096)
    ]


def without_fence_cases() -> list[Case]:
    instructions = (_shared(128, K_MAJOR, K_MAJOR), _registers(128, MN_MAJOR))
    return [product_case(one, 128, Options(with_proxy_fence=False)) for one in instructions]


WGMMA = "Asynchronous warpgroup-level matrix instructions: "
PROBES = [
    Probe(
        "wgmma_accumulator",
        "Which element of D is accumulator i of a thread?",
        "d[4j + 2h + e]: row 16w + l/4 + 8h, column 8j + 2(l%4) + e.",
        WGMMA + "Register Fragments, D",
        "sm_90a",
        accumulator_cases,
    ),
    Probe(
        "wgmma_a_registers",
        "Which element of A is each half register?",
        "mma.m16n8k16's A on rows 16w..16w+15 of warp w.",
        WGMMA + "Register Fragments, A",
        "sm_90a",
        a_register_cases,
    ),
    Probe(
        "wgmma_operand_map",
        "From which shared-memory element is A[m][k], B[n][k] read, per major and swizzle?",
        "The canonical layouts with the leading and stride bytes of matrix_descriptor.h.",
        WGMMA + "Shared Memory Matrix Layout; Matrix descriptor",
        "sm_90a",
        operand_map_cases,
    ),
    Probe(
        "wgmma_product",
        "Every instruction and swizzle over four k steps: right start addresses inside an atom, "
        "right strides, n not a multiple of the atom, stores fenced into the async proxy?",
        "Equal to the integer product.",
        WGMMA + "wgmma.mma_async; Strides; Async Proxy",
        "sm_90a",
        product_cases,
    ),
    Probe(
        "wgmma_scale_d",
        "Does scale-d 0 overwrite and 1 accumulate?",
        "Yes.",
        WGMMA + "wgmma.mma_async",
        "sm_90a",
        scale_d_cases,
    ),
    Probe(
        "wgmma_unused_leading",
        "Is the leading byte offset ignored by swizzled K-major operands?",
        "Yes: any value gives the same product.",
        WGMMA + "Leading dimension byte offset",
        "sm_90a",
        unused_leading_cases,
    ),
    Probe(
        "wgmma_without_proxy_fence",
        "What happens when ordinary stores reach wgmma without fence.proxy.async?",
        "Undefined; the kernels always fence. Reported only.",
        WGMMA + "Async Proxy",
        "sm_90a",
        without_fence_cases,
        informational=True,
    ),
]
