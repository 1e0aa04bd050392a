"""What a machine lent for minutes takes along and gives back, and the command line there."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bench.machine import ROOT

NEWEST_GLIBC = (2, 34)  # that compiled files may ask for: of 2021, as in RHEL 9
COMMAND_CHARACTERS = 2000
CARRIED_PATHS = 8
TREE_BYTES = 64 << 20  # the tree and the carried paths together
RESULT_BYTES = 16 << 20  # one file


def command_line(number: int, folder: str, after: str | None) -> str:
    """What to run in the repository's root on the machine with the GPU; results go to $OUT."""
    earlier = f" --after {after}" if after is not None else ""
    return f'tools/gpu_check.sh --visit {number} --carried {folder}{earlier} "$OUT"'


def tree_bytes(root: Path = ROOT) -> int:
    """Of the files that git tracks, or would if they were added."""
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-coz", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [root / name for name in listed.stdout.split("\0") if name]
    return sum(path.lstat().st_size for path in paths if path.is_symlink() or path.is_file())


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def complaints(commands: list[str], carried_paths: list[str], num_bytes: int) -> list[str]:
    """What is over a limit, with the limit and what to do."""
    found = [
        f"the command line has {len(command)} characters, allowed are {COMMAND_CHARACTERS - 1}: "
        "choose a folder with a shorter name"
        for command in commands
        if len(command) >= COMMAND_CHARACTERS
    ]
    if len(carried_paths) > CARRIED_PATHS:
        found.append(f"{len(carried_paths)} paths are carried, allowed are {CARRIED_PATHS}")
    if num_bytes > TREE_BYTES:
        found.append(
            f"tree and carried paths are {num_bytes / 2**20:.1f} MiB, allowed are "
            f"{TREE_BYTES >> 20}: have git ignore what need not travel"
        )
    return found


def report(folder: str, after: str | None) -> int:
    """Prints the sizes and the command lines; 1 when something is over its limit."""
    commands = [command_line(1, folder, None), command_line(2, folder, after)]
    tree, inside = tree_bytes(), folder_bytes(ROOT / folder)
    print(
        f"travels  {(tree + inside) / 2**20:.1f} of {TREE_BYTES >> 20} MiB: the tree "
        f"{tree / 2**20:.1f}, {folder} {inside / 2**20:.1f}; 1 of {CARRIED_PATHS} carried paths"
    )
    print("In the repository's root on the machine with the GPU, $OUT a folder that comes back:")
    for command in commands if after is None else commands[1:]:
        print(f"    {command}")
    found = complaints(commands, [folder], tree + inside)
    for complaint in found:
        print(f"OVER A LIMIT: {complaint}")
    return int(bool(found))
