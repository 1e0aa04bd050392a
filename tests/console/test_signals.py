"""SIGTERM becomes an exception inside `sigterm_raises`, and nothing else changes."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from pathlib import Path

import pytest

from drope_kernels.console.signals import sigterm_raises


def send_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_inside_it_raises_and_afterwards_it_does_what_it_did() -> None:
    before = signal.getsignal(signal.SIGTERM)
    error = SystemExit(143)
    with pytest.raises(SystemExit) as raised, sigterm_raises(error):
        send_sigterm()
    assert raised.value is error
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work() -> None:
        with sigterm_raises(SystemExit(143)):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


def test_an_evaluation_takes_it_as_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for needed in ("rich", "transformers", "matplotlib"):
        pytest.importorskip(needed)
    from drope_kernels.evaluate import command

    monkeypatch.setattr(command, "_evaluation", lambda arguments: send_sigterm())
    asked = argparse.Namespace(out=Path("report"))
    assert command.evaluate_command(asked) == command.INTERRUPTED
    assert "interrupted; report was not touched" in capsys.readouterr().err
