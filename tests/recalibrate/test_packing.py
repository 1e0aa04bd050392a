"""`pack_documents` and `PackedRows`: what the files hold, and how a model reads it."""

from __future__ import annotations

import errno
import json
import os
import resource
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event
from types import NoneType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import EOS, TEXTS, byte_tokenizer, contents, documents_of, ids_of, pack

from drope_kernels.recalibrate import (
    PackedFolder,
    pack_documents,
    packing,
    read_documents,
)

# ---- what the files hold ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "dtype"), [(0, "uint16"), (2**16 - 257, "uint16"), (2**16 - 256, "uint32")]
)
def test_documents_are_their_tokens_and_eos(tmp_path, more, dtype):
    tokenizer = byte_tokenizer(more=more)
    packed = pack(tmp_path / "deeper" / "packed", tokenizer=tokenizer)
    assert contents(packed) == [ids_of(TEXTS[i], tokenizer) for i in (0, 2, 4)]
    assert packed.dtype == packed.tokens("train").dtype == np.dtype(dtype)
    assert packed.num_documents("train") == 3
    assert packed.num_tokens("train") == len(packed.tokens("train"))
    assert packed.largest_token("train") == max(packed.tokens("train"))
    assert packed.vocabulary_size == 257 + more
    assert packed.metadata["empty"] == 2
    assert contents(packed, "validation") == []


def test_an_eos_of_the_text_itself_is_not_doubled(tmp_path):
    tokenizer = byte_tokenizer()
    packed = pack(tmp_path / "packed", ["a" + EOS, "b", EOS], tokenizer)
    assert contents(packed) == [ids_of("a", tokenizer), ids_of("b", tokenizer), [256]]


def test_a_tokenizer_that_truncates_still_gives_whole_documents(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.model_max_length = 3
    assert len(contents(pack(tmp_path / "packed", tokenizer=tokenizer))[0]) == len(TEXTS[0]) + 1


def test_long_documents_in_pieces_and_batches(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer(merges=(("o", "n"), ("l", "l"), ("Ġ", "l")))
    texts = ["on\nall " * 40, "x" * 90, "short", "too long" * 9]
    whole = contents(pack(tmp_path / "whole", texts, tokenizer))
    monkeypatch.setattr(packing, "CHARACTERS_AT_ONCE", 32)
    seen = []
    packed = pack(
        tmp_path / "packed", texts, tokenizer, progress=lambda *numbers: seen.append(numbers)
    )
    assert contents(packed) == whole
    assert packed.metadata["in_pieces"] == 3
    assert packed.largest_token("train") == max(packed.tokens("train")) > tokenizer.eos_token_id
    assert len(seen) > 4
    assert seen == sorted(seen)
    assert seen[-1] == (4, packed.num_tokens("train"))


@settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.text(max_size=20), max_size=8), at_once=st.integers(1, 9))
def test_whatever_is_packed_comes_back(tmp_path_factory, texts, at_once):
    tokenizer = byte_tokenizer()
    written = [text for text in texts if text.strip()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "CHARACTERS_AT_ONCE", at_once)
        folder = tmp_path_factory.mktemp("any") / "packed"
        if not written:
            with pytest.raises(ValueError, match=f"got {len(texts)} empty documents"):
                pack(folder, texts, tokenizer)
            return
        packed = pack(folder, texts, tokenizer)
    assert contents(packed) == [ids_of(text, tokenizer) for text in written]
    assert packed.metadata["empty"] == len(texts) - len(written)


def test_the_validation_split_is_drawn_document_by_document(tmp_path):
    texts = [f"document {i}" for i in range(400)]
    tokenizer = byte_tokenizer()

    def splits(name, seed=0, number=400):
        packed = pack(tmp_path / name, texts[:number], tokenizer, validation_share=0.1, seed=seed)
        found = [
            [tokenizer.decode(ids[:-1]) for ids in contents(packed, split)]
            for split in ("train", "validation")
        ]
        assert sorted(found[0] + found[1]) == sorted(texts[:number])
        assert found[0] == [x for x in texts[:number] if x in found[0]]  # in order
        return found[1]

    first = splits("first")
    assert 20 <= len(first) <= 60
    assert splits("again") == first
    assert splits("another", seed=1) != first
    assert splits("fewer", number=200) == [x for x in first if x in texts[:200]]


