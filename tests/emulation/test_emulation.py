"""The CUDA sources that we ship, run on the CPU. emulation/README.md: how, and what it misses."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from probes.bits16 import bfloat16_bits
from probes.operands import K_MAJOR, Operand
from probes.probe import Array, Case, Probe, Run
from probes.sm80 import gemm_cases
from probes.worker import PROBES

from emulation.library import (
    AT_ISSUE,
    HEADERS,
    LATEST,
    RANDOM,
    EmulationError,
    Emulator,
    build,
)
from emulation.planted import BUGS, Bug
from emulation.rewrite import asm_templates, rewrite

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the emulator switches stacks in x86-64 assembly"
)

COMPLETIONS = {"at_issue": AT_ISSUE, "latest": LATEST, "random": RANDOM}
PROBE_BY_NAME = {probe.name: probe for probe in PROBES}
GEMMS = ("gemm_sm80", "gemm_sm90")

each_completion = pytest.mark.parametrize(
    "completion", COMPLETIONS.values(), ids=COMPLETIONS.keys()
)


@pytest.fixture(scope="session")
def emulator() -> Emulator:
    return Emulator.load(build())


@pytest.fixture(scope="session")
def planted(emulator: Emulator) -> dict[str, Path]:
    """Bug's name -> its library."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        paths = pool.map(lambda bug: build(bug.planted()), BUGS)
    return dict(zip((bug.name for bug in BUGS), paths, strict=True))


def emulated_id(probe: Probe) -> str:
    return f"{probe.name}-emulated-{probe.architecture.replace('_', '')}"


# ---- the kernels as they are -------------------------------------------------------------------
@each_completion
@pytest.mark.parametrize("probe", [one for one in PROBES if not one.informational], ids=emulated_id)
def test_probe(emulator: Emulator, probe: Probe, completion: int) -> None:
    for case in probe.cases():
        emulator.configure(completion)
        result = emulator.check(case)
        assert result.passed, f"{case.label}: {result.num_wrong} wrong, {result.first_wrong}"


def long_gemm(name: str) -> Case:
    """Long in k, so that the ring goes round often; ragged in m and n."""
    return gemm_cases(f"probe_{name}", [(136, 72, 640)])[0]


@pytest.mark.parametrize("seed", range(2, 8))
@pytest.mark.parametrize("name", GEMMS)
def test_gemm_under_random_schedules(emulator: Emulator, name: str, seed: int) -> None:
    emulator.configure(RANDOM, seed)
    assert emulator.check(long_gemm(name)).passed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 130))
@pytest.mark.parametrize("name", GEMMS)
def test_gemm_under_many_schedules(emulator: Emulator, name: str, seed: int) -> None:
    for case in PROBE_BY_NAME[name].cases():
        emulator.configure(RANDOM, seed)
        assert emulator.check(case).passed


@each_completion
def test_missing_proxy_fence_is_an_error(emulator: Emulator, completion: int) -> None:
    for case in PROBE_BY_NAME["wgmma_without_proxy_fence"].cases():
        emulator.configure(completion)
        with pytest.raises(EmulationError, match=r"wgmma reads .* without fence\.proxy\.async"):
            emulator.check(case)


@each_completion
def test_the_instructions_really_ran(emulator: Emulator, completion: int) -> None:
    emulator.configure(completion)
    assert emulator.check(gemm_cases("probe_gemm_sm80", [(100, 136, 128)])[0]).passed
    blocks, tiles, steps, warps = 6, 2, 4, 4
    sm80 = emulator.counts()
    assert sm80["mma"] == blocks * tiles * steps * warps * 8
    assert sm80["ldmatrix"] == blocks * tiles * steps * warps * 4
    assert sm80["cp_async"] == blocks * tiles * 128 * 8
    assert sm80["wgmma"] == sm80["tensor_load"] == sm80["mbarrier_arrive"] == 0

    emulator.configure(completion)
    assert emulator.check(gemm_cases("probe_gemm_sm90", [(200, 136, 200)])[0]).passed
    blocks, tiles, consumers = 4, 4, 2
    sm90 = emulator.counts()
    assert sm90["wgmma"] == blocks * tiles * steps * consumers
    assert sm90["tensor_load"] == blocks * tiles * 2
    assert sm90["mbarrier_arrive"] == blocks * tiles * (1 + consumers)
    assert sm90["mbarrier_wait"] == blocks * tiles * (1 + consumers * 128)
    assert sm90["mma"] == sm90["ldmatrix"] == sm90["cp_async"] == 0


