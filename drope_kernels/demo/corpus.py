"""The text that ships with the package: Python's documentation, split by document, and its BPE.

No download: `texts/` holds the archive, the tokenizer, the licence and how they were made.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

import torch
from tokenizers import Tokenizer
from torch import Tensor

from drope_kernels.evaluate.needle import NeedleTask, TokenIds


@dataclass(frozen=True)
class Corpus:
    """Token ids of both splits. Documents follow each other; none is in both splits."""

    train: Tensor  # (T,) int64
    held_out: Tensor  # (H,) int64
    names: tuple[TokenIds, ...]  # the tokens <name00>.. , never in the text
    values: tuple[TokenIds, ...]  # the tokens <value00>..
    newline: int
    text_vocab_size: int  # ids below it occur in text
    vocab_size: int  # with names and values

    def needle_task(self, num_needles: int) -> NeedleTask:
        """Lines `\\nNAME VALUE\\n` of four tokens."""
        line_end = (self.newline,)
        return NeedleTask(num_needles, self.names, self.values, before=line_end, after=line_end)


def load_corpus(on_document: Callable[[int, int], None] | None = None) -> Corpus:
    """Reads and tokenizes the shipped text, about 3 s; on_document(done, total) reports it."""
    texts = files("drope_kernels.demo") / "texts"
    tokenizer = Tokenizer.from_str((texts / "tokenizer.json").read_text(encoding="utf-8"))
    splits: dict[str, list[int]] = {"train": [], "held_out": []}
    with (
        (texts / "python_docs.tar.xz").open("rb") as packed,
        tarfile.open(fileobj=packed, mode="r:xz") as archive,
    ):
        members = archive.getmembers()
        for done, member in enumerate(members, start=1):
            content = archive.extractfile(member)
            if content is None:
                raise ValueError(f"{member.name}: expected a regular file in the text archive")
            text = content.read().decode("utf-8")
            splits[member.name.split("/", 1)[0]].extend(tokenizer.encode(text).ids)
            if on_document is not None:
                on_document(done, len(members))
    vocabulary = tokenizer.get_vocab()
    names = tuple((vocabulary[word],) for word in sorted(vocabulary) if word.startswith("<name"))
    values = tuple((vocabulary[word],) for word in sorted(vocabulary) if word.startswith("<value"))
    return Corpus(
        train=torch.tensor(splits["train"]),
        held_out=torch.tensor(splits["held_out"]),
        names=names,
        values=values,
        newline=vocabulary["Ċ"],  # byte-level BPE's letter for "\n"
        text_vocab_size=len(vocabulary) - len(names) - len(values),
        vocab_size=len(vocabulary),
    )
