"""One row against others, in a sentence: what is separated from what, favourable or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from drope_kernels.evaluate.loss import MeanLoss
from drope_kernels.evaluate.needle import Proportion

# Student's t: standard errors that hold 95 % of what 2, 3, ... windows give by chance.
STANDARD_ERRORS = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18)
MANY_WINDOWS = 2.16  # of them, with more

ABOVE, BELOW, UNCLEAR = "above", "below", "unclear"


def retrieval_verdict(
    start: str, scores: Mapping[str, Proportion], ours: str, others: Sequence[str]
) -> str:
    """`ours` is above or below where the 95 % intervals do not meet."""

    def verdict(name: str) -> str:
        low, high = scores[ours].interval()
        other_low, other_high = scores[name].interval()
        return ABOVE if low > other_high else BELOW if high < other_low else UNCLEAR

    def text(name: str) -> str:
        low, high = scores[name].interval()
        return f"{name} {scores[name].mean:.2f} [{low:.2f}-{high:.2f}]"

    words = {ABOVE: "higher than", BELOW: "LOWER than", UNCLEAR: "not separated from"}
    return _sentence(f"{start}: {text(ours)}", words, others, verdict, text)


def loss_verdict(
    start: str, losses: Mapping[str, MeanLoss], ours: str, others: Sequence[str]
) -> str:
    """`ours` is above or below where the difference by window is not chance, at 95 %."""
    loss = losses[ours]

    def verdict(name: str) -> str:
        difference = loss.minus(losses[name])
        freedom = len(difference.per_window) - 1
        errors = dict(enumerate(STANDARD_ERRORS, start=1)).get(freedom, MANY_WINDOWS)
        if not abs(difference.mean) > errors * difference.stderr:
            return UNCLEAR
        return ABOVE if difference.mean > 0 else BELOW

    def text(name: str) -> str:
        other = losses[name]
        return f"{name} {other.mean:.3f} ({loss.mean - other.mean:+.3f})"

    words = {BELOW: "better than", ABOVE: "WORSE than", UNCLEAR: "not separated from"}
    return _sentence(f"{start}: {ours} {loss.mean:.3f}", words, others, verdict, text)


def _sentence(
    start: str,
    words: dict[str, str],
    others: Sequence[str],
    verdict: Callable[[str], str],
    text: Callable[[str], str],
) -> str:
    """`start`; then the other rows, grouped by verdict."""
    parts = [start]
    for outcome, word in words.items():
        group = [text(name) for name in others if verdict(name) == outcome]
        if group:
            parts.append(f"{word} {', '.join(group)}")
    return "; ".join(parts) + "."
