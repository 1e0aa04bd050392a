"""A GGUF file as a plain Hugging Face directory: plain_model.py FILE.gguf FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from drope_kernels import hf


def main() -> None:
    source, folder = map(Path, sys.argv[1:])
    partial = folder.with_name(f"{folder.name}.partial")
    hf.load_model(source).save_pretrained(partial)
    hf.load_tokenizer(source).save_pretrained(partial)
    partial.rename(folder)


if __name__ == "__main__":
    main()
