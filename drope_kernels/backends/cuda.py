"""The compiled CUDA kernels: csrc/cuda, reached through drope_kernels._C with device addresses."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from drope_kernels import _C
from drope_kernels.backends.addresses import (
    call_arguments,
    decode_arguments,
    packed_arguments,
    strided,
)
from drope_kernels.build import cuda_unavailable_reason
from drope_kernels.spec.layout import (
    empty_grad_scale,
    empty_gradients,
    empty_in_order_of,
    empty_lse,
    empty_softmax_state,
    is_aligned,
)
from drope_kernels.spec.packed import ForwardResults
from drope_kernels.spec.spec import AttentionInputs, AttentionSpec, DecodeInputs

NAME = "cuda"

DTYPES = (torch.float16, torch.bfloat16)
OLDEST_CAPABILITY = (8, 0)
MAX_HEAD_DIM = 256
MAX_HEAD_DIM_SM90 = 128
MAX_SEQLEN = 2**30  # kernels count rows in int32
MAX_TILES = 2**31 - 1  # blocks of a grid; a tile has at least 16 rows
_DRIVER_ERRORS = {
    "cudaErrorInsufficientDriver": "this machine has no NVIDIA driver, or one older than this "
    "build's CUDA {cuda}.",
    "cudaErrorNoDevice": "this machine has no NVIDIA GPU, or CUDA_VISIBLE_DEVICES hides it.",
}


class CudaBindings(Protocol):
    """The CUDA functions of drope_kernels._C."""

    def cuda_attention_forward(self, **arguments: Any) -> None: ...
    def cuda_attention_backward(self, **arguments: Any) -> None: ...
    def cuda_attention_decode(self, **arguments: Any) -> None: ...
    def cuda_device_count(self) -> int: ...
    def cuda_device(self, index: int) -> dict[str, Any]: ...


def family_of(capability: tuple[int, int], head_dim: int, architectures: Sequence[str]) -> int:
    """90 or 80: the kernels that run a forward; head_dim is the larger one of q, k and of v."""
    is_hopper = capability == (9, 0) and "sm_90a" in architectures
    return 90 if is_hopper and head_dim <= MAX_HEAD_DIM_SM90 else 80


def runs_on(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether machine code or PTX of the sm_80 kernels in a build fits a GPU."""
    major, minor = capability
    return "compute_80" in architectures or any(
        f"sm_{major}{older}" in architectures for older in range(minor + 1)
    )


