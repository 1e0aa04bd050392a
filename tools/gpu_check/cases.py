"""Stage cases: the test suite's named cases on the device, forward, gradients and decode."""

from __future__ import annotations

from collections import Counter
from typing import Any

from .jobs import JobRun
from .report import Context, Outcome
from .sm80 import SM80

JOB_SECONDS = 30.0
# Unwritten memory is NaN in both; "free" runs the kernels that need not be deterministic.
MODES = ("free", "deterministic")
DRY = {
    *("regular", "fused_projection_rope", "expanded_heads", "packed_rope", "softcap"),
    *("padded_both_sides_full", "decode_pages_rotated", "decode_rows"),
}


def job_names(listing: dict[str, Any], dry_run: bool) -> list[str]:
    """Most telling first: bfloat16 of every backend, then what differs in conversions alone."""

    def names(backend: str) -> list[str]:
        """The decode kernels are the same in both families."""
        found = listing["cases"] + ([] if backend == SM80 else listing["decodes"])
        return [name for name in found if name in DRY] if dry_run else found

    kinds = [("bfloat16", MODES[0]), ("bfloat16", MODES[1]), ("float16", MODES[0])]
    return [
        f"{backend} {dtype} {mode} {name}"
        for dtype, mode in kinds
        for backend in listing["backends"]
        for name in names(backend)
    ]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each backend, dtype and mode; then the refusals, which are few."""
    counts: dict[str, Counter[str]] = {}
    refused: dict[str, str] = {}
    for row in rows:
        kind, _, name = row["job"].rpartition(" ")
        verdict = "failed" if "error" in row else "refused" if "refused" in row else "passed"
        counts.setdefault(kind, Counter())[verdict] += 1
        if verdict == "refused":
            refused[f"{kind.split()[0]} {name}"] = row["refused"].strip()
    lines = []
    for kind, counted in counts.items():
        parts = ", ".join(f"{number} {verdict}" for verdict, number in counted.items())
        lines.append(f"{kind:30} {parts}")
    return lines + [f"refused {name}: {why[:110]}" for name, why in refused.items()]


def run(context: Context) -> Outcome:
    with JobRun(context, "named_cases", JOB_SECONDS) as jobs:
        if listing := jobs.opening("list"):
            jobs.data |= {"backends": listing["backends"], "modes": MODES}
            jobs.ask_all(job_names(listing, context.dry_run))
    return jobs.outcome(table(jobs.rows))
