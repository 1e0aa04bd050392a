"""`drope_kernels.nn`: positions, temperature, switches, loss, files."""

from __future__ import annotations

import pytest
import torch
from decoders import tiny_decoder, token_ids
from safetensors.torch import save_file

from drope_kernels.nn import DecoderConfig, DecoderLM, DropeAttention
from drope_kernels.nn.loss import causal_lm_loss
from drope_kernels.rope import Rope
from drope_kernels.scale import LogScale


def test_strength_goes_from_none_to_all():
    model, ids = tiny_decoder(), token_ids()
    with torch.no_grad():
        logits = {}
        for strength in (0.0, 0.5, 1.0):
            model.set_positions(True, strength=strength)
            logits[strength] = model(ids).logits
        model.set_positions(Rope.pi(2.0))  # all angles halved is position interpolation by 2
        torch.testing.assert_close(logits[0.5], model(ids).logits, rtol=1e-5, atol=1e-6)
        model.drop_positions()
        assert torch.equal(logits[0.0], model(ids).logits)
    assert (logits[0.5] - logits[1.0]).abs().max() > 1e-3


def test_positions_per_layer():
    ids = token_ids()
    mixed = tiny_decoder(rope=[False, True])
    later = tiny_decoder(rope=True)
    later.load_state_dict(mixed.state_dict())
    later.set_positions(False, layers=[0])
    with torch.no_grad():
        assert torch.equal(mixed(ids).logits, later(ids).logits)
        later.set_positions(False, layers=[1])
        assert not torch.equal(mixed(ids).logits, later(ids).logits)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope": False},
        {"smear_keys": True},
        {"qk_norm": "head"},
        {"smear_keys": True, "rope": False},
    ],
    ids=["rope", "nope", "smeared", "qk_norm", "smeared_nope"],
)
def test_the_future_never_changes_the_past(changes):
    model, ids = tiny_decoder(**changes).eval(), token_ids()
    with torch.no_grad():
        before = model(ids).logits
        for changed in (18, 7, 1):
            other = ids.clone()
            other[:, changed] = (other[:, changed] + 1) % 50
            after = model(other).logits
            assert torch.equal(after[:, :changed], before[:, :changed])
            assert not torch.equal(after[:, changed], before[:, changed])


