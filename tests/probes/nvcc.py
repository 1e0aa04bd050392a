"""Compiles the probe sources and reads what ptxas says of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SM_80 = (
    *("-gencode", "arch=compute_80,code=sm_80"),
    *("-gencode", "arch=compute_80,code=compute_80"),  # PTX, for every later GPU
)
SM_90A = ("-gencode", "arch=compute_90a,code=sm_90a")
CSRC = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = ("-std=c++17", "-O3", f"-I{CSRC}", "-Xcompiler", "-fPIC", "-Xptxas", "-v", "-c")


@dataclass(frozen=True)
class Source:
    """One probe source. ptx: instructions its PTX must contain."""

    name: str
    target: tuple[str, ...]
    ptx: tuple[str, ...]


@dataclass(frozen=True)
class Kernel:
    """ptxas' figures of one kernel."""

    name: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


@dataclass(frozen=True)
class Compilation:
    source: str
    seconds: float
    returncode: int
    log: str
    kernels: list[Kernel]
    messages: list[str]  # ptxas' C75xx: setmaxnreg ignored, wgmma serialised, waits injected
    missing_ptx: list[str]

    @property
    def complaints(self) -> list[str]:
        """Everything that fails the gate."""
        found = [f"{self.source}: nvcc failed: {self.log[-400:]}"] if self.returncode else []
        found += [f"{self.source}: {message}" for message in self.messages]
        found += [f"{self.source}: PTX lacks {text}" for text in self.missing_ptx]
        for kernel in self.kernels:
            if kernel.stack_bytes or kernel.spill_store_bytes or kernel.spill_load_bytes:
                found.append(f"{self.source}: {kernel.name} uses local memory: {kernel}")
        return found


_PROPERTIES = re.compile(
    r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads\s+ptxas info\s+: Used (\d+) registers"
)


def parse_ptxas(log: str) -> tuple[list[Kernel], list[str]]:
    """Kernels and C75xx messages of `-Xptxas -v`; those are "info" and leave the status 0."""
    kernels = [
        Kernel(name, int(registers), int(stack), int(stores), int(loads))
        for name, stack, stores, loads, registers in _PROPERTIES.findall(log)
    ]
    messages = [line.strip() for line in log.splitlines() if re.search(r"\(C75\d\d\)", line)]
    return kernels, messages


def compile_source(nvcc: str, folder: Path, source: Source, work: Path) -> Compilation:
    keep = work / source.name
    keep.mkdir(parents=True, exist_ok=True)
    command = [nvcc, *FLAGS, *source.target, "--keep", "--keep-dir", str(keep)]
    command += [str(folder / f"{source.name}.cu"), "-o", str(work / f"{source.name}.o")]
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    log = done.stdout + done.stderr
    kernels, messages = parse_ptxas(log)
    text = "".join(path.read_text() for path in keep.glob("*.ptx"))
    missing = [instruction for instruction in source.ptx if instruction not in text]
    seconds = round(time.time() - started, 2)
    return Compilation(source.name, seconds, done.returncode, log, kernels, messages, missing)


def compile_all(
    nvcc: str, folder: Path, sources: tuple[Source, ...], work: Path, jobs: int
) -> list[Compilation]:
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda one: compile_source(nvcc, folder, one, work), sources))


def link(nvcc: str, sources: tuple[Source, ...], work: Path) -> Path:
    """A shared library that ctypes can load: C functions, CUDA's runtime inside."""
    library = work / "libdrope_probes.so"
    objects = [str(work / f"{source.name}.o") for source in sources]
    command = [nvcc, "-shared", "-cudart", "static", "-o", str(library), *objects]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


SASS = re.compile(r"\b(HGMMA|HMMA|LDSM|LDGSTS|UTMALDG|UTMASTG|UTMAREDG|USETMAXREG|STSM|LDL|STL)\b")


def disassembler_path() -> str:
    """PATH with cuobjdump and nvdisasm, which it calls: of pip's wheels first."""
    wheels = [
        str(found.parent)
        for folder in dict.fromkeys(sys.path)
        for found in Path(folder).glob("nvidia/*/bin/cuobjdump")
    ]
    return os.pathsep.join([*wheels, os.environ.get("PATH", os.defpath)])


def sass_counts(library: Path) -> dict[str, int] | None:
    """Machine instructions of note; None where cuobjdump or nvdisasm is missing."""
    path = disassembler_path()
    tool = shutil.which("cuobjdump", path=path)
    if tool is None or shutil.which("nvdisasm", path=path) is None:
        return None
    command = [tool, "-sass", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
    return dict(Counter(SASS.findall(done.stdout))) if done.returncode == 0 else None
