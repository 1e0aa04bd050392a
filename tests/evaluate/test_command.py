"""`drope evaluate`: whole runs on tiny models, and every refusal before weights are read."""

from __future__ import annotations

import itertools
import json
import re
import sys
import tarfile
from importlib.resources import files
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from held_folders import held_by_another
from hf_models import build
from transformers import PreTrainedTokenizerFast

from drope_kernels.cli import main
from drope_kernels.console.locks import lock_beside
from drope_kernels.evaluate import SweepData
from drope_kernels.evaluate import run as run_module
from drope_kernels.evaluate.command import BAD_ARGUMENTS, FAILED, INTERRUPTED
from drope_kernels.evaluate.inputs import InputChoice, Inputs
from drope_kernels.evaluate.plan import ModelPlan
from drope_kernels.evaluate.remarks import caveats
from drope_kernels.hf import DropState, drop_positions

VOCABULARY = 576
TRAIN = 128
QUICK = ["--windows", "2", "--cases", "2", "--last-targets", "32"]
EVERY_FORM = [
    "RoPE as is",
    "RoPE + PI",
    "RoPE + NTK",
    "RoPE + dynamic NTK",
    "RoPE + YaRN",
    "dropped",
    "dropped, fitted temperature",
]


def shipped_tokenizer(**special):
    path = files("drope_kernels.demo") / "texts" / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(path), **special)


