"""`read_documents`: every kind of source, and what is said of those that cannot be read."""

from __future__ import annotations

import sys
import warnings

import pytest
from text_files import (
    TEXTS,
    compressed,
    dataset,
    saved,
    write_json_lines,
    write_list,
    write_parquet,
    write_table,
)

from drope_kernels.recalibrate import Document, read_documents


@pytest.mark.parametrize("ending", [".txt", ".md", ".rst", ".TXT", ".txt.gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_text_file_is_one_document(tmp_path, ending, mark):
    path = tmp_path / f"a{ending.removesuffix('.gz')}"
    path.write_bytes(mark + TEXTS[2].encode())
    path = compressed(path) if ending.endswith(".gz") else path
    assert list(read_documents(path)) == [Document(TEXTS[2], str(path), None)]


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: write_json_lines(folder / "a.jsonl"),
        lambda folder: write_json_lines(folder / "a.ndjson"),
        lambda folder: write_json_lines(folder / "a.json"),
        lambda folder: write_list(folder / "a.json"),
        lambda folder: write_table(folder / "a.csv"),
        lambda folder: write_table(folder / "a.tsv"),
        lambda folder: compressed(write_json_lines(folder / "a.jsonl")),
        lambda folder: compressed(write_json_lines(folder / "a.jsonl"), ".bz2"),
        lambda folder: compressed(write_json_lines(folder / "a.jsonl"), ".zst"),
        lambda folder: compressed(write_list(folder / "a.json"), ".xz"),
        lambda folder: compressed(write_table(folder / "a.csv"), ".zst"),
        lambda folder: compressed(write_table(folder / "a.tsv")),
        lambda folder: write_parquet(folder / "a.parquet"),
        lambda folder: saved(folder / "a"),
        lambda folder: dataset(),
    ],
    ids=[
        *("jsonl", "ndjson", "json lines", "json list", "csv", "tsv", "jsonl.gz", "jsonl.bz2"),
        *("jsonl.zst", "json.xz", "csv.zst", "tsv.gz", "parquet", "saved dataset", "dataset"),
    ],
)
def test_rows_are_documents(tmp_path, make):
    documents = read_documents(make(tmp_path))
    for _ in range(2):  # each iteration starts anew
        assert [(one.text, one.line) for one in documents] == list(
            zip(TEXTS, [1, 2, 3], strict=True)
        )
    assert documents.num_corrupt == 0


def test_a_column_of_another_name(tmp_path):
    for source in (
        write_json_lines(tmp_path / "a.jsonl", column="body"),
        write_parquet(tmp_path / "a.parquet", column="body"),
        dataset(column="body"),
    ):
        assert [one.text for one in read_documents(source, text_column="body")] == TEXTS


def test_many_row_groups_keep_their_order(tmp_path):
    texts = [f"text {i}" for i in range(300)]
    path = write_parquet(tmp_path / "a.parquet", texts, rows=7)
    assert [(one.text, one.line) for one in read_documents(path)] == [
        (text, i) for i, text in enumerate(texts, start=1)
    ]


