"""Which engines serve which exports, how that is known, and why not the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ENGINES = ("transformers", "llama.cpp", "vllm", "sglang")


@dataclass(frozen=True)
class Support:
    """Whether an engine serves the exports of a family.

    Args:
        served: whether it does, as far as `refusal` says no more of a model.
        evidence: a test of ours, or what the engine's source does; of a refusal, the reason.
        run: whether that was run here; else it was read.
    """

    served: bool
    evidence: str
    run: bool = False

    def __str__(self) -> str:
        verdict = "verified" if self.served else "refused"
        return f"{verdict}, {'run here' if self.run else 'read in its source'}: {self.evidence}"


def _run(evidence: str) -> Support:
    return Support(True, evidence, run=True)


def _read(evidence: str) -> Support:
    return Support(True, evidence)


def _refused(reason: str, *, run: bool = False) -> Support:
    return Support(False, reason, run)


_TESTED = _run("tests/hf/test_export.py, tests/hf/test_verify.py")
_CONVERTED = _run("tests/hf/test_gguf_llama_cpp.py, llama-cpp-python 0.3.36 and its converter")
_UNTOLD = (
    "its converter writes no rope_freqs for this family, and does not say so: the file rotates"
)
_ROTATES = _refused(f"{_UNTOLD} (tests/hf/test_gguf_llama_cpp.py)", run=True)
_VLLM = "vLLM 0.33.0, rotary_embedding/llama3_rope.py: the same formula, from rope_parameters"
_BACKEND = "vLLM 0.33.0, models/registry.py: served by transformers' own model code"
_SGLANG = "SGLang 0.5.23, rotary_embedding/rope_variant.py: the same formula, from rope_parameters"

EXPORT_SUPPORT: dict[str, dict[str, Support]] = {
    "llama": {
        "transformers": _TESTED,
        "llama.cpp": _CONVERTED,
        "vllm": _read(_VLLM),
        "sglang": _read(_SGLANG),
    },
    "mistral": {
        "transformers": _TESTED,
        "llama.cpp": _CONVERTED,
        "vllm": _read(_VLLM),
        "sglang": _read(_SGLANG),
    },
    "qwen2": {
        "transformers": _TESTED,
        "llama.cpp": _ROTATES,
        "vllm": _read(_VLLM),
        "sglang": _read(_SGLANG),
    },
    "qwen3": {
        "transformers": _TESTED,
        "llama.cpp": _ROTATES,
        "vllm": _read(_VLLM),
        "sglang": _read(_SGLANG),
    },
    "gemma3_text": {
        "transformers": _TESTED,
        "llama.cpp": _refused(f"{_UNTOLD} (llama-cpp-python 0.3.36, conversion/gemma.py)"),
        "vllm": _read(f"{_VLLM} of each type of layer (models/gemma3.py)"),
        "sglang": _refused(
            "its sliding layers rotate as type default whatever the config says (SGLang 0.5.23, "
            "models/gemma3_causal.py)"
        ),
    },
    "olmo2": {
        "transformers": _TESTED,
        "llama.cpp": _ROTATES,
        "vllm": _read(_BACKEND),
        "sglang": _read(_SGLANG),
    },
}


def _has_window(config: Any) -> bool:
    types = getattr(config, "layer_types", None)
    if types is None:
        return getattr(config, "sliding_window", None) is not None
    return "sliding_attention" in types


def _mixes_windows(config: Any) -> bool:
    return len(set(config.layer_types)) > 1


def _has_own_head_dim(config: Any) -> bool:
    head_dim = getattr(config, "head_dim", None)
    return head_dim not in (None, config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class _Limit:
    """What an engine does not do for models of these families with this in their config."""

    engine: str
    families: tuple[str, ...]
    applies: Callable[[Any], bool]
    reason: str


_LIMITS = (
    _Limit(
        "llama.cpp",
        ("mistral",),
        _has_window,
        "it knows no sliding window for this architecture and attends to every key",
    ),
    _Limit(
        "sglang",
        ("mistral", "qwen2", "qwen3"),
        _has_window,
        "it knows no sliding window for this family and attends to every key",
    ),
    _Limit(
        "sglang",
        ("llama",),
        lambda config: config.mlp_bias,
        "its Llama has no biases in the MLP",
    ),
    _Limit(
        "vllm",
        ("qwen2", "qwen3"),
        _mixes_windows,
        "it asserts that either all layers have a sliding window or none",
    ),
    _Limit(
        "vllm",
        ("qwen3",),
        lambda config: config.attention_bias,
        "its Qwen3 has no bias in the output projection",
    ),
    _Limit(
        "vllm",
        ("qwen2",),
        _has_own_head_dim,
        "its Qwen2 takes head_dim to be hidden_size / num_attention_heads",
    ),
)


def refusal(config: Any, engine: str) -> str | None:
    """Why an engine would not serve an export with this config as it is; None: it would.

    Args:
        config: of the exported model.
        engine: one of `ENGINES`.

    Raises:
        ValueError: another engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    family = config.model_type
    support = EXPORT_SUPPORT[family][engine]
    if not support.served:
        return support.evidence
    for limit in _LIMITS:
        if engine == limit.engine and family in limit.families and limit.applies(config):
            return limit.reason
    return None
