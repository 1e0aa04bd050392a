"""Files of a model that are cut, missing or pointers: named before anything is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_models import build

from drope_kernels.hf import load_model, load_tokenizer
from drope_kernels.hf.weight_files import check_files

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"


def saved(folder: Path, kind: str) -> Path:
    """A model's folder with its weights in one file, or in parts with an index."""
    model = build("llama")
    if kind.startswith("safetensors"):
        model.save_pretrained(folder, max_shard_size="40KB" if kind.endswith("parts") else "1GB")
        return folder
    model.config.save_pretrained(folder)
    state = model.state_dict()
    names = ["pytorch_model.bin"]
    if kind.endswith("parts"):
        names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        of = {key: names[i % 2] for i, key in enumerate(state)}
        index = {"metadata": {}, "weight_map": of}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for i, name in enumerate(names):
        part = {key: x for n, (key, x) in enumerate(state.items()) if n % len(names) == i}
        torch.save(part, folder / name, _use_new_zipfile_serialization="old" not in kind)
    return folder


KINDS = ["safetensors", "safetensors parts", "torch", "torch parts", "old torch"]


def weights_of(folder: Path) -> Path:
    return max([*folder.glob("*.safetensors"), *folder.glob("*.bin")])


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_pass(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, kind)
    check_files(folder)
    expected = build("llama").state_dict()
    loaded = load_model(folder).state_dict()
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("kind", KINDS[:4])
def test_a_cut_file_is_named(kind: str, keep: float, tmp_path: Path) -> None:
    path = weights_of(saved(tmp_path, kind))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=f"expected whole weights in .*{path.name}.* copy it"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", KINDS[:4])
def test_a_missing_file_is_named(kind: str, tmp_path: Path) -> None:
    path = weights_of(saved(tmp_path, kind))
    path.unlink()
    name = path.name if kind.endswith("parts") else "model.safetensors"
    with pytest.raises(FileNotFoundError, match=f"got no {name}; copy the whole folder"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["weights", "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(name: str, tmp_path: Path) -> None:
    for kind in ("safetensors", "torch parts"):
        folder = tmp_path / kind.replace(" ", "-")
        folder.mkdir()
        saved(folder, kind)
        path = weights_of(folder) if name == "weights" else folder / name
        path.write_text(POINTER)
        load = load_tokenizer if name == "tokenizer.json" else load_model
        with pytest.raises(ValueError, match=f"content of .*{path.name}, got git-lfs's pointer"):
            load(folder)


def test_an_index_that_is_none_is_named(tmp_path: Path) -> None:
    saved(tmp_path, "torch parts")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"expected an index of weights in .*KeyError"):
        load_model(tmp_path)


def test_code_beside_a_tokenizer_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("asked at the terminal")

    monkeypatch.setattr("builtins.input", asked)
    saved(tmp_path, "safetensors")
    written = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "tokenizer_class": "Own"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(written))
    (tmp_path / "own.py").write_text("class Tokenizer: pass")
    with pytest.raises(ValueError, match="expected a tokenizer that transformers reads"):
        load_tokenizer(tmp_path)
