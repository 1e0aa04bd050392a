"""All of `drope evaluate`: checks, inputs, each model in turn, the report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
import transformers

import drope_kernels
from drope_kernels import available_backends, build_info
from drope_kernels.evaluate.hf_model import ATTENTIONS, AttentionName, choose_attention
from drope_kernels.evaluate.inputs import InputChoice, Inputs, draw_inputs, read_texts
from drope_kernels.evaluate.measure import Conditions, FittedTemperature, measure_model
from drope_kernels.evaluate.model_calls import DEFAULT_BATCH_TOKENS
from drope_kernels.evaluate.plan import (
    Method,
    ModelPlan,
    check_asked,
    parse_lengths,
    plan_model,
    train_length_of,
)
from drope_kernels.evaluate.remarks import caveats, findings
from drope_kernels.evaluate.report import Report, check_report_folder, write_report
from drope_kernels.evaluate.sweep import SweepRow
from drope_kernels.hf import load_model, load_tokenizer
from drope_kernels.hf.loading import read_config
from drope_kernels.hf.weight_files import check_files

DtypeName = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DtypeName, ...] = get_args(DtypeName)


# What ends an evaluation before its time; the rows until then are kept.
STOPS = (ValueError, NotImplementedError, OSError, RuntimeError, MemoryError, KeyboardInterrupt)


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate, on what, how. Models are (name, directory or .gguf file)."""

    model: tuple[str, Path]
    text: tuple[Path, ...]
    compared: tuple[tuple[str, Path], ...] = ()
    tokenizer: Path | None = None  # None: the model's own
    text_column: str = "text"
    lengths: str = "1x,2x,4x"
    train_length: int | None = None
    methods: tuple[Method, ...] | None = None
    inputs: InputChoice = field(default_factory=InputChoice)
    attention: AttentionName = "kernels"
    dtype: DtypeName = "float32"
    device: str = "cpu"
    max_tokens: int = DEFAULT_BATCH_TOKENS

    def __post_init__(self) -> None:
        names = [name for name, _ in self.models]
        if len(set(names)) != len(names):
            raise ValueError(
                f"compare: expected a name of its own for each model, got {names}; write "
                "--compare PATH:NAME"
            )
        for name, known in (("attention", ATTENTIONS), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        if self.max_tokens < 1:
            raise ValueError(f"max-tokens: expected at least 1, got {self.max_tokens}")

    @property
    def models(self) -> tuple[tuple[str, Path], ...]:
        return (self.model, *self.compared)


class Progress(Protocol):
    """Told what happens; `advance` counts tokens that models have read."""

    def say(self, text: str) -> None: ...
    def begin(self, total: int) -> None: ...
    def advance(self, title: str, num_tokens: int) -> None: ...


@dataclass
class Prepared:
    """Everything but weights; those of .gguf files are loaded, because only they tell."""

    evaluation: Evaluation
    seconds: float
    lengths: tuple[int, ...]
    plans: list[ModelPlan]
    inputs: Inputs
    loaded: dict[Path, Any]

    def conditions(self, advance: Callable[[str, int], None]) -> Conditions:
        inputs = self.inputs
        return Conditions(inputs.measured, inputs.fit, advance, self.evaluation.max_tokens)


def evaluate(prepared: Prepared, out: Path, command: str, progress: Progress) -> Report:
    """Measures every model and leaves the report in `out`, which an error does not touch.

    What was measured before an error, KeyboardInterrupt among them, is left in `unfinished(out)`.
    """
    begun = time.perf_counter()
    seconds = {"read configs, tokenizer and text": prepared.seconds}
    rows: list[SweepRow] = []
    fits: dict[str, FittedTemperature] = {}
    conditions = prepared.conditions(progress.advance)
    progress.begin(sum(map(conditions.num_tokens, prepared.plans)))
    try:
        for plan in prepared.plans:
            start = time.perf_counter()
            for row, fit in _measure(plan, prepared, conditions, progress):
                rows.append(row)
                if fit is not None:
                    fits[plan.name] = fit
            seconds[f"load and measure {plan.name}"] = time.perf_counter() - start
        seconds["total"] = prepared.seconds + time.perf_counter() - begun
        report = _report(prepared, command, rows, fits, seconds)
        write_report(report, out)
    except STOPS as error:
        if rows:
            write_report(_report(prepared, command, rows, fits, seconds), unfinished(out))
            error.add_note(f"the rows measured before are in {unfinished(out)}/")
        raise
    return report


def unfinished(out: Path) -> Path:
    """Where the rows of an evaluation that did not end are left."""
    return out.with_name(f"{out.name}-unfinished")


def _report(
    prepared: Prepared,
    command: str,
    rows: Sequence[SweepRow],
    fits: dict[str, FittedTemperature],
    seconds: dict[str, float],
) -> Report:
    evaluation, plans, lengths = prepared.evaluation, prepared.plans, prepared.lengths
    wanted = [plan.row(method) for plan in plans for method in plan.methods]
    missing = wanted[len(rows) :]
    if missing:
        found = [f"The evaluation was not finished. Rows that are missing: {', '.join(missing)}."]
    else:
        found = findings(rows, plans, lengths)
    return Report(
        title=f"{evaluation.model[0]} at {', '.join(map(str, lengths))} tokens",
        train_length=plans[0].train_length,
        rows=rows,
        findings=found,
        caveats=caveats(rows, plans, evaluation.inputs, prepared.inputs, fits),
        settings=_settings(prepared, command),
        stage_seconds=seconds,
        extra={"temperature_fits": {name: fit.as_json() for name, fit in fits.items()}},
    )


def prepare(evaluation: Evaluation, out: Path, progress: Progress) -> Prepared:
    """Checks everything that needs no weights, and draws the inputs.

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: what would fail later: no tokenizer, too
            little text, an unknown training length, methods that fit no model, an `out` that holds
            something else.
    """
    begun = time.perf_counter()
    check_report_folder(out)
    check_report_folder(unfinished(out))
    loaded: dict[Path, Any] = {}
    dtype = getattr(torch, evaluation.dtype)
    configs = [_config(source, dtype, loaded, progress) for _, source in evaluation.models]
    train_lengths = [train_length_of(config, evaluation.train_length) for config in configs]
    lengths = parse_lengths(evaluation.lengths, train_lengths[0])
    plans = [
        plan_model(
            name,
            source,
            config,
            evaluation.methods,
            train_length,
            lengths[-1],
            compared=index > 0,
            alone=not evaluation.compared,
        )
        for index, ((name, source), config, train_length) in enumerate(
            zip(evaluation.models, configs, train_lengths, strict=True)
        )
    ]
    check_asked(evaluation.methods, plans)
    tokenizer = load_tokenizer(evaluation.tokenizer or evaluation.model[1])
    if evaluation.tokenizer is None:
        for _, source in evaluation.compared:
            _check_vocabulary(source, tokenizer)
    progress.say("reading and tokenizing the text")
    texts = read_texts(evaluation.text, evaluation.text_column)
    fits = any(plan.fits_temperature for plan in plans)
    inputs = draw_inputs(texts, tokenizer, lengths, evaluation.inputs, fits)
    _check_ids(plans, configs, inputs)
    seconds = time.perf_counter() - begun
    return Prepared(evaluation, seconds, lengths, plans, inputs, loaded)


def _measure(
    plan: ModelPlan, prepared: Prepared, conditions: Conditions, progress: Progress
) -> Iterator[tuple[SweepRow, FittedTemperature | None]]:
    """Loads one model, which is gone when this ends, so that one at a time is in memory."""
    evaluation = prepared.evaluation
    dtype = getattr(torch, evaluation.dtype)
    progress.say(f"loading {plan.name}")
    model = prepared.loaded.pop(plan.source, None)
    if model is None:
        model = load_model(plan.source, dtype=dtype)
    # Not `to(dtype)`, which would round the frequencies of the rotation too.
    model = model.to(evaluation.device).eval()
    choose_attention(model, evaluation.attention)
    yield from measure_model(plan, model, conditions)


def _config(source: Path, dtype: torch.dtype, loaded: dict[Path, Any], progress: Progress) -> Any:
    if source.suffix == ".gguf":
        progress.say(f"loading {source}")
        loaded[source] = load_model(source, dtype=dtype)
        return loaded[source].config
    config = read_config(source)
    check_files(source)
    return config


def _check_ids(plans: Sequence[ModelPlan], configs: Sequence[Any], inputs: Inputs) -> None:
    """Ids that no input has may lie beyond an embedding, as one of Gemma 3's does."""
    for plan, config in zip(plans, configs, strict=True):
        if inputs.largest_token >= config.vocab_size:
            raise ValueError(
                f"tokenizer: expected token ids below {plan.name}'s vocab_size "
                f"{config.vocab_size}, got up to {inputs.largest_token}; pass --tokenizer with the "
                "one it was trained with"
            )


def _check_vocabulary(source: Path, tokenizer: Any) -> None:
    """All models read the same token ids, so these must mean the same to them."""
    try:
        own = load_tokenizer(source)
    except FileNotFoundError:
        return  # a compared model saved without one: its vocab_size has to do
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"compare: expected the tokenizer of the first model, got another one in {source}; "
            "losses per token compare only for the same tokens"
        )


def _settings(prepared: Prepared, command: str) -> dict[str, Any]:
    build, evaluation, inputs = build_info(), prepared.evaluation, prepared.inputs
    return {
        "command": command,
        "drope_kernels": drope_kernels.__version__,
        "build": f"{build['commit']}, {build['compiler']}, {build['build_type']}",
        "backends": available_backends(),
        "transformers": transformers.__version__,
        "models": [f"{name} ({source.name})" for name, source in evaluation.models],
        "text": [path.name for path in evaluation.text],
        "documents": inputs.num_documents,
        "text_tokens": inputs.num_text_tokens,
        "train_length": prepared.plans[0].train_length,
        "lengths": list(prepared.lengths),
        "windows": evaluation.inputs.num_windows,
        "last_targets": inputs.measured.num_last_targets,
        "tasks": list(evaluation.inputs.tasks),
        "cases_per_task_length_and_seed": evaluation.inputs.num_cases,
        "seeds": list(evaluation.inputs.seeds),
        "attention": evaluation.attention,
        "dtype": evaluation.dtype,
        "device": _device_name(evaluation.device),
    }


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
