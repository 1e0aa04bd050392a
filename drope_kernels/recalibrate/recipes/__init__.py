"""Settings of known runs, one YAML file each; the comments say where they come from."""

from __future__ import annotations

import difflib
from pathlib import Path

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """Raises ValueError for a name that no recipe has."""
    if name not in recipe_names():
        near = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.4)
        remedy = f"did you mean {near[0]}?" if near else "--list_recipes shows all"
        raise ValueError(f"recipe: expected the name of one, got {name!r}; {remedy}")
    return FOLDER / f"{name}.yaml"
