"""Texts in columns within others, and what is said of rows without them."""

from __future__ import annotations

import json

import pytest
from text_files import TEXTS

from drope_kernels.recalibrate import read_documents


def nested_json(folder, rows):
    path = folder / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def nested_parquet(folder, rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    return folder / "a.parquet"


def nested_dataset(folder, rows):
    return pytest.importorskip("datasets").Dataset.from_list(rows)


NESTED = [nested_json, nested_parquet, nested_dataset]


@pytest.mark.parametrize("make", NESTED)
def test_a_column_within_another(tmp_path, make):
    rows = [{"data": {"in": {"text": text}, "text": "b"}, "data.title": "a"} for text in TEXTS]
    source = make(tmp_path, rows)
    for column, expected in (
        ("data.in.text", TEXTS),
        ("data.text", ["b"] * 3),
        ("data.title", ["a"] * 3),  # a name with a dot
    ):
        assert [one.text for one in read_documents(source, text_column=column)] == expected
    for column in ("text", "data.body", "data.text.more", "data.in.", ""):
        with pytest.raises(ValueError, match=r"got the (key|column)s .*may be data\.in\.text or "):
            list(read_documents(source, text_column=column))
    with pytest.raises(ValueError, match=r"a string as 'data', got .*text_column may be in\.text"):
        list(read_documents(source, text_column="data"))


@pytest.mark.parametrize("make", NESTED)
def test_a_conversation_is_no_text_yet(tmp_path, make):
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    source = make(tmp_path, [{"messages": messages}])
    with pytest.raises(ValueError, match=r"a string as 'messages', got .*, the messages of a conv"):
        list(read_documents(source, text_column="messages"))


def test_rows_without_what_is_within_a_column(tmp_path):
    rows = [{"data": {"text": "one"}}, {"data": None}, {"data": {"text": "three"}}]
    for make in NESTED:
        documents = read_documents(make(tmp_path, rows), text_column="data.text", skip_corrupt=True)
        with pytest.warns(UserWarning, match="(line|row) 2: expected .*data.text"):
            assert [one.text for one in documents] == ["one", "three"]
