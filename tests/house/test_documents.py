"""What documents say of the tree is true: paths exist, links lead somewhere, rooms are named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import ROOT

DOCUMENTS = sorted(
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "tests/emulation/README.md"]
)
FOLDERS = "csrc|python_bindings|drope_kernels|bench|tests|tools|docs|cmake"
# A placeholder in angle brackets ends what can be looked for: bench/results/<gpu>.json.
PATH = re.compile(rf"(?<![\w./-])(?:{FOLDERS})/[\w./*{{}},-]*(?=<)?")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
ROOMS = "drope_kernels", "tests", "csrc/cpu", "csrc/cuda/attention"


def written(text: str) -> Iterator[str]:
    """The paths of the repository that a text names, without what ends their sentence."""
    for match in PATH.finditer(text):
        path = match.group().rstrip(".,")
        yield path[: path.rindex("/")] if text[match.end() :].startswith("<") else path


def alternatives(path: str) -> list[str]:
    """The paths that braces stand for: a/{b,c} are a/b and a/c."""
    match = re.search(r"\{([^{}]*)\}", path)
    if match is None:
        return [path]
    return [
        whole
        for one in match.group(1).split(",")
        for whole in alternatives(path[: match.start()] + one + path[match.end() :])
    ]


def lost(text: str, root: Path = ROOT) -> list[str]:
    """What a text names and the repository does not have."""
    return [
        path
        for name in dict.fromkeys(written(text))
        for path in alternatives(name)
        if not any(root.glob(path.rstrip("/")))
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_exist(document: Path) -> None:
    assert lost(document.read_text()) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = [link for link in LINK.findall(document.read_text()) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_a_lost_path_is_noticed() -> None:
    text = "`csrc/cpu/gone.h`, then tests/{house,gone}/x_*.py and docs/results/<date>.md."
    assert lost(text) == ["csrc/cpu/gone.h", "tests/house/x_*.py", "tests/gone/x_*.py"]
    assert lost("csrc/cpu/{lanes,vec}, tests/house/test_doc*.py, of/tests/x.py.") == []


@pytest.mark.parametrize("folder", ROOMS)
def test_the_tree_names_every_room(folder: str) -> None:
    tree = README_TREE.search((ROOT / "README.md").read_text())
    assert tree is not None
    rooms = {
        path.name
        for path in (ROOT / folder).iterdir()
        if path.is_dir() and not path.name.startswith(("_", "."))
    }
    words = set(re.findall(r"[\w]+", tree.group(1)))
    assert rooms - words == set()


README_TREE = re.compile(r"## The tree\n\n```\n(.*?)```", re.DOTALL)
