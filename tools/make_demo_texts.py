"""Builds drope_kernels/demo/texts from Debian's python3.11-doc (needs that package, `tokenizers`).

    apt-get install python3.11-doc
    python tools/make_demo_texts.py

Writes python_docs.tar.xz (train/ and held_out/, a document is in one of them), MANIFEST.sha256,
tokenizer.json and LICENSE. The output is the same bytes for the same package and library version.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import subprocess
import tarfile
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

PACKAGE = "python3.11-doc"
SOURCES = Path("/usr/share/doc/python3.11/html/_sources")
SECTIONS = ("tutorial", "library", "reference", "howto", "faq", "extending", "c-api", "using")
TEXTS = Path(__file__).parent.parent / "drope_kernels" / "demo" / "texts"
VOCAB_SIZE = 512
NUM_NAMES = NUM_VALUES = 32
HELD_OUT_PERCENT = 10


def documents() -> dict[str, bytes]:
    """Archive path -> bytes. The split looks at the path's hash only, never at the text."""
    found = {}
    for section in SECTIONS:
        for path in sorted((SOURCES / section).glob("**/*.rst.txt")):
            name = path.relative_to(SOURCES).as_posix().removesuffix(".txt")
            bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
            split = "held_out" if bucket < HELD_OUT_PERCENT else "train"
            found[f"{split}/{name}"] = path.read_bytes()
    return dict(sorted(found.items()))


def write_archive(files: dict[str, bytes]) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    (TEXTS / "python_docs.tar.xz").write_bytes(lzma.compress(packed.getvalue(), preset=9))
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}" for name, content in files.items()]
    (TEXTS / "MANIFEST.sha256").write_text("\n".join(lines) + "\n")


def write_tokenizer(files: dict[str, bytes]) -> None:
    """Byte-level BPE trained on the train split; names and values are added after training."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False
    )
    train = (text.decode() for name, text in files.items() if name.startswith("train/"))
    tokenizer.train_from_iterator(train, trainer)
    names = [AddedToken(f"<name{i:02}>", normalized=False) for i in range(NUM_NAMES)]
    values = [AddedToken(f"<value{i:02}>", normalized=False) for i in range(NUM_VALUES)]
    tokenizer.add_special_tokens(names + values)
    tokenizer.save(str(TEXTS / "tokenizer.json"), pretty=False)


def write_license() -> None:
    """The licence of the documentation, from the documentation: copyright, history, terms."""
    copyright_text = (SOURCES / "copyright.rst.txt").read_text().split("-------")[0]
    terms = (SOURCES / "license.rst.txt").read_text().split(".. _OtherLicenses:")[0]
    terms = terms.replace("|release|", "3.11.2").replace("|copyright|", "Copyright")
    terms = re.sub(r"^\.\. (highlight|_\S+):.*\n\n?", "", terms, flags=re.MULTILINE)
    (TEXTS / "LICENSE").write_text(copyright_text.strip() + "\n\n" + terms.strip() + "\n")


def main() -> None:
    TEXTS.mkdir(parents=True, exist_ok=True)
    files = documents()
    write_archive(files)
    write_tokenizer(files)
    write_license()
    query = ["dpkg-query", "-W", "-f", "${Version}", PACKAGE]
    version = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    held_out = sum(name.startswith("held_out/") for name in files)
    size = sum(map(len, files.values()))
    packed = (TEXTS / "python_docs.tar.xz").stat().st_size
    print(f"{PACKAGE} {version}: {len(files)} documents ({held_out} held out), {size} bytes")
    print(f"python_docs.tar.xz: {packed} bytes")


if __name__ == "__main__":
    main()
