"""The sm_80 kernels on a GPU that would run the sm_90a ones: a backend name of this check alone."""

from __future__ import annotations

import functools
from typing import cast

SM80 = "cuda_sm80"


def register_sm80() -> str:
    """Makes SM80 known: the cuda backend, told that the GPU is of compute capability 8.0."""
    from drope_kernels import _C
    from drope_kernels.backends.cuda import CudaBackend
    from drope_kernels.call import dispatch

    backend = CudaBackend(_C, name=SM80)
    backend.capability = functools.cache(lambda index: (8, 0))
    dispatch.register(cast(dispatch.Backend, backend))
    return SM80
