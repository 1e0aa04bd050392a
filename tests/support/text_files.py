"""Files and datasets of a few texts, of every kind that is read."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma

import pytest

TEXTS = ["First.\nOf two lines.", "", "Zweites: grün, 字, 🙂\r\n"]


def write_json_lines(path, texts=TEXTS, column="text"):
    rows = [json.dumps({"id": i, column: text}) for i, text in enumerate(texts)]
    path.write_text("\n".join(rows) + "\n\n", encoding="utf-8")
    return path


def write_parquet(path, texts=TEXTS, column="text", rows=2):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"id": list(range(len(texts))), column: texts})
    parquet.write_table(table, path, row_group_size=rows)
    return path


def dataset(texts=TEXTS, column="text"):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({"id": list(range(len(texts))), column: texts})


def saved(path, texts=TEXTS):
    made = dataset(texts)
    made.save_to_disk(path)
    return path


def zstandard(content):
    codec = pytest.importorskip("pyarrow").Codec("zstd")
    return codec.compress(content, asbytes=True)


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: zstandard(content[:20]) + zstandard(content[20:]),  # several frames
}


def compressed(path, ending=".gz"):
    path.with_name(path.name + ending).write_bytes(COMPRESS[ending](path.read_bytes()))
    path.unlink()
    return path.with_name(path.name + ending)


def write_table(path, texts=TEXTS):
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        rows.writerow(["id", "text"])
        rows.writerows(enumerate(texts))
    return path


def write_list(path):
    path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1), encoding="utf-8")
    return path
