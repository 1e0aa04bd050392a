"""What the compiler made of the CUDA kernels: registers, no local memory, which instructions.

The build keeps what ptxas said beside every object, and cuobjdump disassembles the objects. Nothing
here needs a GPU, but all of it needs a build by nvcc in this tree.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from repository import ROOT

import drope_kernels as dk

BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}" / "CMakeFiles"
LOGS = sorted(BUILD.glob("drope_cuda_sm*/**/*.ptxas.txt"))
SUFFIX = ".cu.o.ptxas.txt"

pytestmark = [
    pytest.mark.skipif(dk.build_info()["cuda"] is None, reason="built without CUDA kernels"),
    pytest.mark.skipif(not LOGS, reason="the extension was not built by nvcc in this tree"),
]
each_log = pytest.mark.parametrize("log", LOGS, ids=lambda path: path.name.removesuffix(SUFFIX))

COMPILED = re.compile(
    r"Compiling entry function '(\S+)' for '(\S+)'\s+"
    r"ptxas info\s+: Function properties for \S+\s+"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
    r"ptxas info\s+: Used (\d+) registers"
)
TENSOR_OPS = ("HMMA", "HGMMA")
COUNTED = re.compile(
    r"\b(HGMMA|HMMA|LDSM|LDGSTS|UTMALDG|USETMAXREG|RED|ATOMG|LDL|STL|WARPGROUP\.DEPBAR)\b"
)


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture, as ptxas reported it."""

    name: str
    architecture: str
    stack_bytes: int
    spill_bytes: int
    registers: int

    @property
    def kind(self) -> str:
        """The function's own name."""
        return kernel_name(self.name)


def kernel_name(mangled: str) -> str:
    found = re.search(r"cuda\d+([a-z][a-z0-9_]*_kernel)I", mangled)
    assert found, f"not a kernel of ours: {mangled}"
    return found[1]


@cache
def compiled(log: Path) -> list[Compiled]:
    found = COMPILED.findall(log.read_text())
    return [
        Compiled(name, architecture, int(stack), int(stores) + int(loads), int(registers))
        for name, architecture, stack, stores, loads, registers in found
    ]


