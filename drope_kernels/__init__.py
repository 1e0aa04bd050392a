"""Fused attention, rotary and position-free, on hand-written kernels."""

from drope_kernels.attention import attention, attention_varlen, explain
from drope_kernels.build import build_info
from drope_kernels.call.dispatch import available_backends
from drope_kernels.decode import attention_decode
from drope_kernels.merge import merge_attention
from drope_kernels.rope import Rope
from drope_kernels.scale import LogScale

__all__ = [
    "LogScale",
    "Rope",
    "attention",
    "attention_decode",
    "attention_varlen",
    "available_backends",
    "build_info",
    "explain",
    "merge_attention",
]
__version__ = build_info()["version"]
