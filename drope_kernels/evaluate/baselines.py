"""What a RoPE model can do about length without training: its rotation at a length factor."""

from __future__ import annotations

from typing import Literal

from drope_kernels.rope import Rope

RopeMethod = Literal["as is", "PI", "NTK", "YaRN"]
ROPE_METHODS: tuple[RopeMethod, ...] = ("as is", "PI", "NTK", "YaRN")


def rope_at_length(method: RopeMethod, length: int, train_length: int, theta: float) -> Rope:
    """The rotation `method` uses at `length`, for a model trained at train_length with base theta.

    The factor is length / train_length, one for the whole sequence (static, the best case of each
    method at that length); up to train_length every method is plain RoPE.
    """
    if length < 1 or train_length < 1:
        raise ValueError(f"expected lengths of at least 1 token, got {length} and {train_length}")
    if method not in ROPE_METHODS:
        raise ValueError(f"method: expected one of {ROPE_METHODS}, got {method!r}")
    factor = length / train_length
    if method == "as is" or factor <= 1:
        return Rope(theta=theta)
    if method == "PI":
        return Rope.pi(factor, theta=theta)
    if method == "NTK":
        return Rope.ntk(factor, theta=theta)
    return Rope.yarn(factor, original_max_position_embeddings=train_length, theta=theta)
