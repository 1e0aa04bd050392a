"""A folder has one writer at a time, and none that is dead."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
from pathlib import Path

import pytest
from held_folders import held_by_another

from drope_kernels.console.locks import INSIDE, alone_in, lock_beside


def test_a_second_process_is_told_who_was_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with held_by_another(out) as pid:
        before = (out / INSIDE).read_bytes()
        holder = rf"held by process {pid} on {re.escape(socket.gethostname())}, since \d{{4}}-"
        with (
            pytest.raises(ValueError, match=rf"output_dir: expected .* got {out}, .*{holder}"),
            alone_in(out, argument="output_dir"),
        ):
            pass
        assert (out / INSIDE).read_bytes() == before
        with alone_in(tmp_path / "other", argument="output_dir"):
            assert (tmp_path / "other").is_dir()


def test_what_a_killed_process_left_holds_nobody_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with held_by_another(out):
        pass
    assert (out / INSIDE).is_file()
    with alone_in(out, argument="output_dir"):
        assert f'"pid": {os.getpid()}' in (out / INSIDE).read_text()
    assert list(tmp_path.iterdir()) == [out]  # which another process has made
    assert not list(out.iterdir())


def test_a_folder_that_stays_empty_is_taken_away(tmp_path: Path) -> None:
    with alone_in(tmp_path / "a" / "b", argument="output_dir"):
        assert (tmp_path / "a" / "b" / INSIDE).is_file()
    assert not list(tmp_path.iterdir())
    with alone_in(tmp_path / "a" / "b", argument="output_dir"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_the_same_process_may_again(tmp_path: Path) -> None:
    """By any name of the folder; what ends first ends nothing."""
    (tmp_path / "name").symlink_to(tmp_path / "out")
    (tmp_path / "out").mkdir()
    with alone_in(tmp_path / "out", argument="output_dir"):
        with alone_in(tmp_path / "name", argument="output_dir"):
            pass
        assert (tmp_path / "out" / INSIDE).is_file()
    assert lock_beside(tmp_path / "name") == lock_beside(tmp_path / "out")


def test_a_lock_beside_outlives_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with held_by_another(out, lock_beside(out)):
        out.rename(tmp_path / "old")
        with (
            pytest.raises(ValueError, match="out: expected a folder that no other command"),
            alone_in(out, argument="out", lock=lock_beside(out)),
        ):
            pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        pytest.raises(OSError, match=r"cannot be locked .*; choose an output_dir on a file system"),
        alone_in(tmp_path / "out", argument="output_dir"),
    ):
        pass
