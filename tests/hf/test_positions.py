"""`hf.drop_positions`: what stock models with identity rotation compute, and no rotation at all."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from hf_models import (
    ATTENTION,
    FAMILIES,
    STOCK_ATTENTION,
    build,
    close,
    copied,
    counted_calls,
    logits,
    packed,
    padding,
    tokens,
    with_attention,
    with_identity_rotation,
)

from drope_kernels import hf

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {"all layers": None, "first layer": [0], "last layer": [1]}
INPUTS = {
    "plain": {"input_ids": tokens()},
    "left padding": {"input_ids": tokens(), "attention_mask": padding(left=8)},
    "packed": {"input_ids": tokens(1), "position_ids": packed([5, 1, 13]), "use_cache": False},
    "shifted": {"input_ids": tokens(), "position_ids": torch.arange(19)[None] + 70},
}


@pytest.fixture(scope="module", params=FAMILIES)
def stock(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_logits_of_identity_rotation(stock: Any, attention: str, layers: str) -> None:
    model = hf.drop_positions(with_attention(copied(stock), attention), LAYERS[layers])
    reference = with_identity_rotation(copied(stock), LAYERS[layers])
    if attention in STOCK_ATTENTION:
        reference = with_attention(reference, attention)
    for case, inputs in INPUTS.items():
        ours, theirs = logits(model, inputs), logits(reference, inputs)
        assert (ours - logits(stock, inputs)).abs().max() > 0.1  # dropping matters
        if attention in STOCK_ATTENTION:
            assert torch.equal(ours, theirs), case
        else:
            close(case, ours, theirs)


@pytest.mark.parametrize("layers", ["all layers", "first layer"])
@pytest.mark.parametrize("attention", ["eager", "fused rotation"])
def test_gradients_of_identity_rotation(stock: Any, attention: str, layers: str) -> None:
    model = hf.drop_positions(with_attention(copied(stock), attention), LAYERS[layers])
    reference = with_identity_rotation(copied(stock), LAYERS[layers])
    gradients = []
    for x in (model, reference):
        x.train()
        x(**INPUTS["packed"], labels=tokens(1)).loss.backward()
        gradients.append({name: p.grad for name, p in x.named_parameters()})
    for name, theirs in gradients[1].items():
        # A bias's gradient cancels where its layer's does not: both are sums of the same terms.
        close(name, gradients[0][name], theirs, gradients[1][name.replace(".bias", ".weight")])


def test_bfloat16(stock: Any) -> None:
    """Nothing is rounded where nothing is rotated."""
    weights = copied(stock).bfloat16()
    reference = with_identity_rotation(copied(weights))
    ours = logits(hf.drop_positions(weights), INPUTS["packed"])
    assert torch.equal(ours, logits(reference, INPUTS["packed"]))


def rotation_calls(stock: Any, *, angles: int, layers: int) -> Counter[str]:
    """Calls of torch's ops by the stock rotation alone."""
    decoder, positions, embeds = stock.get_decoder(), torch.arange(19)[None], torch.ones(2, 19, 48)
    attention = decoder.layers[0].self_attn
    typed = [attention.layer_type] if stock.config.model_type == "gemma3_text" else []
    with torch.no_grad(), counted_calls() as of_angles:
        cos, sin = decoder.rotary_emb(embeds, positions, *typed)
    q = k = torch.ones(2, 4, 19, attention.head_dim)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    with torch.no_grad(), counted_calls() as of_a_layer:
        rotate(q, k, cos, sin)
    names = of_angles | of_a_layer
    return Counter({x: angles * of_angles[x] + layers * of_a_layer[x] for x in names})


