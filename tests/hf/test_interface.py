"""`hf.use_kernels`: logits, gradients and generated tokens of stock models with eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import FAMILIES, build, close, copied, counted_calls, packed, padding, tokens
from tolerance import check_tensor
from torch import Tensor
from transformers import CompileConfig

from drope_kernels import hf

pytestmark = pytest.mark.usefixtures("one_thread")

MODES = ["rotated before", "fused rotation"]


@pytest.fixture(scope="module", params=FAMILIES)
def stock(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


@pytest.fixture(params=MODES)
def model(stock: Any, request: pytest.FixtureRequest) -> Any:
    return hf.use_kernels(copied(stock), fused_rotation=request.param == MODES[1])


INPUTS = {
    "plain": {"input_ids": tokens()},
    "no padding": {"input_ids": tokens(), "attention_mask": padding()},
    "left padding": {"input_ids": tokens(), "attention_mask": padding(left=8)},
    "right padding": {"input_ids": tokens(), "attention_mask": padding(right=5)},
    "both sides": {"input_ids": tokens(1), "attention_mask": padding(1, left=3, right=4)},
    "packed": {
        "input_ids": tokens(1),
        "position_ids": packed([5, 1, 13]),
        "use_cache": False,
    },
    "packed rows": {
        "input_ids": tokens(),
        "position_ids": packed([9, 10], [2, 8, 9]),
        "use_cache": False,
    },
    "shifted positions": {"input_ids": tokens(), "position_ids": torch.arange(19)[None] + 70},
}


def valid(logits: Tensor, inputs: dict[str, Any]) -> Tensor:
    mask = inputs.get("attention_mask")
    return logits if mask is None else logits[mask.bool()]


@pytest.mark.parametrize("case", INPUTS)
def test_logits(stock: Any, model: Any, case: str) -> None:
    inputs = INPUTS[case]
    with torch.no_grad(), counted_calls() as calls:
        ours = model(**inputs).logits
    assert calls["drope::attention_fwd"] == stock.config.num_hidden_layers
    assert calls["aten::_softmax"] == 0
    rotates = hasattr(model.get_decoder().rotary_emb, "stock")
    assert (calls["aten::cos"] == 0) == rotates
    with torch.no_grad():
        theirs = stock(**inputs).logits
    close(case, valid(ours, inputs), valid(theirs, inputs))


@pytest.mark.parametrize("case", ["plain", "left padding", "packed rows"])
def test_gradients(stock: Any, model: Any, case: str) -> None:
    inputs = dict(INPUTS[case])
    mask = inputs.get("attention_mask", torch.ones(1))
    labels = inputs["input_ids"].masked_fill(mask == 0, -100)
    # Padding tokens predict nothing either: here they attend to nothing.
    labels = labels.masked_fill(mask.roll(1, -1) == 0, -100)
    gradients = []
    for x in (model, stock):
        x.zero_grad()
        x(**inputs, labels=labels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in x.named_parameters()})
    for name, ours in gradients[0].items():
        theirs = gradients[1][name]
        # A bias's gradient cancels where its layer's does not: both are sums of the same terms.
        close(name, ours, theirs, gradients[1][name.replace(".bias", ".weight")])


def test_bfloat16(stock: Any, model: Any) -> None:
    """By the peer rule: the stock model in the same precision errs as much."""
    inputs = INPUTS["plain"]
    weights = copied(stock).bfloat16()
    for x in (weights.get_decoder().rotary_emb, stock.get_decoder().rotary_emb):
        for name, buffer in stock.get_decoder().rotary_emb.named_buffers():
            setattr(x, name, buffer)  # .bfloat16() would round the frequencies
    fused = hasattr(model.get_decoder().rotary_emb, "stock")
    ours = hf.use_kernels(copied(weights), fused_rotation=fused)
    with torch.no_grad():
        ref = copied(weights).float()(**inputs).logits
        peer, got = weights(**inputs).logits, ours(**inputs).logits
    # Errors of a few hundred logits that share two layers' roundings: a fifth of the peer's worst.
    allowance = 0.2 * (peer.float() - ref).abs().max().item()
    check_tensor("logits", got, peer, ref, allowance=allowance)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(stock: Any, model: Any, cache: str) -> None:
    inputs = INPUTS["left padding"]
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    theirs = stock.generate(**inputs, **options)
    for _ in range(2):  # a static cache is used again
        assert torch.equal(model.generate(**inputs, **options), theirs)


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 5}, {"num_beams": 2}])
@pytest.mark.parametrize("fused", [False, True], ids=MODES)
def test_generate_in_chunks_and_beams(fused: bool, options: dict[str, int]) -> None:
    stock = build("gemma3")
    model = hf.use_kernels(copied(stock), fused_rotation=fused)
    inputs = INPUTS["left padding"]
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    with counted_calls() as calls:
        ours = model.generate(**inputs, **options)
    assert calls["drope::attention_fwd"] >= 8 * stock.config.num_hidden_layers
    assert torch.equal(ours, stock.generate(**inputs, **options))


def test_chunked_prefill(stock: Any, model: Any) -> None:
    """Chunks of any size behind cached keys, the sliding caches full and not."""
    ids, logits = tokens(seqlen=30), []
    for x in (model, stock):
        cache, parts = None, []
        for begin, end in [(0, 3), (3, 4), (4, 13), (13, 14), (14, 30)]:
            with torch.no_grad():
                output = x(ids[:, begin:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        logits.append(torch.cat(parts, 1))
    close("logits", *logits)


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")
def test_gradient_checkpointing(model: Any) -> None:
    gradients = []
    for enabled in (False, True):
        model.train()
        if enabled:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        ids = INPUTS["plain"]["input_ids"]
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    model.gradient_checkpointing_disable()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("fused", [False, True], ids=MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compiled(family: str, fused: bool) -> None:
    """fullgraph=True: no graph break, plain, padded or packed."""
    torch._dynamo.reset()
    stock = build(family)
    model = hf.use_kernels(copied(stock), fused_rotation=fused)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids, lengths = tokens(), torch.tensor([0, 6, 19], dtype=torch.int32)
    with torch.no_grad():
        for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": padding(left=4)}):
            ours, theirs = compiled(**inputs, use_cache=False).logits, stock(**inputs).logits
            close("logits", valid(ours, inputs), valid(theirs, inputs))
        inputs = {"input_ids": ids[:1], "position_ids": packed([6, 13]), "use_cache": False}
        ours = compiled(**inputs, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths).logits
        close("packed", ours, stock(**inputs).logits)


def test_compiled_training() -> None:
    torch._dynamo.reset()
    stock, ids = build("llama"), tokens()
    model = hf.use_kernels(copied(stock))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(ids, labels=ids, use_cache=False).loss.backward()
    stock(ids, labels=ids).loss.backward()
    close("dq", *(x.get_decoder().layers[0].self_attn.q_proj.weight.grad for x in (model, stock)))


def test_compiled_generate() -> None:
    torch._dynamo.reset()
    stock = build("llama")
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    compile_config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    for fused in (False, True):
        model = hf.use_kernels(copied(stock), fused_rotation=fused)
        torch._dynamo.utils.counters.clear()
        ours = model.generate(**INPUTS["left padding"], **options, compile_config=compile_config)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # for all steps
        assert torch.equal(ours, stock.generate(**INPUTS["left padding"], **options))


def test_bidirectional() -> None:
    """is_causal=False of the config, which transformers' mask follows."""
    for family in ("llama", "mistral"):
        stock = build(family)
        stock.config.is_causal = False
        model = hf.use_kernels(copied(stock))
        for case in ("plain", "left padding"):
            inputs = INPUTS[case] | {"use_cache": False}
            ours, theirs = model(**inputs).logits, stock(**inputs).logits
            close(f"{family} {case}", valid(ours, inputs), valid(theirs, inputs))


