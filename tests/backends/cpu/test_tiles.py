"""Kernels on tiles: AMX where the machine has it, and what computes the same bits in software."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch
from calls import Call, make_call
from cases import BY_NAME
from checker import compare, peer_results, yardstick
from growing_rows import check_growing_rows
from torch import Tensor

from drope_kernels import _C, attention, explain

HAS_AMX = "amx" in _C.cpu_isas()
MIN_QUERIES = 8  # of a call that tiles serve
needs_amx = pytest.mark.skipif(not HAS_AMX, reason=_C.amx_refusal() or "it has AMX")


def run_on(isa: str, call: Call) -> dict[str, Tensor]:
    _C.set_cpu_isa(isa)
    try:
        return call.run("cpu")
    finally:
        _C.set_cpu_isa("")


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name in theirs:
        same = (ours[name] == theirs[name]) | (ours[name].isnan() & theirs[name].isnan())
        assert same.all(), f"{name}: {int((~same).sum())} of {same.numel()} elements differ"


def is_for_tiles(call: Call) -> bool:
    """Whether no part of a call goes to lanes, of which the two instances have different ones."""
    case = call.case
    lengths = case.seqlens_q if case.seqlens_q is not None else (case.seqlen_q,)
    return (
        case.softcap is None
        and max(case.head_dim, case.value_dim) <= 128
        and not any(0 < length < MIN_QUERIES for length in lengths)
    )


@pytest.mark.parametrize("name", BY_NAME)
def test_case(name: str) -> None:
    call = make_call(BY_NAME[name], torch.bfloat16)
    emulated = run_on("amx-emulated", call)
    yardsticks = [f(name, torch.bfloat16) for f in (yardstick, peer_results)]
    compare(call, emulated, *yardsticks)
    if HAS_AMX and is_for_tiles(call):
        assert_same_bits(run_on("amx", call), emulated)


# --- bits ----------------------------------------------------------------------------------------


@needs_amx
@pytest.mark.parametrize("exponent", [-126, -70, -60, 0, 50, 62])
def test_numbers_of_any_size_have_the_same_bits(exponent: int) -> None:
    """From products that are subnormal, which tiles take for 0, to scores at float32's end."""
    generator = torch.Generator().manual_seed(exponent)
    tensors = [
        (torch.randn(1, 2, length, 64, generator=generator) * 2.0**size).bfloat16()
        for length, size in ((40, exponent), (200, exponent), (200, 0))
    ]
    results = []
    for isa in ("amx", "amx-emulated"):
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        _C.set_cpu_isa(isa)
        out, lse = attention(q, k, v, rope=True, return_lse=True)
        (out.float().sum() + lse.sum()).backward()
        _C.set_cpu_isa("")
        gradients = {f"d{n}": x.grad for n, x in zip("qkv", (q, k, v), strict=True)}
        results.append({"out": out, "lse": lse, **gradients})
    assert_same_bits(*results)


def test_subnormal_numbers_are_numbers_again_after_a_call(isa: str) -> None:
    """Tiles work with flush-to-zero, on the caller's thread too."""
    q = torch.randn(1, 1, 32, 32, dtype=torch.bfloat16, requires_grad=True)
    attention(q, q, q).sum().backward()
    assert torch.tensor([1e-40]).mul(1.0).item() > 0.0


def test_rows_that_grow_block_by_block(isa: str) -> None:
    check_growing_rows()


@pytest.mark.parametrize("isa_name", ["amx-emulated", *(["amx"] if HAS_AMX else [])])
def test_any_number_of_threads_gives_identical_bits(isa_name: str, threads: None) -> None:
    call = make_call(BY_NAME["length_1521"], torch.bfloat16)
    torch.set_num_threads(1)
    one = run_on(isa_name, call)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert_same_bits(run_on(isa_name, call), one)


# --- which calls, and which machines -------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float16}, "bfloat16 only"),
        ({"dim": 136}, "head_dim up to 128"),
        ({"softcap": 5.0}, "no softcap"),
        ({"queries": 2}, "fewer than"),
    ],
    ids=lambda x: str(x),
)
def test_explain_tells_tiles_from_lanes(changes: dict[str, object], reason: str | None) -> None:
    values = {"dtype": torch.bfloat16, "dim": 64, "queries": 64, "softcap": None} | changes
    q = torch.zeros(1, 1, values["queries"], values["dim"], dtype=values["dtype"])
    _C.set_cpu_isa("amx-emulated")
    text = explain(q, q, q, softcap=values["softcap"])
    _C.set_cpu_isa("avx2" if "avx2" in _C.cpu_isas() else "scalar")
    assert " lanes\n" in explain(q, q, q, softcap=values["softcap"])
    _C.set_cpu_isa("")
    if reason is None:
        assert "runs this call with amx-emulated tiles" in text
    else:
        assert " lanes, not amx-emulated tiles: " in text
        assert reason in text


def test_emulated_tiles_are_never_chosen_by_themselves() -> None:
    assert _C.cpu_isas().index("amx-emulated") > 0
    assert _C.cpu_isa() != "amx-emulated"


def test_refusals_of_amx_are_sentences() -> None:
    assert "shows no AMX tiles" in _C.amx_refusal(in_cpu=False, permission=0)
    denied = _C.amx_refusal(in_cpu=True, permission=errno.EPERM)
    assert os.strerror(errno.EPERM) in denied
    assert _C.amx_refusal(in_cpu=True, permission=0) == ""


# A seccomp filter: arch_prctl(ARCH_REQ_XCOMP_PERM, ...) fails with EPERM, all else goes on.
DENY = """
import ctypes, struct
def code(op, yes, no, value): return struct.pack("HBBI", op, yes, no, value)
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
program = b"".join([
    code(LOAD, 0, 0, 0), code(EQUAL, 0, 3, 158),         # the number of the call: arch_prctl
    code(LOAD, 0, 0, 16), code(EQUAL, 0, 1, 0x1023),     # its first argument
    code(RETURN, 0, 0, 0x00050001), code(RETURN, 0, 0, 0x7FFF0000),
])
buffer = ctypes.create_string_buffer(program)
header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.create_string_buffer(header)) == 0, ctypes.get_errno()
import torch
from drope_kernels import _C, attention, cli
q = torch.ones(1, 1, 32, 32, dtype=torch.bfloat16)
assert (attention(q, q, q) == 1).all()
assert "amx" not in _C.cpu_isas()
cli.main(["info"])
"""


@needs_amx
def test_a_process_that_may_not_use_tiles_uses_lanes_and_says_so() -> None:
    result = subprocess.run(
        [sys.executable, "-c", DENY], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "does not let this process use AMX tiles" in result.stdout
    assert os.strerror(errno.EPERM) in result.stdout
