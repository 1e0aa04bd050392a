"""Learning from a frozen teacher: the loss, its chunks, its place in the trainer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from hf_models import build
from training import CONTEXT, VOCAB, config, counting_rows, parameters_of, tiny_decoder, tiny_llama

from drope_kernels.hf import drop_positions, use_kernels
from drope_kernels.nn.loss import distillation_loss
from drope_kernels.recalibrate import TokenRows, recalibrate

W, T = 0.3, 2.5


def plain_losses(student, teacher, labels, weights):
    """Weighted sums over all rows and targets of (1 - w) CE + w T^2 KL, one target at a time."""
    total = torch.zeros((), dtype=torch.float64)
    ce = kl = total
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            target, weight = labels[row, t + 1], weights[row, t + 1].double()
            if target == -100:
                continue
            p = (teacher[row, t].double() / T).softmax(0)
            log_q = (student[row, t].double() / T).log_softmax(0)
            kl = kl + weight * (p * (p.log() - log_q)).sum()
            ce = ce - weight * student[row, t].double().log_softmax(0)[target]
    return ce, kl


def inputs(seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (6, CONTEXT), generator=generator)
    labels = ids.masked_fill(torch.rand(6, CONTEXT, generator=generator) < 0.3, -100)
    return ids, labels, torch.rand(6, CONTEXT, generator=generator) ** 3


@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
def test_the_loss_is_the_definition(chunk):
    """With gradients for the student's states and head, none for the teacher's."""
    _, labels, weights = inputs()
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(6, CONTEXT, 8, generator=generator, requires_grad=True)
    others = torch.randn(6, CONTEXT, 12, generator=generator, requires_grad=True)
    head = torch.randn(VOCAB, 8, generator=generator, requires_grad=True)
    other_head = torch.randn(VOCAB, 12, generator=generator, requires_grad=True)

    ce, kl = distillation_loss(
        lambda x: F.linear(x, head),
        hidden,
        lambda x: F.linear(x, other_head),
        others,
        labels,
        weights,
        torch.tensor(7.0),
        temperature=T,
        chunk=chunk,
    )
    found = torch.autograd.grad((1 - W) * ce + W * T**2 * kl, [hidden, head], retain_graph=True)
    reference = plain_losses(
        F.linear(hidden, head), F.linear(others, other_head).detach(), labels, weights
    )
    wanted = (1 - W) * reference[0] / 7 + W * T**2 * reference[1] / 7
    torch.testing.assert_close(ce, reference[0].float() / 7)
    torch.testing.assert_close(kl, reference[1].float() / 7)
    for gradient, expected in zip(found, torch.autograd.grad(wanted, [hidden, head]), strict=True):
        torch.testing.assert_close(gradient, expected)
    assert torch.autograd.grad(kl, [others, other_head], allow_unused=True) == (None, None)


def test_logits_of_the_whole_batch_never_exist():
    """Neither model's head sees more than a chunk, not in backward either."""
    seen = []
    hidden = torch.randn(2, 32, 4, requires_grad=True)

    def head(states):
        seen.append(states.shape[1])
        return states @ torch.ones(4, VOCAB)

    labels = torch.zeros(2, 32, dtype=torch.long)
    ce, kl = distillation_loss(head, hidden, head, hidden.detach(), labels, chunk=8)
    (ce + kl).backward()
    assert set(seen) == {8}
    assert len(seen) == 2 * 2 * 4  # forward and backward, student and teacher, four chunks