class CudaBackend:
    """Follows `drope_kernels.call.dispatch.Backend`.

    Args:
        bindings: the compiled functions; their device may be an emulated one.
        device_type: of the tensors they take.
        name: how calls ask for it.
        architectures: what the kernels were compiled for, as in build_info().
        missing: why the bindings hold no kernels; None when they do.
    """

    def __init__(
        self,
        bindings: CudaBindings,
        device_type: str = "cuda",
        *,
        name: str = NAME,
        architectures: Sequence[str] = ("compute_80", "sm_90a"),
        missing: str | None = None,
    ) -> None:
        self.NAME = name
        self.bindings = bindings
        self.device_type = device_type
        self.architectures = architectures
        self.missing = missing
        # Facts of the machine: asked once.
        self.unavailable = cache(self._unavailable)
        self.capability = cache(self._capability)

    def _capability(self, index: int) -> tuple[int, int]:
        major, minor = self.bindings.cuda_device(index)["capability"]
        return major, minor

    def _unavailable(self) -> str | None:
        """Why it cannot run on this machine at all."""
        if self.missing is not None:
            return self.missing
        try:
            count = self.bindings.cuda_device_count()
        except RuntimeError as error:
            why = _DRIVER_ERRORS.get(str(error), f"the CUDA runtime does not start: {error}.")
            return why.format(cuda=_C.build_info()["cuda"])
        reasons = [self._no_kernel(index) for index in range(count)]
        return None if None in reasons else reasons[0]

    def _no_kernel(self, index: int) -> str | None:
        capability = self.capability(index)
        has = "{}.{}".format(*capability)
        if capability < OLDEST_CAPABILITY:
            return f"its kernels need compute capability 8.0 or later, the GPU has {has}."
        if not runs_on(capability, self.architectures):
            return (
                f"this build holds kernels for {', '.join(self.architectures)}, the GPU has "
                f"compute capability {has}; build with TORCH_CUDA_ARCH_LIST={has}."
            )
        return None

    def supports(self, spec: AttentionSpec) -> str | None:
        """Why it cannot serve a call."""
        if spec.device != self.device_type:
            device = "CUDA devices" if self.device_type == "cuda" else f"{self.device_type} tensors"
            return f"it computes on {device} and the tensors are on {spec.device}."
        return self.unavailable() or self._no_kernel(spec.device_index) or _unsupported(spec)

    def served_by(self, spec: AttentionSpec) -> str | None:
        """Which of its kernels serve a call: the launch tells, selection does not."""
        return None

    def repeated(self, inputs: AttentionInputs) -> None:
        """A call for other tensors like its own: not on devices."""
        return

    def forward(self, inputs: AttentionInputs, *, save_prepared: bool) -> ForwardResults:
        """out (B, Hq, Sq, Dv), lse (B, Hq, Sq), softmax_state, rotated q and k (0 unless kept)."""
        q, k, v = inputs.q, inputs.k, inputs.v
        keep = save_prepared and inputs.rotation is not None
        out = empty_in_order_of(q, (*q.shape[:3], v.shape[3]))
        lse, softmax_state = empty_lse(q), empty_softmax_state(q, needed=save_prepared)
        q_prepared = q.new_empty(q.shape if keep else (0,))
        k_prepared = q.new_empty(k.shape if keep else (0,))
        arguments, alive = call_arguments(inputs)
        arguments |= packed_arguments(inputs, alive)
        arguments |= {
            "out": strided(out),
            "lse": lse.data_ptr(),
            "softmax_state": softmax_state.data_ptr() if save_prepared else 0,
            "q_prepared": q_prepared.data_ptr() if keep else 0,
            "k_prepared": k_prepared.data_ptr() if keep else 0,
            "family": self._family(q, v),
            "deterministic": True,
        }
        tensors = [q, k, v, out, lse, softmax_state, q_prepared, k_prepared, *alive]
        self.launch("cuda_attention_forward", arguments, tensors)
        return out, lse, softmax_state, q_prepared, k_prepared

    def _family(self, q: Tensor, v: Tensor) -> int:
        capability = self.capability(q.device.index or 0)
        return family_of(capability, max(q.shape[3], v.shape[3]), self.architectures)

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
        grads = empty_gradients(inputs, out)
        grad_scale = empty_grad_scale(inputs, needed=need_grad_scale)
        out, grad_out = _aligned(out), _aligned(grad_out)
        softmax_state = softmax_state.contiguous()
        arguments, alive = call_arguments(inputs)
        if grad_lse is not None:
            alive.append(grad_lse.contiguous())
        arguments |= {
            "out": strided(out),
            "grad_out": strided(grad_out),
            "softmax_state": softmax_state.data_ptr(),
            "grad_lse": 0 if grad_lse is None else alive[-1].data_ptr(),
            **{f"grad_{name}": strided(x) for name, x in zip("qkv", grads, strict=True)},
            "grad_scale": grad_scale.data_ptr() if grad_scale.numel() else 0,
            "family": 80,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        arguments |= packed_arguments(inputs, alive)
        operands = [inputs.q, inputs.k, inputs.v, out, softmax_state, grad_out]
        self.launch("cuda_attention_backward", arguments, [*operands, *grads, grad_scale, *alive])
        return *grads, grad_scale

    def decode(self, inputs: DecodeInputs) -> tuple[Tensor, Tensor]:
        """out (B, Hq, Sq, Dv), lse (B, Hq, Sq); the caches are written in place."""
        k_cache, v_cache = inputs.k_cache, inputs.v_cache
        out = empty_in_order_of(inputs.q, (*inputs.q.shape[:3], v_cache.shape[3]))
        lse = empty_lse(inputs.q)
        # A few rows each: a copy costs less than another backend would.
        q = _aligned(inputs.q)
        k, v = (None if x is None else _aligned(x) for x in (inputs.k, inputs.v))
        arguments, alive = decode_arguments(replace(inputs, q=q, k=k, v=v), out, lse)
        arguments |= {"family": 80, "deterministic": True}
        tensors = [q, k_cache, v_cache, out, lse, *alive]
        tensors += [x for x in (k, v) if x is not None]
        self.launch("cuda_attention_decode", arguments, tensors)
        return out, lse

    def launch(self, function: str, arguments: dict[str, Any], tensors: list[Tensor]) -> None:
        """Calls the binding on the current stream of the tensors' device.

        `tensors` holds all whose addresses are in `arguments`, so that they live until the kernels
        are queued; torch then gives their memory to later work of the same stream only.
        """
        device = tensors[0].device

        def allocate(num_bytes: int) -> int:
            tensors.append(torch.empty(num_bytes, dtype=torch.uint8, device=device))
            return tensors[-1].data_ptr()

        guard: AbstractContextManager[Any] = nullcontext()
        stream = 0
        if device.type == "cuda":
            guard = torch.cuda.device(device)
            stream = torch.cuda.current_stream(device).cuda_stream
        with guard:
            getattr(self.bindings, function)(**arguments, stream=stream, allocate=allocate)


def _unsupported(spec: AttentionSpec) -> str | None:
    """Why no kernel serves the call, whatever the GPU."""
    dims = f"{spec.head_dim} (q, k) and {spec.head_dim_v} (v)"
    if spec.dtype not in DTYPES:
        return f"it computes float16 and bfloat16, not {str(spec.dtype)[6:]}."
    if spec.softcap:
        return "its kernels have no softcap."
    if max(spec.head_dim, spec.head_dim_v) > MAX_HEAD_DIM:
        return f"its head_dim is at most {MAX_HEAD_DIM}, got {dims}."
    if spec.head_dim % 8 or spec.head_dim_v % 8:
        return f"its head_dim is a multiple of 8, got {dims}."
    if not spec.aligned:
        return (
            "it reads 16 bytes at a time, and a tensor starts or steps at something else; "
            ".contiguous() helps."
        )
    if max(spec.seqlen_q, spec.seqlen_kv) > MAX_SEQLEN:
        return f"its sequences have at most {MAX_SEQLEN} rows."
    rows = max(spec.seqlen_q, spec.seqlen_kv)
    if spec.batch * spec.num_heads_q * (rows // 16 + 1) > MAX_TILES:
        return "its grids have at most 2**31 - 1 tiles of 16 rows, over all heads and batch rows."
    return None


def _aligned(x: Tensor) -> Tensor:
    return x if is_aligned(x) else x.contiguous()


_cuda = CudaBackend(
    _C,
    architectures=_C.build_info()["cuda_architectures"],
    missing=cuda_unavailable_reason(),
)
unavailable, supports, served_by = _cuda.unavailable, _cuda.supports, _cuda.served_by
forward, backward, decode = _cuda.forward, _cuda.backward, _cuda.decode
repeated = _cuda.repeated