# Threads of a block and blocks an SM shall hold, by kernel and HEAD_DIM: the arithmetic stands in
# the config header of each kernel. The file of 65536 registers is shared by so many threads.
@dataclass(frozen=True)
class Shape:
    num_threads: int
    blocks_per_sm: int

    @property
    def registers(self) -> int:
        """That a thread can have; ptxas gives them in eights and no more than 255."""
        return min(255, 65536 // (self.num_threads * self.blocks_per_sm) // 8 * 8)


SHAPES = {
    "forward_sm90_d64": Shape(512, 1),
    "forward_sm90_d128": Shape(384, 1),
    "forward_sm80_d64": Shape(128, 2),
    "forward_sm80_d96": Shape(128, 2),
    "forward_sm80_d128": Shape(128, 2),
    "forward_sm80_d256": Shape(256, 1),
}


# Bytes of stack that ptxas takes for sm_90 where the same PTX needs none on sm_80: six
# registers too many. Hopper has a forward kernel of its own.
STACK_ON_HOPPER = {("forward_sm80_d128", "forward_sm80_kernel"): 24}


@each_log
def test_no_local_memory(log: Path) -> None:
    kernels = compiled(log)
    assert kernels
    assert log.read_text().count("Compiling entry function") == len(kernels)
    for kernel in kernels:
        allowed = 0
        if kernel.architecture == "sm_90":
            allowed = STACK_ON_HOPPER.get((log.name.removesuffix(SUFFIX), kernel.kind), 0)
        assert kernel.stack_bytes <= allowed, kernel
        assert kernel.spill_bytes <= 2 * allowed, kernel


@each_log
def test_ptxas_serialised_nothing(log: Path) -> None:
    """C7508: setmaxnreg ignored; C7510 to C7519: wgmma serialised or waits injected."""
    said = [line for line in log.read_text().splitlines() if re.search(r"\(C75\d\d\)", line)]
    assert said == []


@pytest.mark.parametrize("name", SHAPES)
def test_registers_are_those_of_the_table(name: str) -> None:
    for kernel in compiled(log_of(name)):
        assert kernel.registers <= SHAPES[name].registers, kernel
        if kernel.architecture == "sm_90a":  # setmaxnreg counts on what the launch gives
            assert kernel.registers == SHAPES[name].registers, kernel


# ---- machine code ------------------------------------------------------------------------------
def disassembler() -> tuple[str, dict[str, str]]:
    """cuobjdump, and the environment in which it finds nvdisasm."""
    places = [os.environ["PATH"]]
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or () if package else ():
        places += [str(path.parent) for path in sorted(Path(folder).glob("*/bin/cuobjdump"))]
    path = os.pathsep.join(places)
    tool = shutil.which("cuobjdump", path=path)
    if tool is None or shutil.which("nvdisasm", path=path) is None:
        pytest.skip("cuobjdump and nvdisasm are missing: pip install -e '.[dev]'")
    return tool, os.environ | {"PATH": path}


def machine_code(log: Path, architecture: str) -> dict[str, str]:
    """Mangled name -> its disassembly."""
    tool, environment = disassembler()
    command = [tool, "-sass", "-arch", architecture, str(log).removesuffix(".ptxas.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    parts = [part.partition("\n") for part in done.stdout.split("Function : ")[1:]]
    assert parts, f"{log.name} holds no machine code for {architecture}"
    return {name.strip(): code for name, _, code in parts}


@cache
def sass_counts(log: Path, architecture: str) -> dict[str, Counter[str]]:
    """Mangled name -> how often each instruction of note stands in its machine code."""
    code = machine_code(log, architecture)
    return {name: Counter(COUNTED.findall(text)) for name, text in code.items()}


# HMMA (m16n8k16) or HGMMA (m64nNk16) of a kernel: those of its loop bodies, none twice.
def forward_sm80_ops(head_dim: int, block_kv: int, m16: int) -> int:
    """QK of one slab of columns, 64 or 32 wide, which is a loop body, and PV. m16: rows / 16."""
    products = m16 * (block_kv // 8) * (head_dim // 16)
    num_slabs = head_dim // (64 if head_dim % 64 == 0 else 32)
    return products // num_slabs + products


def forward_sm90_ops(head_dim: int, block_kv: int) -> int:
    """QK of the first block; QK and PV of the loop; PV of the last block."""
    return 2 * (head_dim // 16) + 2 * (block_kv // 16)


def log_of(name: str) -> Path:
    return next(path for path in LOGS if path.name == name + SUFFIX)


FORWARD_OPS = {
    "forward_sm80_d64": forward_sm80_ops(64, 128, 2),
    "forward_sm80_d96": forward_sm80_ops(96, 64, 2),
    "forward_sm80_d128": forward_sm80_ops(128, 64, 2),
    "forward_sm80_d256": forward_sm80_ops(256, 32, 1),
    "forward_sm90_d64": forward_sm90_ops(64, 128),
    "forward_sm90_d128": forward_sm90_ops(128, 128),
}


@pytest.mark.parametrize("name", FORWARD_OPS)
def test_tensor_instructions_are_as_many_as_computed(name: str) -> None:
    hopper = "sm90" in name
    for kernel, counts in sass_counts(log_of(name), "sm_90a" if hopper else "sm_80").items():
        assert counts["HGMMA" if hopper else "HMMA"] == FORWARD_OPS[name], kernel
        assert counts["HMMA" if hopper else "HGMMA"] == 0, kernel


@each_log
def test_the_machine_code_uses_what_the_architecture_has(log: Path) -> None:
    hopper = log.relative_to(BUILD).parts[0] == "drope_cuda_sm90a.dir"
    for kernel, counts in sass_counts(log, "sm_90a" if hopper else "sm_80").items():
        assert counts["LDL"] == counts["STL"] == 0, kernel
        name = kernel_name(kernel)
        if hopper:
            assert counts["UTMALDG"] > 0, kernel
            assert counts["USETMAXREG"] == 2, kernel  # the producer's and the consumers'
            assert counts["LDGSTS"] == 0, kernel
        elif name in ("forward_sm80_kernel", "backward_sm80_kernel", "decode_sm80_kernel"):
            assert min(counts["HMMA"], counts["LDSM"], counts["LDGSTS"]) > 0, kernel
            assert counts["UTMALDG"] == 0, kernel


@pytest.mark.parametrize("name", ["forward_sm90_d64", "forward_sm90_d128"])
def test_the_softmax_runs_under_the_products_of_the_block_before(name: str) -> None:
    """QK has been waited for, PV has not: all of a block's exponentials stand between the waits.

    ptxas moves waits up through a basic block, without a message (docs/the-forward-kernel.md).
    """
    block_kv = 128
    event = re.compile(r"MUFU\.EX2|WARPGROUP\.DEPBAR\.LE gsb0, (0x[01])")
    for kernel, code in machine_code(log_of(name), "sm_90a").items():
        between, most = -1, 0  # -1: not after a wait for QK
        for found in event.finditer(code):
            if found[1] is not None:
                most = max(most, between)
                between = 0 if found[1] == "0x1" else -1
            elif between >= 0:
                between += 1
        assert most == block_kv // 2 + 2, kernel  # and the factors of a thread's two rows
