"""Where each second of a visit would go: estimates, said to be such."""

from __future__ import annotations

from pathlib import Path

from gpu_check.visit.carried import Unpacked, check
from gpu_check.visit.plan import TAR, Visit


def lines(visit: Visit, missing: Unpacked) -> list[str]:
    """A clock: each row with the second at which it begins."""
    found = [
        f"visit {visit.number}, {visit.budget:.0f} s: estimates, for 16 cores and one Hopper GPU; "
        "none was measured there"
    ]
    begins = 0.0
    for row in visit.clock(missing):
        found.append(f"{begins:5.0f} s  {row.what:14} {row.estimate:4.0f} s  {row.basis}")
        begins += row.estimate
    spare = visit.budget - begins
    found.append(f"{begins:5.0f} s  {'spare':14} {spare:4.0f} s")
    for task in (task for task in visit.tasks if task.step.spare):
        step = task.step
        found.append(f"  if there is time: {step.stage} {step.estimate:.0f} s, {step.basis}")
    return found


def unreached(visit: Visit, missing: Unpacked) -> list[str]:
    """The stages that begin later than leaves them their least."""
    begins, found = 0.0, []
    least = {task.step.stage: task.step.least for task in visit.tasks}
    for row in visit.clock(missing):
        left = visit.budget - TAR.estimate - begins
        if row.what in least and left < least[row.what]:
            found.append(row.what)
        begins += row.estimate
    return found


def show(visit: Visit, folder: Path | None) -> bool:
    """Prints the clock; whether the plan fits its budget."""
    missing = check(folder)
    for kind, reason in (("package", missing.package), ("probes", missing.probes)):
        if reason:
            print(f"{kind}: made there, {reason}")
    print("\n".join(lines(visit, missing)))
    over = visit.total(missing) - visit.budget
    if over <= 0:
        return True
    left_out = ", ".join(unreached(visit, missing)) or "the end of the last stage"
    remedy = "; `--pack FOLDER` before the visit and `--carried FOLDER` spare the rest"
    print(
        f"OVER THE BUDGET by {over:.0f} s: not reached would be {left_out}"
        f"{remedy if missing.package or missing.probes else ''}"
    )
    return False
