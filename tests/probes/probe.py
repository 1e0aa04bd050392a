"""One layout question: what is launched, what the PTX ISA says must come back, what did."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
MAX_OBSERVED = 40_000  # entries of an observed map kept in the report


@dataclass(frozen=True)
class Run:
    """One call of a C probe function. out: what the output holds before the launch."""

    a: Array
    out: Array
    params: Sequence[int] = ()
    b: Array | None = None


def first_output(outputs: list[Array]) -> Array:
    return outputs[0]


@dataclass(frozen=True)
class Case:
    label: str
    symbol: str
    runs: Sequence[Run]
    expected: Array
    decode: Callable[[list[Array]], Array] = first_output  # raw outputs -> what is compared
    relative_tolerance: float = 0.0  # 0: equal


@dataclass(frozen=True)
class Probe:
    """`source` names the PTX ISA section. Informational probes report and cannot fail."""

    name: str
    question: str
    expectation: str
    source: str
    architecture: str  # "sm_80": runs on later GPUs too; "sm_90a": Hopper only
    cases: Callable[[], list[Case]]
    informational: bool = False


@dataclass(frozen=True)
class Comparison:
    label: str
    num_wrong: int
    num_values: int
    first_wrong: list[dict[str, Any]] = field(default_factory=list)
    observed: list[Any] | None = None

    @property
    def passed(self) -> bool:
        return self.num_wrong == 0


class _ProbeArguments(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("a_bytes", ctypes.c_int64),
        ("b_bytes", ctypes.c_int64),
        ("out_bytes", ctypes.c_int64),
        ("params", ctypes.POINTER(ctypes.c_int32)),
    ]


def call(library: ctypes.CDLL, symbol: str, run: Run) -> Array:
    """Runs one probe function. Raises RuntimeError with the CUDA error's name."""
    a = np.ascontiguousarray(run.a)
    b = None if run.b is None else np.ascontiguousarray(run.b)
    out = run.out.copy(order="C")
    params = (ctypes.c_int32 * max(1, len(run.params)))(*run.params)
    arguments = _ProbeArguments(
        a.ctypes.data,
        None if b is None else b.ctypes.data,
        out.ctypes.data,
        a.nbytes,
        0 if b is None else b.nbytes,
        out.nbytes,
        params,
    )
    status = library[symbol](ctypes.byref(arguments))
    if status != 0:
        library.probe_error_name.restype = ctypes.c_char_p
        name = library.probe_error_name(status).decode()
        raise RuntimeError(f"{symbol}{list(run.params)}: {name}")
    return out


def plain(values: Array) -> list[Any]:
    """JSON has no NaN and no infinity: those become text."""
    if np.issubdtype(values.dtype, np.integer) or np.isfinite(values).all():
        return values.tolist()
    return np.where(np.isfinite(values), values.astype(object), values.astype(str)).tolist()


def compare(case: Case, outputs: list[Array]) -> Comparison:
    """NaN is always wrong. The observed map is kept only when something is."""
    observed = case.decode(outputs)
    expected = case.expected
    if observed.shape != expected.shape:
        raise ValueError(f"{case.label}: observed {observed.shape}, expected {expected.shape}")
    if case.relative_tolerance == 0.0:
        wrong = ~(observed == expected)
    else:
        allowed = case.relative_tolerance * np.abs(expected)
        wrong = ~(np.abs(observed - expected) <= allowed)
    where = np.argwhere(wrong)
    if len(where) == 0:
        return Comparison(case.label, 0, expected.size)
    shown = where[:8]
    first = [
        {"index": index, "expected": wanted, "observed": got}
        for index, wanted, got in zip(
            shown.tolist(),
            plain(expected[tuple(shown.T)]),
            plain(observed[tuple(shown.T)]),
            strict=True,
        )
    ]
    kept = plain(observed) if observed.size <= MAX_OBSERVED else None
    return Comparison(case.label, len(where), expected.size, first, kept)


def run_probe(library: ctypes.CDLL, probe: Probe) -> list[Comparison]:
    return [
        compare(case, [call(library, case.symbol, run) for run in case.runs])
        for case in probe.cases()
    ]
