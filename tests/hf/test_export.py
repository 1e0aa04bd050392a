"""`hf.export`: plain checkpoints that stock transformers loads and computes the same from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import FAMILIES, build, copied, dropped, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter
from transformers import AutoModelForCausalLM
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel

from drope_kernels import LogScale, hf

pytestmark = pytest.mark.usefixtures("one_thread")

BETA = 1.3
TOLERANCE = 1e-5  # of the largest logit: another order of float32 products
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
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


def stock(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", **options)


@torch.no_grad()
def logits(model: Any, positions: Tensor | None = None) -> Tensor:
    """(B, S, V) of the usual tokens."""
    ids = tokens()
    mask = torch.ones_like(ids)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits


def close(ours: Tensor, theirs: Tensor) -> None:
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error <= TOLERANCE


def config_of(path: Path) -> Any:
    return json.loads((path / "config.json").read_text())


# ---- the checkpoint ------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_as_the_live_model(family: str, tmp_path: Path) -> None:
    live = dropped(family)
    loaded = stock(hf.export(live, tmp_path / "out", verify=False))
    assert type(loaded) is type(live)
    assert torch.equal(logits(loaded), logits(live))
    for shift in (1, 1_000_000):
        moved = logits(loaded, torch.arange(19)[None] + shift)
        assert torch.equal(moved, logits(live))
    rotated = logits(build(family))
    assert (rotated - logits(live)).abs().max() > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_temperature_is_in_the_weights(family: str, tmp_path: Path) -> None:
    live = dropped(family, BETA)
    before = {name: x.clone() for name, x in live.state_dict().items()}
    path = hf.export(live, tmp_path / "out")  # verified
    close(logits(stock(path)), logits(live))
    assert (logits(stock(path)) - logits(dropped(family))).abs().max() > 0.1
    assert all(torch.equal(x, before[name]) for name, x in live.state_dict().items())
    assert config_of(path)["drope"]["temperature"] == 1.0
    assert config_of(path)["drope"]["export"]["temperature"] == pytest.approx(BETA)


@pytest.mark.parametrize(
    ("family", "suffix", "folded"),
    [
        ("llama", "q_proj.weight", lambda w: w * BETA),
        ("qwen2", "q_proj.bias", lambda w: w * BETA),
        ("qwen3", "q_norm.weight", lambda w: w * BETA),
        ("olmo2", "q_norm.weight", lambda w: w * BETA),
        ("gemma3", "q_norm.weight", lambda w: (1 + w) * BETA - 1),
    ],
)
def test_folded_parameters(
    family: str, suffix: str, folded: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    live = dropped(family, BETA)
    weights = load_file(hf.export(live, tmp_path / "out", verify=False) / "model.safetensors")
    changed = {
        name
        for name, x in live.state_dict().items()
        if name in weights and not torch.equal(x, weights[name])
    }
    assert any(name.endswith(suffix) for name in changed)
    assert all(".q_" in name for name in changed)
    for name in changed:
        if name.endswith(suffix):
            expected = folded(live.state_dict()[name].double())
            torch.testing.assert_close(weights[name].double(), expected, rtol=2e-7, atol=2e-7)


def test_a_length_makes_the_temperature(tmp_path: Path) -> None:
    live = dropped("qwen3", 1.1)
    path = hf.export(live, tmp_path / "out", scale=LogScale(0.4, 100), length=800)
    beta = 1.1 * (1 + 0.4 * math.log(8))
    assert config_of(path)["drope"]["export"]["temperature"] == pytest.approx(beta)
    close(logits(stock(path)), logits(hf.set_temperature(live, beta)))


def test_yarn_leaves_its_attention_factor(tmp_path: Path) -> None:
    live = dropped("llama", rope_parameters=YARN)
    path = hf.export(live, tmp_path / "out")
    factor = (0.1 * math.log(4) + 1) ** 2
    assert config_of(path)["drope"]["export"]["temperature"] == pytest.approx(factor)
    close(logits(stock(path)), logits(live))
    close(logits(hf.load_model(path)), logits(live))  # not multiplied in once more


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", torch.bfloat16), ("gemma3", torch.float16)]
)
def test_sixteen_bits(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    live = dropped(family, BETA).to(dtype)
    path = hf.export(live, tmp_path / "out")
    assert stock(path).dtype == dtype
    rounding = config_of(path)["drope"]["export"]["rounding"]
    assert 0 < rounding <= torch.finfo(dtype).eps / 2 * (1 + 1e-3)


def test_overflow_is_refused(tmp_path: Path) -> None:
    live = dropped("llama", 1e6).to(torch.float16)
    with pytest.raises(ValueError, match=r"end of torch\.float16; export in bfloat16"):
        hf.export(live, tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_config_is_plain(family: str, tmp_path: Path) -> None:
    live = dropped(family)
    live.config.drope["tokens"] = 12_000
    original = live.config.drope["rope_parameters"]
    config = config_of(hf.export(live, tmp_path / "out", context=4096, verify=False))
    rope = config["rope_parameters"]
    for parameters in rope.values() if family == "gemma3" else [rope]:
        assert (parameters["rope_type"], parameters["factor"]) == ("llama3", 1e30)
        assert parameters["original_max_position_embeddings"] == 1
    assert config["original_max_position_embeddings"] == 1
    assert config["max_position_embeddings"] == 4096
    assert "auto_map" not in config
    assert config["drope"]["tokens"] == 12_000
    assert config["drope"]["rope_parameters"] == original
    assert set(config["drope"]["export"]["versions"]) == {"drope_kernels", "transformers", "torch"}
    assert live.config.max_position_embeddings == 128
    assert not hasattr(live.config, "original_max_position_embeddings")


def test_tied_embeddings_and_kernels(tmp_path: Path) -> None:
    live = hf.use_kernels(build("llama", tie_word_embeddings=True), fused_rotation=True)
    hf.drop_positions(live)
    path = hf.export(torch.compile(live), tmp_path / "out")
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    close(logits(stock(path)), logits(live))


# ---- norms of each head --------------------------------------------------------------------------
def with_norms(family: str, form: str, **changes: Any) -> Any:
    model = hf.drop_positions(build(family, **changes), qk_norm=form)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "head_dim": 16, "tie_word_embeddings": True}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_head_norms_make_a_qwen3(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    live = hf.set_temperature(with_norms(family, "head", **changes), BETA)
    path = hf.export(live, tmp_path / "out")
    loaded = stock(path)
    assert loaded.config.model_type == "qwen3"
    close(logits(loaded), logits(live))
    assert config_of(path)["drope"]["export"]["model_type"] == family
    with pytest.raises(ValueError, match="norms of another architecture"):
        hf.restore_positions(hf.load_model(path))


@pytest.mark.parametrize(
    ("family", "form", "changes", "message"),
    [
        ("llama", "full", {}, "qk_norm='full' in a llama; no plain architecture"),
        ("qwen2", "head", {}, "qk_norm='head' in a qwen2; no plain architecture"),
        ("mistral", "head", {}, "a mistral with sliding_window"),
        ("llama", "head", {"mlp_bias": True}, "a llama with mlp_bias"),
    ],
)
def test_norms_without_an_architecture(
    family: str, form: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(NotImplementedError, match=message):
        hf.export(with_norms(family, form, **changes), tmp_path / "out")
    assert not any(tmp_path.iterdir())


# ---- the way back --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("llama", {"rope_parameters": LLAMA3}), ("gemma3", {})],
)
def test_round_trip(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = build(family, **changes)
    model.save_pretrained(tmp_path / "original")
    path = hf.export(hf.drop_positions(copied(model)), tmp_path / "out", context=1024)
    for loaded in (hf.load_model(path, attn_implementation="eager"), stock(path)):
        back = hf.restore_positions(loaded)
        assert torch.equal(logits(back), logits(model))
        back.save_pretrained(tmp_path / "back")
        assert config_of(tmp_path / "back") == config_of(tmp_path / "original")
        assert torch.equal(logits(stock(tmp_path / "back")), logits(model))


def test_no_way_back_from_a_folded_temperature(tmp_path: Path) -> None:
    path = hf.export(dropped("qwen3", BETA), tmp_path / "out")
    loaded = hf.load_model(path)
    with pytest.raises(ValueError, match="a temperature folded into them"):
        hf.restore_positions(loaded)
    again = hf.export(hf.set_temperature(loaded, 1.1), tmp_path / "again")
    close(logits(stock(again)), logits(dropped("qwen3", BETA * 1.1)))
    assert not config_of(again)["drope"]["export"]["restorable"]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_weight_that_is_no_number_is_refused(value: float, name: str, tmp_path: Path) -> None:
    """Also where no token of the verification reads it."""
    live = dropped("llama")
    hf.export(live, tmp_path / "good")
    with torch.no_grad():
        live.get_parameter(name)[-1, -1] = value
    for verify in (True, False):
        with pytest.raises(ValueError, match=f"got 1 inf or NaN in {re.escape(name)}"):
            hf.export(live, tmp_path / "out", verify=verify)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
    weights = load_file(tmp_path / "good" / "model.safetensors")
    weights[name][-1, -1] = value
    save_file(weights, tmp_path / "good" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="inf or NaN in"):
        hf.verify_export(tmp_path / "good")


# ---- refusals ------------------------------------------------------------------------------------
def test_bad_requests(tmp_path: Path) -> None:
    out, live = tmp_path / "out", dropped("llama")
    with pytest.raises(ValueError, match="call drop_positions first"):
        hf.export(build("llama"), out)
    with pytest.raises(ValueError, match="got 1 of 2; no plain config"):
        hf.export(hf.drop_positions(build("llama"), layers=[0]), out)
    with pytest.raises(NotImplementedError, match="got gpt2: its positions are learned"):
        hf.export(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=9)), out)
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM, got a LlamaModel"):
        hf.export(live.model, out)
    with pytest.raises(NotImplementedError, match=r"Parameter of torch\.float64; load"):
        hf.export(copied(live).double(), out)
    adapted, quantised, offloaded = (copied(live) for _ in range(3))
    adapted.peft_config = {"default": object()}
    with pytest.raises(NotImplementedError, match="with adapters or wrapped; merge them"):
        hf.export(adapted, out)
    quantised.lm_head.weight = Parameter(torch.ones(61, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"lm_head\.weight Parameter of torch\.int8"):
        hf.export(quantised, out)
    with pytest.raises(NotImplementedError, match=r"embed_tokens\.weight offloaded; load"):
        hf.export(offloaded.to("meta"), out)
    with pytest.raises(ValueError, match="length: expected the number of tokens"):
        hf.export(live, out, scale=LogScale(0.4, 100))
    with pytest.raises(ValueError, match="length: expected None without a scale"):
        hf.export(live, out, length=100)
    with pytest.raises(ValueError, match=r"context: expected at least .* 128, got 64"):
        hf.export(live, out, context=64)
    with pytest.raises(FileNotFoundError, match=r"without config\.json"):
        hf.verify_export(out)
    assert not any(tmp_path.iterdir())
