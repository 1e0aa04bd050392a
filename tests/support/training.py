"""Small models, data and settings for the trainer's tests."""

from __future__ import annotations

import torch
import transformers

from drope_kernels.nn import DecoderConfig, DecoderLM
from drope_kernels.recalibrate import RecalibrationConfig, TokenRows

VOCAB, CONTEXT = 24, 16


def tiny_decoder(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 2,
        "tie_embeddings": True,
        "embedding_norm": True,
    }
    return DecoderLM(DecoderConfig(**(sizes | changes)))


def tiny_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def counting_rows(rows=64, seed=0):
    """Sequences that count up by one, modulo the vocabulary, from a random start."""
    start = torch.randint(VOCAB, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return TokenRows((start + torch.arange(CONTEXT)) % VOCAB)


def config(**changes):
    settings = {
        "batch_size": 8,
        "context_length": CONTEXT,
        "steps": 40,
        "learning_rate": 1e-2,
        "warmup": 4,
        "use_cpu": True,
        "log_steps": 10,
    }
    return RecalibrationConfig(**(settings | changes))


def parameters_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}