def test_every_asm_statement_is_understood(emulator: Emulator) -> None:
    """Also those that no probe executes."""
    templates = [text for path in HEADERS for text in asm_templates(path.read_text())]
    assert len(templates) > 60
    for text in templates:
        understood = emulator.library.emulation_understands(text.encode())
        assert understood, emulator.library.emulation_error().decode()


# ---- planted bugs ------------------------------------------------------------------------------
def outcome(emulator: Emulator, case: Case) -> tuple[str, int]:
    """The emulator's message, empty when there was none, and the number of wrong values."""
    try:
        return "", emulator.check(case).num_wrong
    except EmulationError as error:
        return str(error), 0


@each_completion
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "_"))
def test_planted_bug_is_caught(planted: dict[str, Path], bug: Bug, completion: int) -> None:
    emulator = Emulator.load(planted[bug.name])
    case = long_gemm(bug.probe) if bug.probe in GEMMS else PROBE_BY_NAME[bug.probe].cases()[-1]
    emulator.configure(completion, seed=5)
    said, num_wrong = outcome(emulator, case)
    assert said or num_wrong > 0
    assert bug.message in said


# ---- the emulator's own rules ------------------------------------------------------------------
def overlap_run(meddling: int) -> tuple[Run, Array]:
    """kernels/overlap.cu with small integers, and its output as (2, 64, 64)."""
    rng = np.random.default_rng(3)
    layout = Operand(64, 16, K_MAJOR, 0)
    a, b = rng.integers(-3, 4, (64, 16)), rng.integers(-3, 4, (64, 16))
    images = np.concatenate([layout.image(bfloat16_bits(x)) for x in (a, b)])
    product = (a @ b.T).astype(np.float32)
    out = np.full((2, 128, 32), np.nan, dtype=np.float32)
    return Run(images, out, [meddling]), np.stack([product, product + 1])


