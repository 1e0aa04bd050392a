"""What `hf.drop_positions` and `hf.set_temperature` leave behind, can undo, and refuse."""

from __future__ import annotations

import importlib
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import (
    ATTENTION,
    FAMILIES,
    YARN,
    build,
    close,
    copied,
    logits,
    padding,
    tokens,
    with_attention,
    with_identity_rotation,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    SmolLM3Config,
)

from drope_kernels import hf

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {"all layers": None, "first layer": [0], "last layer": [1]}
PADDED = {"input_ids": tokens(), "attention_mask": padding(left=8)}


@pytest.fixture(scope="module", params=FAMILIES)
def stock(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_restored(stock: Any, attention: str, layers: str) -> None:
    """Bit for bit, whatever came in between, and the config with it."""
    model = with_attention(copied(stock), attention)
    before, config = logits(model, PADDED), model.config.to_dict()
    modules = [type(x) for x in model.modules()]
    hf.set_temperature(hf.drop_positions(model, LAYERS[layers]), 1.25)
    logits(model)
    assert hf.restore_positions(model) is model
    assert torch.equal(logits(model, PADDED), before)
    assert model.config.to_dict() == config
    assert [type(x) for x in model.modules()] == modules
    hf.restore_positions(model)  # nothing to restore
    assert model.config.to_dict() == config


def test_config_of_a_whole_drop() -> None:
    """Llama-3's scaling by 1e30, per type of layer where parameters are; the original beside it."""
    unturning = {
        "rope_type": "llama3",
        "factor": 1e30,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1,
    }
    model = build("llama", rope_parameters=YARN | {"rope_theta": 5e5})
    original = dict(model.config.rope_parameters)
    for layers, qk_norm in (([0], None), (None, "full")):  # stock code cannot be such a model
        other = hf.drop_positions(copied(model), layers, qk_norm)
        assert other.config.rope_parameters == original
    hf.drop_positions(model)
    assert model.config.rope_parameters == unturning | {"rope_theta": 5e5}
    assert model.config.drope == {
        "dropped_layers": [0, 1],
        "qk_norm": None,
        "temperature": 1.0,
        "rope_parameters": original,
    }
    gemma = hf.drop_positions(build("gemma3"))
    assert gemma.config.rope_parameters == {
        "sliding_attention": unturning | {"rope_theta": 1e4},
        "full_attention": unturning | {"rope_theta": 1e6},
    }
    hf.drop_positions(gemma)
    assert gemma.config.drope["rope_parameters"] == build("gemma3").config.rope_parameters


@pytest.mark.parametrize("layers", LAYERS)
def test_order_does_not_matter(stock: Any, layers: str) -> None:
    """Kernels before, after and again; layers one by one; fused rotation on and off."""
    chosen = LAYERS[layers]
    expected = logits(hf.drop_positions(hf.use_kernels(copied(stock)), chosen))
    model = hf.drop_positions(copied(stock), chosen)
    for fused in (True, False):
        hf.use_kernels(model, fused_rotation=fused)
        close(f"fused={fused}", logits(model), expected)
    hf.use_kernels(hf.restore_positions(model), fused_rotation=True)
    for index in chosen or (1, 0, 0):
        hf.drop_positions(model, [index])
    close("one by one", logits(model), expected)
    assert model.config.drope["dropped_layers"] == (chosen or [0, 1])
    model.set_attn_implementation("eager")
    close("eager", logits(copied(model)), expected)


def test_yarn_keeps_its_attention_factor() -> None:
    stock = build("llama", rope_parameters=YARN)
    factor = stock.get_decoder().rotary_emb.attention_scaling ** 2
    assert factor > 1.4
    model = hf.drop_positions(copied(stock), [1])
    reference = with_identity_rotation(copied(stock), [1])
    reference.get_decoder().layers[1].self_attn.scaling *= factor
    assert torch.equal(logits(model), logits(reference))
    for beta in (1.3, 0.8):  # of the stock scale, not of each other
        hf.set_temperature(model, beta)
        scaling = [layer.self_attn.scaling for layer in reference.get_decoder().layers]
        ours = [layer.self_attn.scaling for layer in model.get_decoder().layers]
        assert ours == pytest.approx([x * beta for x in scaling], rel=1e-15)
    hf.set_temperature(model, 1.0)
    assert torch.equal(logits(model), logits(reference))


@pytest.mark.parametrize("attention", ATTENTION)
def test_temperature(stock: Any, attention: str) -> None:
    model = with_attention(copied(stock), attention)
    config = model.config.to_dict()
    assert hf.set_temperature(model, 1.5) is model
    reference = copied(stock)
    for layer in reference.get_decoder().layers:
        layer.self_attn.scaling *= 1.5
    close("logits", logits(model), logits(reference))
    assert model.config.drope["temperature"] == 1.5
    hf.set_temperature(model, 1.0)
    close("logits", logits(model), logits(stock))
    assert model.config.to_dict() == config


@pytest.mark.parametrize("attention", ["eager", "fused rotation"])
def test_pickled_for_another_process(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose module of the family still has its own apply_rotary_pos_emb."""
    model = hf.drop_positions(with_attention(build("llama"), attention), [1])
    expected, content = logits(model), pickle.dumps(model)
    module = sys.modules[type(model).__module__]
    monkeypatch.setattr(module, "apply_rotary_pos_emb", module.apply_rotary_pos_emb.__wrapped__)
    assert torch.equal(logits(pickle.loads(content)), expected)


def test_other_frequencies_beside_a_temperature() -> None:
    """What the config says of a rotation that is there holds, not what was recorded earlier."""
    config = hf.set_temperature(build("llama"), 1.2).config
    config.rope_parameters = YARN
    model = hf.set_temperature(AutoModelForCausalLM.from_config(config), 1.3)
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert hf.restore_positions(model).config.rope_parameters["rope_type"] == "yarn"


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, lambda model: hf.drop_positions(model, [0])),
        ({}, lambda model: hf.drop_positions(model, qk_norm="head")),
        ({}, lambda model: hf.set_temperature(model, 1.2)),
        ({"rope_parameters": YARN}, hf.drop_positions),
    ],
)
def test_a_record_that_nobody_applied(options: dict[str, Any], change: Any) -> None:
    """As `from_pretrained` of transformers leaves it."""
    config = change(build("llama", **options)).config
    for fused in (False, True):
        with pytest.raises(ValueError, match=r"as transformers itself loads it; load it with"):
            hf.use_kernels(AutoModelForCausalLM.from_config(config), fused_rotation=fused)
    if config.drope["qk_norm"] is not None:  # weights that transformers did not load
        with pytest.raises(ValueError, match=r"got a model without them; load it with"):
            hf.restore_positions(AutoModelForCausalLM.from_config(config))


def test_a_whole_drop_that_transformers_loads(stock: Any) -> None:
    """It loses nothing, and may compute with the kernels."""
    dropped = hf.drop_positions(copied(stock))
    loaded = AutoModelForCausalLM.from_config(dropped.config).eval()
    loaded.load_state_dict(dropped.state_dict())
    close("logits", logits(hf.use_kernels(loaded, fused_rotation=True)), logits(dropped))


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers is missing: pip install 'drope_kernels\["):
        importlib.reload(hf)


def test_frequencies_that_the_kernel_cannot_know() -> None:
    """Refused with nothing changed; of no consequence where no layer rotates."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = build("llama", rope_parameters=dynamic)
    with pytest.raises(NotImplementedError, match="'dynamic', whose frequencies change"):
        hf.use_kernels(model, fused_rotation=True)
    assert model.config._attn_implementation == "eager"
    before = logits(hf.drop_positions(model))
    hf.use_kernels(model, fused_rotation=True)
    config = model.config.to_dict()
    with pytest.raises(NotImplementedError, match="'dynamic', whose frequencies change"):
        hf.restore_positions(model)
    assert model.config.to_dict() == config
    close("still dropped", logits(model), before)


def test_wrapped_models() -> None:
    """A wrapper's inner model is dropped; norms, which a wrapper would not see, are refused."""
    stock = build("llama")
    wrapped = torch.nn.Sequential(copied(stock))
    assert hf.drop_positions(wrapped) is wrapped
    reference = with_identity_rotation(copied(stock))
    assert torch.equal(logits(wrapped[0]), logits(reference))
    with pytest.raises(ValueError, match=r"qk_norm='full', got a Sequential that is a wrapper"):
        hf.drop_positions(torch.nn.Sequential(copied(stock)), qk_norm="full")
    adapted = copied(stock)
    adapted.peft_config = {"default": object()}
    with pytest.raises(ValueError, match=r"LlamaForCausalLM that .* has adapters"):
        hf.drop_positions(adapted, qk_norm="head")


def test_refusals() -> None:
    model = build("llama")
    before = model.config.to_dict()
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "layers: expected 0 to 1, got 2", {"layers": [0, 2]}),
        (ValueError, "layers: expected 0 to 1, got -1", {"layers": [-1]}),
        (ValueError, "layers: expected at least one layer, got none", {"layers": []}),
        (TypeError, "layers: expected indices of layers, got bool", {"layers": [True]}),
        (ValueError, "qk_norm: expected None, 'full' or 'head', got 'rms'", {"qk_norm": "rms"}),
    ]
    for kind, message, options in refused:
        with pytest.raises(kind, match=message):
            hf.drop_positions(model, **options)
    for beta, kind in ((0.0, ValueError), (float("nan"), ValueError), ("hot", TypeError)):
        with pytest.raises(kind, match="beta: expected a "):
            hf.set_temperature(model, beta)
    assert model.config.to_dict() == before
    with pytest.raises(NotImplementedError, match=r"expected one decoder, got 2 in a ModuleList"):
        hf.drop_positions(torch.nn.ModuleList([model, copied(model)]))
    with pytest.raises(NotImplementedError, match=r"one of gemma3_text, .*, got Linear"):
        hf.drop_positions(torch.nn.Linear(1, 1))


