"""`drope demo`: the text it ships, its sequences, the whole line in a moment, and what it shows."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("tokenizers")

from held_folders import held_by_another

from drope_kernels.cli import main
from drope_kernels.console.locks import lock_beside
from drope_kernels.demo.config import DemoConfig
from drope_kernels.demo.corpus import load_corpus
from drope_kernels.demo.findings import caveats, findings
from drope_kernels.demo.mixture import ANSWER_WEIGHT, training_sequences
from drope_kernels.demo.plan import (
    DROPE,
    Measurement,
    Training,
    lanes,
    pretraining,
    recalibration,
    row_order,
)
from drope_kernels.demo.stages import AMONG_FOUR, Workplace, measure, sweep_data, train
from drope_kernels.evaluate import MeanLoss, Proportion, SweepRow

START_SECONDS = 120  # for a child's imports on a busy machine


@pytest.fixture(scope="module")
def corpus():
    return load_corpus()


def test_shipped_text_is_what_the_manifest_says():
    texts = files("drope_kernels.demo") / "texts"
    manifest = dict(
        reversed(line.split("  ", 1))
        for line in (texts / "MANIFEST.sha256").read_text().splitlines()
    )
    with (
        (texts / "python_docs.tar.xz").open("rb") as packed,
        tarfile.open(fileobj=packed, mode="r:xz") as archive,
    ):
        found = {
            member.name: hashlib.sha256(archive.extractfile(member).read()).hexdigest()
            for member in archive
        }
    assert found == manifest
    documents = {
        split: {n.split("/", 1)[1] for n in found if n.startswith(split)}
        for split in ("train", "held_out")
    }
    assert not documents["train"] & documents["held_out"]
    assert len(documents["held_out"]) > 40
    licence = (texts / "LICENSE").read_text()
    assert "PSF LICENSE AGREEMENT FOR PYTHON 3.11.2" in licence
    assert "Copyright © 2001-2023 Python Software Foundation" in licence
    assert sum(path.stat().st_size for path in texts.iterdir()) < 4e6


def test_corpus_tokens(corpus):
    assert corpus.text_vocab_size == 512
    assert corpus.vocab_size == 576
    assert len(corpus.names) == len(corpus.values) == 32
    assert int(corpus.train.max()) < 512
    assert int(corpus.held_out.max()) < 512
    assert len(corpus.train) > 3_000_000
    assert len(corpus.held_out) > 500_000


def test_training_sequences(corpus):
    columns = training_sequences(corpus, 64, 4000, seed=1)
    ids, weights = columns["input_ids"], columns["loss_weights"]
    assert ids.shape == weights.shape == (4000, 64)
    names = torch.tensor(corpus.names)[:, 0]
    values = torch.tensor(corpus.values)[:, 0]
    heavy = weights == ANSWER_WEIGHT
    assert torch.equal(heavy | (weights == 1.0), torch.ones_like(heavy))
    assert torch.isin(ids[heavy], values).all()
    with_needles = torch.isin(ids, names).any(dim=1)
    assert with_needles.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(heavy.any(dim=1), with_needles)
    for row in torch.nonzero(heavy.any(dim=1)).flatten()[:300].tolist():
        tokens = ids[row].tolist()
        for at in torch.nonzero(heavy[row]).flatten().tolist():
            line = tokens[at - 1 : at + 1]  # NAME VALUE, said before in that order
            assert any(tokens[i : i + 2] == line for i in range(at - 4))
            assert tokens[at - 2] == tokens[at + 1] == corpus.newline


def test_training_sequences_repeat_with_the_seed_only(corpus):
    draws = [training_sequences(corpus, 64, 50, seed)["input_ids"] for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    with pytest.raises(ValueError, match="length: expected at least 32 tokens, got 31"):
        training_sequences(corpus, 31, 1, seed=0)


def test_the_plan_gives_every_row_an_equal_budget():
    config = DemoConfig()
    stages = [stage for lane in lanes(config) for stage in lane]
    steps = {stage.name: stage.steps for stage in stages if isinstance(stage, Training)}
    assert steps["nope"] == steps["rope"] + steps["drope"]
    assert steps["control"] == steps["drope"]
    trained: set[str] = set()
    for stage in stages:  # one process can do them in this order
        if isinstance(stage, Training):
            assert stage.start is None or stage.start in trained
            trained.add(stage.name)
        else:
            assert stage.weights in trained
    titles = [stage.title for stage in stages]
    assert len(titles) == len(set(titles))
    assert len(row_order(config)) == len(set(row_order(config))) == 12


def test_weights_that_nobody_trains_are_an_error(corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match="nobody is left to train it"):
        Workplace(DemoConfig(), corpus, tmp_path).load("drope")


def row_with(name, right, loss):
    lengths = DemoConfig().lengths
    score = {length: Proportion(right, 100) for length in lengths}
    losses = {length: MeanLoss((loss - 0.1, loss, loss + 0.1), 300) for length in lengths}
    return SweepRow(name, {"1 needle": score, AMONG_FOUR: score}, losses, losses, [])


def test_findings_claim_no_more_than_the_rows():
    config = DemoConfig()
    rows = [row_with(name, 97, 3.0) for name in row_order(config)]
    rows[0] = row_with(rows[0].name, 18, 4.0)  # RoPE as is
    rows[3] = row_with(rows[3].name, 100, 2.5)  # YaRN
    sentences = findings(rows, config)
    assert "higher than RoPE as is 0.18 [0.12-0.27]; not separated from RoPE + PI" in sentences[0]
    assert "LOWER" not in sentences[0]
    assert "better than RoPE as is 4.000 (-1.000); not separated from dropped" in sentences[1]
    assert "WORSE than RoPE + YaRN 2.500 (+0.500)" in sentences[2]
    rows[3] = row_with(rows[3].name, 100, 2.5)
    rows = [row_with(r.name, 50, 3.0) if r.name.startswith(DROPE) else r for r in rows]
    assert "LOWER than RoPE + PI 0.97" in findings(rows, config)[0]
    text = " ".join(caveats(config, {"fit": {"betas": {128: 1.1}, "c": 0.14}}))
    for words in ("smears keys", "Nothing was selected", "1.10 at 128", "c = 0.140"):
        assert words in text


@pytest.mark.plain_memory
@pytest.mark.parametrize("processes", [1, 2])
def test_quick_demo(processes, tmp_path, capfd):
    out = tmp_path / "report"
    arguments = ["demo", "--quick", "--out", str(out), "--processes", str(processes)]
    assert main(arguments) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    found = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in found["rows"]] == row_order(DemoConfig())
    assert found["settings"]["pretrain_steps"] == 12
    assert set(found["temperature_fits"]["fit the temperature"]["betas"]) == {"128", "256"}
    shown = capfd.readouterr().out
    for text in (
        "pretrain with RoPE",
        "Retrieval, 4 needles",
        "smears keys",
        "DroPE, c=0.2",
        "SHORTENED",
    ):
        assert text in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{file}"], "expected a folder, got the file"),
        (["--out", "{full}"], "with other files"),
        (["--out", "{missing}/report"], "writable parent folder"),
        (["--out", "{new}", "--steps", "0"], "pretrain_steps: expected at least 1, got 0"),
        (["--out", "{new}", "--recalibration-steps", "-3"], "recalibration_steps: .*got -3"),
        (["--out", "{new}", "--seed", "-1"], "seed: expected a number >= 0, got -1"),
        (["--out", "{new}", "--backend", "other"], "backend"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("kept")
    places = {name: tmp_path / name for name in ("file", "full", "missing", "new")}
    start = time.perf_counter()
    assert main(["demo", *(argument.format(**places) for argument in arguments)]) == 2
    assert time.perf_counter() - start < 30
    error = capsys.readouterr().err
    assert error.startswith("drope demo: ")
    assert re.search(message, error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
    assert (tmp_path / "full" / "notes").read_text() == "kept"


def running_in_group(group):
    """Processes of a process group that still run; dead ones nobody has waited for do not count."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, _, process_group = stat.read_text().rsplit(")", 1)[1].split()[:3]
            if int(process_group) == group and state != "Z":
                found.append(stat.parent.name)
    return found


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_leaves_nothing(sent, tmp_path):
    """Interrupted while both processes train: no report, no temporary files, no processes."""
    out, scratch = tmp_path / "report", tmp_path / "scratch"
    scratch.mkdir()
    program = (  # SIGINT as a terminal leaves it: a shell's background jobs inherit it ignored
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from drope_kernels.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, "demo", "--out", str(out)]
    child = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in child.stdout:
        if line.startswith("pretrain with RoPE ..."):
            break
    time.sleep(1)
    os.killpg(child.pid, sent)  # as a terminal does: to the children too
    try:
        _, error = child.communicate(timeout=START_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        raise
    assert child.returncode == (130 if sent == signal.SIGINT else 128 + signal.SIGTERM)
    if sent == signal.SIGINT:
        assert "was not touched" in error
    assert not out.exists()
    left = [path.name for path in scratch.iterdir() if not path.name.startswith("torchinductor")]
    assert left == []
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    deadline = time.monotonic() + 10  # multiprocessing's own tracker ends a moment later
    while running_in_group(child.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert running_in_group(child.pid) == []


@pytest.mark.slow  # a minute
@pytest.mark.plain_memory
def test_rope_collapses_and_drope_does_not(corpus, tmp_path):
    """The demo's own setting and cases, only the stages this needs; a shorter recalibration."""
    config = DemoConfig(recalibration_steps=1000)
    place = Workplace(config, corpus, tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(pretraining(config), place, advance=lambda steps: None)
        train(recalibration(config), place, advance=lambda steps: None)
        data = sweep_data(place)
        cell = (AMONG_FOUR, config.longest)
        data = replace(
            data,
            lengths=(config.context,),
            needles={cell: data.needles[cell]},
            windows=data.windows[:1, : config.context],
        )
        scores = {}
        for stage in (
            Measurement("RoPE", "rope", "as is"),
            Measurement("DroPE", "drope", None, 0.2),
        ):
            row = measure(stage, place, data, advance=lambda cells: None)
            scores[stage.title] = row.retrieval[AMONG_FOUR][config.longest]
    finally:
        torch.set_num_threads(threads)
    print(scores)
    assert scores["RoPE"].mean < 0.4
    assert scores["DroPE"].mean > 0.9


def test_a_second_demo_in_one_folder_is_refused(tmp_path, capsys):
    out = tmp_path / "new"
    with held_by_another(out, lock_beside(out)) as pid:
        assert main(["demo", "--quick", "--out", str(out)]) == 2
    message = f"got {out}, which is held by process {pid}"
    assert message in capsys.readouterr().err
    assert not out.exists()