def as_matrices(out: Array) -> Array:
    thread, register = np.ogrid[:128, :32]
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register // 2 % 2)
    column = 8 * (register // 4) + 2 * (thread % 4) + register % 2
    matrices = np.empty((2, 64, 64), dtype=np.float32)
    matrices[:, row, column] = out
    return matrices


@each_completion
def test_one_product_is_used_while_another_runs(emulator: Emulator, completion: int) -> None:
    run, expected = overlap_run(0)
    emulator.configure(completion)
    np.testing.assert_array_equal(as_matrices(emulator.call("emulation_overlap", run)), expected)


@each_completion
@pytest.mark.parametrize(
    ("meddling", "message"),
    [(1, "0 is read while"), (2, "0 is written while"), (3, "0 is read while")],
    ids=["read", "write", "scale"],
)
def test_accumulators_in_flight_are_not_touched(
    emulator: Emulator, completion: int, meddling: int, message: str
) -> None:
    emulator.configure(completion)
    with pytest.raises(EmulationError, match=message):
        emulator.call("emulation_overlap", overlap_run(meddling)[0])


@each_completion
def test_warp_functions(emulator: Emulator, completion: int) -> None:
    values = np.random.default_rng(4).integers(0, 1000, 32).astype(np.int32)
    odd = np.array([sum(int(value & 1) << lane for lane, value in enumerate(values))])
    run = Run(values, np.zeros((3, 32), np.int32), [1])
    emulator.configure(completion)
    neighbour, largest, ballot = emulator.call("emulation_warp", run)
    np.testing.assert_array_equal(neighbour, values.reshape(16, 2)[:, ::-1].reshape(32))
    np.testing.assert_array_equal(largest, np.full(32, values.max()))
    np.testing.assert_array_equal(ballot.view(np.uint32), np.full(32, odd))


@each_completion
def test_a_shuffle_does_not_order_memory(emulator: Emulator, completion: int) -> None:
    run = Run(np.arange(32, dtype=np.int32), np.zeros((3, 32), np.int32), [0])
    emulator.configure(completion)
    with pytest.raises(EmulationError, match="race: an ordinary load reads shared byte"):
        emulator.call("emulation_warp", run)


def test_shared_memory_ends_where_the_launch_says(emulator: Emulator) -> None:
    emulator.configure(AT_ISSUE)
    out = np.zeros(1, np.int32)
    emulator.call("emulation_shared_bounds", Run(out, out, [1020]))
    with pytest.raises(EmulationError, match="the block has 0x400"):
        emulator.call("emulation_shared_bounds", Run(out, out, [1024]))


@pytest.mark.parametrize(
    ("dims", "box", "swizzle"),
    [
        ((104, 30), (300, 8), 0),  # more than 256
        ((104, 30), (20, 8), 0),  # a row that is no multiple of 16 bytes
        ((104, 30), (64, 8), 2),  # 128 bytes in a 64-byte swizzle
        ((100, 30), (24, 8), 0),  # a stride that is no multiple of 16 bytes
    ],
)
def test_illegal_tensor_maps_are_refused(
    emulator: Emulator, dims: tuple[int, int], box: tuple[int, int], swizzle: int
) -> None:
    params = [2, 2, swizzle, 0, 0, *dims, 0, 0, *box, 0, 0, 0, 0, 0, 0]
    tensor = np.zeros(dims[0] * dims[1], np.uint16)
    emulator.configure(AT_ISSUE)
    with pytest.raises(EmulationError, match="cudaErrorInvalidValue"):
        emulator.call(
            "probe_tensor_load", Run(tensor, np.zeros(box[0] * box[1], np.uint16), params)
        )


@pytest.mark.parametrize(
    "text",
    [
        "wgmma.mma_async.sync.aligned.m64n64k8.f32.bf16.bf16 %0, %1, %2, 1, 1, 1, 0, 0;",
        "mma.sync.aligned.m16n8k16.row.row.f32.bf16.bf16.f32 {%0}, {%1}, {%2}, {%3};",
        "bar.sync %0;",
        "mbarrier.init.shared::cta.b64 [barrier], %0;",
        "bra nowhere;",
        "mov.u32 %0, %clock;",
    ],
)
def test_other_ptx_is_refused(emulator: Emulator, text: str) -> None:
    assert not emulator.library.emulation_understands(text.encode())
    assert "PTX" in emulator.library.emulation_error().decode()


# ---- the rewriter ------------------------------------------------------------------------------
def test_rewriting_keeps_text_operands_and_lines() -> None:
    source = (
        'asm volatile(  // why\n    "mov.u32 %0, %1;\\n"\n    "(\\"}"\n'
        '    : "=r"(out[f(1, 2)])\n    : "r"(a::b), "n"(static_cast<int>(kX)) : "memory");\nnext;'
    )
    result = rewrite(source)
    assert result.count("\n") == source.count("\n")
    assert '"mov.u32 %0, %1;\\n"\n    "(\\"}"' in result
    assert "asm_output<'r'>(out[f(1, 2)])" in result
    assert "asm_input<'r'>(a::b)" in result
    assert "asm_constant(static_cast<int>(kX))" in result
    assert "memory" not in result


def test_rewriting_launches_and_shared_memory() -> None:
    assert "launch(k<A, 2>, g, n, s, a, f(b));" in rewrite("{ k<A, 2><<<g, n, s>>>(a, f(b)); }")
    pointer = rewrite("extern __shared__ __align__(1024) unsigned char smem[];")
    assert pointer.startswith("unsigned char* smem = reinterpret_cast<unsigned char*>(")
    with pytest.raises(ValueError, match="static __shared__"):
        rewrite("__shared__ float x[4];")
    with pytest.raises(ValueError, match="asm constraint: x"):
        rewrite('asm("nop;" :: "x"(1));')
