"""`drope recalibrate`: fields, YAML files, recipes, and the page that tells of them."""

from __future__ import annotations

import re

import pytest
from repository import ROOT

from drope_kernels.cli import main
from drope_kernels.recalibrate.other_names import OTHER_NAMES
from drope_kernels.recalibrate.recipes import recipe_file, recipe_names
from drope_kernels.recalibrate.run_config import RunConfig, read_run_config

PATHS = ["--model", "m", "--data", "d", "--output_dir", "o"]

TABLE = {  # tokens a step, steps, billions of tokens, warm-up, learning rate, norms
    "llama2_7b_drope": (512 * 4096, 5_000, 10.5, 100, 1e-4, "none"),
    "llama2_7b_drope_qk_norm": (512 * 4096, 15_000, 31.5, 100, 3e-4, "full"),
    "smollm_1_7b_drope": (512 * 2048, 120_000, 125.8, 600, 3e-4, "none"),
    "smollm_1_7b_drope_qk_norm": (512 * 2048, 120_000, 125.8, 600, 3e-4, "full"),
    "smollm_360m_drope": (512 * 2048, 120_000, 125.8, 0, 3e-4, "none"),
    "smollm_360m_drope_qk_norm": (512 * 2048, 120_000, 125.8, 0, 3e-4, "full"),
    "smollm2_1_7b_drope": (512 * 8192, 120_000, 503.3, 0, 3e-4, "none"),
    "smollm2_1_7b_drope_qk_norm": (512 * 8192, 120_000, 503.3, 0, 3e-4, "full"),
    "paper_494m": (1_048_576, 2_000, 2.1, 70, 1e-3, "none"),
    "paper_smollm_360m": (1_048_576, 30_000, 31.46, 490, 1e-3, "full"),
    "smollm2_135m": (524_288, 1_908, 1.0, 38, 3e-4, "none"),
    "smollm2_135m_qk_norm": (524_288, 1_908, 1.0, 38, 1e-3, "head"),
}


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("name", TABLE)
def test_recipes_are_the_published_runs(name, devices):
    per_step, steps, billions, warmup, rate, norm = TABLE[name]
    config = read_run_config(["--recipe", name, *PATHS])
    context = config.context_length
    settings = config.recalibration(context, devices)
    total = settings.total_steps(devices)
    assert config.tokens_per_step(context, devices) == per_step
    assert settings.tokens_per_step * devices == per_step
    assert total == steps
    assert total * per_step == pytest.approx(billions * 1e9, rel=3e-3)
    assert settings.warmup_steps(total) == warmup
    assert (config.learning_rate, config.qk_norm, config.recipe) == (rate, norm, name)
    authors = name.endswith(("_drope", "_drope_qk_norm"))
    assert settings.adam_betas == ((0.9, 0.999) if authors else (0.9, 0.95))
    assert settings.weight_decay == (0.0 if authors else 0.1)
    if name.startswith("smollm_1_7b"):
        assert settings.decay_steps(total) == 23_400
        assert settings.scheduler(total)[1]["min_lr_ratio"] == 0.1


def test_every_recipe_is_in_the_table_and_says_where_it_is_from(capsys):
    assert set(TABLE) == set(recipe_names())
    for name in TABLE:
        comment = recipe_file(name).read_text()
        assert "arXiv" in comment or "260a8bb" in comment
        assert ("Not measured on a GPU" in comment) == name.startswith("smollm2_135m")
    assert main(["recalibrate", "--list_recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^{name} +\S", shown, re.MULTILINE) for name in TABLE)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_recipe(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "recipe: llama2_7b_drope\nmodel: m\ndata: texts\noutput_dir: o\n"
        "learning_rate: 5e-5\nadam_betas: [0.8, 0.9]\ndrop: [1, 0]\ntokens: 4_000_000\nbf16: no\n"
    )
    config = read_run_config([str(file), "--learning-rate", "7e-5", "--no-resume"])
    assert (config.learning_rate, config.adam_betas) == (7e-5, [0.8, 0.9])
    assert (config.tokens, config.steps) == (4_000_000, None)  # the recipe's steps gave way
    assert (config.data, config.layers(), config.warmup) == (["texts"], [0, 1], 100.0)
    assert (config.bf16, config.resume, config.sharded) == (False, False, True)
    config = read_run_config([str(file), "--gradient_accumulation", "3", "--steps", "2"])
    assert (config.sequences_per_step, config.gradient_accumulation) == (None, 3)
    assert (config.steps, config.tokens) == (2, None)


