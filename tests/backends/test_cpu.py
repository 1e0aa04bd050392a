"""The CPU backend as a citizen: every instruction set, threads, forks, callers, memory, the GIL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from calls import make_call
from cases import BY_NAME
from checker import check_case
from torch import Tensor

from drope_kernels import _C, Rope, attention

ISAS = _C.cpu_isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors(
    seqlen: int, *, heads_q: int = 4, heads_kv: int = 2, head_dim: int = 64
) -> list[Tensor]:
    """q, k, v: normal, the same at every call."""
    generator = torch.Generator().manual_seed(seqlen)
    return [
        torch.randn(1, heads, seqlen, head_dim, generator=generator)
        for heads in (heads_q, heads_kv, heads_kv)
    ]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# --- instruction sets ----------------------------------------------------------------------------

SPREAD = (
    "length_1",
    "length_111",
    "length_111_full",
    "length_1521",
    "tail_of_keys_full",
    "head_dim_7",
    "head_dim_80",
    "head_dim_256",
    "wide_values",
    "window_16_full",
    "right_padded",
    "static_cache_rope",
    "q_start_negative_rope",
    "every_row_empty",
    "fused_projection_rope",
    "expanded_batch",
    "huge_entries",
    "softcap_rope_rows",
    "scale_per_row_ranges",
    "rope_partial_interleaved",
    "rope_per_head",
    "rope_million",
    "no_keys",
    "packed_rope",
)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("name", SPREAD)
def test_every_isa_computes_the_cases(isa: str, name: str, dtype: torch.dtype) -> None:
    check_case(BY_NAME[name], dtype, "cpu")


def test_isas_are_best_first_and_end_with_those_of_any_machine() -> None:
    assert ISAS[-2:] == ["scalar", "amx-emulated"]
    assert _C.cpu_isa() == ISAS[0]


def test_bf16_goes_to_float32_where_its_dot_products_are_slow() -> None:
    assert _C.bf16_dots_come_first(intel=False)
    assert not _C.bf16_dots_come_first(intel=True)
    if {"avx512", "avx512bf16"} <= set(ISAS):
        intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
        before = ISAS.index("avx512bf16") < ISAS.index("avx512")
        assert before == _C.bf16_dots_come_first(intel=intel)


def test_unknown_isa_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"expected one of .*scalar.*, got 'sse9'"):
        _C.set_cpu_isa("sse9")
    assert _C.cpu_isa() == ISAS[0]


IMPORT_AND_CALL = """
import torch
from drope_kernels import _C, attention
try:
    attention(*torch.zeros(3, 1, 1, 2, 4), backend="cpu")
    print("isa", _C.cpu_isa())
except ValueError as error:
    print("ValueError", error)
