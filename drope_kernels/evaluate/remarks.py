"""What a report says of its rows: sentences from the numbers alone, and what limits them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from drope_kernels.evaluate.inputs import InputChoice, Inputs
from drope_kernels.evaluate.measure import HIGHEST, LOWEST, FittedTemperature
from drope_kernels.evaluate.plan import SCALED, Method, ModelPlan
from drope_kernels.evaluate.sweep import SweepRow
from drope_kernels.evaluate.verdicts import loss_verdict, retrieval_verdict
from drope_kernels.evaluate.written_needles import ONE_ANSWER


def findings(
    rows: Sequence[SweepRow],
    plans: Sequence[ModelPlan],
    lengths: Sequence[int],
    train_length: int,
) -> list[str]:
    """The first model's last form against every other row, at both ends of the lengths."""
    ours = plans[0].row(reference_method(plans[0]))
    others = [row.name for row in rows if row.name != ours]
    if not others:
        return [f"One row only, {ours}: nothing to compare it with."]
    first, last = lengths[0], lengths[-1]

    def at(length: int) -> str:
        return f"{length / train_length:g}x ({length} tokens)"

    num_last = rows[0].last_loss[last].num_targets // len(rows[0].last_loss[last].per_window)
    found = [
        loss_verdict(
            f"Text loss at {at(first)}, nats per token",
            {row.name: row.text_loss[first] for row in rows},
            ours,
            others,
        ),
        loss_verdict(
            f"Loss of the same last {num_last} targets at {at(last)}",
            {row.name: row.last_loss[last] for row in rows},
            ours,
            others,
        ),
    ]
    for task in rows[0].retrieval:
        scores = {row.name: row.retrieval[task][last] for row in rows}
        start = f"Retrieval, {task}, at {at(last)}"
        if not any(score.successes for score in scores.values()):
            found.append(f"{start}: no row gave one right answer.")
        else:
            found.append(retrieval_verdict(start, scores, ours, others))
    return found


def reference_method(plan: ModelPlan) -> Method:
    """The method whose row the others are compared with: the furthest from the model as it is."""
    furthest: tuple[Method, ...] = ("drope_temperature", "dropped")
    return next((method for method in furthest if method in plan.methods), plan.methods[0])


def caveats(
    rows: Sequence[SweepRow],
    plans: Sequence[ModelPlan],
    choice: InputChoice,
    inputs: Inputs,
    fits: Mapping[str, FittedTemperature],
) -> list[str]:
    """What a reader must know before believing a number."""
    measured = inputs.measured
    found = [
        _control(plans),
        f"Losses are of {_windows(len(measured.windows))} of {measured.windows.shape[1]} tokens of "
        "one text; intervals and verdicts cover these windows and the drawn cases, not another "
        "text and not what another training would change. Every length reads the same windows, in "
        "pieces, and every row the same inputs. Documents follow each other: in a window, text "
        "before the start of a document helps little.",
        *_rows(plans),
        *_needles(choice, measured.task_names),
    ]
    for name, fit in fits.items():
        found += _fit(name, fit, len(inputs.fit.windows))
    broken = [row.name for row in rows if not all(map(math.isfinite, _means(row)))]
    if broken:
        found.append(f"Losses that are not finite, shown as nan or inf: {', '.join(broken)}.")
    return found


def _control(plans: Sequence[ModelPlan]) -> str:
    with_rope = [plan for plan in plans if plan.positions == "rope"]
    without = [plan for plan in plans if plan.positions != "rope"]
    if not without:
        return (
            "No row was recalibrated without positions: `dropped` is a model with its rotation "
            "taken out and nothing learned since. What recalibration gives, and what it costs "
            "against a control that kept RoPE on the same tokens, is not shown here."
        )
    budgets = {plan.recalibration_tokens for plan in without} - {None}
    controls = [plan for plan in with_rope if plan.recalibration_tokens in budgets]
    if controls:
        named = [f"{x.name} ({x.recalibration_tokens} tokens)" for x in controls]
        return (
            f"Control: {', '.join(named)}, RoPE kept, trained on as many tokens as a model "
            "without positions here, by what the configs record. What the drop costs is the "
            "difference from the control, not from the original."
        )
    if with_rope:
        return (
            f"Rows with RoPE kept: {_names(with_rope)}. By what the configs record none of them "
            f"was trained on as many tokens as {_names(without)}, so none is a control: a gain "
            "may be the further training, or its text, rather than the drop."
        )
    return (
        "No control: without a model that kept RoPE on the same tokens, a gain over the original "
        "may be the further training, or its text, rather than the drop."
    )


def _names(plans: Sequence[ModelPlan]) -> str:
    return ", ".join(plan.name for plan in plans)


def _rows(plans: Sequence[ModelPlan]) -> list[str]:
    used = {method for plan in plans for method in plan.methods}
    found = []
    if used & set(SCALED):
        found.append(
            "PI, NTK and YaRN use the factor length / training length, another one at each length "
            "(the best case of each) and no training; dynamic NTK has one factor for all lengths, "
            "that of the greatest. Layers with a sliding window keep their rotation."
        )
    if any("dropped" in plan.methods or plan.fits_temperature for plan in plans):
        found.append(
            "`dropped` takes the rotation out of a model that has learned with it: this shows what "
            "recalibration starts from, not DroPE."
        )
    found += [
        f"{plan.name} has no row for {method}: {why}."
        for plan in plans
        for method, why in plan.refused.items()
    ]
    return found


def _needles(choice: InputChoice, tasks: Sequence[str]) -> list[str]:
    if not tasks:
        return []
    seeds = ", ".join(map(str, choice.seeds))
    found = [
        f"Needles: {choice.num_cases * len(choice.seeds)} cases a cell (seeds {seeds}: of keys, "
        "numbers and places, not of any training), sentences of our own in the given text, in the "
        "manner of RULER but not its prompts, so not comparable with published RULER numbers. "
        "Prompts are plain text that the model continues; no chat template is used, which an "
        "instruct model may need.",
    ]
    if set(tasks) & set(ONE_ANSWER):
        found.append(
            "`single` and `multi-key` are right if every token of the number is the most likely "
            "one. With a single needle, copying the only such number in sight is enough."
        )
    if set(tasks) - set(ONE_ANSWER):
        found.append(
            "The other tasks are right if greedy decoding writes every wanted answer, in any "
            "order, and in variable tracking no name of the other chain; the share of the answers "
            "found is given apart, and says less because the others in sight can be listed too."
        )
    return found


def _fit(name: str, fit: FittedTemperature, num_windows: int) -> list[str]:
    betas = ", ".join(f"{beta:.2f} at {length}" for length, beta in fit.betas.items())
    found = [
        f"{name}: the multipliers of the logits with the least loss on {_windows(num_windows)} of "
        f"other text than any row's are {betas}; the row uses 1 + c ln(length / training length) "
        f"with c = {fit.c:.3f}. They were fitted to loss, not to retrieval."
    ]
    if fit.at_the_edge:
        found.append(
            f"{name}: at {', '.join(map(str, fit.at_the_edge))} tokens the multiplier is at the "
            f"edge of what was searched, {LOWEST} to {HIGHEST}; the best one may lie beyond."
        )
    return found


def _windows(count: int) -> str:
    return "1 window" if count == 1 else f"{count} windows"


def _means(row: SweepRow) -> list[float]:
    return [loss.mean for losses in (row.text_loss, row.last_loss) for loss in losses.values()]