@pytest.mark.parametrize("build", [tiny_decoder, tiny_llama])
@pytest.mark.parametrize("loss_chunk", [None, 5])
def test_one_step_learns_from_both(build, loss_chunk):
    """The trainer's gradient over unequal micro-batches is that of the definition."""
    ids, labels, weights = inputs()
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    teacher, by_hand = build(), copy.deepcopy(model)
    frozen = parameters_of(teacher)
    ce, kl = plain_losses(by_hand(ids).logits, teacher(ids).logits.detach(), labels, weights)
    divisor = (weights * (labels != -100))[:, 1:].sum()
    ((1 - W) * ce / divisor + W * T**2 * kl / divisor).backward()

    seen = {}

    class Recorder(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, *, model, **kwargs):
            seen.update({name: p.grad.clone() for name, p in model.named_parameters()})

    settings = config(
        batch_size=2,
        gradient_accumulation=3,
        steps=1,
        log_steps=1,
        max_grad_norm=0.0,
        distillation=W,
        distillation_temperature=T,
        loss_chunk=loss_chunk,
    )
    result = recalibrate(
        model,
        TokenRows(ids, labels, weights),
        settings,
        teacher=teacher,
        callbacks=[Recorder()],
    )
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
    entry = result.history[0]
    assert entry["ce"] == pytest.approx((ce / divisor).item(), rel=1e-5)
    assert entry["kl"] == pytest.approx((kl / divisor).item(), rel=1e-5)
    assert entry["loss"] == pytest.approx((1 - W) * entry["ce"] + W * T**2 * entry["kl"], rel=1e-5)
    for name, value in parameters_of(teacher).items():
        assert torch.equal(value, frozen[name])
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_dropped_model_comes_closer_to_its_teacher():
    """From the RoPE model it was; what is logged is a mean over the steps since the last entry."""
    model = tiny_llama()
    recalibrate(model, counting_rows(), config(steps=30))
    teacher = copy.deepcopy(model)
    use_kernels(drop_positions(model))
    settings = config(steps=40, distillation=1.0, bf16=True, eval_steps=40)
    result = recalibrate(
        model, counting_rows(), settings, teacher=teacher, eval_data=counting_rows(seed=5)
    )
    entries = [entry for entry in result.history if "kl" in entry]
    assert len(entries) == 4
    assert entries[-1]["kl"] < 0.3 * entries[0]["kl"]
    assert all(entry["loss"] == pytest.approx(entry["kl"], rel=1e-4) for entry in entries)
    ids = counting_rows(seed=5).input_ids
    with torch.no_grad():
        loss = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    evaluation = next(entry for entry in result.history if "eval_loss" in entry)
    assert evaluation["eval_loss"] == pytest.approx(float(loss), rel=0.02)  # no teacher in it


def test_the_cap_on_gemmas_logits_is_kept():
    """Chunks and teachers see capped logits, as the model's own forward makes them."""
    losses = []
    for cap, chunk in ((None, None), (0.5, None), (0.5, 5)):
        model = build("gemma3", final_logit_softcapping=cap)
        rows = TokenRows(torch.arange(8 * CONTEXT).view(8, CONTEXT) % VOCAB)
        result = recalibrate(model, rows, config(steps=2, log_steps=1, loss_chunk=chunk))
        losses.append([entry["loss"] for entry in result.history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)


def test_a_head_that_does_more_is_refused():
    """A model that scales its logits would be trained on others."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = transformers.GraniteForCausalLM(
        transformers.GraniteConfig(vocab_size=VOCAB, logits_scaling=4.0, **sizes, **heads)
    )
    with pytest.raises(
        ValueError, match=r"loss_chunk: expected a model whose logits are .* Granite"
    ):
        recalibrate(model, counting_rows(), config(loss_chunk=4))
    recalibrate(model, counting_rows(), config(steps=1))


def test_bad_teachers():
    model = tiny_llama()
    wider = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB + 1,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    for teacher, weight, message in (
        (None, 0.5, "teacher: expected a model exactly if config.distillation > 0, got None"),
        (tiny_llama(), 0.0, "got LlamaForCausalLM with distillation=0"),
        (model, 0.5, r"teacher: expected a model with weights of its own.* copy\.deepcopy"),
        (wider, 0.5, "teacher: expected the model's vocabulary of 24 tokens, got 25"),
    ):
        with pytest.raises(ValueError, match=message):
            recalibrate(model, counting_rows(), config(distillation=weight), teacher=teacher)
    with pytest.raises(ValueError, match=r"distillation: expected a number in \[0, 1\]"):
        config(distillation=1.5)
