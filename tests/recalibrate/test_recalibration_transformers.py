"""`recalibrate` on transformers models: memory and speed switches, what it leaves as it was."""

from __future__ import annotations

import functools
import json
import sys

import pytest
import torch
import transformers
from hf_models import FAMILIES, VOCABULARY, build
from resumed_runs import tiny_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from texts import byte_tokenizer, documents_of
from training import CONTEXT, VOCAB, config, counting_rows, parameters_of, tiny_decoder, tiny_llama

from drope_kernels.hf import drop_positions, use_kernels
from drope_kernels.nn.loss import causal_lm_loss
from drope_kernels.recalibrate import PackedRows, TokenRows, pack_documents, recalibrate


def losses_of(result):
    return [entry["loss"] for entry in result.history if "loss" in entry]


def is_checkpointing(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def hooks_of(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def random_rows(rows=16):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (rows, CONTEXT), generator=generator)
    return TokenRows(ids, None, torch.rand(rows, CONTEXT, generator=generator) ** 2)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Rows of CONTEXT tokens with several documents each."""
    folder = tmp_path_factory.mktemp("texts") / "packed"
    texts = [("to be or not to be " * 3)[i : 7 + 2 * i] for i in range(14)]
    pack_documents(documents_of(*texts), byte_tokenizer(), folder, validation_share=0)
    return PackedRows(folder, CONTEXT)


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_memory_changes_nothing(family):
    """Losses and gradient norms of a dropped model, step by step; stock and with our kernels."""
    found = []
    for saving in ({}, {"loss_chunk": 5, "activation_checkpointing": True}):
        model = drop_positions(build(family))
        if saving:
            use_kernels(model)
        result = recalibrate(model, random_rows(), config(steps=3, log_steps=1, **saving))
        found.append([(entry["loss"], entry["grad_norm"]) for entry in result.history[:3]])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_recomputes():
    """Each layer runs twice a step, once without it."""
    counts = []
    for switch in (False, True):
        model, calls = tiny_llama(), []
        norm = model.model.layers[0].input_layernorm
        norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        recalibrate(model, counting_rows(), config(steps=2, activation_checkpointing=switch))
        counts.append(len(calls))
    assert counts == [2, 4]


def test_chunks_bound_the_logits():
    model, seen = tiny_llama(), []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    recalibrate(model, counting_rows(), config(steps=2, loss_chunk=5))
    assert max(seen[2:]) == 5  # the first two are of the check that the head is only a head


@pytest.mark.parametrize("saving", [{}, {"loss_chunk": 5, "activation_checkpointing": True}])
def test_compiled_steps_are_the_same(monkeypatch, packed, saving):
    """Without breaks, on packed rows of ever other document bounds; the backend is swift."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    results = []
    for switch in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = use_kernels(drop_positions(tiny_model(packed.largest_token + 1)))
        settings = config(batch_size=2, steps=4, log_steps=1, compile=switch, **saving)
        results.append(losses_of(recalibrate(model, packed, settings)))
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    stats = torch._dynamo.utils.counters
    assert 1 <= stats["stats"]["unique_graphs"] <= 2  # the second: any number of documents
    assert not stats["graph_break"]


@pytest.mark.slow  # inductor compiles C++
def test_compiled_by_inductor(packed):
    results = []
    for switch in (False, True):
        torch._dynamo.reset()
        model = use_kernels(drop_positions(tiny_model(packed.largest_token + 1)))
        settings = config(batch_size=2, steps=3, log_steps=1, bf16=True, compile=switch)
        results.append(losses_of(recalibrate(model, packed, settings)))
    assert results[0] == pytest.approx(results[1], rel=1e-3)


def test_flat_batches_train_as_rows_do(packed):
    """Several documents in one row of all rows, or a mask of transformers' eager attention."""
    results = []
    for flatten in (True, False):
        rows = PackedRows(packed.folder, CONTEXT, flatten=flatten)
        model = tiny_model(packed.largest_token + 1)
        model = use_kernels(model) if flatten else model
        model.set_attn_implementation("drope_kernels" if flatten else "eager")
        settings = config(batch_size=2, gradient_accumulation=3, steps=4, log_steps=1)
        results.append(losses_of(recalibrate(model, rows, settings)))
    assert results[0] == pytest.approx(results[1], rel=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_the_model_as_it_was(tmp_path, fails):
    """Forward, cache, checkpointing, gradients of the teacher's kind: also after a failure."""
    model = tiny_llama()
    attributes, hooks = set(model.__dict__), hooks_of(model)
    settings = {"bf16": True, "activation_checkpointing": True, "loss_chunk": 5, "save_steps": 2}

    class Failure(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            assert model(counting_rows().input_ids[:1]).logits.shape == (1, CONTEXT, VOCAB)
            if fails and state.global_step == 2:
                raise KeyboardInterrupt

    run = functools.partial(
        recalibrate,
        model,
        counting_rows(),
        config(steps=2, output_dir=str(tmp_path), **settings),
        callbacks=[Failure()],
    )
    if fails:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
        saved = json.loads((tmp_path / "checkpoint-2" / "config.json").read_text())
        assert saved["use_cache"] is True
    assert set(model.__dict__) - {"_require_grads_hooks"} == attributes  # of transformers, empty
    assert hooks_of(model) == hooks
    assert model.config.use_cache is True
    assert not model.training
    assert not is_checkpointing(model)
    assert model.generate(counting_rows().input_ids[:1, :4], max_new_tokens=3).shape[1] <= 7


def test_a_control_with_positions_is_the_same_call():
    model = tiny_llama()
    before = parameters_of(model)
    result = recalibrate(model, counting_rows(), config(steps=30))
    assert losses_of(result)[-1] < 0.7 * losses_of(result)[0]
    assert getattr(model.config, "drope", None) is None
    assert any(not torch.equal(value, before[n]) for n, value in parameters_of(model).items())


def test_tokens_are_logged():
    settings = config(steps=20, gradient_accumulation=2, log_steps=5)
    history = recalibrate(tiny_llama(), counting_rows(), settings).history
    entries = [entry for entry in history if "loss" in entry]
    assert [entry["tokens"] for entry in entries] == [n * 2 * 8 * CONTEXT for n in (5, 10, 15, 20)]
    assert all(entry["tokens_per_second"] > 0 for entry in entries)


@pytest.mark.parametrize("flatten", [True, False])
def test_every_held_out_target_counts_alike(flatten, packed):
    """Also those of a last batch that is short."""
    rows = PackedRows(packed.folder, CONTEXT, flatten=flatten)
    size = 5
    assert len(rows) % size
    model = use_kernels(tiny_model(257))
    result = recalibrate(
        model, rows, config(steps=1, batch_size=size, eval_steps=1), eval_data=rows
    )
    total = targets = 0
    for row in (rows[index] for index in range(len(rows))):
        ids, labels, positions = (row[x][None] for x in ("input_ids", "labels", "position_ids"))
        with torch.no_grad():
            logits = model(ids, position_ids=positions, use_cache=False).logits
        total += causal_lm_loss(logits, labels, None, 1.0)
        targets += int((labels != -100).sum())
    (found,) = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert found == pytest.approx(float(total) / targets, rel=1e-5)


def test_tensorboard(tmp_path):
    """Steps that a stopped run took beyond its checkpoint are written once."""
    settings = {"steps": 6, "save_steps": 2, "log_steps": 1, "tensorboard": True, "resume": True}

    class Stop(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    run = config(output_dir=str(tmp_path), **settings)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(tiny_decoder(), counting_rows(), run, callbacks=[Stop()])
    result = recalibrate(tiny_decoder(), counting_rows(), run)
    events = EventAccumulator(str(tmp_path / "runs")).Reload()
    assert {"loss", "learning_rate", "grad_norm", "tokens"} <= set(events.Tags()["scalars"])
    scalars = events.Scalars("loss")
    assert [scalar.step for scalar in scalars] == list(range(1, 7))
    assert [scalar.value for scalar in scalars] == pytest.approx(losses_of(result))


def test_tensorboard_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    settings = config(tensorboard=True, output_dir=str(tmp_path))
    with pytest.raises(ImportError, match="pip install tensorboard"):
        recalibrate(tiny_llama(), counting_rows(), settings)
    assert list(tmp_path.iterdir()) == []


def test_a_context_beyond_the_positions_is_refused():
    """Unless no layer has positions any more."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT - 1,
        )
    )
    message = r"context_length: expected at most 15 tokens, the max_position_embeddings .* got 16"
    with pytest.raises(ValueError, match=message):
        recalibrate(model, counting_rows(), config())
    with pytest.raises(ValueError, match=message):
        recalibrate(drop_positions(model, layers=[0]), counting_rows(), config())
    recalibrate(drop_positions(model), counting_rows(), config(steps=1))


def test_tokens_that_the_model_has_not(packed):
    ids = counting_rows().input_ids
    strange = ids.masked_fill(ids == 5, VOCAB)
    for data, message in (
        (TokenRows(strange), r"data\[\d+\]: expected input_ids below 24.* got 24; tokenise with"),
        (TokenRows(ids, strange), r"data\[\d+\]: expected labels below 24.* got 24"),
        (packed, "data: expected input_ids below 24, the model's vocabulary, got 256"),
    ):
        with pytest.raises(ValueError, match=message):
            recalibrate(tiny_llama(), data, config(batch_size=2))
    settings = config(eval_steps=1)
    with pytest.raises(ValueError, match=r"eval_data\[\d+\]: expected input_ids below 24"):
        recalibrate(tiny_llama(), counting_rows(), settings, eval_data=TokenRows(strange))


def test_what_only_transformers_models_can_do(packed):
    decoder = tiny_decoder(vocab_size=packed.largest_token + 1)
    with pytest.raises(ValueError, match="got position_ids as well"):
        recalibrate(decoder, packed, config(batch_size=2))
    with pytest.raises(ValueError, match="activation_checkpointing: expected False for a Decoder"):
        recalibrate(decoder, counting_rows(), config(activation_checkpointing=True))
