"""`pack_documents`: documents to files of token ids, each tokenized once."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import PreTrainedTokenizerBase

from drope_kernels.build import build_info
from drope_kernels.recalibrate.overlap import WORTH_TELLING, share_seen
from drope_kernels.recalibrate.packed_folder import (
    FORMAT,
    SPLITS,
    PackedFolder,
    Split,
    SplitWriter,
    one_at_a_time,
    write_metadata,
    written_whole,
)
from drope_kernels.texts.documents import Document, Documents, split_files
from drope_kernels.texts.tokens import first_token

CHARACTERS_AT_ONCE = 1 << 20  # tokenizing takes some 140 bytes of memory for each
Progress = Callable[[int, int], None]


def pack_documents(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    validation_documents: Iterable[Document] | None = None,
    validation_share: float = 0.01,
    seed: int = 0,
    bos: bool = True,
    split_at_eos: bool = True,
    progress: Progress | None = None,
) -> PackedFolder:
    """Tokenizes documents into `folder`, or finds that it holds just these already.

    Each document begins with the BOS of a tokenizer that begins texts with it, ends with the
    tokenizer's EOS, and has no other special token that its text does not spell. Empty documents
    are left out and counted. A document of more than CHARACTERS_AT_ONCE is tokenized in pieces, cut
    at line breaks: tokens beside a cut may differ from those of the whole. The folder appears when
    it is whole; an interrupted call leaves nothing; of several calls at once one writes and the
    others wait, to find what it has made.

    Args:
        documents: of `read_documents`, or any others; only of the former it can be known whether a
            folder holds them.
        tokenizer: of transformers, with an EOS token.
        folder: where the files go; its parents are made.
        validation_documents: documents of the validation split, which is then not drawn.
        validation_share: share of documents in the validation split, drawn one by one from seed
            and number of the document; 0: none. Of two documents or more each split gets one.
        seed: of the draw.
        bos: False: no document begins with BOS, whatever the tokenizer does with other texts.
        split_at_eos: a text file is the documents between the EOS that it spells, each of them
            drawn by itself; False: it is one. Lines and rows are one document each always.
        progress: called now and then with the numbers of documents and of tokens so far.

    Raises:
        ValueError: a tokenizer without EOS, a folder that holds something else, documents that
            cannot be read, a split without documents.
        TypeError: another kind of tokenizer.
        OSError: the folder cannot be written.
    """
    target = Path(folder).absolute()
    request = _request(tokenizer, validation_documents, validation_share, seed, bos)
    request["split_at_eos"] = spelled_eos(tokenizer) if split_at_eos else None
    with nullcontext() if _is_filled(target) else one_at_a_time(target):
        if _is_filled(target):
            return _told(_reused(target, request, documents, validation_documents))
        packing = _Packing(tokenizer, request["bos_token_id"], request["split_at_eos"], progress)
        with written_whole(target) as partial:
            sources = [_record(one) for one in (documents, validation_documents)]
            with ExitStack() as files:
                for split in SPLITS:
                    writer = packing.writer(partial, split)
                    packing.writers[split] = files.enter_context(writer)
                if validation_documents is None:
                    packing.pack(documents, Draw(seed, validation_share))
                else:
                    packing.pack(documents, lambda _: "train")
                    packing.pack(validation_documents, lambda _: "validation")
            if validation_documents is None and validation_share > 0:
                packing.fill_empty_split(partial, seed)
            packing.check_splits(validation_share if validation_documents is None else None)
            both = documents, validation_documents
            metadata = {
                "format": FORMAT,
                "dtype": packing.dtype.str,
                **request,
                "documents": sources[0],
                "validation_documents": sources[1],
                **packing.counts(),
                "corrupt": sum(getattr(one, "num_corrupt", 0) for one in both),
                "versions": {
                    "drope_kernels": build_info()["version"],
                    "transformers": transformers.__version__,
                },
            }
            write_metadata(partial, metadata)
    return _told(PackedFolder.load(target))


def _told(packed: PackedFolder) -> PackedFolder:
    if packed.held_out_seen >= WORTH_TELLING:
        warnings.warn(
            f"{packed.path}: {packed.held_out_seen:.0%} of the held-out text is in the text to "
            "train on as well, so that its loss says little; hold out other text, or leave out "
            "what is there twice",
            stacklevel=3,
        )
    return packed


@dataclass
class _Packing:
    """One run over documents: the writers of the splits, and what was counted."""

    tokenizer: PreTrainedTokenizerBase
    bos: int | None
    mark: str | None  # between the documents of a text file
    progress: Progress | None
    writers: dict[Split, SplitWriter] = field(default_factory=dict)
    num_documents: int = 0  # those that are not empty
    num_empty: int = 0
    num_in_pieces: int = 0

    @property
    def eos(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if vocabulary_size(self.tokenizer) <= 1 << 16 else "<u4")

    def writer(self, folder: Path, split: Split) -> SplitWriter:
        return SplitWriter(folder, split, self.dtype, self.eos, self.bos)

    def pack(self, documents: Iterable[Document], split_of: Callable[[int], Split]) -> None:
        for batch in _batches(self._pieces(documents, split_of)):
            texts = [piece.text for piece in batch]
            rows = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            for piece, ids in zip(batch, rows, strict=True):
                writer = self.writers[piece.split]
                writer.write(ids)
                if piece.is_last and not writer.end_document():
                    self.num_empty += 1
            if self.progress is not None:
                written = self.writers.values()
                self.progress(
                    sum(writer.num_documents for writer in written),
                    sum(writer.num_tokens for writer in written),
                )

    def _pieces(
        self, documents: Iterable[Document], split_of: Callable[[int], Split]
    ) -> Iterator[_Piece]:
        for document in split_files(documents, self.mark):
            if not document.text.strip():
                self.num_empty += 1
                continue
            split = split_of(self.num_documents)
            self.num_documents += 1
            self.num_in_pieces += len(document.text) > CHARACTERS_AT_ONCE
            num_left = len(document.text)
            for text in pieces_of(document.text):
                num_left -= len(text)
                yield _Piece(text, split, num_left == 0)

    def fill_empty_split(self, folder: Path, seed: int) -> None:
        """Of a few documents, of which the draw left one split without any, it gets one.

        The one that was nearest to it; there are so few that they fit into memory.
        """
        documents = {split: writer.num_documents for split, writer in self.writers.items()}
        total = sum(documents.values())
        if total < 2 or all(documents.values()):
            return
        empty, full = sorted(SPLITS, key=lambda split: documents[split])
        nearest = min if empty == "validation" else max
        moved = nearest(range(total), key=Draw(seed, 0.0).number)
        rows = self.writers[full].read_documents()
        with ExitStack() as files:
            for split in SPLITS:
                writer = self.writer(folder, split)
                self.writers[split] = files.enter_context(writer)
            for index, row in enumerate(rows):
                writer = self.writers[empty if index == moved else full]
                writer.write(row)
                writer.end_document()

    def check_splits(self, validation_share: float | None) -> None:
        train, validation = (self.writers[split].num_documents for split in SPLITS)
        total = train + validation
        if total == 0:
            raise ValueError(f"documents: expected text, got {self.num_empty} empty documents")
        if validation_share != 0.0 and (train == 0 or validation == 0):
            problem = f"{train} documents for training and {validation} for validation"
            remedy = (
                "give more validation_documents"
                if validation_share is None
                else "give validation_documents, or set validation_share="
                f"{validation_share:g} to 0 for no validation"
            )
            raise ValueError(f"documents: expected some in each split, got {problem}; {remedy}")

    def counts(self) -> dict[str, Any]:
        return {
            "splits": {split: writer.counts() for split, writer in self.writers.items()},
            "held_out_seen": share_seen(
                self.writers["validation"].written(), self.writers["train"].written()
            ),
            "empty": self.num_empty,
            "in_pieces": self.num_in_pieces,
        }


@dataclass(frozen=True)
class _Piece:
    text: str
    split: Split
    is_last: bool  # of its document


def pieces_of(text: str) -> Iterator[str]:
    """The text in parts of at most CHARACTERS_AT_ONCE."""
    start = 0
    while start < len(text):
        end = _piece_end(text, start)
        yield text[start:end]
        start = end


def _piece_end(text: str, start: int) -> int:
    """Where a piece that begins at `start` ends: behind a line break, else before a space."""
    end = start + CHARACTERS_AT_ONCE
    if end >= len(text):
        return len(text)
    behind_line = text.rfind("\n", start, end) + 1
    if behind_line > 0:
        return behind_line
    space = text.rfind(" ", start + 1, end)
    return space if space > 0 else end


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for piece in pieces:
        if batch and characters + len(piece.text) > CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
        batch.append(piece)
        characters += len(piece.text)
    if batch:
        yield batch


class Draw:
    """Which split a document is in, by seed and number, whatever documents there are besides."""

    def __init__(self, seed: int, validation_share: float) -> None:
        self.seed, self.validation_share = seed, validation_share
        self.nearest, self._least = -1, 1.0  # the document with the least number so far

    def __call__(self, index: int) -> Split:
        number = self.number(index)
        if number < self._least:
            self.nearest, self._least = index, number
        return "validation" if number < self.validation_share else "train"

    def number(self, index: int) -> float:
        """In [0, 1); held out are those below the share."""
        digest = hashlib.blake2b(f"{self.seed} {index}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2.0**64


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id + 1; a vocabulary may have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def spelled_eos(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """EOS as a text may spell it, if the tokenizer then reads it as EOS."""
    text = str(tokenizer.eos_token)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return text if ids == [tokenizer.eos_token_id] else None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides which ids a text gets."""
    rules: dict[str, Any] = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    if tokenizer.is_fast:
        rules |= json.loads(tokenizer.backend_tokenizer.to_str())
        rules |= {"truncation": None, "padding": None}  # of the latest call
    content = json.dumps([rules, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _request(
    tokenizer: PreTrainedTokenizerBase,
    validation_documents: Iterable[Document] | None,
    validation_share: float,
    seed: int,
    bos: bool,
) -> dict[str, Any]:
    """The settings, checked: with the documents they decide what the folder holds."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"tokenizer: expected one of transformers, got {type(tokenizer).__name__}; wrap one of "
            "the package tokenizers in PreTrainedTokenizerFast(tokenizer_object=...)"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer: expected one with an EOS token, which marks where documents end, got none; "
            "set tokenizer.eos_token to the token that the model ends texts with"
        )
    if not 0.0 <= validation_share < 1.0:
        raise ValueError(f"validation_share: expected a number in [0, 1), got {validation_share}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed: expected an int, got {seed!r}")
    drawn = validation_documents is None and validation_share > 0
    begins_with = first_token(tokenizer)
    if begins_with is not None and not bos:
        warnings.warn(
            f"bos: the tokenizer begins every text with {tokenizer.bos_token!r}, as samples and "
            "evaluation do; documents to train on will not begin so",
            stacklevel=3,
        )
    return {
        "tokenizer": {
            "name": str(tokenizer.name_or_path),
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "vocabulary_size": vocabulary_size(tokenizer),
            "eos_token_id": int(tokenizer.eos_token_id),
        },
        "validation_share": validation_share if drawn else 0.0,
        "seed": seed if drawn else None,
        "bos_token_id": begins_with if bos else None,
    }


def _is_filled(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def _record(documents: Iterable[Document] | None) -> dict[str, Any] | None:
    return documents.record() if isinstance(documents, Documents) else None


def _reused(
    folder: Path,
    request: Mapping[str, Any],
    documents: Iterable[Document],
    validation_documents: Iterable[Document] | None,
) -> PackedFolder:
    """What the folder holds, if it was packed from the same things."""
    packed = PackedFolder.load(folder)
    saved = packed.metadata
    settings = ("validation_share", "seed", "bos_token_id", "split_at_eos")
    others = [name for name in settings if saved.get(name) != request[name]]
    if saved["tokenizer"]["fingerprint"] != request["tokenizer"]["fingerprint"]:
        others.append("tokenizer")
    for name, given in (
        ("documents", documents),
        ("validation_documents", validation_documents),
    ):
        if not _same(given, saved[name]):
            others.append(name)
    if others:
        raise ValueError(
            f"{folder}: expected no files there, or those of the same call, got a folder packed "
            f"with different {', '.join(others)}; choose another folder, delete this one, or use "
            "it as it is with PackedFolder.load"
        )
    return packed


def _same(documents: Iterable[Document] | None, record: Mapping[str, Any] | None) -> bool:
    if isinstance(documents, Documents):
        return record is not None and documents.are_those_of(record)
    return documents is None and record is None
