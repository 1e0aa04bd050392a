"""Decoder layers on `attention()`: Llama's architecture and names, droppable positions."""

import sys

from drope_kernels.nn import config
from drope_kernels.nn.config import DecoderConfig
from drope_kernels.nn.layers import (
    DecoderBlock,
    DecoderLM,
    DecoderOutput,
    DecoderStack,
    DropeAttention,
    GatedMLP,
)

# Pickled models name the module of their config as it was called before.
sys.modules["drope_kernels.decoder_config"] = config

__all__ = [
    "DecoderBlock",
    "DecoderConfig",
    "DecoderLM",
    "DecoderOutput",
    "DecoderStack",
    "DropeAttention",
    "GatedMLP",
]
