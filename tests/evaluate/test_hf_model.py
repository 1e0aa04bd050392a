"""`drope_kernels.evaluate` on transformers models: scalings, kernels, temperature, memory."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import FAMILIES, VOCABULARY, build, copied, tokens
from transformers import GraniteConfig, GraniteForCausalLM

from drope_kernels.evaluate import SweepData, run_sweep, window_losses
from drope_kernels.evaluate.hf_model import choose_attention, decoding_model
from drope_kernels.evaluate.hf_rope import SCALED_METHODS, scaled_rope
from drope_kernels.evaluate.measure import Conditions, fit_model, measure_model
from drope_kernels.evaluate.model_calls import greedy_tokens
from drope_kernels.evaluate.plan import METHODS, plan_model, positions_of, train_length_of
from drope_kernels.hf import DropState, drop_positions, position_free_parameters, set_temperature
from drope_kernels.rope import Rope

TRAIN = 16
LENGTHS = (TRAIN, 2 * TRAIN, 4 * TRAIN)


def plan_of(model, methods=METHODS):
    return plan_model("m", None, model.config, methods, TRAIN, LENGTHS[-1])


def data_of(num_windows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(1, VOCABULARY, (num_windows, LENGTHS[-1]), generator=generator)
    return SweepData(LENGTHS, {}, windows, num_last_targets=4)


def measured(model, methods=METHODS, *, fit_windows=None, advance=lambda title, tokens: None):
    conditions = Conditions(data_of(), fit_windows or data_of(2, seed=1), advance, 10**6)
    rows, fits = zip(*measure_model(plan_of(model, methods), model, conditions), strict=True)
    return rows, fits[-1]


def fitted(model, fit_windows):
    conditions = Conditions(data_of(), fit_windows, lambda title, tokens: None, 10**6)
    return fit_model(plan_of(model), model, conditions)


def our_rope(method, length, theta):
    factor = length / TRAIN
    if method == "PI":
        return Rope.pi(factor, theta=theta)
    if method == "NTK":
        return Rope.ntk(factor, theta=theta)
    if method == "YaRN":
        return Rope.yarn(factor, original_max_position_embeddings=TRAIN, theta=theta)
    return Rope.dynamic_ntk(
        LENGTHS[-1] / TRAIN, seq_len=length, max_position_embeddings=TRAIN, theta=theta
    )


@pytest.mark.parametrize("method", SCALED_METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_transformers_scalings_are_our_rope_and_are_undone(family, method):
    model = build(family)
    decoder, config = model.get_decoder(), copy.deepcopy(model.config.to_dict())
    stock, before = decoder.rotary_emb, model(tokens(1, 40)).logits
    nested = family == "gemma3"
    prefix, theta = ("full_attention_", 1e6) if nested else ("", 1e4)
    with scaled_rope(model, method, TRAIN, LENGTHS[-1]) as settle:
        settle(TRAIN)
        assert decoder.rotary_emb is stock
        for length in LENGTHS[1:]:
            settle(length)
            model(tokens(1, length + 3))  # as an answer grows
            rotary, rope = decoder.rotary_emb, our_rope(method, length, theta)
            head_dim = 2 * stock.get_buffer(f"{prefix}inv_freq").numel()
            expected = torch.tensor(rope.frequencies(head_dim)[0])
            found = getattr(rotary, f"{prefix}inv_freq")
            assert torch.allclose(found, expected, rtol=1e-5, atol=0)
            factor = getattr(rotary, f"{prefix}attention_scaling")
            assert factor == pytest.approx(rope.attention_factor)
            if nested:
                local = rotary.sliding_attention_inv_freq
                assert torch.equal(local, stock.sliding_attention_inv_freq)
    assert decoder.rotary_emb is stock
    assert model.config.to_dict() == config
    assert torch.equal(model(tokens(1, 40)).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_through_our_kernels_are_those_of_stock_kernels(family):
    data = data_of()

    def row(name, dtype=torch.float32, method="yarn"):
        model = build(family).to(dtype)
        choose_attention(model, name)
        rows, _ = measured(model, ("as_is", method, "dropped"))
        return torch.tensor(
            [[r.text_loss[n].per_window for n in LENGTHS] for r in rows], dtype=torch.float64
        )

    exact = row("eager", torch.float64)
    stock, ours = row("eager"), row("kernels")
    assert exact.shape == (3, len(LENGTHS), len(data.windows))
    limit = 2 * (stock - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (ours - exact).abs().max() <= limit
    assert (exact[0] - exact[1]).abs().max() > 100 * limit  # the rows are not all one
    assert (exact[0] - exact[2]).abs().max() > 100 * limit


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_method_measures_what_it_says_and_leaves_the_model_as_it_was(family):
    model = build(family)
    choose_attention(model, "kernels")
    config, before = copy.deepcopy(model.config.to_dict()), model(tokens()).logits
    data, read = data_of(), []
    rows, fit = measured(model, advance=lambda title, num_tokens: read.append(num_tokens))
    assert [row.name for row in rows] == [
        "RoPE as is",
        "RoPE + PI",
        "RoPE + NTK",
        "RoPE + dynamic NTK",
        "RoPE + YaRN",
        "dropped",
        "dropped, fitted temperature",
    ]
    assert model.config.to_dict() == config
    assert torch.equal(model(tokens()).logits, before)
    by_name = {row.name: row for row in rows}
    first = {row.text_loss[TRAIN].per_window for row in rows[:5]}
    assert len(first) == 1  # up to the training length all are RoPE as is
    assert len({row.text_loss[LENGTHS[-1]].per_window for row in rows}) == 7
    free = copied(model)
    free.config.rope_parameters = position_free_parameters(free.config)
    decoder = free.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(free.config)
    parts = decoding_model(free)
    expected = run_sweep("x", lambda _: parts, data)
    for length in LENGTHS:
        got = by_name["dropped"].text_loss[length].per_window
        assert got == pytest.approx(expected.text_loss[length].per_window, rel=1e-5)
    assert set(fit.betas) == set(LENGTHS[1:])
    drop_positions(free)
    same = fitted(free, data_of(2, seed=1))
    assert same.betas == pytest.approx(fit.betas, abs=1e-3)
    set_temperature(free, 1 + fit.c * torch.tensor(4.0).log().item())
    warm = run_sweep("x", lambda _: parts, data).text_loss[LENGTHS[-1]].per_window
    got = by_name["dropped, fitted temperature"].text_loss[LENGTHS[-1]].per_window
    assert got == pytest.approx(warm, rel=1e-5)
    conditions = Conditions(data, data_of(2, seed=1), print)
    # Up to the training length RoPE is scaled by nothing: measured once.
    text = data.windows.numel()
    assert conditions.num_tokens(plan_of(model, ("as_is", "yarn"))) == (3 + 2) * text
    assert conditions.num_tokens(plan_of(model, ("yarn",))) == 3 * text
    assert sum(read) == conditions.num_tokens(plan_of(model))


@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_as_it_was_after_an_error_too(method):
    model = build("llama")
    DropState(notes={"recalibration": {"tokens": 5}}, temperature=1.0).into_config(model.config)
    set_temperature(model, 1.25)
    config, before = copy.deepcopy(model.config.to_dict()), model(tokens()).logits

    def interrupt(title, num_tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(model, (method,), advance=interrupt)
    assert model.config.to_dict() == config
    assert torch.equal(model(tokens()).logits, before)


def test_the_fit_finds_the_temperature_a_text_was_written_with():
    model = drop_positions(build("llama", initializer_range=0.4))
    parts = decoding_model(model)
    torch.manual_seed(0)
    text = torch.randint(1, VOCABULARY, (96, 1))
    set_temperature(model, 1.7)
    while text.shape[1] < LENGTHS[-1]:
        logits = parts.head(parts.hidden(text)[:, -1]).detach()
        text = torch.cat([text, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    set_temperature(model, 1.0)
    windows = SweepData(LENGTHS, {}, text, num_last_targets=4)
    fit = fitted(model, windows)
    assert fit.betas[LENGTHS[-1]] == pytest.approx(1.7, abs=0.15)
    assert fit.beta(TRAIN) == 1.0
    assert fit.at_the_edge == []
    # A model's own temperature is multiplied, and kept.
    set_temperature(model, 1.3)
    fit = fitted(model, windows)
    assert fit.betas[LENGTHS[-1]] == pytest.approx(1.7 / 1.3, abs=0.15)
    assert model.config.drope["temperature"] == 1.3


def test_head_honours_a_softcap_and_others_are_refused():
    model = build("gemma3", final_logit_softcapping=2.0)
    given = tokens()
    logits = model(given).logits
    assert logits.abs().max() < 2.0
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), given[:, 1:].flatten(), reduction="none"
    )
    got = window_losses(decoding_model(model), given).flatten()
    assert torch.allclose(got, expected, atol=1e-5)
    other = GraniteForCausalLM(
        GraniteConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            logits_scaling=4.0,  # of logits that are small, as a fresh model's are
        )
    )
    with pytest.raises(NotImplementedError, match="got GraniteForCausalLM, which computes others"):
        decoding_model(other)


@pytest.mark.parametrize("attention", ["kernels", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_greedy_is_generate(family, attention):
    model = build(family)
    choose_attention(model, attention)
    given = tokens(2, 19)
    expected = model.generate(given, max_new_tokens=7, do_sample=False)[:, 19:]
    parts = decoding_model(model)
    assert torch.equal(greedy_tokens(parts, given, 7), expected)
    assert torch.equal(greedy_tokens(lambda ids: model(ids), given, 7), expected)  # no cache


def test_positions_and_training_length_are_what_the_config_tells():
    model = build("llama")
    assert positions_of(model.config) == "rope"
    assert train_length_of(model.config, None) == 128
    assert train_length_of(model.config, 77) == 77
    drop_positions(model, layers=[0])
    assert positions_of(model.config) == "partly dropped"
    drop_positions(model)
    assert positions_of(model.config) == "position-free"
    with pytest.raises(ValueError, match=r"position-free.*pass --train-length"):
        train_length_of(model.config, None)
    model.config.drope["recalibration"] = {"context_length": 48}
    assert train_length_of(model.config, None) == 48
    exported = build("gemma3").config  # an export may say it in no other way
    exported.rope_parameters = position_free_parameters(exported)
    assert positions_of(exported) == "position-free"
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    config = build("llama", rope_parameters=scaled).config
    with pytest.raises(ValueError, match="pass --train-length"):
        train_length_of(config, None)
    plan = plan_model("m", None, config, None, TRAIN, LENGTHS[-1])
    assert plan.methods == ("as_is", "dropped", "drope_temperature")
    assert "expected rope_type 'default' to scale, got 'linear'" in plan.refused["yarn"]


MEMORY = """
import json, resource, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from drope_kernels.evaluate import SweepData, run_sweep
from drope_kernels.evaluate.hf_model import choose_attention, decoding_model
from drope_kernels.evaluate.model_calls import greedy_tokens

torch.set_num_threads(1)
length = int(sys.argv[1])
config = LlamaConfig(
    vocab_size=8192, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=length,
)
model = LlamaForCausalLM(config).eval()
choose_attention(model, "kernels")
parts = decoding_model(model)
windows = torch.randint(1, 8192, (1, length))
run_sweep("warm", lambda _: parts, SweepData((2048,), {}, windows[:, :2048], 16))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
row = run_sweep("row", lambda _: parts, SweepData((length,), {}, windows, 16))
greedy_tokens(parts, windows, 2)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"grown": peak - before, "loss": row.text_loss[length].mean}))
"""


@pytest.mark.parametrize("length", [8192, pytest.param(131072, marks=pytest.mark.slow)])
def test_memory_grows_with_the_length_only(length):
    """At most 24 float32 rows of states (32 channels) and 6 of the MLP (64) at one time."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(length)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    bound = length * 4 * (24 * 32 + 6 * 64)
    assert bound < length * 8192 * 4 / 4  # a quarter of the logits would already be too much
    assert found["grown"] <= bound
    assert found["loss"] == pytest.approx(torch.tensor(8192.0).log().item(), abs=0.1)