def save(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A RoPE model, a position-free one and its control, others, and text."""
    place = tmp_path_factory.mktemp("models")
    tokenizer = shipped_tokenizer()
    options = {"vocab_size": VOCABULARY, "max_position_embeddings": TRAIN}
    save(build("llama", **options), place / "rope", tokenizer)
    free = drop_positions(build("llama", **options))
    free.config.drope["recalibration"] = {"context_length": TRAIN, "tokens": 4096}
    save(free, place / "free", tokenizer)
    control = build("llama", **options)
    notes = {"recalibration": {"context_length": TRAIN, "tokens": 4096}}
    DropState(notes=notes).into_config(control.config)
    save(control, place / "control", tokenizer)
    save(build("llama", **options), place / "bare")
    save(build("llama", **{**options, "vocab_size": 600}), place / "other", more_words())
    archive = files("drope_kernels.demo") / "texts" / "python_docs.tar.xz"
    with archive.open("rb") as packed, tarfile.open(fileobj=packed, mode="r:xz") as members:
        held_out = [x for x in members.getmembers() if x.name.startswith("held_out")][:4]
        for index, member in enumerate(held_out):
            content = members.extractfile(member).read()[:8000]
            (place / f"text{index}.txt").write_bytes(content)
    (place / "short.txt").write_text("Too short.")
    (place / "broken").mkdir()
    (place / "broken" / "config.json").write_text("{")
    return place


def more_words():
    tokenizer = shipped_tokenizer()
    tokenizer.add_tokens(["<more>"])
    return tokenizer


def texts(place):
    return [str(path) for path in sorted(place.glob("text?.txt"))]


def evaluate(place, *words, text=None):
    return main(["evaluate", *words, "--text", *(text or texts(place))])


def test_a_rope_model_gets_every_row(place, tmp_path, capsys):
    out = tmp_path / "report"
    words = [str(place / "rope"), "--lengths", "1x,2x,4x", "--tasks", "single", *QUICK]
    assert evaluate(place, *words, "--out", str(out), "--seeds", "0,1") == 0
    found = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in found["rows"]] == EVERY_FORM
    assert found["lengths"] == [TRAIN, 2 * TRAIN, 4 * TRAIN]
    assert found["train_length"] == TRAIN
    betas = found["temperature_fits"]["rope"]["betas"]
    assert set(betas) == {str(2 * TRAIN), str(4 * TRAIN)}
    for row in found["rows"]:
        cell = row["retrieval"]["single"][str(TRAIN)]
        assert cell["cases"] == 4
        assert sum(x["cases"] for x in cell["by_depth"].values()) == 4
        assert set(cell["by_seed"]) == {"0", "1"}
        assert row["last_loss"][str(TRAIN)]["num_targets"] == 2 * 32
        assert row["by_position"][-1]["stop"] == 4 * TRAIN
    names = {path.name for path in out.iterdir()}
    assert {"report.json", "report.md", "retrieval_by_depth.png", "text_loss.png"} <= names
    markdown = (out / "report.md").read_text()
    assert "No row was recalibrated" in markdown
    assert "![retrieval_by_depth](retrieval_by_depth.png)" in markdown
    assert f"c = {found['temperature_fits']['rope']['c']:.3f}" in markdown
    assert str(place) not in markdown  # folders are nobody's business
    shown = capsys.readouterr()
    assert "RoPE + dynamic NTK" in shown.out
    assert "s left" in shown.err


def test_compared_models_read_the_same(place, tmp_path):
    out = tmp_path / "report"
    words = [str(place / "free"), "--compare", f"{place / 'control'}", "--tasks", "none"]
    words += ["--compare", f"{place / 'bare'}:again", "--lengths", "1x,2x", *QUICK]
    assert evaluate(place, *words, "--out", str(out)) == 0
    found = json.loads((out / "report.json").read_text())
    rows = {row.pop("name"): row for row in found["rows"]}
    assert list(rows) == [
        "free: position-free",
        "free: position-free, fitted temperature",
        "control: RoPE as is",
        "control: RoPE + YaRN",
        "again: RoPE as is",
        "again: RoPE + YaRN",
    ]
    assert rows["control: RoPE as is"] == rows["again: RoPE as is"]
    assert found["caveats"][0].startswith("Control: control (4096 tokens), RoPE kept")
    assert found["findings"][0].count("control: RoPE as is") == 1
    assert not (out / "retrieval.png").exists()


def test_a_run_and_its_control_are_compared(place, tmp_path, monkeypatch):
    """As docs/recalibrate.md has it: both folders are called model."""
    for name in ("run", "control"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").symlink_to(place / ("free" if name == "run" else name))
    monkeypatch.chdir(tmp_path)
    words = ["run/model", "--compare", "control/model", "--tasks", "none", "--methods", "as_is"]
    assert evaluate(place, *words, "--lengths", "1x", *QUICK) == 0
    found = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    rows = ["run/model: position-free", "control/model: RoPE as is"]
    assert [row["name"] for row in found["rows"]] == rows
    assert found["settings"]["command"].startswith("drope evaluate run/model --")
    assert "--compare control/model " in found["settings"]["command"]
    same = ["run/model", "--compare", "run/model", "--out", "again"]
    assert evaluate(place, *same) == BAD_ARGUMENTS


def test_a_gguf_file_is_a_model_and_jsonl_is_text(place, tmp_path):
    pytest.importorskip("gguf")
    from gguf_files import VOCABULARY as WORDS
    from gguf_files import write_gguf

    options = {"vocab_size": WORDS, "max_position_embeddings": TRAIN, "hidden_size": 64}
    model = build("llama", **options, tie_word_embeddings=True)
    file = write_gguf(tmp_path / "tiny.gguf", model)
    lines = [{"content": path.read_text()} for path in sorted(place.glob("text?.txt"))]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "report"
    words = [f"{file}:tiny", "--methods", "as_is,yarn", "--tasks", "none", *QUICK]
    words += ["--text-column", "content", "--lengths", "1x,2x", "--out", str(out)]
    assert evaluate(place, *words, text=[str(tmp_path / "text.jsonl")]) == 0
    found = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["RoPE as is", "RoPE + YaRN"]
    assert found["settings"]["models"] == ["tiny (tiny.gguf)"]
    assert found["settings"]["documents"] == len(lines)


def test_methods_lengths_and_attention_are_those_asked_for(place, tmp_path):
    found = {}
    for attention in ("kernels", "eager"):
        out = tmp_path / attention
        words = [str(place / "rope"), "--methods", "yarn,as_is", "--lengths", "64,256"]
        words += ["--tasks", "none", "--attention", attention, "--dtype", "bfloat16", *QUICK]
        words += ["--train-length", "64"]
        assert evaluate(place, *words, "--out", str(out)) == 0
        found[attention] = json.loads((out / "report.json").read_text())
    rows = {name: report["rows"] for name, report in found.items()}
    assert [row["name"] for row in rows["eager"]] == ["RoPE as is", "RoPE + YaRN"]
    for ours, stock in zip(rows["kernels"], rows["eager"], strict=True):
        for length in ("64", "256"):
            mean = stock["text_loss"][length]["mean"]
            assert ours["text_loss"][length]["mean"] == pytest.approx(mean, rel=2e-2)
    said = "rope: its config allows 128 positions, so that RoPE beyond 64 tokens need not be"
    assert any(said in sentence for sentence in found["eager"]["caveats"])
    settings = found["eager"]["settings"]
    assert (settings["attention"], settings["dtype"]) == ("eager", "bfloat16")
    assert settings["train_length"] == 64


def test_a_report_says_what_control_it_has():
    def plan(positions, tokens):
        name = f"{positions} {tokens}"
        return ModelPlan(name, Path(name), positions, ("as_is",), {}, 4, False, tokens)

    def said(*plans):
        inputs = SweepData((4,), {}, torch.zeros(2, 4, dtype=torch.int64), 1)
        return caveats([], plans, InputChoice(), Inputs(inputs, inputs, 9, 1), {})[0]

    assert said(plan("rope", None)).startswith("No row was recalibrated")
    for tokens in (None, 4):  # the original, or another budget
        sentence = said(plan("position-free", 5), plan("rope", tokens))
        assert sentence.startswith("No control of position-free 5: by what")
    sentence = said(plan("position-free", 5), plan("rope", None), plan("rope", 5))
    assert sentence.startswith("Control: rope 5 (5 tokens), RoPE kept, trained on as many tokens")
    assert "No control" not in sentence
    sentence = said(plan("position-free", 5), plan("partly dropped", 6), plan("rope", 5))
    assert "as many tokens as position-free 5, by" in sentence
    assert "No control of partly dropped 6" in sentence
    sentence = said(plan("position-free", None), plan("rope", None))
    assert sentence.startswith("No control of position-free None")
    assert sentence.endswith(
        "Whether position-free None learned without positions is not recorded."
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "expected a directory with config.json or a .gguf file, got nowhere"),
        (["{bare}"], "source: expected a tokenizer in"),
        (["{broken}"], "not a valid JSON file"),
        (["{rope}", "--methods", "yarm"], "methods: expected as_is, .*did you mean yarn"),
        (["{rope}", "--tasks", "multikey"], "tasks: expected single, .*did you mean multi-key"),
        (["{free}", "--methods", "as_is,pi"], "no model can be measured with pi .*position-free"),
        (["{free}", "--methods", "dropped"], "no model can be measured with dropped"),
        (["{rope}", "--methods", "yarn", "--lengths", "1x"], "no length exceeds the training"),
        (["{rope}", "--lengths", "1x,3y"], "lengths: expected whole numbers of tokens"),
        (["{rope}", "--lengths", "4,8"], "lengths: expected 16 tokens or more as the greatest"),
        (["{rope}", "--lengths", "3x,4x"], "expected divisors of the greatest one"),
        (["{rope}", "--lengths", "1x,512x"], r"at least 655360 tokens \(8 windows of 65536"),
        (["{rope}", "--tasks", "multi-key", "--lengths", "0.5x,1x"], "tokens for needles and"),
        (["{rope}", "--train-length", "0"], "train-length: expected at least 2 tokens, got 0"),
        (["{rope}", "--seeds", "1,1"], "seeds: expected different numbers"),
        (["{rope}", "--seeds", "one"], "seeds: expected ints with commas between, got 'one'"),
        (["{rope}", "--depths", "0,2"], "depths: expected numbers in"),
        (["{rope}", "--max-tokens", "0"], "max-tokens: expected at least 1, got 0"),
        (["{rope}", "--cases", "0"], "num_cases: expected at least 1"),
        (["{rope}", "--compare", "{free}:rope"], "expected a name of its own for each model"),
        (["{rope}", "--compare", "{other}"], "expected the tokenizer of the first model"),
        (["{rope}", "--out", "{place}"], "expected a new folder or an earlier report"),
    ],
)
def test_refusals_come_before_weights(place, tmp_path, monkeypatch, capsys, words, message):
    def loaded(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(run_module, "load_model", loaded)
    names = {name: place / name for name in ("rope", "free", "bare", "other", "broken")}
    words = [word.format(place=place, **names) for word in words]
    out = [] if "--out" in words else ["--out", str(tmp_path / "report")]
    assert evaluate(place, *words, *out) == BAD_ARGUMENTS
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("drope evaluate: ")
    assert re.search(message, error), error
    assert not (tmp_path / "report").exists()


def test_ids_beyond_the_embedding_count_where_a_text_has_them(place, tmp_path, capsys):
    """Gemma 3 has such an id, which no text gets."""
    out = ["--out", str(tmp_path / "report")]
    words = [str(place / "rope"), "--tokenizer", str(place / "other"), "--methods", "as_is"]
    words += ["--lengths", "1x", "--tasks", "single", *QUICK]
    assert evaluate(place, *words, *out) == 0
    (tmp_path / "more.txt").write_text("A word that is <more> than the model has.")
    text = [*texts(place), str(tmp_path / "more.txt")]
    assert evaluate(place, *words, "--out", str(tmp_path / "other"), text=text) == BAD_ARGUMENTS
    said = "expected token ids below rope's vocab_size 576, got up to 576"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_missing_package_is_named(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert evaluate(place, str(place / "rope")) == BAD_ARGUMENTS
    assert "pip install 'drope_kernels[eval]'" in capsys.readouterr().err


def test_text_that_cannot_be_read_is_refused(place, tmp_path, capsys):
    words = [str(place / "rope"), "--out", str(tmp_path / "report")]
    assert evaluate(place, *words, text=[str(place / "absent.txt")]) == BAD_ARGUMENTS
    assert "absent.txt" in capsys.readouterr().err
    assert evaluate(place, *words, text=[str(place / "short.txt")]) == BAD_ARGUMENTS
    assert "text: expected at least" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), INTERRUPTED), (RuntimeError("no room"), FAILED)]
)
def test_a_failed_run_leaves_the_old_report_and_its_rows(
    place, tmp_path, monkeypatch, capsys, error, status
):
    out = tmp_path / "report"
    words = [str(place / "rope"), "--methods", "as_is,dropped", "--tasks", "none"]
    words += ["--lengths", "1x", *QUICK, "--out", str(out)]
    assert evaluate(place, *words) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    whole = json.loads(before["report.json"])
    measure = run_module.measure_model

    def broken(num_rows):
        def rows(*given):
            yield from itertools.islice(measure(*given), num_rows)
            raise error

        return rows

    monkeypatch.setattr(run_module, "measure_model", broken(0))
    assert evaluate(place, *words) == status
    assert "was not touched, no row was kept" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    monkeypatch.setattr(run_module, "measure_model", broken(1))
    assert evaluate(place, *words) == status
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    kept = tmp_path / "report-unfinished"
    assert f"the rows measured before are in {kept}/" in capsys.readouterr().err
    found = json.loads((kept / "report.json").read_text())
    assert found["rows"] == whole["rows"][:1]
    expected = "The evaluation was not finished. Rows that are missing: dropped."
    assert found["findings"] == [expected]


def test_frequencies_stay_exact_in_16_bits(place, tmp_path, monkeypatch):
    found = []

    def frequencies(plan, model, conditions):
        found.append(model.get_decoder().rotary_emb.inv_freq)
        raise RuntimeError("seen")

    monkeypatch.setattr(run_module, "measure_model", frequencies)
    words = [str(place / "rope"), "--dtype", "bfloat16", "--tasks", "none", *QUICK]
    assert evaluate(place, *words, "--out", str(tmp_path / "report")) == FAILED
    stock = build("llama", max_position_embeddings=TRAIN).get_decoder().rotary_emb.inv_freq
    assert torch.equal(found[0], stock)


def test_each_model_is_scaled_from_its_own_training_length(place, tmp_path):
    longer = build("llama", vocab_size=VOCABULARY, max_position_embeddings=2 * TRAIN)
    source = save(longer, tmp_path / "Llama-3.2-long")
    out = tmp_path / "report"
    words = [str(place / "free"), "--compare", source, "--tasks", "none", "--windows", "2"]
    words += ["--lengths", "1x,2x", "--tokenizer", str(place / "rope"), "--out", str(out)]
    assert evaluate(place, *words) == 0
    found = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in found["rows"]][2:] == ["Llama-3.2-long: RoPE as is"]
    said = " ".join(found["caveats"])
    assert f"Llama-3.2-long was trained at {2 * TRAIN} tokens" in said
    assert "Llama-3.2-long has no row for yarn: no length exceeds" in said
    assert "`dropped` takes" not in said  # no such row
    command = found["settings"]["command"]
    assert "--tokenizer rope" in command
    assert str(place) not in command


def test_a_second_evaluation_in_one_folder_is_refused(place, tmp_path, capsys):
    out = tmp_path / "new"
    with held_by_another(out, lock_beside(out)) as pid:
        assert evaluate(place, str(place / "rope"), "--out", str(out)) == 2
    message = f"got {out}, which is held by process {pid}"
    assert message in capsys.readouterr().err
    assert not out.exists()