@pytest.mark.parametrize("share", [0.01, 0.9])
def test_of_a_few_documents_each_split_gets_one(tmp_path, share):
    """Whatever the draw leaves empty, for every seed and number."""
    tokenizer, moved = byte_tokenizer(), set()
    for number in (2, 3, 10, 50):
        texts = [f"document {i}" for i in range(number)]
        for seed in range(8):
            name = f"{number} {seed}"
            packed = pack(tmp_path / name, texts, tokenizer, validation_share=share, seed=seed)
            train, held_out = contents(packed, "train"), contents(packed, "validation")
            assert train
            assert held_out
            assert sorted(train + held_out) == sorted(ids_of(text, tokenizer) for text in texts)
            assert train == [x for x in (ids_of(text, tokenizer) for text in texts) if x in train]
            assert packed.num_documents("validation") == len(held_out)
            assert packed.largest_token("validation") == tokenizer.eos_token_id
            if number == 10 and len(held_out) == 1:
                moved.add(tuple(held_out[0]))
    assert share > 0.5 or len(moved) > 3  # not always the same one
    again = pack(tmp_path / "again", texts, tokenizer, validation_share=share, seed=7)
    assert again.fingerprint("validation") == packed.fingerprint("validation")


def test_validation_documents_of_their_own(tmp_path):
    packed = pack(tmp_path / "packed", validation_documents=documents_of("held out"))
    assert contents(packed, "validation") == [ids_of("held out", byte_tokenizer())]
    assert packed.num_documents("train") == 3


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ([], {}, ValueError, "documents: expected text, got 0 empty documents"),
        (["", " "], {}, ValueError, "expected text, got 2 empty documents"),
        (["a", ""], {"validation_share": 0.01}, ValueError, "1 documents for training and 0 for"),
        (["a"], {"validation_documents": []}, ValueError, "give more validation_documents"),
        (["a"], {"validation_share": 1.0}, ValueError, "validation_share: expected a number in"),
        (["a"], {"seed": 1.5}, ValueError, "seed: expected an int"),
        (["a"], {"tokenizer": byte_tokenizer(eos=False)}, ValueError, "with an EOS token"),
        (["a"], {"tokenizer": byte_tokenizer().backend_tokenizer}, TypeError, "tokenizer_object="),
    ],
)
def test_what_cannot_be_packed_leaves_nothing(tmp_path, texts, options, error, message):
    with pytest.raises(error, match=message):
        pack(tmp_path / "packed", texts, **options)
    assert list(tmp_path.iterdir()) == []


# ---- whole or not at all ---------------------------------------------------------------------


def test_a_folder_is_used_again_by_the_same_call_only(tmp_path):
    source, other = tmp_path / "a.txt", tmp_path / "b.txt"
    source.write_text("one")
    other.write_text("two")
    folder, calls = tmp_path / "packed", []

    def again(documents=None, tokenizer=None, **options):
        options = {"validation_share": 0.0, "progress": lambda *_: calls.append(1)} | options
        documents = read_documents(source) if documents is None else documents
        return pack_documents(documents, tokenizer or byte_tokenizer(), folder, **options)

    folder.mkdir()  # one without files is as good as none
    first = again()
    assert len(calls) == 1
    assert again() == first
    os.utime(source, (0, 0))  # another time, the same content
    assert again() == first
    truncating = byte_tokenizer()
    truncating.backend_tokenizer.enable_truncation(3)  # which packing turns off
    assert again(tokenizer=truncating) == first
    assert len(calls) == 1
    held_out = read_documents(other)
    for change, message in (
        ({"documents": read_documents([source, source])}, "different documents;"),
        ({"documents": read_documents(source, skip_corrupt=True)}, "different documents;"),
        ({"documents": documents_of("one")}, "different documents;"),
        ({"tokenizer": byte_tokenizer(more=1)}, "different tokenizer;"),
        ({"validation_share": 0.5}, "different validation_share, seed;"),
        ({"validation_documents": held_out}, "different validation_documents;"),
        ({"tokenizer": byte_tokenizer(bos=True)}, "different bos_token_id, tokenizer;"),
    ):
        with pytest.raises(ValueError, match=message):
            again(**change)
    source.write_text("six")
    with pytest.raises(ValueError, match=r"different documents; choose another folder.*load"):
        again()
    assert contents(PackedFolder.load(folder)) == contents(first)


def test_documents_of_unknown_origin_are_packed_once(tmp_path):
    pack(tmp_path / "packed")
    with pytest.raises(ValueError, match="different documents; choose another folder"):
        pack(tmp_path / "packed")


