"""Whether there is text enough for a run: found by a look at the documents, before they are packed.

The look tokenizes no more than it needs to see that there is, so it is short where there is plenty.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from drope_kernels.recalibrate.packed_folder import SPLITS, PackedFolder, Split
from drope_kernels.recalibrate.packing import Draw, pieces_of, spelled_eos
from drope_kernels.recalibrate.run_config import RunConfig
from drope_kernels.texts.documents import Document, split_files
from drope_kernels.texts.tokens import first_token

Counts = dict[Split, int]


class Need:
    """The tokens that a run needs of each split, and the settings that ask for them."""

    def __init__(
        self, config: RunConfig, context_length: int, vocabulary: int | None = None
    ) -> None:
        self.config, self.context_length = config, context_length
        self.vocabulary = vocabulary  # of the model; None: ids are not looked at
        row = context_length if config.eval_steps is not None else 0
        self.sweep = max(config.length_sweep, default=0) * context_length * config.sweep_windows
        self.tokens: Counts = {
            "train": config.batch_size * context_length,
            "validation": max(row, self.sweep),
        }

    def check_packed(self, folder: PackedFolder) -> None:
        """Of documents that are packed; raises as `check_documents`."""
        self._check({split: folder.num_tokens(split) for split in SPLITS})

    def check_documents(
        self,
        documents: Iterable[Document],
        validation_documents: Iterable[Document] | None,
        tokenizer: Any,
    ) -> None:
        """Of documents that are not packed yet.

        Raises:
            ValueError: too few tokens or documents, with the settings that ask for more; ids that
                the model has not; documents that cannot be read.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # packing reads the same again, and warns
            look = _Look(tokenizer, self)
            if validation_documents is not None:
                look.read(documents, lambda _: "train")
                look.read(validation_documents, lambda _: "validation")
            elif self.config.validation_share > 0:
                draw = Draw(self.config.seed, self.config.validation_share)
                look.read(documents, draw, least_documents=2)
                if look.num_documents < 2:
                    raise ValueError(
                        "validation_share: expected two documents or more, of which to hold one "
                        f"out, got {look.num_documents} that is not empty; name validation_data, "
                        "or set validation_share to 0"
                    )
            else:
                look.read(documents, lambda _: "train")
        self._check(look.tokens)

    def _check(self, found: Counts) -> None:
        config, length = self.config, self.context_length
        if found["train"] < self.tokens["train"]:
            raise ValueError(
                f"batch_size: expected at least batch_size x context_length = {config.batch_size} "
                f"x {length} = {self.tokens['train']} tokens to train on, got {found['train']}; "
                "give more data, or lower batch_size or context_length"
            )
        if found["validation"] >= self.tokens["validation"]:
            return
        more = "name validation_data"
        if not config.validation_data:
            more = f"raise validation_share={config.validation_share:g}, {more}"
        got = f"got {found['validation']}; give more data, {more}, or lower"
        if found["validation"] < self.sweep:
            raise ValueError(
                f"length_sweep: expected at least {max(config.length_sweep)} x context_length x "
                f"sweep_windows = {max(config.length_sweep)} x {length} x {config.sweep_windows} = "
                f"{self.sweep} held-out tokens, {got} one of the three"
            )
        raise ValueError(
            f"eval_steps: expected a row of context_length={length} held-out tokens, {got} "
            "context_length"
        )


def check_ids(what: str, ids: Sequence[int], vocabulary: int) -> None:
    """ValueError for an id that the model has no embedding for."""
    largest = max(ids, default=-1)
    if largest >= vocabulary:
        raise ValueError(
            f"tokenizer: expected ids below {vocabulary}, the model's vocabulary, got {largest} in "
            f"{what}; put the model's own tokenizer beside it"
        )


class _Look:
    """Counts tokens as packing would write them, until there are enough."""

    def __init__(self, tokenizer: Any, need: Need) -> None:
        self.tokenizer, self.least, self.vocabulary = tokenizer, need.tokens, need.vocabulary
        self.begins = need.config.bos and first_token(tokenizer) is not None
        self.tokens: Counts = dict.fromkeys(SPLITS, 0)
        self.mark = spelled_eos(tokenizer) if need.config.split_at_eos else None
        self.num_documents = 0

    def read(self, documents: Iterable[Document], split_of: Any, least_documents: int = 0) -> None:
        """Goes on until both splits have enough; a split that nothing is drawn for gets one."""
        drawn: dict[Split, int] = dict.fromkeys(SPLITS, 0)
        nearest = ""
        whole = split_files(documents, self.mark)
        for index, document in enumerate(x for x in whole if x.text.strip()):
            split = split_of(index)
            drawn[split] += 1
            self.num_documents += 1
            if isinstance(split_of, Draw) and split_of.nearest == index:
                nearest = document.text
            self._count(document.text, split)
            full = all(self.tokens[x] >= self.least[x] for x in SPLITS)
            if full and self.num_documents >= least_documents:
                return
        if nearest and drawn["validation"] == 0:
            self._count(nearest, "validation")

    def _count(self, text: str, split: Split) -> None:
        for piece in pieces_of(text):
            if self.tokens[split] >= self.least[split]:
                return
            ids = self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            self.tokens[split] += len(ids)
            if self.vocabulary is not None:
                check_ids("the text", ids, self.vocabulary)
        self.tokens[split] += 1 + self.begins  # EOS, BOS
