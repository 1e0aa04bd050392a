"""`RunConfig`: what `drope recalibrate` can be told, by a YAML file and on the command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from drope_kernels.console.paths import user_path
from drope_kernels.recalibrate.config import RecalibrationConfig, Schedule
from drope_kernels.recalibrate.other_names import OTHER_NAMES
from drope_kernels.recalibrate.recipes import recipe_file, recipe_names

PATHS = ("model", "data", "output_dir", "validation_data", "data_cache", "export")


def _help(meaning: str) -> dict[str, str]:
    return {"help": meaning}


def _option(default: Any, meaning: str) -> Any:
    return field(default=default, metadata=_help(meaning))


@dataclass
class RunConfig:
    """One run of `drope recalibrate`. A field is a key of the YAML file and a `--field`.

    Raises:
        ValueError: what is seen to be wrong without looking at any file.
    """

    model: str | None = _option(None, "model to start from: a directory, or a .gguf file")
    data: list[str] = field(
        default_factory=list, metadata=_help("training text: files, folders, patterns")
    )
    output_dir: str | None = _option(None, "folder of the run: checkpoints, model, result.json")
    recipe: str | None = _option(None, "named settings to start from; see --list_recipes")

    drop: str = _option(
        "all", "layers that lose their positions: all, none (the RoPE-kept control), or 0,2,5"
    )
    qk_norm: Literal["none", "full", "head"] = _option(
        "none", "RMSNorm put on q and k: over the whole projection width, or per head"
    )
    distillation: float = _option(
        0.0, "weight in [0, 1] of the divergence from the model as it was before the drop"
    )
    distillation_temperature: float = _option(1.0, "softmax temperature of that divergence")
    attention: Literal["kernels", "sdpa", "eager"] = _option("kernels", "who computes attention")
    backend: str = _option("auto", "which of the kernels; `drope info` lists them")
    attend_across_documents: bool = _option(False, "let tokens attend to documents before theirs")

    context_length: int | None = _option(None, "tokens a row; default: the model's original length")
    tokens: int | None = _option(None, "length of the run in tokens, rounded up to whole steps")
    steps: int | None = _option(None, "length of the run in optimiser steps")
    batch_size: int = _option(1, "rows a device and micro-batch")
    gradient_accumulation: int | None = _option(None, "micro-batches a step; default: 1")
    sequences_per_step: int | None = _option(
        None, "rows a step over all devices; sets gradient_accumulation"
    )
    learning_rate: float = _option(3e-4, "peak learning rate")
    schedule: Schedule = field(default="cosine", metadata=_help("of the learning rate"))
    warmup: float = _option(0.02, "steps of rising learning rate; below 1: share of all steps")
    decay: float = _option(0.2, "wsd: share of all steps spent decaying")
    min_lr_ratio: float = _option(0.0, "cosine, wsd: final learning rate over peak")
    weight_decay: float = _option(0.1, "of matrices")
    adam_betas: list[float] = field(default_factory=lambda: [0.9, 0.95], metadata=_help("of AdamW"))
    adam_eps: float = _option(1e-8, "of AdamW")
    max_grad_norm: float = _option(1.0, "gradient clipping; 0: none")
    seed: int = _option(0, "of the order of rows, and of all else that is drawn")

    dtype: Literal["float32", "bfloat16"] = _option("float32", "of weights and optimiser state")
    bf16: bool = _option(False, "compute in bfloat16 (autocast)")
    activation_checkpointing: bool = _option(False, "recompute layers in backward, saves memory")
    loss_chunk: int | None = _option(None, "positions whose logits exist at once, saves memory")
    compile: bool = _option(False, "torch.compile the model")
    sharded: bool = _option(False, "shard weights and optimiser over the processes (FSDP2)")
    cpu: bool = _option(False, "stay on the CPU where there is a GPU")

    validation_data: list[str] = field(
        default_factory=list, metadata=_help("held-out text; default: a share of the data")
    )
    validation_share: float = _option(0.01, "documents held out where validation_data is not given")
    text_column: str = _option("text", "of JSON, CSV, Parquet and datasets")
    skip_corrupt: bool = _option(False, "leave out and count corrupt lines, instead of stopping")
    bos: bool = _option(True, "begin documents with BOS if the tokenizer begins texts with it")
    split_at_eos: bool = _option(True, "a text file is the documents between the EOS it spells")
    data_cache: str | None = _option(None, "folder of the tokens; default: data/ in output_dir")

    log_steps: int = _option(10, "steps between two log lines")
    eval_steps: int | None = _option(None, "steps between two validation losses")
    eval_rows: int = _option(1024, "rows in a validation loss, at most; spread evenly")
    save_steps: int | None = _option(None, "steps between two checkpoints")
    keep_checkpoints: int = _option(2, "the latest are kept")
    tensorboard: bool = _option(False, "write TensorBoard files into runs/ in output_dir")
    samples: list[str] = field(default_factory=list, metadata=_help("prompts, continued greedily"))
    sample_steps: int = _option(500, "steps between two samplings")
    sample_tokens: int = _option(64, "tokens of a sample")
    length_sweep: list[int] = field(
        default_factory=list,
        metadata=_help("multiples of context_length with a held-out loss: 1 2 4"),
    )
    sweep_steps: int = _option(500, "steps between two length sweeps")
    sweep_windows: int = _option(4, "texts of the greatest length in a sweep")
    resume: bool = _option(True, "go on from the last checkpoint if output_dir holds this run")
    export: str | None = _option(None, "folder for a position-free copy that stock engines load")

    def __post_init__(self) -> None:
        for required in ("model", "data", "output_dir"):
            if not getattr(self, required):
                raise ValueError(f"{required}: expected --{required} PATH, got none")
        for name in PATHS:
            setattr(self, name, _expanded(getattr(self, name)))
        _check_choices(self)
        if self.drop not in ("all", "none"):
            self.drop = ",".join(map(str, self.layers() or []))
        if self.drop == "none" and self.qk_norm != "none":
            raise ValueError(
                f"qk_norm: expected none with --drop none, got {self.qk_norm}; norms come with "
                "the drop"
            )
        if not 0.0 <= self.distillation <= 1.0:
            raise ValueError(f"distillation: expected a weight in [0, 1], got {self.distillation}")
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(
                f"steps, tokens: expected exactly one, got steps={self.steps}, tokens={self.tokens}"
            )
        if None not in (self.sequences_per_step, self.gradient_accumulation):
            raise ValueError("sequences_per_step: expected alone, got gradient_accumulation too")
        if len(self.adam_betas) != 2:
            raise ValueError(f"adam_betas: expected two numbers, got {self.adam_betas}")
        for name in ("eval_rows", "sample_steps", "sample_tokens", "sweep_steps", "sweep_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {getattr(self, name)}")
        if any(multiple < 1 for multiple in self.length_sweep):
            raise ValueError(f"length_sweep: expected numbers >= 1, got {self.length_sweep}")
        self.recalibration(self.context_length or 2, 1, check_devices=False)

    def layers(self) -> list[int] | None:
        """Indices of the layers to drop, None for all; of a run that drops any."""
        if self.drop == "all":
            return None
        try:
            return sorted({int(index) for index in self.drop.split(",")})
        except ValueError as error:
            raise ValueError(
                f"drop: expected all, none, or layers such as 0,2,5, got {self.drop!r}"
            ) from error

    def recalibration(
        self, context_length: int, devices: int, *, check_devices: bool = True
    ) -> RecalibrationConfig:
        """The trainer's settings for so many devices.

        Raises:
            ValueError: a setting out of range, or sequences_per_step that the devices cannot share
                out evenly.
        """
        accumulation = 1 if self.gradient_accumulation is None else self.gradient_accumulation
        if self.sequences_per_step is not None and check_devices:
            accumulation, rest = divmod(self.sequences_per_step, self.batch_size * devices)
            if rest or not accumulation:
                raise ValueError(
                    f"sequences_per_step: expected a multiple of batch_size x devices = "
                    f"{self.batch_size} x {devices}, got {self.sequences_per_step}"
                )
        taken = {f.name for f in dataclasses.fields(RecalibrationConfig)} & set(vars(self))
        settings = {name: getattr(self, name) for name in taken - {"resume"}}
        return RecalibrationConfig(
            **{
                **settings,
                "context_length": context_length,
                "gradient_accumulation": accumulation,
                "warmup": int(self.warmup) if self.warmup.is_integer() else self.warmup,
                "adam_betas": tuple(self.adam_betas),
                "use_cpu": self.cpu,
                "resume": self.resume,
            }
        )

    def tokens_per_step(self, context_length: int, devices: int = 1) -> int:
        """Tokens of an optimiser step over all devices."""
        rows = self.batch_size * (self.gradient_accumulation or 1) * devices
        return (self.sequences_per_step or rows) * context_length


def _expanded(value: Any) -> Any:
    """A path, or a list of them, or none."""
    if isinstance(value, list):
        return [str(user_path(path)) for path in value]
    return None if value is None else str(user_path(value))


# ---- reading -----------------------------------------------------------------------------------
# Either says the same thing: the one that is given last replaces the other.
ALTERNATIVES = ({"steps", "tokens"}, {"sequences_per_step", "gradient_accumulation"})


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, []) else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """One spelling of each; dashes in the place of underscores are understood as well."""
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = "-h, --help" if action.dest == "help" else action.option_strings[0]
        values = f" {{{','.join(action.choices)}}}" if action.choices else ""
        return name + values


def whole_number(text: str) -> int:
    """Of 1000000, 1_000_000 and 1e6."""
    try:
        number = Decimal(text)
        if number == number.to_integral_value():
            return int(number)
    except (InvalidOperation, OverflowError):
        pass  # said below
    raise argparse.ArgumentTypeError(f"invalid int value: {text!r}")


class _Parser(HfArgumentParser):
    """Says what is wrong in one sentence, without the list of all options."""

    def error(self, message: str) -> Any:
        raise ValueError(message.removeprefix("argument "))


def run_config_parser() -> HfArgumentParser:
    """The command line of `drope recalibrate`."""
    parser = _Parser(
        RunConfig,
        prog="drope recalibrate",
        usage="drope recalibrate [CONFIG.yaml] [--field value ...]",
        formatter_class=_Help,
        description="Drop the positions of a pretrained model and train it on at its original "
        "length. The command line wins over the YAML file, the file over the recipe.",
        allow_abbrev=False,
    )
    for action in parser._actions:
        if action.type is int:
            action.type = whole_number
    parser.add_argument("config", nargs="?", type=user_path, help="YAML file of the fields below")
    parser.add_argument(
        *("--list_recipes", "--list-recipes"), action="store_true", help="name them and stop"
    )
    return parser


def read_run_config(arguments: Sequence[str]) -> RunConfig:
    """The run that a command line describes, with its YAML file and its recipe.

    Raises:
        ValueError: an unknown field (the nearest valid one is named), a value of the wrong type or
            out of range, a file that is no YAML mapping.
        FileNotFoundError: no such YAML file.
    """
    parser = run_config_parser()
    chosen, unknown = parser.parse_known_args(list(arguments))
    for argument in unknown:
        _refuse(argument)
    written = {} if chosen.config is None else read_yaml(chosen.config)
    recipe = chosen.recipe or written.get("recipe")
    settings = {} if recipe is None else read_yaml(recipe_file(recipe))
    settings = _over(settings, written)
    typed = {name for pair in ALTERNATIVES for name in pair if getattr(chosen, name) is not None}
    settings = _over(settings, dict.fromkeys(typed))
    parser.set_defaults(**settings)
    try:
        namespace = parser.parse_args(list(arguments))
    except ValueError as error:
        raise ValueError(f"{chosen.config or recipe}: {error}") from error
    return RunConfig(**{f.name: getattr(namespace, f.name) for f in dataclasses.fields(RunConfig)})


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    replaced = {name for pair in ALTERNATIVES if pair & above.keys() for name in pair}
    return {name: value for name, value in below.items() if name not in replaced} | above


def read_yaml(file: Path) -> dict[str, Any]:
    """Fields of a YAML file as the parser takes them: texts, and lists of their own type.

    Texts, because YAML reads 3e-4 as one: the parser then converts every number alike.
    """
    if not file.is_file():
        raise FileNotFoundError(f"config: expected a YAML file, got {file}, which is none")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected YAML, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a mapping of fields, got {type(content).__name__}")
    hints = get_type_hints(RunConfig)
    for key in content:
        if key not in hints:
            raise ValueError(f"{file}: unknown field {key!r}{_nearest(str(key))}")
    given = {key: value for key, value in content.items() if value is not None}
    return {key: _as_default(f"{file}: {key}", hints[key], given[key]) for key in given}


def _as_default(place: str, hint: Any, value: Any) -> Any:
    if get_origin(hint) is list:
        (item,) = get_args(hint)
        values = value if isinstance(value, list) else [value]
        try:
            return [(whole_number if item is int else item)(str(one)) for one in values]
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{place}: expected {item.__name__}s, got {value}") from error
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        raise ValueError(f"{place}: expected one value, got a mapping")
    return str(value)


def _refuse(argument: str) -> None:
    name = argument.split("=")[0]
    if name.startswith("-"):
        raise ValueError(f"unknown option {name}{_nearest(name.strip('-'), '--')}")
    raise ValueError(
        f"unexpected argument {argument!r}; the YAML file comes first, everything else is "
        "--field value"
    )


def _nearest(name: str, prefix: str = "") -> str:
    names = [f.name for f in dataclasses.fields(RunConfig)]
    word = name.replace("-", "_").lower()
    elsewhere = [ours for ours, others in OTHER_NAMES.items() if word in others.split()]
    near = elsewhere or difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"; did you mean {prefix}{near[0]}?" if near else "; --help lists the fields"


def _check_choices(config: RunConfig) -> None:
    for name, hint in get_type_hints(RunConfig).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"{name}: expected one of {', '.join(get_args(hint))}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}")


def list_recipes() -> str:
    """A line per recipe: its name and the first line of its comment."""
    names = recipe_names()
    width = max(map(len, names))
    lines = []
    for name in names:
        first = recipe_file(name).read_text(encoding="utf-8").splitlines()[0]
        lines.append(f"{name:<{width}}  {first.removeprefix('# ')}")
    return "\n".join(lines)