def test_back_to_stock_attention() -> None:
    stock = build("llama")
    model = hf.use_kernels(copied(stock), fused_rotation=True)
    model.set_attn_implementation("eager")
    assert torch.equal(model(tokens()).logits, stock(tokens()).logits)
    model = copied(hf.use_kernels(model, fused_rotation=True))  # a copy is no less
    close("copy", model(tokens()).logits, stock(tokens()).logits)
    model = hf.use_kernels(model, backend="reference")
    with counted_calls() as calls:
        ours = model(tokens()).logits
    assert calls["aten::cos"] == 1  # rotated by the model again
    close("reference", ours, stock(tokens()).logits)


def test_frequencies_of_a_scaled_rope() -> None:
    """YaRN's attention factor and table reach the kernel, for each type of layer its own."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    yarn["original_max_position_embeddings"] = 32
    linear = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    for family, parameters in (
        ("llama", yarn),
        ("gemma3", {"full_attention": linear, "sliding_attention": yarn}),
    ):
        stock = build(family, rope_parameters=parameters)
        model = hf.use_kernels(copied(stock), fused_rotation=True)
        close(family, model(tokens()).logits, stock(tokens()).logits)


def test_models_of_one_process() -> None:
    """A model with fused rotation leaves stock models of its family alone."""
    stock = build("qwen2")
    before = stock(tokens()).logits
    hf.use_kernels(copied(stock), fused_rotation=True)(tokens())
    assert torch.equal(stock(tokens()).logits, before)
