"""What a run needs, found and checked before any weights are read."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from drope_kernels.hf import DropState, drop_positions, load_tokenizer, use_kernels
from drope_kernels.hf.loading import read_config
from drope_kernels.hf.provenance import is_export
from drope_kernels.hf.ranges import Unpadded
from drope_kernels.hf.weight_files import check_files
from drope_kernels.recalibrate.config import RecalibrationConfig
from drope_kernels.recalibrate.enough import Need, check_ids
from drope_kernels.recalibrate.environment import check_engines, num_devices
from drope_kernels.recalibrate.packed_folder import METADATA
from drope_kernels.recalibrate.run_config import RunConfig
from drope_kernels.recalibrate.run_folder import DATA, Progress, progress_of
from drope_kernels.texts.documents import Documents, read_documents

# Their frequencies depend on the length of the input.
_MOVING_TYPES = ("dynamic", "longrope")


@dataclass(frozen=True)
class RunPlan:
    """A run that can begin."""

    config: RunConfig
    recalibration: RecalibrationConfig
    context_length: int
    tokenizer: Any
    documents: Documents
    validation_documents: Documents | None
    progress: Progress  # of output_dir

    @property
    def folder(self) -> Path:
        return Path(str(self.config.output_dir))

    @property
    def data_folder(self) -> Path:
        return Path(self.config.data_cache) if self.config.data_cache else self.folder / DATA


def plan_run(config: RunConfig) -> RunPlan:
    """Checks a run against the files it names.

    Raises:
        FileNotFoundError: no model, or no tokenizer beside it.
        ValueError: what does not fit together, each with what to do.
        NotImplementedError: a model of a family that the kernels or the drop do not know.
        ImportError: a package that a setting needs.
    """
    check_engines()
    tokenizer = load_tokenizer(str(config.model))
    model_config = read_config(str(config.model))
    if Path(str(config.model)).is_dir():
        check_files(Path(str(config.model)))
    _check_tokenizer(tokenizer, model_config, config.samples)
    context_length = _context_length(config, model_config)
    _rehearse(config, model_config)
    recalibration = config.recalibration(context_length, num_devices())
    plan = RunPlan(
        config=config,
        recalibration=recalibration,
        context_length=context_length,
        tokenizer=tokenizer,
        documents=_documents(config, config.data),
        validation_documents=_documents(config, config.validation_data)
        if config.validation_data
        else None,
        progress=progress_of(config, recalibration),
    )
    _check_export(config)
    _check_texts(plan, model_config.vocab_size)
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            "tensorboard: expected the package, it is missing: pip install tensorboard"
        )
    return plan


def _check_texts(plan: RunPlan, vocabulary: int) -> None:
    """That there is text enough, unless it is packed already and `run.packed_data` sees it."""
    if plan.progress == "new" and not (plan.data_folder / METADATA).is_file():
        need = Need(plan.config, plan.context_length, vocabulary)
        need.check_documents(plan.documents, plan.validation_documents, plan.tokenizer)


def original_length(model_config: Any) -> int:
    """Tokens that the model was trained on, before its RoPE was scaled if it was."""
    lengths = [
        x.get("original_max_position_embeddings") or 0 for x in _rope_parameters(model_config)
    ]
    return int(min([x for x in lengths if x > 1] + [model_config.max_position_embeddings]))


def _rope_parameters(model_config: Any) -> list[dict[str, Any]]:
    """Of the model while it had positions; several where types of layers differ."""
    given = DropState.from_config(model_config).rope_parameters
    given = given or getattr(model_config, "rope_parameters", None) or {}
    return [x for x in given.values() if isinstance(x, dict)] or [given]


def _check_tokenizer(tokenizer: Any, model_config: Any, prompts: list[str]) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer: expected one with an EOS token, which marks where documents end, got none; "
            "set eos_token in tokenizer_config.json"
        )
    # Ids that no text gets may lie beyond the embedding, as one of Gemma 3's does.
    needed = [("its EOS", [tokenizer.eos_token_id])]
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        if not ids:
            raise ValueError(f"samples: expected prompts of at least one token, got {prompt!r}")
        needed.append((f"the prompt {prompt!r}", ids))
    for what, ids in needed:
        check_ids(what, ids, model_config.vocab_size)


def _context_length(config: RunConfig, model_config: Any) -> int:
    for parameters in _rope_parameters(model_config):
        kind = parameters.get("rope_type", "default")
        if kind in _MOVING_TYPES:
            raise ValueError(
                f"model: expected RoPE with fixed frequencies, got rope_type {kind!r}, whose "
                "frequencies follow the length of the input; set rope_parameters in config.json "
                "to what the model was pretrained with"
            )
        if kind not in ROPE_INIT_FUNCTIONS.keys() | {"default"}:
            raise ValueError(
                f"model: expected a rope_type of {', '.join(sorted(ROPE_INIT_FUNCTIONS))} or "
                f"default, got {kind!r}; mend rope_parameters in config.json"
            )
    length = config.context_length or original_length(model_config)
    limit = model_config.max_position_embeddings
    if length > limit:
        raise ValueError(
            f"context_length: expected at most {limit}, the model's max_position_embeddings, got "
            f"{length}; DroPE trains at the original length or below"
        )
    return length


def _rehearse(config: RunConfig, model_config: Any) -> None:
    """What will be done to the model, done to one without weights."""
    dropped = DropState.from_config(model_config).dropped_layers
    if dropped and config.drop != "none":
        raise ValueError(
            f"model: expected one with all its positions, got one with {len(dropped)} of "
            f"{model_config.num_hidden_layers} layers dropped; --drop none trains it on as it is"
        )
    if dropped and config.distillation > 0:
        raise ValueError(
            "distillation: expected a model with all its positions, from which to learn, got one "
            "whose positions are dropped; start from the original"
        )
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model_config)
    change_attention(skeleton, config)
    if config.drop != "none":
        drop_positions(
            skeleton, config.layers(), None if config.qk_norm == "none" else config.qk_norm
        )
    if config.attention == "kernels":
        _rehearse_forward(skeleton)


def _rehearse_forward(skeleton: Any) -> None:
    """One forward of training, in which attention refuses by name what it cannot do."""
    tokens = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    try:
        with torch.device("meta"), torch.no_grad():
            skeleton.train()(tokens, attention_mask=Unpadded((1, 2)), use_cache=False)
    except NotImplementedError as error:
        raise NotImplementedError(f"{error}; or choose --attention sdpa") from error
    except RuntimeError:
        return  # torch's own, of an operation without a form for meta tensors: it says nothing


def change_attention(model: Any, config: RunConfig) -> None:
    """Gives the model the attention that the run asks for."""
    if config.attention == "kernels":
        use_kernels(model, backend=config.backend)
    else:
        model.set_attn_implementation(config.attention)


def _documents(config: RunConfig, sources: list[str]) -> Documents:
    """Of paths, and of patterns that the shell has not expanded."""
    paths: list[Path] = []
    for path in map(Path, sources):
        pattern = str(path.relative_to(path.anchor))
        found = [] if path.exists() else sorted(Path(path.anchor).glob(pattern))
        paths += found or [path]
    return read_documents(paths, text_column=config.text_column, skip_corrupt=config.skip_corrupt)


def _check_export(config: RunConfig) -> None:
    if config.export is None:
        return
    if config.drop != "all" or config.qk_norm == "full":
        got = f"--drop {config.drop}" if config.drop != "all" else "--qk_norm full"
        raise ValueError(
            f"export: expected a run that drops all positions without full-width norms, got {got}; "
            "no plain architecture has that, output_dir/model keeps it"
        )
    path = Path(config.export)
    if path.exists() and not is_export(path) and (path.is_file() or any(path.iterdir())):
        raise ValueError(
            f"export: expected a new or empty folder, or an earlier export, got {path} with other "
            "files; choose another"
        )
