"""Tokenizers and documents for the tests of training data."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from drope_kernels.recalibrate import Document

EOS = "<eos>"


def byte_tokenizer(*, merges: tuple[tuple[str, str], ...] = (), more: int = 0, eos: bool = True):
    """One token per byte, 0 to 255, then EOS, then the merged pairs and `more` unused tokens."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), EOS]
    words += ["".join(pair) for pair in merges] + [f"<unused{i}>" for i in range(more)]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(  # what training data must not get
        single=f"{EOS} $A", special_tokens=[(EOS, vocabulary[EOS])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS if eos else None)


def documents_of(*texts: str) -> list[Document]:
    return [Document(text, "memory", i) for i, text in enumerate(texts, start=1)]
