"""Where `pack_documents` lets documents begin and end: BOS, and EOS that a text file spells."""

from __future__ import annotations

import json

import pytest
from texts import BOS, EOS, byte_tokenizer, contents, ids_of, pack
from tokenizers import processors

from drope_kernels.recalibrate import pack_documents, packing, read_documents


def test_a_text_file_is_the_documents_between_its_eos(tmp_path):
    tokenizer = byte_tokenizer()
    (tmp_path / "a.txt").write_text(f"{EOS}one{EOS}\ntwo\n{EOS}{EOS}\n{EOS}")
    (tmp_path / "b.txt").write_text(EOS)
    (tmp_path / "c.txt").write_text("three")
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": f"four{EOS}five"}))
    documents = read_documents([tmp_path / f"{x}" for x in ("a.txt", "b.txt", "c.txt", "d.jsonl")])

    def packed(name, tokenizer=tokenizer, **options):
        options = {"validation_share": 0.0} | options
        return pack_documents(documents, tokenizer, tmp_path / name, **options)

    rows = [ids_of(text, tokenizer) for text in ("one", "\ntwo\n", "three", f"four{EOS}five")]
    split = packed("split")
    assert contents(split) == rows
    assert (split.metadata["split_at_eos"], split.metadata["empty"]) == (EOS, 1)
    assert contents(packed("whole", split_at_eos=False))[2:] == rows[2:]
    drawn = packed("drawn", validation_share=0.4, seed=3)  # each is drawn by itself
    assert sorted(contents(drawn) + contents(drawn, "validation")) == sorted(rows)
    assert {drawn.num_documents(split) for split in ("train", "validation")} != {0, 4}
    with pytest.raises(ValueError, match="different split_at_eos;"):
        packed("split", split_at_eos=False)
    unlike = byte_tokenizer()  # one that reads the spelled EOS as text
    unlike.split_special_tokens = True
    unlike.backend_tokenizer.encode_special_tokens = True
    assert packed("unlike", unlike).metadata["split_at_eos"] is None


def test_documents_begin_as_the_tokenizer_begins_texts(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer(bos=True)
    texts = ["a", BOS + "b", "long " * 20, " "]  # BOS of the text itself is not doubled
    monkeypatch.setattr(packing, "CHARACTERS_AT_ONCE", 16)  # nor is there one in every piece
    packed = pack(tmp_path / "with", texts, tokenizer)
    bodies = [ids_of(text, tokenizer) for text in ("a", "b", texts[2])]
    assert contents(packed) == [[tokenizer.bos_token_id, *body] for body in bodies]
    assert contents(packed)[0] == [*tokenizer("a")["input_ids"], tokenizer.eos_token_id]
    assert packed.metadata["bos_token_id"] == tokenizer.bos_token_id == 257
    with pytest.warns(UserWarning, match="every text with '<bos>'.*will not begin so"):
        packed = pack(tmp_path / "without", ["a"], tokenizer, bos=False)
    assert contents(packed) == bodies[:1]
    held_out = pack(tmp_path / "moved", ["a", "b"], tokenizer, validation_share=0.01)
    both = contents(held_out) + contents(held_out, "validation")
    assert sorted(both) == sorted([257, *body] for body in bodies[:2])
    unlike = byte_tokenizer(bos=True)  # it has one, and begins no text with it
    unlike.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", special_tokens=[]
    )
    assert contents(pack(tmp_path / "unlike", ["a"], unlike)) == [ids_of("a", unlike)]
