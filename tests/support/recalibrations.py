"""A tiny model, a few texts, and command lines of `drope recalibrate` on them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from texts import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from drope_kernels.recalibrate import run as running

VOCABULARY, CONTEXT = 257, 32
START_SECONDS = 120  # for a child's imports on a busy machine
WATCHED = [
    *("--samples", "1 and", "--sample_steps", "5", "--sample_tokens", "4"),
    *("--length_sweep", "1", "2", "--sweep_steps", "5", "--sweep_windows", "2"),
    *("--eval_steps", "5"),
]


def llama(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 4 * CONTEXT,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 256,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def save(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    (byte_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return str(folder)


def write_start(folder):
    """`folder` with the model `model` and the texts `texts`."""
    save(folder / "model", llama())
    (folder / "texts").mkdir()
    sums = [f"{i} and {j} make {i + j}\n" for i in range(12) for j in range(i, i + 30)]
    (folder / "texts" / "a.txt").write_text("".join(sums[:20]))
    lines = [json.dumps({"text": "".join(sums[i : i + 3])}) for i in range(20, len(sums), 3)]
    (folder / "texts" / "lines.jsonl").write_text("\n".join(lines))
    return folder


def command(start, out, *more, steps="10"):
    return [
        *("recalibrate", "--model", str(start / "model"), "--data", str(start / "texts")),
        *("--output_dir", str(out), "--context_length", str(CONTEXT), "--batch_size", "4"),
        *("--steps", steps, "--learning_rate", "1e-3", "--log_steps", "2", "--cpu"),
        *("--validation_share", "0.25", *more),
    ]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def result(out):
    return json.loads((out / "result.json").read_text())


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, *, model, **_):
        if state.global_step == self.step:
            self.act(model)


def stop(model):
    raise KeyboardInterrupt


def poison(model):
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))


def at(monkeypatch, step, act):
    stock = running.observers
    monkeypatch.setattr(running, "observers", lambda *rest: [*stock(*rest), At(step, act)])
