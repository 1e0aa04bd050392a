"""Small decoders and token ids for the model layer's tests."""

from __future__ import annotations

import torch

from drope_kernels.nn import DecoderConfig, DecoderLM


def tiny_decoder(**changes):
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "init_std": 0.2,
    }
    torch.manual_seed(0)
    return DecoderLM(DecoderConfig(**(sizes | changes)))


def token_ids(vocab=50, shape=(2, 19), seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))
