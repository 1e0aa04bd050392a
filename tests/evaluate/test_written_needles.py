"""A user's text as inputs: parts, first tokens, and needles written into it as sentences."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from importlib.resources import files

import pytest
import torch

pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from drope_kernels.evaluate import WRITTEN_TASKS, write_cases
from drope_kernels.evaluate.inputs import InputChoice, draw_inputs
from drope_kernels.evaluate.tokens import encode, split_text
from drope_kernels.evaluate.written_needles import numbers_in
from drope_kernels.texts.tokens import first_token

LENGTH = 800
QUESTIONS = "Remember this: the value locker code codes of is. Question: which what are names have?"
TEXT = "The list holds 1234567 entries; sorting keeps the order of equal ones.\n" * 60


@pytest.fixture(scope="module")
def tokenizer():
    shipped = files("drope_kernels.demo") / "texts" / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(shipped))


@pytest.fixture(scope="module")
def text(tokenizer):
    return encode(tokenizer, TEXT)


class Reader:
    """Answers by reading the sentences, as a perfect model would; `answer` may spoil it."""

    def __init__(self, tokenizer, spoil=lambda answer, text: answer):
        self.tokenizer, self.spoil = tokenizer, spoil

    def __call__(self, input_ids):
        logits = torch.zeros(*input_ids.shape, len(self.tokenizer))
        for row, ids in enumerate(input_ids.tolist()):
            prompt = self.tokenizer.decode(ids[:LENGTH])
            answer = self.spoil(self._answer(prompt), prompt)
            told = ids[:LENGTH] + encode(self.tokenizer, f" {answer}").tolist() + [0] * len(ids)
            if ids == told[: len(ids)]:  # else it was given another answer's beginning
                logits[row, torch.arange(len(ids)), torch.tensor(told[1 : len(ids) + 1])] = 1.0
        return logits

    def _answer(self, prompt):
        body, question = prompt.rsplit("\nQuestion: ", 1)
        if "have the value" in question:
            holders = {re.search(r"the value (\d{7})", question)[1]}
            names = []
            for name, source in re.findall(
                r"the value of ([A-Z]{5}) is (?:the value of )?(\w+)\.", body
            ):
                if source in holders:
                    holders.add(name)
                    names.append(name)
            return ", ".join(names)
        keys = re.findall(r"[a-z]+-[a-z]+", question.split("Answer")[0])
        codes = [re.findall(rf"locker code of {key} is (\d{{7}})\.", body) for key in keys]
        return ", ".join(code for found in codes for code in found)


@pytest.mark.parametrize("task", WRITTEN_TASKS)
def test_a_reader_is_right(tokenizer, text, task):
    cases = write_cases(task, tokenizer, text, LENGTH, 2, seeds=(3, 4), taken=numbers_in(TEXT))
    scores = cases.score(Reader(tokenizer))
    assert scores.right == (True,) * 4
    assert scores.mean_share == 1.0
    assert scores.seed == (3, 3, 4, 4)
    assert {seed: score.trials for seed, score in scores.by_seed().items()} == {3: 2, 4: 2}


def spaced(tokenizer):
    """Words, lowered, and single digits, with a space between all of them when decoded."""
    words = sorted({*re.findall(r"[a-z]+|[^\sa-z\d]", f"{TEXT} {QUESTIONS}".lower())})
    letters = list("abcdefghijklmnopqrstuvwxyz")
    entries = [*words, *(f"##{x}" for x in letters), *letters, *"0123456789", "?", "[UNK]"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(entries))}
    backend = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)]
    )
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def lowered(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize("make", [lowered, spaced])
@pytest.mark.parametrize("task", WRITTEN_TASKS)
def test_answers_are_found_as_the_tokenizer_writes_them(tokenizer, task, make):
    """Each is solved by the words that were hidden, whatever becomes of them in decoding."""
    changed = make(tokenizer)
    text = encode(changed, TEXT)[:2000]
    cases = write_cases(task, changed, text, LENGTH, 3)
    for case in cases.cases:
        prompt = changed.decode(case.prompt.tolist())
        assert all(word in prompt for word in case.writing.wanted + case.writing.unwanted)
        assert not any(word.isupper() for word in case.writing.wanted)
        answer = ", ".join(word.replace(" ", "") for word in case.writing.wanted)
        told = encode(changed, f" {answer}")
        assert cases._judge(case, told)[1]
        assert len(told) <= case.num_new_tokens
        wrong = encode(changed, f" {answer[:-1]}{'1' if answer[-1] != '1' else '2'}")
        assert not cases._judge(case, wrong)[1]


@pytest.mark.parametrize("task", ["single", "multi-value"])
def test_cases_are_read_in_batches_of_bounded_size(tokenizer, text, task):
    cases = write_cases(task, tokenizer, text, LENGTH, 5)
    sizes = []

    class Watched(Reader):
        def __call__(self, input_ids):
            sizes.append(input_ids.numel())
            return super().__call__(input_ids)

    every_other = Watched(tokenizer, lambda answer, text: answer if "1" in answer else "no")
    together = cases.score(every_other, 2 * (LENGTH + 80))
    assert LENGTH < max(sizes) <= 2 * (LENGTH + 80)
    first = len(sizes)
    assert cases.score(every_other, 1) == together
    assert len(sizes) - first > first  # one by one
    assert max(sizes[first:]) < LENGTH + 80


@pytest.mark.parametrize("task", WRITTEN_TASKS)
def test_one_wrong_digit_or_letter_is_wrong(tokenizer, text, task):
    cases = write_cases(task, tokenizer, text, LENGTH, 2)
    other = {"A": "E", "E": "A"}

    def spoil(answer, _):
        if answer[-1].isdigit():
            return answer[:-1] + str((int(answer[-1]) + 1) % 10)
        return answer[:-1] + other.get(answer[-1], "A")

    scores = cases.score(Reader(tokenizer, spoil))
    assert scores.right == (False, False)
    num_wanted = len(cases.cases[0].writing.wanted)
    assert scores.mean_share == pytest.approx((num_wanted - 1) / num_wanted)


def test_listing_every_name_finds_all_but_is_wrong(tokenizer, text):
    cases = write_cases("variable tracking", tokenizer, text, LENGTH, 2)

    def every_name(_, prompt):
        return ",".join(dict.fromkeys(re.findall(r"the value of ([A-Z]{5}) is", prompt)))

    # Room for ten names, which a case does not give.
    roomy = tuple(replace(case, num_new_tokens=120) for case in cases.cases)
    scores = replace(cases, cases=roomy).score(Reader(tokenizer, every_name))
    assert scores.share == (1.0, 1.0)
    assert scores.right == (False, False)


@pytest.mark.parametrize("task", ["single", "multi-key"])
def test_depth_is_where_the_asked_needle_stands(tokenizer, text, task):
    depths = (0.0, 0.5, 1.0)
    cases = write_cases(task, tokenizer, text, LENGTH, 6, depths=depths)
    assert [case.depth for case in cases.cases] == [0.0, 0.5, 1.0] * 2
    for case in cases.cases:
        assert len(case.prompt) == LENGTH
        prompt = tokenizer.decode(case.prompt.tolist())
        body, question = prompt.rsplit("\nQuestion: ", 1)
        assert question.endswith("is")
        needles = [m.start() for m in re.finditer("Remember this", body)]
        assert len(needles) == len(case.writing.lines)
        asked = body.index(case.writing.lines[0])
        assert body.count(case.writing.wanted[0]) == 1
        lines = sum(len(line) + 2 for line in case.writing.lines)
        before = body[:asked].count("Remember this")
        share = (asked - before * lines / len(needles)) / (len(body) - lines)
        assert share == pytest.approx(case.depth, abs=0.1)
    assert cases.score(Reader(tokenizer)).by_depth().keys() == set(depths)


def test_cases_repeat_with_the_seed_and_avoid_numbers_of_the_text(tokenizer, text):
    first, again = (write_cases("multi-query", tokenizer, text, LENGTH, 2) for _ in range(2))
    other = write_cases("multi-query", tokenizer, text, LENGTH, 2, seeds=(1,))
    for one, same, different in zip(first.cases, again.cases, other.cases, strict=True):
        assert torch.equal(one.prompt, same.prompt)
        assert one.writing.wanted != different.writing.wanted
    drawn = {number for case in first.cases for number in case.writing.wanted}
    avoiding = write_cases("multi-query", tokenizer, text, LENGTH, 2, taken=frozenset(drawn))
    assert not drawn & {number for case in avoiding.cases for number in case.writing.wanted}
    assert numbers_in(TEXT) == {"1234567"}
    assert numbers_in("of 12345678.") == {"1234567", "2345678"}


def test_prompts_begin_with_the_given_token(tokenizer, text):
    plain, begun = (
        write_cases("single", tokenizer, text, LENGTH, 1, start=start) for start in (None, 5)
    )
    assert int(begun.cases[0].prompt[0]) == 5
    assert len(begun.cases[0].prompt) == len(plain.cases[0].prompt) == LENGTH


def test_text_is_split_into_a_part_to_fit_on_and_one_to_measure():
    parts = split_text(torch.arange(1000), 100, num_windows=6, num_fit_windows=2)
    assert torch.equal(torch.cat([parts.fit, parts.measured]), torch.arange(1000))
    assert len(parts.fit) == 250  # a quarter
    tight = split_text(torch.arange(800), 100, num_windows=6, num_fit_windows=2)
    assert (len(tight.fit), len(tight.measured)) == (200, 600)
    assert len(split_text(torch.arange(600), 100, 6, 0).fit) == 0
    with pytest.raises(ValueError, match=r"at least 800 tokens .* and 2 to fit"):
        split_text(torch.arange(799), 100, num_windows=6, num_fit_windows=2)


def test_every_input_begins_as_the_tokenizer_begins_a_text(tokenizer):
    assert first_token(tokenizer) is None
    beginning = copy.deepcopy(tokenizer)
    beginning.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    assert first_token(beginning) is None  # it has one but does not put it there
    backend = beginning.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", beginning.bos_token_id)]
    )
    assert first_token(beginning) == beginning.bos_token_id
    texts = [TEXT, TEXT]
    choice = InputChoice(num_windows=2, tasks=("single",), num_cases=1)
    inputs = draw_inputs(texts, beginning, (LENGTH // 2, LENGTH), choice, fits_temperature=True)
    ends = inputs.num_text_tokens - 2 * len(encode(tokenizer, TEXT))
    assert ends == 2  # an EOS after each document
    for data in (inputs.measured, inputs.fit):
        for length in data.lengths:
            pieces, plain = data.pieces(length), data.windows.reshape(-1, length)
            assert (pieces[:, 0] == beginning.bos_token_id).all()
            assert torch.equal(pieces[:, 1:], plain[:, 1:])
    for cases in inputs.measured.needles.values():
        assert cases.cases[0].prompt[0] == beginning.bos_token_id


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "multi-hop"}, "task: expected one of single, .* got 'multi-hop'"),
        ({"length": 60}, r"lengths: expected at least \d+ tokens for needles and question, got 60"),
        ({"length": 10**6}, "text: expected a 1-D int64 tensor of at least 1000000 tokens"),
    ],
)
def test_bad_arguments(tokenizer, text, changes, message):
    given = {"task": "multi-key", "length": LENGTH, **changes}
    with pytest.raises(ValueError, match=message):
        write_cases(given["task"], tokenizer, text, given["length"], 1)
