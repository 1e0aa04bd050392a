"""Where each second of a visit would go: estimates, said to be such."""

from __future__ import annotations

from pathlib import Path

from .carried import why_stale
from .plan import BUILD, START, TAR, UNPACK, Visit


def rows(visit: Visit, carried: bool) -> list[tuple[str, float, str]]:
    """(what, seconds, basis) in the order of the visit; what runs in spare seconds is not there."""
    found = [(fixed.what, fixed.estimate, fixed.basis) for fixed in (START, UNPACK)]
    waits = not carried
    for task in (task for task in visit.tasks if not task.step.spare):
        if waits and task.step.needs_package:
            waits = False
            found.append(("wait for build", visit.wait_for_build(), BUILD.basis))
        jobs = "" if task.only is None else f"{len(task.only)} jobs left by the visit before; "
        found.append((task.step.stage, task.estimate, jobs + task.step.basis))
    return [*found, (TAR.what, TAR.estimate, TAR.basis)]


def lines(visit: Visit, carried: bool) -> list[str]:
    """A clock: each row with the second at which it begins."""
    found = [
        f"visit {visit.number}, {visit.budget:.0f} s: estimates, for 16 cores and one Hopper GPU; "
        "none was measured there"
    ]
    begins = 0.0
    for what, seconds, basis in rows(visit, carried):
        found.append(f"{begins:5.0f} s  {what:14} {seconds:4.0f} s  {basis}")
        begins += seconds
    spare = visit.budget - begins
    found.append(f"{begins:5.0f} s  {'spare':14} {spare:4.0f} s")
    for task in (task for task in visit.tasks if task.step.spare):
        step = task.step
        found.append(f"  if there is time: {step.stage} {step.estimate:.0f} s, {step.basis}")
    return found


def unreached(visit: Visit, carried: bool) -> list[str]:
    """The stages that begin later than leaves them their least."""
    begins, found = 0.0, []
    for what, seconds, _ in rows(visit, carried):
        step = next((task.step for task in visit.tasks if task.step.stage == what), None)
        left = visit.budget - TAR.estimate - begins
        if step is not None and left < step.least:
            found.append(what)
        begins += seconds
    return found


def show(visit: Visit, folder: Path | None) -> bool:
    """Prints the clock; whether the plan fits its budget."""
    reason = why_stale(folder)
    carried = not reason
    if reason:
        print(f"the package would be built there, from the first second on: {reason}")
    print("\n".join(lines(visit, carried)))
    over = visit.total(carried) - visit.budget
    if over <= 0:
        return True
    left_out = ", ".join(unreached(visit, carried)) or "the end of the last stage"
    remedy = "" if carried else "; `--pack FOLDER` before the visit and `--carried FOLDER` spare it"
    print(f"OVER THE BUDGET by {over:.0f} s: not reached would be {left_out}{remedy}")
    return False
