"""What `drope evaluate` calls the models of its report."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from drope_kernels.evaluate import command as command_module


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["run/model", "control/model"], ["run/model", "control/model"]),
        (["run/model", "control/model/", "original"], ["run/model", "control/model", "original"]),
        (["a/run/model", "b/run/model"], ["a/run/model", "b/run/model"]),
        (["model", "control/model"], ["{here}/model", "control/model"]),
        (["run/model:mine", "control/model"], ["mine", "model"]),
        (["a/tiny.gguf", "b/tiny.gguf"], ["a/tiny", "b/tiny"]),
        (["run/model", "run/model"], ["model", "model"]),  # refused: it is one model
    ],
)
def test_models_are_called_by_as_much_of_their_path_as_tells_them_apart(
    words, names, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    found = command_module._named(words)
    assert [name for name, _ in found] == [name.format(here=tmp_path.name) for name in names]
    assert [path for _, path in found] == [Path(word.removesuffix(":mine")) for word in words]
