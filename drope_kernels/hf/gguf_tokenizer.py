"""The tokenizer in a GGUF file, split as llama.cpp splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from drope_kernels.hf.gguf_file import field, opened

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
_DIGITS = r"\p{N}"
# tokenizer.ggml.pre: what words are, before pairs merge; None: as in GPT-2.
_WORDS: dict[str, str | None] = {
    "gpt-2": None,
    "smollm": _DIGITS,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


def load_gguf_tokenizer(source: str | Path) -> Any:
    """The tokenizer in a GGUF file, with the special tokens that the file names.

    transformers reads the vocabularies of sentencepiece; byte-level ones are built here, since it
    does not know every way to split text.

    Raises:
        ModuleNotFoundError: the package `gguf` is not installed.
        FileNotFoundError: no such file.
        ValueError: the file has no tokenizer, or is no GGUF file.
        NotImplementedError: a kind of tokenizer, or a way to split text, that is not known here.
    """
    path, reader = opened(source)
    tokens: list[str] | None = field(reader, "tokenizer.ggml.tokens")
    if tokens is None:
        raise ValueError(
            f"{path}: expected a tokenizer in the GGUF file, got none; convert the model with its "
            "tokenizer, or name a tokenizer of its own"
        )
    model = field(reader, "tokenizer.ggml.model")
    split = field(reader, "tokenizer.ggml.pre")
    if model == "llama":
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True
        )
        begins = True
    elif model == "gpt2":
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_byte_level(path, reader, tokens, split),
            clean_up_tokenization_spaces=False,  # in transformers 4, decoding would lose spaces
        )
        tokenizer.chat_template = field(reader, "tokenizer.chat_template")
        begins = _WORDS[split] is _LLAMA3
    else:
        raise NotImplementedError(
            f"{path}: expected a byte-level or sentencepiece tokenizer ('gpt2', 'llama'), got "
            f"{model!r}; load the original checkpoint's tokenizer instead"
        )
    for name, key in _SPECIAL_TOKENS.items():
        token_id = field(reader, f"tokenizer.ggml.{key}")
        setattr(tokenizer, name, None if token_id is None else tokens[token_id])
    stated = field(reader, "tokenizer.ggml.add_bos_token")
    if begins if stated is None else stated:
        _begin_sequences(tokenizer)
    return tokenizer


def _byte_level(path: Path, reader: Any, tokens: list[str], split: str | None) -> Tokenizer:
    if split not in _WORDS:
        raise NotImplementedError(
            f"{path}: expected text split as one of {', '.join(_WORDS)}, got {split!r} "
            "(tokenizer.ggml.pre); load the original checkpoint's tokenizer instead"
        )
    words = _WORDS[split]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(pair.split(" ")) for pair in field(reader, "tokenizer.ggml.merges")],
            ignore_merges=words is _LLAMA3,
        )
    )
    # Between the digits, where they are split off, words are those of GPT-2.
    as_gpt2 = words in (None, _DIGITS)
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=as_gpt2)]
    if words is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(words), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, field(reader, "tokenizer.ggml.token_type") or [], strict=False):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return tokenizer


def _begin_sequences(tokenizer: Any) -> None:
    """Puts the BOS token before what is encoded."""
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.bos_token_id)],
    )
