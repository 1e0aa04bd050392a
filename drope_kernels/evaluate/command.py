"""The command line of `drope evaluate`; light to import, the work is imported when it runs."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from drope_kernels.console.locks import alone_in, lock_beside
from drope_kernels.console.paths import user_path
from drope_kernels.console.signals import sigterm_raises

FAILED, BAD_ARGUMENTS = 1, 2
INTERRUPTED = 130  # the shell's status for Ctrl-C

_EPILOG = """\
MODEL is a directory that save_pretrained wrote, or a .gguf file; PATH:NAME names it in the report,
in which it has else the end of its path.
A RoPE model gets the rows RoPE as is, PI, NTK, dynamic NTK, YaRN, dropped, and dropped with fitted
temperature; a position-free model itself, and with fitted temperature. Nothing is downloaded.
"""


def add_evaluate_command(parser: argparse.ArgumentParser) -> None:
    """Options of `drope evaluate`."""
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="directory or .gguf file, [:NAME]")
    add = parser.add_argument
    add(
        "--text",
        type=user_path,
        nargs="+",
        required=True,
        help="files or folders: text, JSON, CSV, Parquet",
    )
    add("--text-column", default="text", help="of JSON, CSV, Parquet (default: text)")
    add("--compare", action="append", default=[], metavar="MODEL", help="another model; repeatable")
    add("--tokenizer", type=user_path, help="directory of a tokenizer (default: MODEL's)")
    add("--lengths", default="1x,2x,4x", help="tokens, or training lengths (default: 1x,2x,4x)")
    add("--train-length", type=int, help="context of the last training (default: the config's)")
    add("--methods", help="as_is,pi,ntk,dynamic_ntk,yarn,dropped,drope_temperature (default: all)")
    add("--tasks", default="all", help="needle tasks, all or none (default: all five)")
    add("--cases", type=int, default=20, help="of each task, length and seed (default: 20)")
    add("--seeds", default="0", help="of the cases, as in 0,1,2 (default: 0)")
    add("--depths", default="0,0.25,0.5,0.75,1", help="of the asked needle, in [0, 1]")
    add("--windows", type=int, default=8, help="of text, of the greatest length (default: 8)")
    add("--last-targets", type=int, default=256, help="<= half the least length (default: 256)")
    add("--attention", choices=("kernels", "sdpa", "eager"), default="kernels")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--device", help="default: cuda where there is a GPU, else cpu")
    add("--max-tokens", type=int, default=8192, help="of text in one call (default: 8192)")
    add("--out", type=user_path, default=Path("evaluation"), help="folder (default: evaluation)")
    parser.set_defaults(run=evaluate_command)


def evaluate_command(arguments: argparse.Namespace) -> int:
    """Runs the evaluation; status 2 for bad arguments, 1 for a failure, 130 when interrupted."""
    with sigterm_raises(KeyboardInterrupt()):  # as Ctrl-C
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    try:
        from rich.console import Console

        from drope_kernels.console.progress import Progress
        from drope_kernels.evaluate.report import check_report_folder
        from drope_kernels.evaluate.run import prepare
    except ImportError as error:
        return _fail(
            f"{error.name or error} is missing: pip install 'drope_kernels[eval]'",
            BAD_ARGUMENTS,
        )
    out, console = arguments.out, Console(stderr=True)
    with ExitStack() as lock:
        try:
            evaluation = _evaluation(arguments)
            check_report_folder(out)
            lock.enter_context(alone_in(out, argument="out", lock=lock_beside(out)))
            with Progress(console) as progress:
                prepared = prepare(evaluation, out, progress.bar())
        except (ValueError, TypeError, OSError, NotImplementedError, ImportError) as error:
            return _fail(str(error), BAD_ARGUMENTS)
        except KeyboardInterrupt:
            return _fail(f"interrupted; {out} was not touched", INTERRUPTED)
        return _measured(prepared, arguments, console)


def _measured(prepared: Any, arguments: argparse.Namespace, console: Any) -> int:
    """The evaluation itself, to the status of its end."""
    from rich.console import Console

    from drope_kernels.console.progress import Progress
    from drope_kernels.evaluate.run import evaluate
    from drope_kernels.evaluate.terminal import print_report

    out = arguments.out
    try:
        with Progress(console) as progress:
            report = evaluate(prepared, out, _command(arguments), progress.bar())
    except (ValueError, NotImplementedError, OSError, RuntimeError, MemoryError) as error:
        return _fail(f"{error or 'out of memory'}; {_kept(error, out)}", FAILED)
    except KeyboardInterrupt as error:
        return _fail(f"interrupted; {_kept(error, out)}", INTERRUPTED)
    shown = Console()
    print_report(report, shown if shown.is_terminal else Console(width=130))
    print(f"everything is in {out}/")
    return 0


def _kept(error: BaseException, out: Path) -> str:
    """What is left of an evaluation that did not end, as `evaluate` noted it."""
    notes = getattr(error, "__notes__", ["no row was kept"])
    return f"{out} was not touched, {notes[-1]}"


def _evaluation(arguments: argparse.Namespace) -> Any:
    """The options as an `Evaluation`; ValueError for words that mean nothing."""
    import torch

    from drope_kernels.evaluate.inputs import InputChoice
    from drope_kernels.evaluate.plan import nearest_checked, parse_methods
    from drope_kernels.evaluate.run import Evaluation
    from drope_kernels.evaluate.written_needles import WRITTEN_TASKS

    tasks = {"all": list(WRITTEN_TASKS), "none": []}.get(arguments.tasks)
    if tasks is None:
        tasks = nearest_checked("tasks", arguments.tasks.split(","), WRITTEN_TASKS)
    model, *compared = _named([arguments.model, *arguments.compare])
    return Evaluation(
        model=model,
        text=tuple(arguments.text),
        compared=tuple(compared),
        tokenizer=arguments.tokenizer,
        text_column=arguments.text_column,
        lengths=arguments.lengths,
        train_length=arguments.train_length,
        methods=parse_methods(arguments.methods),
        inputs=InputChoice(
            num_windows=arguments.windows,
            num_last_targets=arguments.last_targets,
            tasks=tuple(tasks),
            num_cases=arguments.cases,
            seeds=tuple(_numbers("seeds", arguments.seeds, int)),
            depths=tuple(_numbers("depths", arguments.depths, float)),
        ),
        attention=arguments.attention,
        dtype=arguments.dtype,
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        max_tokens=arguments.max_tokens,
    )


def _named(words: Sequence[str]) -> list[tuple[str, Path]]:
    """PATH or PATH:NAME each; a path that exists is one, whatever it contains.

    A path without a name is called by its end, by as much of it as no other of these ends with.
    """
    given = [_split(word) for word in words]
    ends = [_ends(path) for name, path in given if not name]
    named = []
    for name, path in given:
        own = _ends(path)
        unlike = [end for end in own if sum(end in other for other in ends) == 1]
        named.append((name or [*unlike, own[0]][0], path))
    return named


def _ends(path: Path) -> list[str]:
    """Of a/b/model: model, b/model, a/b/model and so on."""
    whole = path.absolute()
    parts = [*whole.parts[1:-1], whole.name.removesuffix(".gguf")]
    return ["/".join(parts[-length:]) for length in range(1, len(parts) + 1)]


def _split(word: str) -> tuple[str, Path]:
    """Name, "" where none is given, and path."""
    word = str(user_path(word))
    path, colon, name = word.rpartition(":")
    if not colon or Path(word).exists() or "/" in name:
        return "", Path(word)
    return name, Path(path)


def _numbers(argument: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{argument}: expected {kind.__name__}s with commas between, got {text!r}"
        ) from None


def _command(arguments: argparse.Namespace) -> str:
    """What repeats the run, for the report: every choice but the folder; names, not folders."""
    given = [arguments.model, *arguments.compare]
    model, *compared = map(_repeated, given, _named(given))
    words = ["drope evaluate", model]
    for name, value in vars(arguments).items():
        if name in ("command", "rest", "run", "model", "out") or value is None or value == []:
            continue
        option = f"--{name.replace('_', '-')}"
        if name == "text":
            words += [option, *(shlex.quote(path.name) for path in value)]
        elif name == "compare":
            words += [f"{option} {word}" for word in compared]
        else:
            shown = value.name if isinstance(value, Path) else str(value)
            words.append(f"{option} {shlex.quote(shown)}")
    return " ".join(words)


def _repeated(word: str, named: tuple[str, Path]) -> str:
    """A model's word without its folder, or with as much of it as its name has."""
    name, path = named
    parts = path.absolute().parts[-name.count("/") - 1 :]
    return shlex.quote(Path(word).name if _split(word)[0] else "/".join(parts))


def _fail(message: str, status: int) -> int:
    print(f"drope evaluate: {message}", file=sys.stderr)
    return status