"""


@pytest.mark.parametrize("name", [ISAS[0], "scalar", ""])
def test_environment_chooses_the_isa(name: str) -> None:
    result = run_python(IMPORT_AND_CALL, DROPE_CPU_ISA=name)
    assert result.stdout.strip() == f"isa {name or ISAS[0]}", result.stderr


def test_environment_with_an_unknown_isa_says_what_was_expected() -> None:
    result = run_python(IMPORT_AND_CALL, DROPE_CPU_ISA="avx1024")
    assert result.stdout.startswith("ValueError DROPE_CPU_ISA: expected one of "), result.stderr
    assert "got 'avx1024'" in result.stdout
    assert "unset" in result.stdout


# --- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads_kv", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_identical_bits(
    threads: None, heads_kv: int, dtype: torch.dtype
) -> None:
    q, k, v = (x.to(dtype) for x in tensors(400, heads_kv=heads_kv))
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = attention(*leaves, rope=True, return_lse=True, backend="cpu")
        results.append([out, lse, *torch.autograd.grad(out.sum(), leaves)])
    for others in results[1:]:
        for one, other in zip(results[0], others, strict=True):
            assert torch.equal(one, other)


def test_concurrent_callers_do_not_disturb_each_other(threads: None) -> None:
    torch.set_num_threads(2)
    calls = [tensors(seqlen) for seqlen in (150, 200, 250, 300)]
    expected = [attention(*call, backend="cpu") for call in calls]
    with ThreadPoolExecutor(4) as callers:
        for _ in range(5):
            results = callers.map(lambda call: attention(*call, backend="cpu"), calls)
            for result, reference in zip(results, expected, strict=True):
                assert torch.equal(result, reference)


def test_other_python_threads_run_during_a_call(threads: None) -> None:
    torch.set_num_threads(1)
    call = tensors(4096)
    running = threading.Event()
    interval = sys.getswitchinterval()
    ticks = 0

    def count() -> None:
        nonlocal ticks
        while running.is_set():
            ticks += 1
            time.sleep(0.001)

    running.set()
    counter = threading.Thread(target=count)
    counter.start()
    try:
        sys.setswitchinterval(1000)  # only a released GIL lets the counter run
        ticks = 0
        attention(*call, backend="cpu")
        ticks_during_call = ticks
    finally:
        sys.setswitchinterval(interval)
        running.clear()
        counter.join()
    assert ticks_during_call > 3


# --- forks ---------------------------------------------------------------------------------------


@pytest.mark.plain_memory  # torch fills memory with its OpenMP threads, which do hang in a child
@pytest.mark.parametrize("parent_calls_first", [True, False])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_computes_and_does_not_hang(threads: None, parent_calls_first: bool) -> None:
    torch.set_num_threads(2)
    call = tensors(300)
    expected = attention(*call, backend="cpu") if parent_calls_first else None
    child = os.fork()
    if child == 0:  # the child leaves by _exit only: it must not run pytest's clean-up
        signal.alarm(60)
        out = attention(*call, backend="cpu").numpy()
        os._exit(0 if expected is None or (out == expected.numpy()).all() else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0  # -SIGALRM would be a hang
    again = attention(*call, backend="cpu")
    assert expected is None or torch.equal(again, expected)


# --- memory --------------------------------------------------------------------------------------

MEASURE_MEMORY = """
import resource, torch
from drope_kernels import attention
torch.set_num_threads(2)
def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small = [torch.randn(1, 1, 64, 64, requires_grad=True) for _ in range(3)]
attention(*small, rope=True, backend="cpu").sum().backward()
seqlen = SEQLEN
inputs = [torch.randn(1, 1, seqlen, 64, requires_grad=True) for _ in range(3)]
before = peak_mib()
out = attention(*inputs, rope=True, window=WINDOW, backend="cpu")
out.backward(torch.ones_like(out))
print(peak_mib() - before)
"""


def memory_of(seqlen: int, window: int | None = None) -> float:
    """MiB that a forward and backward call with rope needs beyond its inputs."""
    code = MEASURE_MEMORY.replace("SEQLEN", str(seqlen)).replace("WINDOW", str(window))
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=3000
    )
    return float(result.stdout)


def test_memory_grows_with_the_length_not_with_its_square() -> None:
    # A (8192, 8192) float32 matrix has 256 MiB; q, k, v, out and their gradients 2 MiB each.
    assert memory_of(8192) < 64


def test_memory_of_a_long_window() -> None:
    assert memory_of(131072, window=256) < 2048


@pytest.mark.slow
def test_memory_at_131072_is_below_2_gib() -> None:
    assert memory_of(131072) < 2048


def test_angles_are_exact_up_to_two_to_the_24(isa: str) -> None:
    """Both the fastest pair of a usual table, 2.7 million turns away, and one 100 times faster."""
    q, k, v = tensors(70, head_dim=16)
    far = 2**24 - torch.arange(70)[None]
    for frequency, tolerance in ((1.0, 2e-6), (100.0, 3e-5)):
        rope = Rope(inv_freq=[frequency, 0.1])
        for positions in (far, far - 2**23, far.flip(1) - 2**25 + 100):
            where = {"rope": rope, "positions": positions, "kv_positions": positions.flip(1)}
            ours = attention(q, k, v, backend="cpu", **where)
            exact = attention(q.double(), k.double(), v.double(), **where)
            assert (ours - exact).abs().max() < tolerance


def test_a_long_row_forgets_no_key(isa: str) -> None:
    """Every block rescales what came before: by exactly 1 while the maximum stays."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, rows, 16, generator=generator) for rows in (3, 200_000, 200_000))
    _, lse = attention(q, k, v, causal=False, return_lse=True, backend="cpu")
    exact = (q.double() @ k.double().mT / 4).logsumexp(-1)
    assert (lse - exact).abs().max() < 5e-6


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_every_element_is_written(isa: str, layout: str) -> None:
    """Unwritten memory is NaN in this suite (conftest), in every corner of a tile."""
    for seqlen in (1, 17, 47, 49, 97):
        for head_dim in (1, 15, 17, 40):
            call = tensors(seqlen, head_dim=head_dim)
            if layout == "bshd":
                call = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in call]
            out, lse = attention(*call, return_lse=True, backend="cpu")
            assert out.isfinite().all()
            assert lse.isfinite().all()


def test_training_and_inference_prepare_alike(isa: str) -> None:
    """Keeping rotated q and k for the backward pass changes no bit of the result."""
    call = make_call(BY_NAME["rope_gqa"], torch.bfloat16)
    trained = call.run("cpu")["out"]
    with torch.no_grad():
        assert torch.equal(call.outputs(call.leaves(), "cpu")[0], trained)
