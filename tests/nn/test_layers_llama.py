"""`DecoderLM` against transformers' Llama: the same names, numbers and gradients."""

from __future__ import annotations

import pytest
import torch
import transformers
from decoders import token_ids

from drope_kernels.nn import DecoderConfig, DecoderLM

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMAS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa_tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "wide_heads": {"head_dim": 24, "num_key_value_heads": 2},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3_rope": {"rope_parameters": LLAMA3, "num_key_value_heads": 2},
    "yarn_rope": {"rope_parameters": YARN, "max_position_embeddings": 128},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
}


def tiny_llama(**changes):
    """An untrained LlamaForCausalLM whose attention is far from uniform."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "attn_implementation": "eager",
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | changes))).eval()
    for name, parameter in llama.named_parameters():
        if name.endswith("bias") or "norm" in name:  # constants at first: would hide a swap
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return llama


def from_llama(llama, **changes):
    model = DecoderLM(DecoderConfig.from_llama(llama.config, **changes))
    result = model.load_state_dict(llama.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    return model.eval()


BACKENDS = ("reference", "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LLAMAS)
def test_equals_transformers_llama(name, backend):
    llama = tiny_llama(**LLAMAS[name])
    model = from_llama(llama, backend=backend)
    assert set(model.state_dict()) == set(llama.state_dict())
    ids = token_ids(97, (2, 70))
    with torch.no_grad():
        expected = llama(ids, labels=ids)
        got = model(ids, ids)
    assert (got.logits - expected.logits).abs().max() < 2e-5 * expected.logits.abs().max()
    torch.testing.assert_close(got.loss, expected.loss, rtol=2e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_transformers_llama(backend):
    llama = tiny_llama(num_key_value_heads=2, tie_word_embeddings=True)
    model = from_llama(llama, backend=backend)
    ids = token_ids(97)
    llama(ids, labels=ids).loss.backward()
    model(ids, ids).loss.backward()
    expected = dict(llama.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-6, msg=name
        )


def test_a_tied_file_without_head_loads():
    llama = tiny_llama(tie_word_embeddings=True)
    state = {k: v for k, v in llama.state_dict().items() if k != "lm_head.weight"}
    model = DecoderLM(DecoderConfig.from_llama(llama.config))
    model.load_state_dict(state)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, llama.model.embed_tokens.weight)


class IdentityRotary(torch.nn.Module):
    """cos = 1, sin = 0: transformers' Llama without positions."""

    def forward(self, x, position_ids):
        ones = torch.ones(*position_ids.shape, 16)
        return ones, torch.zeros_like(ones)


def test_drop_equals_llama_without_rotation_and_restores():
    llama = tiny_llama(num_key_value_heads=2)
    model, ids = from_llama(llama), token_ids(97, (2, 40))
    with torch.no_grad():
        rotated = model(ids).logits
        model.drop_positions()
        dropped = model(ids).logits
        model.set_positions(True)
        restored = model(ids).logits
        llama.model.rotary_emb = IdentityRotary()
        expected = llama(ids).logits
    assert (dropped - expected).abs().max() < 2e-5 * expected.abs().max()
    assert (dropped - rotated).abs().max() > 0.1
    assert torch.equal(restored, rotated)


def test_refused_llamas():
    for changes, message in (
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
    ):
        config = transformers.LlamaConfig(
            **({"hidden_size": 32, "num_attention_heads": 4} | changes)
        )
        with pytest.raises(ValueError, match=message):
            DecoderConfig.from_llama(config)
