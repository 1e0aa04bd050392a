"""The Triton kernels: every call of the API on GPUs from Ampere on, from one source.

Nothing here needs Triton to be installed until a call asks for this backend.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from drope_kernels.backends.triton.params import MAX_SEQLEN
from drope_kernels.spec.packed import ForwardResults
from drope_kernels.spec.spec import AttentionInputs, AttentionSpec, DecodeInputs

NAME = "triton"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
MAX_PROGRAMS = 2**31 - 1
MAX_ROW = 2**23  # channels of all heads: 256 rows of a result, a tile at most, stay below 2**31
OLDEST_CAPABILITY = (8, 0)
OLDEST_TRITON = (3, 6)


@cache
def _launcher(name: str) -> ModuleType:
    return import_module(f"drope_kernels.backends.triton.launch_{name}")


class TritonBackend:
    """Follows `drope_kernels.call.dispatch.Backend`.

    Args:
        device_type: of the tensors it takes; "cpu" only under Triton's interpreter.
        name: how calls ask for it.
    """

    def __init__(self, device_type: str = "cuda", *, name: str = NAME) -> None:
        self.NAME = name
        self.device_type = device_type
        self.unavailable = cache(self._unavailable)  # facts of the machine: asked once

    def _unavailable(self) -> str | None:
        """Why it cannot run on this machine at all."""
        if find_spec("triton") is None:
            return "triton is not installed; pip install 'drope_kernels[triton]' brings it."
        if self.device_type == "cuda":
            if torch.version.hip is not None:
                return "it runs on NVIDIA GPUs, and this torch is built for AMD's (HIP)."
            if not torch.cuda.is_available():
                return "it runs on NVIDIA GPUs, and torch sees none."
            reasons = [_too_old(index) for index in range(torch.cuda.device_count())]
            if None not in reasons:
                return reasons[0]
        installed: str = import_module("triton").__version__
        if tuple(map(int, installed.split(".")[:2])) < OLDEST_TRITON:
            oldest = "{}.{}".format(*OLDEST_TRITON)
            return f"it needs triton {oldest} or later, {installed} is installed."
        return None

    def supports(self, spec: AttentionSpec) -> str | None:
        """Why it cannot serve a call."""
        if spec.device != self.device_type:
            device = "CUDA devices" if self.device_type == "cuda" else f"{self.device_type} tensors"
            return f"it computes on {device} and the tensors are on {spec.device}."
        reason = self.unavailable()
        if reason is None and self.device_type == "cuda":
            reason = _too_old(spec.device_index)
        return reason or _unsupported(spec)

    def served_by(self, spec: AttentionSpec) -> str | None:
        """Which of its kernels serve a call: the launch tells, selection does not."""
        return None

    def repeated(self, inputs: AttentionInputs) -> None:
        """A call for other tensors like its own: not on devices."""
        return

    def forward(self, inputs: AttentionInputs, *, save_prepared: bool) -> ForwardResults:
        """out (B, Hq, Sq, Dv), lse (B, Hq, Sq), softmax_state, rotated q and k (0 unless kept)."""
        results: ForwardResults
        results = _launcher("forward").forward(inputs, save_prepared=save_prepared)
        return results

    def backward(
        self,
        inputs: AttentionInputs,
        out: Tensor,
        softmax_state: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        *,
        need_grad_scale: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dq, dk, dv in the order and dtype of q, k, v; dscale (B, Hq, Sq), size 0 if unneeded.

        inputs.q and inputs.k are the rotated ones where the call rotates.
        """
        results: tuple[Tensor, Tensor, Tensor, Tensor]
        results = _launcher("backward").backward(
            inputs, out, softmax_state, grad_out, grad_lse, need_grad_scale=need_grad_scale
        )
        return results

    def decode(self, inputs: DecodeInputs) -> tuple[Tensor, Tensor]:
        """out (B, Hq, Sq, Dv), lse (B, Hq, Sq); the caches are written in place."""
        results: tuple[Tensor, Tensor] = _launcher("decode").decode(inputs)
        return results


@cache
def _too_old(index: int) -> str | None:
    """Why GPU number `index` runs no kernel."""
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST_CAPABILITY:
        return None
    has = "{}.{}".format(*capability)
    return f"it needs compute capability 8.0 or later, the GPU has {has}."


def _unsupported(spec: AttentionSpec) -> str | None:
    """Why no kernel serves the call, whatever the GPU."""
    if spec.dtype not in DTYPES:
        return f"it computes float32, float16 and bfloat16, not {str(spec.dtype)[6:]}."
    if max(spec.head_dim, spec.head_dim_v) > MAX_HEAD_DIM:
        dims = f"{spec.head_dim} (q, k) and {spec.head_dim_v} (v)"
        return f"its head_dim is at most {MAX_HEAD_DIM}, got {dims}."
    if spec.num_heads_q * max(spec.head_dim, spec.head_dim_v) > MAX_ROW:
        return "its heads have at most 2**23 channels together."
    rows = max(spec.seqlen_q, spec.seqlen_kv)
    if rows > MAX_SEQLEN:
        return f"its sequences have at most {MAX_SEQLEN} rows."
    if spec.batch * spec.num_heads_q * (rows // 16 + 1) > MAX_PROGRAMS:
        return "its grids have at most 2**31 - 1 tiles of 16 rows, over all heads and batch rows."
    return None


_triton = TritonBackend()
unavailable, supports, served_by = _triton.unavailable, _triton.supports, _triton.served_by
forward, backward, decode = _triton.forward, _triton.backward, _triton.decode
repeated = _triton.repeated