def test_folders_are_read_in_order_with_what_lies_in_them(tmp_path):
    (tmp_path / "b" / "deeper").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    for name in ("c.txt", "a.md", "b/2.txt", "b/deeper/1.txt", ".git/no.txt", "picture.png"):
        (tmp_path / name).write_text(name)
    saved(tmp_path / "d", ["row"])
    expected = ["a.md", "b/2.txt", "b/deeper/1.txt", "c.txt", "row"]
    with pytest.warns(UserWarning, match=r"no texts, passed by: 1 \.png$"):
        documents = read_documents(tmp_path)
    assert [one.text for one in documents] == expected
    mixed = [str(tmp_path / "c.txt"), tmp_path / "b", dataset(["live"])]
    assert [one.text for one in read_documents(mixed)] == ["c.txt", *expected[1:3], "live"]


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        (lambda folder: [], ValueError, "at least one file"),
        (lambda folder: folder / "none.txt", ValueError, "none.txt: expected a file or a folder"),
        (lambda folder: folder / "a.pdf", ValueError, "a.pdf: expected one of .txt .md"),
        (lambda folder: folder / "a.parquet.gz", ValueError, "expected one of .txt .md"),
        (lambda folder: folder / "empty", ValueError, "empty: expected a folder with files"),
        (lambda folder: folder / "splits", ValueError, r"the splits \['test', 'train'\]"),
        (lambda folder: {"train": 1}, ValueError, "the splits"),
        (lambda folder: [3], TypeError, "expected paths or a datasets.Dataset, got int"),
        (lambda folder: dataset().to_iterable_dataset(), TypeError, "write a stream to a .jsonl"),
    ],
)
def test_what_is_no_source_is_refused_before_reading(tmp_path, sources, error, message):
    (tmp_path / "a.pdf").touch()
    (tmp_path / "a.parquet.gz").touch()
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / "splits" / split).mkdir(parents=True)
    (tmp_path / "splits" / "dataset_dict.json").write_text("{}")
    with pytest.raises(error, match=message):
        read_documents(sources(tmp_path))


@pytest.mark.parametrize(
    ("ending", "extra"),
    [("parquet", "train"), ("jsonl.zst", "train"), ("csv", "train"), ("dataset", "datasets")],
)
def test_a_missing_package_is_named_before_reading(tmp_path, monkeypatch, ending, extra):
    source = saved(tmp_path / "a") if ending == "dataset" else tmp_path / f"a.{ending}"
    if ending != "dataset":
        source.touch()
    for package in ("pyarrow", "pyarrow.parquet", "pyarrow.csv", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'drope_kernels\[{extra}\]'"):
        read_documents(source)


def write_bytes(path, content):
    path.write_bytes(content)
    return path


def cut(path, keep):
    """The file without its end."""
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    return path


def line_two(content):
    """JSON lines with `content` between two good ones."""
    return lambda folder: write_bytes(
        folder / "a.jsonl", b'{"text": "one"}\n' + content + b'\n{"text": "three"}\n'
    )


def garbled_parquet(folder):
    """Its second row group cannot be decompressed."""
    path = write_parquet(folder / "a.parquet", ["good", "x" * 10000], rows=1)
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        start = file.metadata.row_group(1).column(1).dictionary_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 40] = b"\xff" * 40
    return write_bytes(path, bytes(content))


