"""Texts that a model in training writes, and its held-out loss at several lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from drope_kernels.recalibrate.callbacks import TensorBoard
from drope_kernels.recalibrate.objective import Targets
from drope_kernels.recalibrate.records import StepRecords

_LOSS_CHUNK = 1024  # positions whose logits exist at once


class Observer(TrainerCallback):
    """Looks at the model every `every` steps and after the last, and writes down what it saw.

    Every process looks, because a sharded model answers only if all ask; the first one writes.
    Nothing is drawn at random: a run goes on as if nobody had looked.
    """

    board: TensorBoard | None = None  # takes what was seen too

    def __init__(self, records: StepRecords, every: int) -> None:
        self.records, self.every = records, every

    def observe(self, model: Any, step: int, *, writes: bool) -> None:
        """Looks, and if `writes` is set, tells."""
        raise NotImplementedError

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            self.records.begin(state.global_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any,
        **_: Any,
    ) -> None:
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        with _evaluated(model), torch.no_grad():
            self.observe(model, state.global_step, writes=state.is_world_process_zero)


class SampleTexts(Observer):
    """Continues prompts greedily.

    Args:
        prompts: texts.
        tokenizer: the model's.
        num_tokens: of a continuation, at most; it ends at EOS.
        records, every: where the texts go, and when.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        tokenizer: Any,
        num_tokens: int,
        records: StepRecords,
        every: int,
    ) -> None:
        super().__init__(records, every)
        self.prompts, self.tokenizer, self.num_tokens = list(prompts), tokenizer, num_tokens

    def observe(self, model: Any, step: int, *, writes: bool) -> None:
        for number, prompt in enumerate(self.prompts):
            text = self.continuation(model, prompt)
            if writes:
                self.records.append(step, prompt=prompt, text=text)
                if self.board is not None:
                    self.board.writer.add_text(f"sample {number}", prompt + text, step)

    def continuation(self, model: Any, prompt: str) -> str:
        """What follows the prompt, without it."""
        device = next(model.parameters()).device
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
        settings = GenerationConfig(
            max_new_tokens=self.num_tokens,
            do_sample=False,
            use_cache=True,  # not while it trains, says the model's config
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        mask = torch.ones_like(ids)
        tokens = model.generate(ids, attention_mask=mask, generation_config=settings)[0]
        text: str = self.tokenizer.decode(tokens[ids.shape[1] :], skip_special_tokens=True)
        return text


class HeldOutLosses(Observer):
    """Mean next-token loss of one text, read in pieces of several lengths; memory is O(length).

    Args:
        windows: (N, S) token ids of held-out text.
        lengths: tokens of a piece, divisors of S.
        records, every: where the losses go, and when.
        first_token: in the place of every piece's first one, as evaluation has it; None: its own.
    """

    def __init__(
        self,
        windows: Tensor,
        lengths: Sequence[int],
        records: StepRecords,
        every: int,
        first_token: int | None = None,
    ) -> None:
        super().__init__(records, every)
        if not lengths or any(windows.shape[1] % length for length in lengths):
            raise ValueError(
                f"lengths: expected divisors of the windows' {windows.shape[1]} tokens, got "
                f"{list(lengths)}"
            )
        self.windows, self.lengths, self.first_token = windows, list(lengths), first_token

    def observe(self, model: Any, step: int, *, writes: bool) -> None:
        losses = {n: self.mean_loss(model, self.windows.view(-1, n)) for n in self.lengths}
        if writes:
            self.records.append(step, losses={str(n): loss for n, loss in losses.items()})
            if self.board is not None:
                for length, loss in losses.items():
                    self.board.writer.add_scalar(f"held_out_loss/{length}", loss, step)

    def mean_loss(self, model: Any, pieces: Tensor) -> float:
        """Nats per predicted token of pieces (N, L), one after the other."""
        device = next(model.parameters()).device
        total = 0.0
        for piece in pieces.split(1):
            ids = piece.to(device).long()
            if self.first_token is not None:
                ids = torch.cat([torch.full_like(ids[:, :1], self.first_token), ids[:, 1:]], dim=1)
            targets = Targets(ids, None, None, _LOSS_CHUNK)
            total += float(model(input_ids=ids, targets=targets)[0])
        return total / len(pieces)


@contextmanager
def _evaluated(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
