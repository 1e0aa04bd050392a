"""Texts of Debian packages as JSONL, one document a line, split by document.

    python tools/real_run/texts.py ANARCHISM_DEB PYTHON_DOC_DEB OUT

Writes train.jsonl and heldout.jsonl (essays of `anarchism`), heldout_python.jsonl (another domain:
pages of `python3.11-doc`) and texts.json, which says how much of what. The same packages give the
same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import subprocess
import tempfile
from pathlib import Path

ESSAYS = "usr/share/doc/anarchism/markdown"
PAGES = "usr/share/doc/python3.11/html/_sources"
SECTIONS = ("tutorial", "howto", "faq", "library", "reference")
HELD_OUT_PERCENT = 10
SHORTEST = 2000  # characters: tables of contents are not texts


def unpacked_package(deb: Path, folder: Path) -> None:
    subprocess.run(["dpkg-deb", "-x", deb, folder], check=True)


def essays(root: Path) -> dict[str, str]:
    found = {}
    for path in sorted((root / ESSAYS).iterdir()):
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        found[path.name.removesuffix(".gz")] = content.decode()
    return found


def pages(root: Path) -> dict[str, str]:
    found = {}
    for section in SECTIONS:
        for path in sorted((root / PAGES / section).glob("**/*.rst.txt")):
            found[path.relative_to(root / PAGES).as_posix()] = path.read_text()
    return found


def is_held_out(name: str) -> bool:
    """By the hash of the name: never by the text."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def distinct(documents: dict[str, str]) -> dict[str, str]:
    """Without short documents and second copies."""
    kept: dict[str, str] = {}
    for name, text in documents.items():
        if len(text) >= SHORTEST and text not in kept.values():
            kept[name] = text
    return kept


def write(path: Path, documents: dict[str, str]) -> dict[str, object]:
    lines = [json.dumps({"text": text, "name": name}) + "\n" for name, text in documents.items()]
    content = "".join(lines).encode()
    path.write_bytes(content)
    return {
        "documents": len(documents),
        "characters": sum(map(len, documents.values())),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("anarchism", type=Path, help="anarchism_*.deb")
    parser.add_argument("python_doc", type=Path, help="python3.11-doc_*.deb")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        unpacked_package(arguments.anarchism, root)
        unpacked_package(arguments.python_doc, root)
        prose, technical = distinct(essays(root)), distinct(pages(root))
    splits = {
        "train": {name: text for name, text in prose.items() if not is_held_out(name)},
        "heldout": {name: text for name, text in prose.items() if is_held_out(name)},
        "heldout_python": {name: text for name, text in technical.items() if is_held_out(name)},
    }
    facts: dict[str, object] = {"packages": [arguments.anarchism.name, arguments.python_doc.name]}
    for name, documents in splits.items():
        facts[name] = write(arguments.out / f"{name}.jsonl", documents)
    (arguments.out / "texts.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
