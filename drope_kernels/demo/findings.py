"""Sentences made from the measured rows, favourable or not, and what limits them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drope_kernels.demo.config import DemoConfig
from drope_kernels.demo.plan import CONTROL, DROPE, DROPPED, NOPE, ROPE, rope_row, with_temperature
from drope_kernels.demo.stages import AMONG_FOUR
from drope_kernels.evaluate import SweepRow
from drope_kernels.evaluate.verdicts import loss_verdict, retrieval_verdict


def findings(rows: Sequence[SweepRow], config: DemoConfig) -> list[str]:
    """DroPE against every other row: retrieval at the greatest length, text loss at both ends."""
    c = config.temperatures[0]
    temperate = with_temperature(DROPE, c)
    baselines = [ROPE, *(rope_row(method) for method in ("PI", "NTK", "YaRN")), DROPPED]
    controls = [CONTROL, f"{CONTROL} + YaRN"]
    retrieval = [*baselines, DROPE, NOPE, with_temperature(NOPE, c), *controls]
    first, last = config.lengths[0], config.lengths[-1]
    return [
        _retrieval(rows, config, last, temperate, retrieval),
        _loss(rows, config, first, DROPE, [ROPE, DROPPED, NOPE, CONTROL]),
        _loss(rows, config, last, DROPE, [*baselines, temperate, NOPE, *controls]),
    ]


def _retrieval(
    rows: Sequence[SweepRow], config: DemoConfig, length: int, ours: str, others: list[str]
) -> str:
    start = f"Retrieval among 4 at {_times(config, length)}"
    scores = {row.name: row.retrieval[AMONG_FOUR][length] for row in rows}
    return retrieval_verdict(start, scores, ours, others)


def _loss(
    rows: Sequence[SweepRow], config: DemoConfig, length: int, ours: str, others: list[str]
) -> str:
    start = f"Text loss at {_times(config, length)}, nats per token"
    losses = {row.name: row.text_loss[length] for row in rows}
    return loss_verdict(start, losses, ours, others)


def caveats(config: DemoConfig, fits: dict[str, dict[str, Any]]) -> list[str]:
    """What a reader must know before believing a number; the fitted temperature last."""
    found = [
        *_shortened(config),
        "The decoder smears keys: each head mixes the previous token's key into the current one "
        "with one learned weight. That local order signal survives the drop and makes "
        "position-free models easier to train than in the DroPE paper (arXiv 2512.12167); without "
        "it a model of this size does not learn retrieval among 4 in minutes.",
        "Nothing was selected on these numbers: steps, rates and every temperature c were fixed "
        "before the run, and every row is printed. The setting was chosen earlier because RoPE "
        "learns the task at C in it, not for what happens at greater lengths.",
        f"One seed ({config.seed}), about 0.18 million parameters, C={config.context}, needles of "
        "tokens that never occur in text, answer tokens weighted 6 times: this says nothing about "
        "models of real size. Intervals and verdicts cover the cases and the text that were drawn, "
        "not what another training seed would change.",
        "PI, NTK and YaRN use the factor length / C at each length and no training; the "
        "control had the same extra tokens as DroPE with RoPE kept; NoPE from scratch had the "
        "whole budget.",
        "With 1 needle, copying the only value in sight is enough; among 4 needles the name "
        "decides, and guessing one of those present gives 0.25.",
    ]
    for fit in fits.values():
        betas = ", ".join(f"{beta:.2f} at {length}" for length, beta in fit["betas"].items())
        found.append(
            f"Scale multipliers of DroPE with the least loss on separate held-out text: {betas}; "
            f"as 1 + c ln(length / C) this is c = {fit['c']:.3f}. No row uses it."
        )
    return found


def _shortened(config: DemoConfig) -> list[str]:
    full = DemoConfig()
    if config.total_steps >= full.total_steps:
        return []
    return [
        f"A SHORTENED RUN: {config.pretrain_steps} + {config.recalibration_steps} steps, not "
        f"{full.pretrain_steps} + {full.recalibration_steps}. What follows is about the full one; "
        "these numbers show only that the program works."
    ]


def _times(config: DemoConfig, length: int) -> str:
    return f"{length // config.context}x C ({length} tokens)"