def half_character(folder):
    """A column of strings of which one is not UTF-8."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = pyarrow.array([b"one", b"\xff", b"three"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), folder / "a.parquet")
    return folder / "a.parquet"


LONG = [f"line of no pattern {i * 7919 % 10007}" for i in range(5000)]
CORRUPT = {
    "broken JSON": (line_two(b'{"text": "tw'), "a.jsonl, line 2: expected a JSON object", 2),
    "a number": (line_two(b"7"), "line 2: expected a JSON object, got a int", 2),
    "nested": (line_two(b"[" * 200_000), "line 2: expected a JSON object", 2),
    "no key": (line_two(b'{"body": ""}'), r"line 2: expected the key 'text', got the keys \['b", 2),
    "null": (line_two(b'{"text": null}'), "line 2: expected a string as 'text', got None", 2),
    "half a pair": (line_two(b'{"text": "\\ud83d"}'), "line 2: expected text, got the half", 2),
    "not UTF-8": (line_two(b'{"text": "\xe9"}'), "line 2: expected UTF-8, got the byte 0xe9", 2),
    "Latin-1": (
        lambda folder: write_bytes(folder / "a.txt", b"one\ntwo \xe9\n"),
        "a.txt, line 2: expected UTF-8, got the byte 0xe9",
        0,
    ),
    "no gzip": (
        lambda folder: write_bytes(folder / "a.txt.gz", b"plain"),
        "a.txt.gz: expected a whole gzip file",
        0,
    ),
    "cut gzip": (
        lambda folder: cut(compressed(write_json_lines(folder / "a.jsonl", LONG)), 0.5),
        r"a.jsonl.gz, after line \d{3,}: expected the rest of a gzip file",
        None,
    ),
    "cut zstandard": (
        lambda folder: cut(compressed(write_json_lines(folder / "a.jsonl", LONG), ".zst"), 0.9),
        r"a.jsonl.zst, after line \d+: expected the rest of a zstandard file",
        None,
    ),
    "no bzip2": (
        lambda folder: write_bytes(folder / "a.txt.bz2", b"plain"),
        "a.txt.bz2: expected a whole bzip2 file",
        0,
    ),
    "cut xz": (
        lambda folder: cut(compressed(write_list(folder / "a.json"), ".xz"), 0.5),
        "a.json.xz: expected a whole xz file",
        0,
    ),
    "cut list": (
        lambda folder: cut(write_list(folder / "a.json"), 0.5),
        "a.json: expected a list of JSON objects, got",
        0,
    ),
    "a number in a list": (
        lambda folder: write_bytes(folder / "a.json", b'[{"text": "one"}, 2, {"text": "three"}]'),
        "a.json, row 2: expected a JSON object, got a int",
        2,
    ),
    "ragged table": (
        lambda folder: write_bytes(folder / "a.csv", b"id,text\n1,one\n2\n"),
        "a.csv, after row 0: expected rows of a table, got CSV parse error: Row #3: Expected 2",
        0,
    ),
    "no column in a table": (
        lambda folder: write_bytes(folder / "a.csv", b"body\none\n"),
        "a.csv: expected the column 'text' in its first line",
        0,
    ),
    "cut Parquet": (
        lambda folder: cut(write_parquet(folder / "a.parquet", LONG), 0.5),
        "a.parquet: expected a whole Parquet file",
        0,
    ),
    "garbled Parquet": (garbled_parquet, "a.parquet.*: expected a whole Parquet file", None),
    "no column": (
        lambda folder: write_parquet(folder / "a.parquet", column="body"),
        r"a.parquet: expected the column 'text', got the columns \['id', 'body'\]",
        0,
    ),
    "null in Parquet": (
        lambda folder: write_parquet(folder / "a.parquet", ["one", None, "three"]),
        "a.parquet, row 2: expected a string as 'text', got None",
        2,
    ),
    "not UTF-8 in Parquet": (half_character, "row 2: expected UTF-8, got the byte 0xff", 2),
    "numbers in a dataset": (
        lambda folder: dataset([1]),
        "dataset .*, row 1: expected a string as 'text', got 1",
        0,
    ),
    "no column in a dataset": (
        lambda folder: dataset(column="body"),
        r"dataset .*: expected the column 'text', got the columns \['id', 'body'\]",
        0,
    ),
    "cut dataset": (
        lambda folder: cut(next(saved(folder / "a", LONG).glob("*.arrow")), 0.5).parent,
        "a.*: expected a whole dataset",
        None,
    ),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_parts_stop_the_reading_or_are_counted(tmp_path, name):
    make, message, remaining = CORRUPT[name]
    source = make(tmp_path)
    with pytest.raises(ValueError, match=message + ".*; mend or remove it, or pass skip_corrupt"):
        list(read_documents(source))
    documents = read_documents(source, skip_corrupt=True)
    with pytest.warns(UserWarning, match=message + ".*; left out"):
        read = [one.text for one in documents]
    assert documents.num_corrupt == 1
    assert remaining is None or len(read) == remaining
    if remaining == 2:
        assert read == ["one", "three"]


def test_after_ten_warnings_only_the_number_is_told(tmp_path):
    path = write_bytes(tmp_path / "a.jsonl", b"x\n" * 50 + b'{"text": "good"}\n')
    documents = read_documents(path, skip_corrupt=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [one.text for one in documents] == ["good"]
    assert [str(one.message).count("left out") for one in caught] == [1] * 11
    assert str(caught[-1].message).startswith("50 corrupt parts")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(documents)
    assert documents.num_corrupt == 50  # of this iteration