def test_smeared_keys_are_the_key_plus_the_weighted_previous_key():
    torch.manual_seed(0)
    layer = DropeAttention(16, 2, rope=False, smear_keys=True)
    hidden = torch.randn(1, 5, 16)
    with torch.no_grad():
        layer.k_smear.copy_(torch.tensor([0.25, -1.5]))
        q, k, v = (
            getattr(layer, name)(hidden).view(1, 5, 2, 8).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = k.clone()
        mixed[:, :, 1:] += layer.k_smear[:, None, None] * k[:, :, :-1]
        out = torch.nn.functional.scaled_dot_product_attention(q, mixed, v, is_causal=True)
        expected = layer.o_proj(out.transpose(1, 2).reshape(1, 5, 16))
        torch.testing.assert_close(layer(hidden), expected, rtol=1e-5, atol=1e-6)
    layer(hidden).square().sum().backward()
    assert (layer.k_smear.grad != 0).all()


def test_without_positions_only_smeared_keys_know_the_order():
    ids = token_ids(shape=(1, 8))
    swapped = ids.clone()
    swapped[0, [2, 3]] = ids[0, [3, 2]]
    with torch.no_grad():
        for smear_keys in (False, True):
            model = tiny_decoder(rope=False, smear_keys=smear_keys, num_layers=1).eval()
            difference = model(ids).logits[0, -1] - model(swapped).logits[0, -1]
            assert (difference.abs().max() > 1e-3) == smear_keys


@pytest.mark.parametrize("kind", ["full", "head"])
def test_qk_norm_makes_the_size_of_the_projection_irrelevant(kind):
    torch.manual_seed(0)
    layer = DropeAttention(32, 4, 2, qk_norm=kind)
    assert layer.q_norm.weight.shape == ((32,) if kind == "full" else (8,))
    assert layer.k_norm.weight.shape == ((16,) if kind == "full" else (8,))
    hidden = torch.randn(2, 9, 32)
    with torch.no_grad():
        before = layer(hidden)
        layer.q_proj.weight.mul_(30.0)
        layer.k_proj.weight.mul_(30.0)
        torch.testing.assert_close(layer(hidden), before, rtol=1e-3, atol=1e-4)
        layer.q_norm.weight.mul_(3.0)
        assert (layer(hidden) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 2, "qk_norm": "full", "smear_keys": True, "embedding_norm": True},
        {"num_kv_heads": 1, "qk_norm": "head", "head_dim": 6, "rope": False, "mlp_bias": True},
    ],
)
def test_every_parameter_gets_a_gradient(changes):
    model, ids = tiny_decoder(**changes), token_ids()
    model(ids, ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        if name != "model.layers.0.self_attn.k_proj.bias":  # softmax ignores a shift of all keys
            assert (parameter.grad != 0).any(), name


def test_bfloat16_stays_near_float32():
    model, ids = tiny_decoder(smear_keys=True, qk_norm="full").eval(), token_ids()
    with torch.no_grad():
        exact = model(ids, ids)
        rounded = model.to(torch.bfloat16)(ids, ids)
    assert rounded.logits.dtype == torch.bfloat16
    assert rounded.loss.dtype == torch.float32
    assert (rounded.logits.float() - exact.logits).abs().max() < 0.05 * exact.logits.abs().max()


def test_autocast_trains():
    model, ids = tiny_decoder(smear_keys=True), token_ids()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, ids).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_compiles_without_a_break():
    model, ids = tiny_decoder(smear_keys=True, num_kv_heads=2), token_ids()
    model.set_scale(LogScale(0.4, 8))
    expected = model(ids, ids).loss
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_temperature_follows_the_length():
    model, ids = tiny_decoder().eval(), token_ids(shape=(1, 32))
    with torch.no_grad():
        plain = {n: model(ids[:, :n]).logits for n in (8, 32)}
        model.set_scale(LogScale(0.4, 8))
        assert torch.equal(model(ids[:, :8]).logits, plain[8])
        warm = model(ids).logits
        assert (warm - plain[32]).abs().max() > 1e-3
        model.set_scale(LogScale(0.4, 8)(32, 8))
        assert torch.equal(model(ids).logits, warm)
        model.set_scale(LogScale(0.4, 8), length=32)  # as if the text went on to 32 tokens
        torch.testing.assert_close(model(ids[:, :8]).logits, warm[:, :8])
        model.set_scale(None)
        assert torch.equal(model(ids).logits, plain[32])


def test_loss_weights_and_ignored_labels():
    model, ids = tiny_decoder().eval(), token_ids()
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, 4:9] = -100
    out = model(ids, labels, weights)
    log_p = out.logits[:, :-1].float().log_softmax(-1)
    losses = -log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    counted = weights[:, 1:] * (labels[:, 1:] != -100)
    torch.testing.assert_close(out.loss, (losses * counted).sum() / counted.sum())
    halved = model(ids, labels, weights, num_items_in_batch=2 * counted.sum()).loss
    torch.testing.assert_close(halved, out.loss / 2)
    assert causal_lm_loss(out.logits, torch.full_like(ids, -100)) == 0


def test_a_weight_of_zero_gives_no_gradient():
    model, ids = tiny_decoder(), token_ids(shape=(1, 12))
    weights = torch.zeros(1, 12)
    weights[0, 5] = 1.0
    logits = model(ids).logits.detach().requires_grad_()
    causal_lm_loss(logits, ids, weights).backward()
    rows = (logits.grad[0] != 0).any(-1).nonzero().flatten().tolist()
    assert rows == [4]  # the row that predicts token 5


