"""generate of transformers on these kernels against its sdpa: prompts of two lengths, 32 tokens."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import pytest
import torch

from drope_kernels import hf

from .cases import DTYPES
from .measure import torch_threads
from .timing import Samples, clock_for, interleave

NEW_TOKENS = 32
CONTENDERS = ("drope_kernels", "sdpa")


@dataclass(frozen=True)
class GenerateCase:
    dtype: str
    prompt: int
    threads: int = 1

    @property
    def name(self) -> str:
        return f"generate-{self.dtype}-prompt{self.prompt}-new{NEW_TOKENS}"


@dataclass(frozen=True)
class MeasuredGenerate:
    case: GenerateCase
    worst_error: float
    samples: dict[str, Samples]

    def row(self, name: str) -> dict[str, object]:
        samples = self.samples[name]
        return {
            "case": self.case.name,
            "contender": name,
            "median_ms": samples.median * 1e3,
            "spread": samples.spread,
            "rounds": len(samples.seconds),
            "tokens_per_second": NEW_TOKENS / samples.median,
            "gflops": None,
            "peak_fraction": None,
            "speedup_of_drope": samples.over(self.samples["drope_kernels"]),
            "peak_extra_mib": None,
            "worst_error": self.worst_error if name == "drope_kernels" else None,
        }


def models(case: GenerateCase) -> dict[str, torch.nn.Module]:
    """A small Llama with grouped heads on both attentions, and in float32 what they should say."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        attn_implementation="sdpa",
        eos_token_id=None,
        pad_token_id=0,
    )
    exact = LlamaForCausalLM(config).eval()
    sdpa = copy.deepcopy(exact).to(DTYPES[case.dtype])
    ours = copy.deepcopy(sdpa)
    hf.use_kernels(ours)
    return {"drope_kernels": ours, "sdpa": sdpa, "exact": exact}


@torch.inference_mode()
def check_gate(case: GenerateCase, of: dict[str, torch.nn.Module], ids: torch.Tensor) -> float:
    """Largest error of our logits; AssertionError if they are further off than sdpa's explain."""
    logits = {name: model(ids).logits[:, -1].float() for name, model in of.items()}
    errors = {name: (logits[name] - logits["exact"]).abs().max().item() for name in CONTENDERS}
    limit = 2 * errors["sdpa"] + 1e-5
    assert errors["drope_kernels"] <= limit, f"{case.name}: {errors}, expected at most {limit}"
    return errors["drope_kernels"]


@functools.cache
def measure_generate(case: GenerateCase) -> MeasuredGenerate:
    of = models(case)
    ids = torch.randint(1, 4096, (1, case.prompt), generator=torch.Generator().manual_seed(1))

    def run(name: str) -> object:
        return of[name].generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)

    with torch_threads(case.threads):
        worst_error = check_gate(case, of, ids)
        runs = {name: functools.partial(run, name) for name in CONTENDERS}
        samples = interleave(runs, clock=clock_for(case.threads), budget=12.0)
    return MeasuredGenerate(case, worst_error, samples)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(
    "case",
    [GenerateCase(dtype, prompt) for dtype in ("fp32", "bf16") for prompt in (128, 2048)],
    ids=lambda case: case.name,
)
def test_generate(case, contender, replay):
    measured = measure_generate(case)
    replay(measured.row(contender), measured.samples[contender])
