"""Tokenizers and documents for the tests of training data."""

from __future__ import annotations

from itertools import pairwise

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from drope_kernels.recalibrate import Document, pack_documents

EOS, BOS = "<eos>", "<bos>"
TEXTS = ["One document.", "  \n", "Another, longer document: grün 🙂.\n", "", "Third"]


def byte_tokenizer(
    *,
    merges: tuple[tuple[str, str], ...] = (),
    more: int = 0,
    eos: bool = True,
    bos: bool = False,
):
    """One token per byte, 0 to 255, then EOS, then the merged pairs and `more` unused tokens.

    With `bos` another one, the last, begins every text, as Gemma's and Llama's tokenizers do it.
    """
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), EOS]
    words += ["".join(pair) for pair in merges] + [f"<unused{i}>" for i in range(more)]
    words += [BOS] * bos
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    first = BOS if bos else EOS  # EOS there is what training data must not get
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, vocabulary[first])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS if eos else None,
        bos_token=BOS if bos else None,
    )


def documents_of(*texts: str) -> list[Document]:
    return [Document(text, "memory", i) for i, text in enumerate(texts, start=1)]


def pack(folder, texts=TEXTS, tokenizer=None, **options):
    options = {"validation_share": 0.0} | options
    return pack_documents(documents_of(*texts), tokenizer or byte_tokenizer(), folder, **options)


def contents(packed, split="train"):
    """Token ids of each document of a split."""
    tokens, starts = packed.tokens(split).tolist(), packed.starts(split).tolist()
    return [tokens[begin:end] for begin, end in pairwise(starts)]


def ids_of(text, tokenizer):
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
