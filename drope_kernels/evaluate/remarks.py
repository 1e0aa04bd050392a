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
) -> list[str]:
    """The first model's last form against every other row, at both ends of the lengths."""
    ours = plans[0].row(reference_method(plans[0]))
    others = [row.name for row in rows if row.name != ours]
    if not others:
        return [f"One row only, {ours}: nothing to compare it with."]
    first, last = lengths[0], lengths[-1]

    def at(length: int) -> str:
        return f"{length / plans[0].train_length:g}x ({length} tokens)"

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
        *_learned(plans, measured.lengths),
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
            "No row was recalibrated without positions. What recalibration gives, and what it "
            "costs against a control that kept RoPE on the same tokens, is not shown here."
        )
    controls = [plan for plan in with_rope if _same_budget(plan, without)]
    free = [plan for plan in without if not _same_budget(plan, controls)]
    found = []
    if controls:
        named = [f"{x.name} ({x.recalibration_tokens} tokens)" for x in controls]
        against = [plan for plan in without if plan not in free]
        found.append(
            f"Control: {', '.join(named)}, RoPE kept, trained on as many tokens as "
            f"{_names(against)}, by what the configs record. What the drop costs is the "
            "difference from the control, not from the original."
        )
    if free:
        found.append(
            f"No control of {_names(free)}: by what the configs record no model that kept RoPE was "
            "trained on as many tokens, so a gain over the original may be the further training, "
            "or its text, rather than the drop."
        )
    unknown = [plan for plan in without if plan.recalibration_tokens is None]
    if unknown:
        found.append(f"Whether {_names(unknown)} learned without positions is not recorded.")
    return " ".join(found)


def _same_budget(plan: ModelPlan, others: Sequence[ModelPlan]) -> bool:
    tokens = plan.recalibration_tokens
    return tokens is not None and tokens in {x.recalibration_tokens for x in others}


def _names(plans: Sequence[ModelPlan]) -> str:
    return ", ".join(plan.name for plan in plans)


def _rows(plans: Sequence[ModelPlan]) -> list[str]:
    used = {method for plan in plans for method in plan.methods}
    found = []
    if used & set(SCALED):
        found.append(
            "PI, NTK and YaRN use the factor length / training length, another one at each length "
            "(the best case of each) and no training; dynamic NTK has one factor for all lengths, "
            "that of the greatest. Layers with a sliding window keep their rotation. Up to the "
            "training length these rows are RoPE as is."
        )
    dropped_here = [x for x in plans if x.positions == "rope"]
    if any("dropped" in x.methods or x.fits_temperature for x in dropped_here):
        found.append(
            "`dropped` takes the rotation out of a model that has learned with it: this shows what "
            "recalibration starts from, not DroPE."
        )
    found += [
        f"{plan.name} was trained at {plan.train_length} tokens, as its config tells: its RoPE is "
        "scaled, or its temperature fitted, beyond that only."
        for plan in plans[1:]
        if plan.train_length != plans[0].train_length
    ]
    found += [
        f"{plan.name} has no row for {method}: {why}."
        for plan in plans
        for method, why in plan.refused.items()
    ]
    return found


def _learned(plans: Sequence[ModelPlan], lengths: Sequence[int]) -> list[str]:
    """Lengths beyond the training length that the weights may know from an earlier training."""
    return [
        f"{plan.name}: its config allows {plan.max_positions} positions, so that RoPE beyond "
        f"{plan.train_length} tokens need not be extrapolation."
        for plan in plans
        if plan.positions == "rope"
        and (plan.max_positions or 0) > plan.train_length
        and lengths[-1] > plan.train_length
    ]


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