def test_a_dataset_is_known_by_its_fingerprint(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict({"text": ["one", "two"]})
    saved.save_to_disk(tmp_path / "saved")
    for folder, source in (("a", saved), ("b", tmp_path / "saved")):
        for _ in range(2):
            packed = pack_documents(
                read_documents(source), byte_tokenizer(), tmp_path / folder, validation_share=0.0
            )
        assert len(contents(packed)) == 2
        with pytest.raises(ValueError, match="different documents"):
            pack_documents(
                read_documents(saved.select([0])),
                byte_tokenizer(),
                tmp_path / folder,
                validation_share=0.0,
            )


@pytest.mark.parametrize("state", ["{", "{}", "[]"])
def test_a_damaged_dataset_is_named(tmp_path, state):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text(state)
    with pytest.raises(ValueError, match=r"saved/state\.json: expected the state of a saved"):
        pack_documents(read_documents(tmp_path / "saved"), byte_tokenizer(), tmp_path / "packed")


@pytest.mark.parametrize("make", [lambda path: path.write_text(""), lambda path: path.mkdir()])
def test_a_folder_with_something_else_is_left_alone(tmp_path, make):
    folder = tmp_path / "packed"
    make(folder)
    if folder.is_dir():
        (folder / "thesis.tex").touch()
    with pytest.raises(ValueError, match="expected a folder of packed documents"):
        pack(folder)
    assert folder.exists()


def stopping(error):
    yield documents_of("one")[0]
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a.jsonl, line 7")])
def test_an_interrupted_call_leaves_nothing(tmp_path, monkeypatch, error):
    monkeypatch.setattr(packing, "CHARACTERS_AT_ONCE", 1)
    with pytest.raises(type(error)):
        pack_documents(stopping(error), byte_tokenizer(), tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_process_go(tmp_path):
    for name in (".partial-packed", ".partial-other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.tokens").touch()
    (tmp_path / ".lock-packed").touch()
    pack(tmp_path / "packed")
    assert {path.name for path in tmp_path.iterdir()} == {".partial-other", "packed"}


@pytest.mark.filterwarnings("ignore:.*waiting")  # the third may wait a second time
@pytest.mark.parametrize("fails", [False, True])
def test_of_calls_at_once_one_writes_and_the_others_wait_for_it(tmp_path, fails):
    """If the first one fails, the next one tries."""
    (tmp_path / "a.txt").write_text("one")
    begun, goes_on, calls = Event(), Event(), []

    def tell(*_):
        calls.append(1)
        begun.set()
        assert goes_on.wait(60)
        if fails and len(calls) == 1:
            raise OSError("a full disk")

    def call():
        documents = read_documents(tmp_path / "a.txt")
        options = {"validation_share": 0.0, "progress": tell}
        return pack_documents(documents, byte_tokenizer(), tmp_path / "packed", **options)

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(call)
        assert begun.wait(60)
        with pytest.warns(UserWarning, match="packed: waiting for the process that is writing it"):
            others = submitted_and_waiting(pool, call)
        goes_on.set()
    whole = contents(PackedFolder.load(tmp_path / "packed"))
    assert [contents(future.result()) for future in others] == [whole, whole]
    assert isinstance(first.exception(), OSError if fails else NoneType)
    assert len(calls) == 1 + fails
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "packed"}


def submitted_and_waiting(pool, call):
    futures = [pool.submit(call) for _ in range(2)]
    assert not wait(futures, timeout=0.5).done
    return futures


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    """Files may grow to 4 KiB only: the kernel refuses the write as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"expected to write into.*make room") as caught:
            pack(tmp_path / "packed", ["text " * 5000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_damaged_folders_are_refused(tmp_path):
    packed = pack(tmp_path / "packed")
    tokens, metadata = packed.path / "train.tokens", packed.path / "packed.json"
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"train.tokens: expected {len(content)} bytes, got"):
        PackedFolder.load(packed.path)
    tokens.unlink()
    with pytest.raises(ValueError, match="got no file; delete the folder and pack again"):
        PackedFolder.load(packed.path)
    metadata.write_text(json.dumps({"format": 0}))
    with pytest.raises(ValueError, match="packed documents of format 1, got 0"):
        PackedFolder.load(packed.path)
    metadata.write_text("{")
    with pytest.raises(ValueError, match=r"packed\.json: expected JSON"):
        PackedFolder.load(packed.path)
