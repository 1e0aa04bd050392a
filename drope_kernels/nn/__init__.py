"""Decoder layers on `attention()`: Llama's architecture and names, droppable positions."""

from drope_kernels.nn.config import DecoderConfig
from drope_kernels.nn.layers import (
    DecoderBlock,
    DecoderLM,
    DecoderOutput,
    DecoderStack,
    DropeAttention,
    GatedMLP,
)

__all__ = [
    "DecoderBlock",
    "DecoderConfig",
    "DecoderLM",
    "DecoderOutput",
    "DecoderStack",
    "DropeAttention",
    "GatedMLP",
]
