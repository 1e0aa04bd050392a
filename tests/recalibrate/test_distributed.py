"""Two processes train as one: replicated and sharded, interrupted and resumed."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import sys

import distributed_runs
import pytest
import torch
from hf_models import build, tokens
from repository import ROOT
from safetensors.torch import load_file
from training import config, counting_rows, tiny_decoder

from drope_kernels.hf import load_model
from drope_kernels.recalibrate import recalibrate
from drope_kernels.recalibrate.distributed import decoder_layers

PROGRAM = distributed_runs.__file__
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
if "PYTHONPATH" in os.environ:
    ENVIRONMENT["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def killed(folder):
    """Exit codes and last words of two processes of which the second dies, without a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, PROGRAM, str(folder), "llama-sharded:die"],
            env={**ENVIRONMENT, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        words = [process.communicate(timeout=300)[1][-4000:] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], words


@pytest.fixture(scope="module")
def two(folder, killed):
    """By the run's name, what each of two processes did under torchrun."""
    names = ["llama", *(name for name in distributed_runs.RUNS if name.endswith("-sharded"))]
    resumed = ["llama", "llama-sharded"]
    run = subprocess.run(
        [*TORCHRUN, PROGRAM, str(folder), *names, *(f"{name}:resume" for name in resumed)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    names += [f"{name}-resumed" for name in resumed]
    return {name: [read(folder / f"{name}-{rank}.pt") for rank in range(2)] for name in names}


def read(file):
    return torch.load(file, weights_only=False)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process does in a run, by the run's name and changes of its config."""

    @functools.cache
    def run(name, **changes):
        return distributed_runs.run(tmp_path_factory.mktemp("one"), name, **changes)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    torch.set_num_threads(threads)


def weights_apart(first, second):
    assert first["weights"].keys() == second["weights"].keys()
    return max(float((first["weights"][n] - w).abs().max()) for n, w in second["weights"].items())


def apart(first, second, what):
    pairs = zip(first[what], second[what], strict=True)
    return max((abs(a - b) for a, b in pairs), default=0.0)


@pytest.mark.parametrize("name", ["llama", "llama-sharded", "packed-sharded", "decoder-sharded"])
def test_two_processes_take_the_steps_of_one(two, one, name):
    """As near as one process with half the micro-batch: the same products, in another order."""
    single = name.removesuffix("-sharded")
    expected, peer = one(single), one(single, batch_size=4, gradient_accumulation=4)
    for found in two[name]:
        assert found["tokens"] == expected["tokens"] == 7 * 16 * 16
        for what in ("losses", "norms", "evaluations", "sweep"):
            rounding = 4 * torch.finfo(torch.float32).eps * max([1.0, *expected[what]])
            allowed = 8 * apart(peer, expected, what) + rounding
            assert apart(found, expected, what) <= allowed, what
        allowed = 8 * weights_apart(peer, expected)
        assert 0 < weights_apart(found, expected) <= allowed < 1e-4
    assert weights_apart(*two[name]) == 0
    assert found["attention_calls"] == expected["attention_calls"] > 0


@pytest.mark.parametrize("name", ["llama-sharded", "bf16-sharded", "decoder-sharded"])
def test_every_process_holds_a_slice_of_everything(two, name):
    assert two[name][0]["groups"] == ["", "model.layers.0", "model.layers.1"]
    first, second = (found["slices"] for found in two[name])
    assert first.keys() == second.keys() == two[name][0]["weights"].keys()
    for parameter, weight in two[name][0]["weights"].items():
        for mine, other in zip(first[parameter], second[parameter], strict=True):
            for is_slice, whole, here, dtype in (mine, other):
                assert is_slice, parameter
                assert whole == weight.shape
                assert here[1:] == whole[1:]
                assert dtype == torch.float32
            assert mine[2][0] + other[2][0] == weight.shape[0]
            assert mine[2][0] == (weight.shape[0] + 1) // 2


def test_replicas_are_whole(two):
    for found in two["llama"]:
        assert found["groups"] == []
        for name, (parameter, gradient, moment) in found["slices"].items():
            whole = (False, found["weights"][name].shape, found["weights"][name].shape)
            assert [x[:3] for x in (parameter, gradient, moment)] == [whole] * 3


def test_layers_compute_with_gathered_weights_in_the_precision_of_the_run(two, one):
    for name, dtype in (("llama-sharded", torch.float32), ("bf16-sharded", torch.bfloat16)):
        assert two[name][0]["computed_in"] == {(torch.nn.Parameter, dtype)}
    exact, autocast, found = one("llama"), one("bf16"), two["bf16-sharded"][0]
    assert 0 < apart(found, exact, "losses") < 3 * apart(autocast, exact, "losses")


def test_a_checkpoint_is_that_of_one_process(two, one):
    expected = one("llama")["folder"] / "checkpoint-7"
    for name in ("llama", "llama-sharded"):
        found = two[name][0]["folder"] / "checkpoint-7"
        files = {file.name for file in found.iterdir()}
        assert files - {f"rng_state_{rank}.pth" for rank in range(2)} == {
            file.name for file in expected.iterdir()
        } - {"rng_state.pth"}
        assert (found / "config.json").read_text() == (expected / "config.json").read_text()
        weights = load_file(found / "model.safetensors")
        assert weights.keys() == load_file(expected / "model.safetensors").keys()
        for parameter, weight in weights.items():
            assert torch.equal(weight, two[name][0]["weights"][parameter]), parameter
    model = load_model(found)
    for parameter, weight in model.named_parameters():
        assert torch.equal(weight, two[name][0]["weights"][parameter]), parameter
    assert torch.isfinite(model(tokens()).logits).all()


def test_a_killed_process_ends_the_other(killed, folder):
    (survivor, victim), words = killed
    assert victim == -signal.SIGKILL, words[1]
    assert survivor > 0, words[0]
    assert "by peer" in words[0]  # the connection was closed, or reset
    assert [x.name for x in (folder / "llama-sharded-killed").iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("name", ["llama", "llama-sharded"])
def test_a_run_goes_on_as_if_never_interrupted(two, name):
    for found, uninterrupted in zip(two[name + "-resumed"], two[name], strict=True):
        for what in ("losses", "norms", "evaluations"):
            assert found[what] == uninterrupted[what], what
        assert weights_apart(found, uninterrupted) == 0


def test_one_process_is_not_sharded(tmp_path):
    with pytest.raises(ValueError, match="sharded: expected at least 2 processes, got 1"):
        recalibrate(tiny_decoder(), counting_rows(), config(sharded=True))


def test_a_model_without_layers_is_not_sharded():
    assert len(decoder_layers(build("gemma3"))) == 2
    with pytest.raises(ValueError, match="expected a decoder with a ModuleList named `layers`"):
        decoder_layers(torch.nn.Linear(2, 2))
