"""What `hf.use_kernels` makes of masks, keywords and caches, and what it refuses, by message."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from hf_models import WINDOW, build, copied, packed, padding, tokens
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache, masking_utils
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from drope_kernels import hf
from drope_kernels.hf.interface import attend
from drope_kernels.hf.masks import key_ranges
from drope_kernels.hf.ranges import KeyRanges


@pytest.fixture(scope="module")
def model() -> Any:
    return hf.use_kernels(build("llama"))


@pytest.fixture(scope="module")
def fused() -> Any:
    return hf.use_kernels(build("llama"), fused_rotation=True)


def dense(ranges: KeyRanges, batch: int) -> Tensor:
    """(B, Sq, Skv) of what `attention` sees with these ranges."""
    start = torch.as_tensor(ranges.q_start).expand(batch)
    query = (start[:, None] + torch.arange(ranges.q_length))[:, :, None]
    key = torch.arange(ranges.kv_length)
    seen = torch.ones(batch, ranges.q_length, ranges.kv_length, dtype=torch.bool)
    if ranges.causal:
        seen &= key <= query
    if ranges.window is not None:
        seen &= (key > query - ranges.window) & (key < query + ranges.window)
    if ranges.kv_start is not None:
        seen &= key >= ranges.kv_start[:, None, None]
    if ranges.kv_end is not None:
        seen &= key < ranges.kv_end[:, None, None]
    if ranges.cu_seqlens is not None:
        row = torch.arange(batch * ranges.q_length)
        sequence = torch.bucketize(row, ranges.cu_seqlens[1:-1], right=True)
        sequence = sequence.reshape(batch, -1)
        seen &= sequence[:, :, None] == sequence[:, None, :]
    return seen


def test_ranges_are_the_dense_mask() -> None:
    """Every combination of offset, static capacity, window and padding against `sdpa_mask`."""
    functions = {
        "causal": (masking_utils.causal_mask_function, None),
        "window": (masking_utils.sliding_window_causal_mask_function(WINDOW), WINDOW),
        "full": (masking_utils.bidirectional_mask_function, None),
        "both": (masking_utils.sliding_window_bidirectional_mask_function(WINDOW), WINDOW),
    }
    shapes = [(12, 12, 0, 0), (1, 12, 11, 0), (5, 12, 7, 0), (5, 20, 7, 0), (5, 11, 30, 24)]
    sides = [(0, 0), (4, 0), (0, 3), (2, 9), (12, 0)]
    for (name, (function, size)), shape, (left, right), is_tensor in itertools.product(
        functions.items(), shapes, sides, (False, True)
    ):
        q_length, kv_length, q_offset, kv_offset = shape
        mask = padding(3, q_offset + q_length, left=left, right=right).bool()
        arguments = {
            "batch_size": 3,
            "q_length": q_length,
            "kv_length": kv_length,
            "q_offset": torch.tensor(q_offset) if is_tensor else q_offset,
            "kv_offset": kv_offset,
            "mask_function": function,
            "attention_mask": mask if left or right else None,
            "local_size": size,
            "allow_is_causal_skip": False,
        }
        theirs = masking_utils.sdpa_mask(**arguments)[:, 0]
        assert torch.equal(dense(key_ranges(**arguments), 3), theirs), (name, shape, left, right)


@pytest.mark.parametrize("create", [create_causal_mask, create_sliding_window_causal_mask])
def test_packed_ranges_are_the_dense_mask(create: Any) -> None:
    config = build("mistral").config
    positions = packed([3, 9, 1, 6], [19, 0, 0, 0]) + 5
    arguments = {
        "config": config,
        "inputs_embeds": torch.empty(2, 19, 0),
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": positions,
    }
    config._attn_implementation = "sdpa"
    theirs = create(**arguments)[:, 0]
    config._attn_implementation = "drope_kernels"
    assert torch.equal(dense(create(**arguments), 2), theirs)


def test_plain_causal_looks_at_nothing(model: Any) -> None:
    ranges = key_ranges(2, 8, 8)
    assert (ranges.causal, ranges.q_start, ranges.window) == (True, 0, None)
    assert ranges.kv_start is ranges.kv_end is ranges.cu_seqlens is None
    whole = key_ranges(2, 8, 8, attention_mask=torch.ones(2, 8, dtype=torch.bool))
    assert whole.kv_start is whole.kv_end is None


def visible_to_first(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return key < 3


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("chunked_overlay", masking_utils.chunked_causal_mask_function(4, torch.zeros(1).long())),
        ("blockwise_overlay", masking_utils.blockwise_overlay(torch.zeros(1, 4))),
        ("or_masks", masking_utils.or_masks(masking_utils.causal_mask_function)),
        (
            "visible_to_first",
            masking_utils.and_masks(masking_utils.causal_mask_function, visible_to_first),
        ),
        ("without causal", masking_utils.sliding_window_overlay(4)),
    ],
)
def test_unknown_patterns_are_refused_by_name(name: str, function: Any) -> None:
    with pytest.raises(NotImplementedError, match=f"mask function .*{name}.*one interval of keys"):
        key_ranges(1, 4, 4, mask_function=function)


def test_packed_rows_of_a_caller_are_refused() -> None:
    """Their numbers may come back, or meet padding; transformers' own do neither."""
    function = masking_utils.and_masks(
        masking_utils.causal_mask_function,
        masking_utils.packed_sequence_mask_function(torch.tensor([[0, 1, 0, 1]])),
    )
    for arguments in ({"use_vmap": True}, {"attention_mask": torch.ones(1, 4) > 0}):
        with pytest.raises(NotImplementedError, match="packed_sequence_mask_function of a caller"):
            key_ranges(1, 4, 4, mask_function=function, **arguments)


