"""`EXPORT_SUPPORT`: what `export(engine=...)` refuses, and what docs/export.md says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hf_models import FAMILIES, build
from repository import ROOT

from drope_kernels import hf
from drope_kernels.hf.support import ENGINES, refusal

DOCUMENT = ROOT / "docs" / "export.md"


def test_every_family_and_engine_has_a_cell() -> None:
    assert set(hf.EXPORT_SUPPORT) == {build(family).config.model_type for family in FAMILIES}
    for cells in hf.EXPORT_SUPPORT.values():
        assert tuple(cells) == ENGINES
        assert cells["transformers"].run
        assert not cells["vllm"].run
        assert not cells["sglang"].run
    with pytest.raises(ValueError, match=r"engine: expected one of transformers, llama\.cpp"):
        refusal(build("llama").config, "vLLM")


@pytest.mark.parametrize("family", hf.EXPORT_SUPPORT)
def test_the_document_says_so(family: str) -> None:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in lines if line.startswith(f"| {family} |")]
    for said, support in zip(row.split("|")[2:-1], hf.EXPORT_SUPPORT[family].values(), strict=True):
        expected = ("run" if support.run else "read") if support.served else "refused"
        assert said.split()[0] == expected


@pytest.mark.parametrize(
    ("family", "engine", "changes", "reason"),
    [
        ("qwen2", "llama.cpp", {}, "no rope_freqs"),
        ("mistral", "llama.cpp", {}, "no sliding window"),
        ("mistral", "llama.cpp", {"sliding_window": None}, None),
        ("mistral", "sglang", {}, "no sliding window"),
        ("mistral", "vllm", {}, None),
        ("gemma3", "sglang", {}, "sliding layers rotate"),
        ("gemma3", "vllm", {}, None),
        ("qwen3", "vllm", {"attention_bias": True}, "no bias in the output projection"),
        ("llama", "sglang", {"mlp_bias": True}, "no biases in the MLP"),
        (
            "qwen3",
            "vllm",
            {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 7},
            "all layers have a sliding window or none",
        ),
        ("qwen2", "vllm", {"head_dim": 16}, "takes head_dim to be"),
        ("olmo2", "sglang", {}, None),
    ],
)
def test_engines(
    family: str, engine: str, changes: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    live = hf.drop_positions(build(family, **changes))
    if reason is None:
        hf.export(live, tmp_path / "out", engine=engine, verify=False)
        return
    with pytest.raises(NotImplementedError, match=f"{engine} would not serve .*{reason}"):
        hf.export(live, tmp_path / "out", engine=engine)
    assert not any(tmp_path.iterdir())
