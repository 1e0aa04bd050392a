"""`hf.verify_export` and the planted errors that it must find."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import FAMILIES, build, copied, dropped, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from drope_kernels import LogScale, hf

pytestmark = pytest.mark.usefixtures("one_thread")

BETA = 1.3


def edit_config(path: Path, edit: Callable[[Any], None]) -> None:
    """Applies `edit` to every dictionary of rope_parameters in a saved config."""
    config = json.loads((path / "config.json").read_text())
    given = config["rope_parameters"]
    nested = any(isinstance(x, dict) for x in given.values())
    for parameters in given.values() if nested else [given]:
        edit(parameters)
    (path / "config.json").write_text(json.dumps(config))


def edit_weights(path: Path, suffix: str, edit: Callable[[Tensor], Tensor]) -> None:
    weights = load_file(path / "model.safetensors")
    names = [name for name in weights if name.endswith(suffix)]
    assert names
    weights |= {name: edit(weights[name]).contiguous() for name in names}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def rotated(path: Path) -> None:
    edit_config(path, lambda x: x.update(factor=1.0))


def factor_too_small(path: Path) -> None:
    edit_config(path, lambda x: x.update(factor=1e18))


def default_type(path: Path) -> None:
    def make_default(parameters: dict[str, Any]) -> None:
        theta = parameters["rope_theta"]
        parameters.clear()
        parameters.update(rope_type="default", rope_theta=theta)

    edit_config(path, make_default)


def forgotten_bias(path: Path) -> None:
    edit_weights(path, "q_proj.bias", lambda x: x / BETA)


def slightly_other_temperature(path: Path) -> None:
    edit_weights(path, "q_proj.weight", lambda x: x * 1.01)


def gemma_norm_without_its_one(path: Path) -> None:
    edit_weights(path, "q_norm.weight", lambda x: 1 + x - BETA)


TURNED = "entries that its rotation changes"
PLANTED = {
    "rotated": ("llama", torch.float32, rotated, TURNED),
    "rotated, nested": ("gemma3", torch.float32, rotated, TURNED),
    "factor 1e18": ("qwen3", torch.float32, factor_too_small, TURNED),
    "factor 1e18, large channels": ("llama", torch.float32, factor_too_small, "the same with"),
    "default type": ("mistral", torch.float32, default_type, "logits under shifted positions"),
    "forgotten bias": ("qwen2", torch.float32, forgotten_bias, "error, by the largest logit"),
    "forgotten bias, bf16": ("qwen2", torch.bfloat16, forgotten_bias, "error, by that of one"),
    "1 % hotter": ("llama", torch.float32, slightly_other_temperature, "error, by the largest"),
    "Gemma's norm": (
        "gemma3",
        torch.float32,
        gemma_norm_without_its_one,
        "error, by the largest logit",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_verification_finds(name: str, tmp_path: Path) -> None:
    family, dtype, plant, expected = PLANTED[name]
    live = dropped(family, BETA).to(dtype)
    path = hf.export(live, tmp_path / "out", verify=False)
    assert hf.verify_export(path, live).passed
    plant(path)
    report = hf.verify_export(path, live)
    assert not report.passed
    failed = [check.name for check in report.checks if not check.passed]
    assert any(x.startswith(expected) for x in failed), report


@pytest.mark.parametrize("family", FAMILIES)
def test_verification_alone(family: str, tmp_path: Path) -> None:
    path = hf.export(dropped(family), tmp_path / "out", verify=False)
    report = hf.verify_export(path)
    assert report.passed, report
    assert {check.dtype for check in report.checks} == {"float32", "bfloat16"}
    build(family).save_pretrained(tmp_path / "with positions")
    assert not hf.verify_export(tmp_path / "with positions").passed


def test_verification_leaves_the_live_model(tmp_path: Path) -> None:
    live = dropped("llama", attention_dropout=0.5)
    live.train()
    live.model.norm.eval()
    before = copied(live)
    path = hf.export(live, tmp_path / "out", scale=LogScale(0.4, 100), length=800)
    assert [x.training for x in live.modules()] == [x.training for x in before.modules()]
    with torch.no_grad():
        assert torch.equal(live.eval()(tokens()).logits, before.eval()(tokens()).logits)
        assert not torch.equal(hf.load_model(path)(tokens()).logits, live(tokens()).logits)