def test_unknown_patterns_are_refused_while_compiling(model: Any) -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def overlaid(embeds: Tensor) -> Any:
        return create_causal_mask(
            model.config, embeds, padding().bool(), None, or_mask_function=visible_to_first
        )

    with pytest.raises(Exception, match=r"mask function (or|and)_masks"):
        overlaid(torch.empty(2, 19, 0))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="pass cu_seq_lens_q"):
        compiled(tokens(1), position_ids=packed([6, 13]), use_cache=False)


def test_refused_inputs(model: Any) -> None:
    ids, holes = tokens(), padding()
    holes[1, 7] = 0
    refused: list[tuple[str, dict[str, Any]]] = [
        ("attention_mask: .* one run", {"attention_mask": holes}),
        (
            r"attention_mask: .* a 2-D mask .* got a prepared one \(shape \(2, 1, 19, 19\)\)",
            {"attention_mask": torch.zeros(2, 1, 19, 19)},
        ),
        (
            r"output_attentions: .* True; attention weights are never formed",
            {"output_attentions": True},
        ),
        (r"head_mask: .* got shape \(4,\); masks of heads", {"head_mask": torch.ones(4)}),
        ("favourite: expected None, got 3; its meaning is not known", {"favourite": 3}),
        ("cu_seq_lens_q: .* one row .* got 2 rows", {"cu_seq_lens_q": torch.tensor([0, 19])}),
    ]
    for message, inputs in refused:
        with pytest.raises((NotImplementedError, ValueError), match=message):
            model(ids, **inputs)


def test_refused_keywords() -> None:
    module = torch.nn.Module()
    q = k = torch.ones(1, 2, 4, 8)
    causal = KeyRanges(4, 4, causal=True)
    refused: list[tuple[str, KeyRanges | None, dict[str, Any]]] = [
        ("dropout: expected 0, got 0.1", causal, {"dropout": 0.1}),
        (r"s_aux: .* got shape \(2,\); attention sinks", causal, {"s_aux": torch.ones(2)}),
        ("position_bias: .*; additive biases", causal, {"position_bias": torch.ones(1)}),
        ("cache: .*; paged caches", causal, {"cache": object()}),
        ("is_causal: expected True", causal, {"is_causal": False}),
        ("sliding_window: expected None as in", causal, {"sliding_window": 3}),
        ("sliding_window: expected None in a layer without a mask", None, {"sliding_window": 3}),
        ("attention_mask: .* 4 queries and 4 keys, got", KeyRanges(4, 5, causal=True), {}),
    ]
    for message, ranges, keywords in refused:
        with pytest.raises((NotImplementedError, ValueError), match=message):
            attend(module, q, k, k, ranges, **keywords)
    with pytest.raises(ValueError, match="4 queries and 2 keys, got None"):
        attend(module, q, k[:, :, :2], k[:, :, :2], None)


