"""`hf.load_model` after `save_pretrained`, and the norms that `hf.drop_positions` can add."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import FAMILIES, YARN, build, copied, logits, tokens, with_identity_rotation
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from drope_kernels import hf

pytestmark = pytest.mark.usefixtures("one_thread")

EAGER = {"attn_implementation": "eager"}
WITHOUT_NORMS = ("llama", "qwen2", "mistral")


@pytest.fixture(scope="module", autouse=True)
def no_progress_bars() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def trained(model: Any) -> Any:
    """Norms that were added with weights of their own."""
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_drop_needs_no_code_of_ours(family: str, tmp_path: Path) -> None:
    """Stock transformers gives the same logits; loaded either way, its positions can return."""
    stock = build(family)
    model = hf.drop_positions(copied(stock))
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, **EAGER)
    loaded = hf.load_model(tmp_path, **EAGER)
    for x in (plain, loaded):
        assert torch.equal(logits(x), logits(model))
    assert loaded.config.drope == model.config.drope
    hf.drop_positions(plain)  # its rotary embedding is the one that turns nothing
    for x in (plain, loaded, AutoModelForCausalLM.from_pretrained(tmp_path, **EAGER)):
        assert torch.equal(logits(hf.restore_positions(x)), logits(stock))
        assert x.config.rope_parameters == stock.config.rope_parameters
        assert not hasattr(x.config, "drope")


@pytest.mark.parametrize("family", FAMILIES)
def test_partial_drop_and_temperature(family: str, tmp_path: Path) -> None:
    stock = build(family)
    model = hf.set_temperature(hf.drop_positions(copied(stock), [1]), 1.3)
    model.config.drope["steps"] = 7  # whatever else is written there
    model.save_pretrained(tmp_path)
    loaded = hf.load_model(tmp_path, **EAGER)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.drope == model.config.drope
    assert hf.drop_positions(loaded, [1]).config.drope["steps"] == 7
    assert torch.equal(logits(hf.restore_positions(loaded)), logits(stock))


@pytest.mark.parametrize("layers", [None, [0]])
def test_attention_factor_comes_back_once(layers: list[int] | None, tmp_path: Path) -> None:
    model = hf.drop_positions(build("llama", rope_parameters=YARN), layers)
    for round_trip in ("first", "second"):
        model.save_pretrained(tmp_path / round_trip)
        loaded = hf.load_model(tmp_path / round_trip, **EAGER)
        assert torch.equal(logits(loaded), logits(model))
        model = loaded


def test_temperature_of_a_rotating_model(tmp_path: Path) -> None:
    model = hf.set_temperature(build("llama"), 0.7)
    model.save_pretrained(tmp_path)
    loaded = hf.load_model(tmp_path, **EAGER)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.drope["dropped_layers"] == []


def projection_norm(
    model: Any, index: int, weights: dict[str, Tensor], heads: dict[str, int] | None = None
) -> None:
    """RMSNorm in float64 of what the projections of one layer give, `heads` parts each apart."""
    attention = model.get_decoder().layers[index].self_attn
    for name, weight in weights.items():
        parts = 1 if heads is None else heads[name]

        def normalised(
            module: nn.Module, args: Any, out: Tensor, weight: Tensor = weight, parts: int = parts
        ) -> Tensor:
            x = out.double().unflatten(-1, (parts, -1))
            x = x * (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
            return (x * weight.double()).flatten(-2).to(out.dtype)

        getattr(attention, f"{name}_proj").register_forward_hook(normalised)


@pytest.mark.parametrize("form", ["full", "head"])
@pytest.mark.parametrize("family", WITHOUT_NORMS)
def test_norms_are_the_formula(family: str, form: str) -> None:
    """Against a stock model whose projections are normalised by hooks, and gradients."""
    stock = build(family)
    model = trained(hf.drop_positions(copied(stock), [1], form))
    attention = model.get_decoder().layers[1].self_attn
    weights = {"q": attention.q_norm.weight.detach(), "k": attention.k_norm.weight.detach()}
    heads = {"q": 4, "k": 2}
    assert {x: tuple(w.shape) for x, w in weights.items()} == (
        {"q": (48,), "k": (24,)} if form == "full" else {"q": (12,), "k": (12,)}
    )
    reference = with_identity_rotation(copied(stock), [1])
    projection_norm(reference, 1, weights, heads if form == "head" else None)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-4)
    kernels = hf.use_kernels(copied(model), fused_rotation=True)
    torch.testing.assert_close(logits(kernels), logits(reference), rtol=1e-5, atol=2e-4)
    for x in (model, reference):
        x(tokens(), labels=tokens()).loss.backward()
    ours, theirs = (
        x.get_decoder().layers[0].self_attn.q_proj.weight.grad for x in (model, reference)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    assert attention.q_norm.weight.grad.abs().max() > 0
    first = model.get_decoder().layers[0].self_attn
    assert not hasattr(first, "q_norm")  # it rotates and is what it was


@pytest.mark.filterwarnings("error:Mismatch dtype")
@pytest.mark.parametrize("form", ["full", "head"])
def test_norms_in_16_bits(form: str) -> None:
    """Taken in float32 under autocast, as exact as the model's own norms; in bfloat16 too."""
    model = trained(hf.drop_positions(build("llama"), qk_norm=form))
    q_norm, x = model.get_decoder().layers[0].self_attn.q_norm, torch.randn(1, 4, 5, 12).bfloat16()
    assert torch.equal(q_norm(x), q_norm(x.float()).bfloat16())
    expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens(), labels=tokens()).loss.backward()
        mixed = logits(model)
    new = hf.drop_positions(build("llama").bfloat16().train(), qk_norm=form)
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert all(x.training for x in new.modules())
    for ours in (mixed, logits(model.bfloat16())):
        assert (ours - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(("form", "other"), [("full", "olmo2"), ("head", "qwen3")])
def test_norms_have_the_layout_of_a_stock_family(form: str, other: str) -> None:
    names = hf.drop_positions(build("llama"), qk_norm=form).state_dict()
    theirs = {
        k: v.shape for k, v in build(other, head_dim=12).state_dict().items() if "k_norm" in k
    }
    assert {k: v.shape for k, v in names.items() if "k_norm" in k} == theirs


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("form", ["full", "head"])
def test_norms_survive_saving(
    form: str, layers: list[int] | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In many files; in 16 bits; with another attention; and nothing is reported missing."""
    model = trained(hf.drop_positions(build("mistral"), layers, form))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    capfd.readouterr()
    loaded = hf.load_model(tmp_path, **EAGER)
    assert capfd.readouterr().err == ""
    assert torch.equal(logits(loaded), logits(model))
    assert type(loaded) is type(model)
    assert not loaded.training
    states = (loaded.state_dict(), model.state_dict(), copied(model).state_dict())
    assert list(states[0]) == list(states[1])
    for name, weight in states[1].items():
        assert torch.equal(states[0][name], weight)
        assert torch.equal(states[2][name], weight)
    half = hf.load_model(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, **EAGER)  # which knows no such norms
    with pytest.raises(ValueError, match=r"without them; load it with drope_kernels.hf.load_model"):
        hf.drop_positions(plain, layers, form)


@pytest.mark.parametrize("form", ["full", "head"])
def test_restoring_keeps_trained_norms(form: str) -> None:
    stock = build("llama")
    model = hf.drop_positions(copied(stock), [1], form)
    assert torch.equal(logits(hf.restore_positions(model)), logits(stock))
    assert list(model.state_dict()) == list(stock.state_dict())
    hf.drop_positions(model, qk_norm=form)
    trained(model)
    before = logits(model)
    with pytest.raises(ValueError, match=r"weights 1, got trained ones, .*discard_qk_norm=True"):
        hf.restore_positions(model)
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(hf.restore_positions(model, discard_qk_norm=True)), logits(stock))


def test_norms_that_are_refused() -> None:
    for family in sorted({*FAMILIES} - {*WITHOUT_NORMS}):
        with pytest.raises(ValueError, match=rf"expected None for a {family}\w*, which has norms"):
            hf.drop_positions(build(family), qk_norm="head")
    model = hf.drop_positions(build("llama"), [0], "full")
    for other in (None, "head"):
        with pytest.raises(ValueError, match=r"expected 'full' as in the layers dropped before"):
            hf.drop_positions(model, qk_norm=other)
    before = copied(model)
    assert torch.equal(logits(hf.drop_positions(model, [0], "full")), logits(before))


def test_weights_of_other_shapes_are_an_error(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["intermediate_size"] *= 2
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"the shapes that config\.json .* says, got .*mlp"):
        hf.load_model(tmp_path)


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    model = trained(hf.drop_positions(build("llama"), qk_norm="full"))
    for name in ("model.layers.1.self_attn.k_norm.weight", "model.norm.weight"):
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights[name]
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=f"1 are missing, {name} among them"):
            hf.load_model(tmp_path)


def test_weights_cut_short_are_an_error(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    for size in (0, 5, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"expected whole weights in .*; copy it again"):
            hf.load_model(tmp_path)


def test_norms_that_the_config_does_not_tell_of(tmp_path: Path) -> None:
    hf.drop_positions(build("llama"), qk_norm="head").save_pretrained(tmp_path)
    hf.drop_positions(build("llama")).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"got model\.layers\.0\.self_attn\.k_norm\.weight; take"):
        hf.load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropped_layers": [0, 9]}, "dropped_layers between 0 and 1, got .* another model"),
        ({"qk_norm": "rms"}, "a qk_norm of None, 'full' or 'head', got 'rms'"),
        ({"temperature": -1.0}, "a temperature > 0, got -1.0"),
        (None, "a dictionary with dropped_layers, .*, got 'yes'"),
    ],
)
def test_records_of_others_are_an_error(
    change: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    hf.drop_positions(build("llama")).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["drope"] = "yes" if change is None else config["drope"] | change
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.drope: expected {message}"):
        hf.load_model(tmp_path)


def test_sources_without_a_model_or_a_tokenizer(tmp_path: Path) -> None:
    for load in (hf.load_model, hf.load_tokenizer):
        for name in (".", "absent", "absent.gguf"):
            with pytest.raises(FileNotFoundError, match=r"directory with config.json or a .gguf"):
                load(tmp_path / name)
    build("llama").save_pretrained(tmp_path)
    assert type(hf.load_model(str(tmp_path))) is LlamaForCausalLM
    with pytest.raises(FileNotFoundError, match=r"expected a tokenizer in .*tokenizer.json.*none"):
        hf.load_tokenizer(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(TypeError, match=r"no options for a .gguf file, got attn_implementation"):
        hf.load_model(tmp_path / "model.gguf", **EAGER)


def test_tokenizer_beside_a_model(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({"far": 0, "away": 1}, unk_token="far"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    build("llama").save_pretrained(tmp_path)
    assert hf.load_tokenizer(tmp_path).convert_tokens_to_ids(["away", "far"]) == [1, 0]