@pytest.mark.parametrize("text", ["1e6", "1_000_000", "1000000", "1.0e+6", "10e5"])
def test_a_whole_number_is_written_as_people_write_it(text, tmp_path):
    config = read_run_config([*PATHS, "--tokens", text, "--length_sweep", "1e0", "2"])
    assert (config.tokens, config.length_sweep) == (1_000_000, [1, 2])
    file = tmp_path / "run.yaml"
    file.write_text(f"tokens: {text}\nlength_sweep: [1e0, 2]\nbatch_size: 2e0\n")
    config = read_run_config([str(file), *PATHS])
    assert (config.tokens, config.length_sweep, config.batch_size) == (1_000_000, [1, 2], 2)
    assert isinstance(config.tokens, int)


@pytest.mark.parametrize("text", ["1e-6", "1.5", "inf", "nan", "", "ten", "1e6x"])
def test_what_is_no_whole_number_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(f"tokens: invalid int value: {text!r}")):
        read_run_config([*PATHS, "--tokens", text])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("lr", "learning_rate"),
        ("max-seq-length", "context_length"),
        ("per_device_train_batch_size", "batch_size"),
        ("gradient_accumulation_steps", "gradient_accumulation"),
        ("gradient_checkpointing", "activation_checkpointing"),
        ("warmup_ratio", "warmup"),
        ("out", "output_dir"),
    ],
)
def test_a_field_is_found_by_the_name_it_has_elsewhere(theirs, ours, tmp_path):
    with pytest.raises(ValueError, match=rf"--{theirs}; did you mean --{ours}\?$"):
        read_run_config([*PATHS, f"--{theirs}", "1"])
    file = tmp_path / "run.yaml"
    file.write_text(f"{theirs}: 1\n")
    with pytest.raises(ValueError, match=rf"'{theirs}'; did you mean {ours}\?$"):
        read_run_config([str(file), *PATHS])


def test_names_that_fields_have_elsewhere_are_theirs_alone():
    """Each names one of our fields, and is none itself."""
    words = [word for others in OTHER_NAMES.values() for word in others.split()]
    assert len(set(words)) == len(words)
    fields = set(RunConfig.__dataclass_fields__)
    assert set(OTHER_NAMES) <= fields
    assert not fields & set(words)


WRONG_SETTINGS = {
    "option": (["--learning_rat", "3"], "unknown option --learning_rat; did you mean --learning_r"),
    "no option": (["--frobnicate"], "--help lists the fields"),
    "argument": (["run.yaml", "--steps", "3", "more"], "unexpected argument 'more'"),
    "type": (["--steps", "many"], "steps: invalid int value: 'many'"),
    "choice": (["--attention", "flash"], "attention: invalid choice: 'flash'"),
    "recipe": (["--recipe", "llama2_drope"], "did you mean llama2_7b_drope?"),
    "no length": (PATHS, "steps, tokens: expected exactly one"),
    "no model": (["--data", "d", "--output_dir", "o", "--steps", "3"], "model: expected --model"),
    "layers": ([*PATHS, "--steps", "3", "--drop", "every"], "drop: expected all, none, or layers"),
    "norm": (
        [*PATHS, "--steps", "3", "--drop", "none", "--qk_norm", "full"],
        "qk_norm: expected none with --drop none",
    ),
    "rate": ([*PATHS, "--steps", "3", "--learning_rate", "-1"], "learning_rate: expected a number"),
    "sweep": ([*PATHS, "--steps", "3", "--length_sweep", "0"], "length_sweep: expected numbers"),
    "no file": (["run.yaml"], "config: expected a YAML file, got run.yaml"),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_wrong_settings_are_one_sentence(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given, message = WRONG_SETTINGS[case]
    assert main(["recalibrate", *given]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 3", "unknown field 'learning_rte'; did you mean learning_rate?"),
        ("steps: 1.5", "steps: invalid int value: '1.5'"),
        ("schedule: step\nsteps: 3", "schedule: expected one of cosine"),
        ("adam_betas: [a, b]", "adam_betas: expected floats"),
        ("steps: {a: 1}", "steps: expected one value, got a mapping"),
        ("- a\n- b", "expected a mapping of fields, got list"),
        ("a: [", "expected YAML"),
    ],
)
def test_wrong_files_are_named(text, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_run_config([str(file), *PATHS])
    assert text.startswith("schedule") or str(file) in str(caught.value)


def test_the_help_and_the_page_name_every_field(capsys):
    assert main(["recalibrate", "--help"]) == 0
    shown = capsys.readouterr().out
    page = (ROOT / "docs" / "recalibrate.md").read_text()
    for name in RunConfig.__dataclass_fields__:
        assert f"--{name}" in shown
        assert re.search(rf"`{name}`", page), name
    for name in recipe_names():
        assert f"`{name}`" in page