def test_other_families_are_refused_with_a_reason() -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "pad_token_id": 0}
    sizes |= {"num_hidden_layers": 1, "intermediate_size": 8, "num_key_value_heads": 2}
    for config, reason in (
        (GPTNeoXConfig(**sizes), "part of each head keeps no rotation"),
        (CohereConfig(**sizes), "neighbouring channels"),
        (SmolLM3Config(**sizes), "no_rope_layers"),
        (GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2), "learned vectors"),
        (GraniteConfig(**sizes), "no test compares it with its stock form"),
    ):
        model, before = AutoModelForCausalLM.from_config(config), config.to_dict()
        message = f"expected one of gemma3_text, .*, got {config.model_type}: .*{reason}"
        for change in (hf.drop_positions, hf.restore_positions):
            with pytest.raises(NotImplementedError, match=message):
                change(model)
        with pytest.raises(NotImplementedError, match=message):
            hf.set_temperature(model, 2.0)
        assert model.config.to_dict() == before


def test_sharded_models(tmp_path: Path) -> None:
    """FSDP2 keeps what it sharded; norms that it would not know are refused."""
    stock = build("llama")
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = copied(stock)
        for layer in model.get_decoder().layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"Llama\w+ that .* is sharded"):
            hf.drop_positions(model, qk_norm="head")
        reference = with_identity_rotation(copied(stock), [1])
        ours = logits(hf.drop_positions(model, [1]))
        assert torch.equal(ours, logits(reference))
    finally:
        torch.distributed.destroy_process_group()