@pytest.mark.parametrize("chunk", [1, 7, 19, 64])
def test_chunked_loss_is_the_loss(chunk):
    ids, weights = token_ids(), torch.rand(2, 19, generator=torch.Generator().manual_seed(3))
    whole, chunked = tiny_decoder(tie_embeddings=True), tiny_decoder(tie_embeddings=True)
    expected = whole(ids, ids, weights).loss
    out = chunked(ids, ids, weights, loss_chunk=chunk)
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected)
    expected.backward()
    out.loss.backward()
    for a, b in zip(whole.parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1)])
def test_empty_and_single_tokens(shape):
    model = tiny_decoder(smear_keys=True, num_kv_heads=2)
    ids = torch.zeros(shape, dtype=torch.long)
    out = model(ids, ids)
    out.loss.backward()
    assert out.loss == 0  # nothing to predict
    assert out.logits.shape == (*shape, 50)


def test_logits_to_keep():
    model, ids = tiny_decoder().eval(), token_ids()
    with torch.no_grad():
        torch.testing.assert_close(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:])


ROPES = {
    "default": True,
    "dropped": False,
    "yarn": Rope.yarn(4.0, original_max_position_embeddings=16, theta=5000.0),
    "weak_ntk": Rope.ntk(2.0).with_strength(0.5),
    "table": Rope(inv_freq=[0.5, 0.25, 0.1, 0.0]),
    "per_layer": [False, Rope.pi(4.0)],
}


@pytest.mark.parametrize("name", ROPES)
def test_save_and_load(name, tmp_path):
    model = tiny_decoder(
        tie_embeddings=name != "default", smear_keys=True, embedding_norm=True, rope=ROPES[name]
    )
    path = tmp_path / "folder" / "decoder.safetensors"
    model.save(path)
    loaded = DecoderLM.load(path)
    assert [layer.rope for layer in loaded.attentions] == [layer.rope for layer in model.attentions]
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key])
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_save_keeps_positions_as_they_are_now(tmp_path):
    model = tiny_decoder()
    model.drop_positions()
    model.save(tmp_path / "dropped.safetensors")
    loaded = DecoderLM.load(tmp_path / "dropped.safetensors", backend="reference")
    assert [layer.rope for layer in loaded.attentions] == [False, False]
    assert loaded.attentions[0].backend == "reference"


def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "decoder.safetensors"
    model = tiny_decoder()
    model.save(path)
    before = path.read_bytes()

    def interrupted(tensors, file, metadata):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_load_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"written by DecoderLM\.save"):
        DecoderLM.load(tmp_path / "none")
    (tmp_path / "cut").write_bytes(b"\0" * 30)
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        DecoderLM.load(tmp_path / "cut")
    save_file({"lm_head.weight": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="from_llama"):
        DecoderLM.load(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers: expected an int >= 1, got 0"),
        ({"vocab_size": 5.0}, "vocab_size: expected an int"),
        ({"head_dim": -1}, "head_dim: expected an int >= 1"),
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads=4, got 3"),
        ({"num_heads": 5}, "hidden_size: expected a multiple of num_heads=5"),
        ({"qk_norm": "both"}, "qk_norm: expected one of"),
        ({"rope": [True]}, r"rope: expected one choice per layer \(2\), got 1"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_decoder(**changes)


def test_bad_calls():
    model = tiny_decoder()
    with pytest.raises(TypeError, match="rope: expected a Rope, True or False, got float"):
        model.set_positions(1.0)
    with pytest.raises(ValueError, match="rope_strength"):
        model.set_positions(True, strength=1.5)
    with pytest.raises(IndexError):
        model.set_positions(True, layers=[2])
    with pytest.raises(ValueError, match="loss_chunk"):
        model(token_ids(), token_ids(), loss_chunk=0)
    with pytest.raises(ValueError, match=r"input_ids: expected \(B, S\), got \(3,\)"):
        model(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="labels: expected the shape of input_ids"):
        model(token_ids(), token_ids()[:, 1:])
    with pytest.raises(ValueError, match="unknown fields"):
        DecoderConfig.from_dict({**model.config.to_dict(), "experts": 8})