@pytest.mark.parametrize("attention", STOCK_ATTENTION)
def test_no_rotation_is_computed(stock: Any, attention: str) -> None:
    """Exactly the stock model's ops, less those of angles and of rotating."""
    model = with_attention(copied(stock), attention)
    with torch.no_grad(), counted_calls() as before:
        model(tokens(), use_cache=False)
    typed = stock.config.model_type == "gemma3_text"  # whose two layers read angles of their own
    for layers, angles in ((None, 1 + typed), ([0], int(typed))):
        hf.drop_positions(model, layers)
        with torch.no_grad(), counted_calls() as calls:
            model(tokens(), use_cache=False)
        spared = rotation_calls(stock, angles=angles, layers=2 if layers is None else 1)
        assert spared["aten::neg"] == (4 if layers is None else 2)
        assert calls == before - spared
        assert (calls["aten::cos"], calls["aten::sin"]) == (before["aten::cos"] - angles,) * 2
        hf.restore_positions(model)


def test_stock_rotation_is_never_called(stock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[type(stock.get_decoder().layers[0].self_attn).__module__]
    rotate, rotated = module.apply_rotary_pos_emb, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        rotated.append(args)
        return rotate(*args, **kwargs)

    monkeypatch.setattr(module, "apply_rotary_pos_emb", watched)
    for attention in ATTENTION:
        for layers, expected in ((None, 0), ([1], 1)):
            model = hf.drop_positions(with_attention(copied(stock), attention), layers)
            rotated.clear()
            model(tokens())
            assert len(rotated) == (0 if attention == "fused rotation" else expected)
    rotated.clear()
    stock(tokens())  # of the same process: keeps its rotation
    assert len(rotated) == 2


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("layers", ["all layers", "last layer"])
@pytest.mark.parametrize("attention", ["eager", "kernels", "fused rotation"])
def test_generate(stock: Any, attention: str, layers: str, cache: str) -> None:
    model = hf.drop_positions(with_attention(copied(stock), attention), LAYERS[layers])
    reference = with_identity_rotation(copied(stock), LAYERS[layers])
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    theirs = reference.generate(**INPUTS["left padding"], **options)
    assert torch.equal(model.generate(**INPUTS["left padding"], **options), theirs)


def test_caches_of_fused_rotation() -> None:
    """Raw keys as long as some layer rotates; keys of a whole drop are those of any attention."""
    stock, ids = build("llama"), tokens()
    fused = with_attention(copied(stock), "fused rotation")
    model = hf.drop_positions(copied(fused), [0])
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="position_ids: expected consecutive"):
        model(ids[:, :1], position_ids=torch.tensor([[30]]), past_key_values=cache)
    with pytest.raises(ValueError, match="a model with fused_rotation=True filled"):
        hf.drop_positions(copied(stock), [0])(ids[:, :1], past_key_values=cache)
    model, other = (hf.drop_positions(x) for x in (fused, copied(stock)))
    later = [x(ids[:, :3], past_key_values=other(ids).past_key_values) for x in (model, other)]
    close("after another's cache", later[0].logits, later[1].logits)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")
@pytest.mark.parametrize("qk_norm", [None, "full", "head"])
@pytest.mark.parametrize("attention", ["eager", "fused rotation"])
def test_gradient_checkpointing(attention: str, qk_norm: str | None) -> None:
    model = hf.drop_positions(with_attention(build("llama"), attention), [1], qk_norm).train()
    gradients = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("family", "attention", "qk_norm"),
    [
        ("llama", "sdpa", "full"),
        pytest.param("gemma3", "fused rotation", None, marks=pytest.mark.slow),
    ],
)
def test_compiled(family: str, attention: str, qk_norm: str | None) -> None:
    """fullgraph=True; code compiled before a change of layers is not run after it."""
    torch._dynamo.reset()
    types = {"layer_types": ["full_attention"] * 3} if family == "gemma3" else {}
    model = with_attention(build(family, num_hidden_layers=3, **types), attention)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = {"input_ids": tokens(), "use_cache": False}
    for change in (
        lambda: hf.drop_positions(model, [0], qk_norm),
        lambda: hf.drop_positions(model, [1], qk_norm),
        lambda: hf.set_temperature(model, 1.5),
    ):
        change()
        close("logits", logits(compiled, inputs), logits(model, inputs))