def test_keywords_of_the_call() -> None:
    """Scaling and softcap arrive; layers without a mask follow their module."""
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.is_causal = False
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    out, weights = attend(module, q, k, v, None, scaling=0.7, softcap=2.0, use_cache=True)
    scores = 2.0 * torch.tanh(0.7 * q @ k.mT / 2.0)
    assert weights is None
    torch.testing.assert_close(out, (scores.softmax(-1) @ v).transpose(1, 2))


def test_training_with_dropout_is_refused() -> None:
    model = hf.use_kernels(build("llama", attention_dropout=0.1))
    model(tokens())
    with pytest.raises(NotImplementedError, match=r"dropout: .*; set attention_dropout=0"):
        model.train()(tokens())


def test_refused_models() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match=r"backend: expected 'auto' or one of .* got 'abacus'"):
        hf.use_kernels(model, backend="abacus")
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(NotImplementedError, match="'dynamic', whose frequencies change"):
        hf.use_kernels(build("llama", rope_parameters=dynamic), fused_rotation=True)
    model.config.model_type = "another"
    with pytest.raises(NotImplementedError, match=r"expected one of gemma3_text, .* got another"):
        hf.use_kernels(model, fused_rotation=True)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_caches_are_not_exchanged(model: Any, fused: Any, kind: str) -> None:
    def empty() -> Any:
        if kind == "dynamic":
            return DynamicCache(config=model.config)
        return StaticCache(config=model.config, max_cache_len=40)

    ids, more = tokens(), tokens(seqlen=2)
    rotated = model(ids, past_key_values=empty()).past_key_values
    with pytest.raises(ValueError, match="got one that a model without fused_rotation=True filled"):
        fused(more, past_key_values=rotated)
    raw = fused(ids, past_key_values=empty()).past_key_values
    for other in (model, build("llama")):
        with pytest.raises(ValueError, match="a model with fused_rotation=True filled"):
            other(more, past_key_values=raw)
    assert fused(more, past_key_values=raw).logits.isfinite().all()
    raw = fused(ids, past_key_values=empty()).past_key_values
    with pytest.raises(ValueError, match=r"position_ids: |attention_mask: "):
        fused(more, past_key_values=raw, attention_mask=torch.tensor([[1, 0] * 10 + [1]] * 2))
    with pytest.raises(ValueError, match="a model with fused_rotation=True filled"):
        model(more, past_key_values=raw)  # closed after the error as well


def test_positions_behind_cached_keys(fused: Any) -> None:
    stock = build("llama")
    ids, positions = tokens(), torch.arange(19)[None] + 4
    for later, expected in ((23, True), (30, False)):
        both = []
        for x in (fused, stock):
            cache = x(ids, position_ids=positions, use_cache=True).past_key_values
            arguments = {"position_ids": torch.tensor([[later]]), "past_key_values": cache}
            if x is fused and not expected:
                with pytest.raises(ValueError, match="position_ids: expected consecutive"):
                    x(ids[:, :1], **arguments)
                return
            both.append(x(ids[:, :1], **arguments).logits)
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


def test_other_caches_are_refused(fused: Any) -> None:
    cache = QuantizedCache.__new__(QuantizedCache)
    with pytest.raises(
        NotImplementedError, match=r"DynamicCache or a StaticCache .* QuantizedCache"
    ):
        fused(tokens(), past_key_values=cache)


def test_any_positions_without_a_cache(fused: Any) -> None:
    """Positions that jump, with a mask so that transformers does not take them for packed rows."""
    positions = torch.tensor([[3 * i % 19 for i in range(19)]]).expand(2, -1)
    arguments = {"position_ids": positions, "attention_mask": padding(), "use_cache": False}
    ours, theirs = fused(tokens(), **arguments), build("llama")(tokens(), **arguments)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)


def test_original_is_untouched() -> None:
    stock = build("llama")
    before = stock(tokens()).logits
    hf.use_kernels(copied(stock))
    assert torch.equal(stock(tokens()).logits, before)
    assert stock.config._attn_implementation == "eager"


def test_the_package_does_without_transformers() -> None:
    code = "import sys; sys.modules['transformers'] = None; import drope_kernels"
    subprocess.run([sys.executable, "-c", code], check=True)
