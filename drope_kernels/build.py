"""What this installation was compiled with."""

from __future__ import annotations

from typing import TypedDict

try:
    import drope_kernels._C as _C
except ImportError as error:
    raise ImportError(
        f"drope_kernels: its compiled module cannot be loaded ({error}); build it with "
        "`pip install .` in the source tree"
    ) from error


class BuildInfo(TypedDict):
    version: str  # with what it was built for: 0.1.0+cpu, 0.1.0+cu130
    commit: str  # git commit of the source, "-dirty" when edited, "unknown" outside a checkout
    compiler: str
    build_type: str
    sanitizers: bool
    cpu_isas: list[str]  # compiled instruction sets, slowest first; the machine picks one of them
    cuda: str | None  # CUDA toolkit version, None in a CPU-only build
    cuda_architectures: list[str]  # machine code (sm_80, sm_90a) and PTX (compute_80)
    no_cuda_reason: str | None  # why a CPU-only build is one


def build_info() -> BuildInfo:
    """How the compiled kernels of this installation were built; needs no GPU and no driver."""
    info: BuildInfo = _C.build_info()
    return info


def cuda_unavailable_reason() -> str | None:
    """Why this build cannot run CUDA kernels: a sentence, or None when it has them."""
    info = build_info()
    if info["cuda"] is not None:
        return None
    return (
        f"drope_kernels {info['version']} was built without CUDA kernels: "
        f"{info['no_cuda_reason']}; DROPE_CUDA=ON with `pip install .` in the source tree builds "
        "them or says what is missing"
    )
