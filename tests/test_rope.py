"""Rope: transformers' tables to float32 rounding, rotation against float64 up to 2**24."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import drope_kernels as dk
from drope_kernels.backends.reference import rotate
from drope_kernels.spec.spec import Rotation

CPU = torch.device("cpu")
# float32: a power rounded once, a division and a product, of up to 1.2e-7 each. The error of the
# exponent 2i/dim counts ln(theta) times; the largest theta here has 13.8.
FLOAT32 = 2e-6
YARN = {"factor": 8.0, "original_max_position_embeddings": 4096}
LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# name: (Rope, transformers' rope_parameters, head_dim, seq_len, max_position_embeddings)
TABLES: dict[str, tuple[dk.Rope, dict[str, Any], int, int | None, int]] = {
    "linear": (dk.Rope.pi(4.0), {"rope_type": "linear", "factor": 4.0}, 64, None, 2048),
    "linear_theta": (
        dk.Rope.pi(2.5, theta=1e6),
        {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e6},
        128,
        None,
        2048,
    ),
    "dynamic_within": (
        dk.Rope.dynamic_ntk(2.0, seq_len=1000, max_position_embeddings=2048),
        {"rope_type": "dynamic", "factor": 2.0},
        64,
        1000,
        2048,
    ),
    "dynamic_beyond": (
        dk.Rope.dynamic_ntk(4.0, seq_len=16384, max_position_embeddings=2048),
        {"rope_type": "dynamic", "factor": 4.0},
        64,
        16384,
        2048,
    ),
    "yarn": (dk.Rope.yarn(**YARN), {"rope_type": "yarn", **YARN}, 64, None, 32768),
    "yarn_betas": (
        dk.Rope.yarn(**YARN, beta_fast=16.0, beta_slow=2.0, theta=150_000.0),
        {"rope_type": "yarn", **YARN, "beta_fast": 16.0, "beta_slow": 2.0, "rope_theta": 150_000.0},
        128,
        None,
        32768,
    ),
    "yarn_untruncated": (
        dk.Rope.yarn(**YARN, truncate=False),
        {"rope_type": "yarn", **YARN, "truncate": False},
        64,
        None,
        32768,
    ),
    "yarn_mscale": (
        dk.Rope.yarn(**YARN, mscale=0.707, mscale_all_dim=1.3),
        {"rope_type": "yarn", **YARN, "mscale": 0.707, "mscale_all_dim": 1.3},
        64,
        None,
        32768,
    ),
    "yarn_attention_factor": (
        dk.Rope.yarn(**YARN, attention_factor=1.1),
        {"rope_type": "yarn", **YARN, "attention_factor": 1.1},
        64,
        None,
        32768,
    ),
    "llama3": (
        dk.Rope.llama3(**LLAMA3, theta=500_000.0),
        {"rope_type": "llama3", **LLAMA3, "rope_theta": 500_000.0},
        64,
        None,
        131072,
    ),
    "llama3_128": (
        dk.Rope.llama3(**{**LLAMA3, "factor": 8.0}, theta=500_000.0),
        {"rope_type": "llama3", **LLAMA3, "factor": 8.0, "rope_theta": 500_000.0},
        128,
        None,
        131072,
    ),
}


def config(parameters: dict[str, Any], head_dim: int, max_positions: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_theta": 10_000.0, **parameters},
    )


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_of_transformers(name: str) -> None:
    rope, parameters, head_dim, seq_len, max_positions = TABLES[name]
    theirs, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](
        config(parameters, head_dim, max_positions), CPU, seq_len=seq_len
    )
    (ours,) = rope.frequencies(head_dim)
    torch.testing.assert_close(torch.tensor(ours), theirs, rtol=FLOAT32, atol=0)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


def test_scaled_tables_differ_from_the_plain_one() -> None:
    """The comparison above could not pass with the scaling left out."""
    for rope, _, head_dim, _, _ in TABLES.values():
        plain = dk.Rope(theta=rope.theta).frequencies(head_dim)[0]
        changed = max(
            abs(a / b - 1) for a, b in zip(rope.frequencies(head_dim)[0], plain, strict=True)
        )
        within = rope == TABLES["dynamic_within"][0]
        assert (changed < 1e-12) if within else (changed > 0.3)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_default_table_and_pairing_are_llamas(theta: float) -> None:
    """Our rotation of real tensors equals transformers' apply_rotary_pos_emb at small positions."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    parameters = {"rope_type": "default", "rope_theta": theta}
    embedding = LlamaRotaryEmbedding(config(parameters, 64, 512))
    torch.testing.assert_close(
        torch.tensor(dk.Rope(theta=theta).frequencies(64)[0]),
        embedding.inv_freq,
        rtol=FLOAT32,
        atol=0,
    )
    q, k = torch.randn(1, 4, 96, 64), torch.randn(1, 4, 96, 64)
    positions = torch.arange(96)[None]
    cos, sin = embedding(q, positions)
    theirs, _ = apply_rotary_pos_emb(q, k, cos, sin)
    torch.testing.assert_close(
        rotated(dk.Rope(theta=theta), q, positions), theirs, atol=3e-5, rtol=0
    )


def test_ntk_stretches_the_slowest_pair_by_the_factor() -> None:
    plain, ntk = dk.Rope().frequencies(64)[0], dk.Rope.ntk(8.0).frequencies(64)[0]
    assert ntk[0] == plain[0] == 1.0
    assert plain[-1] / ntk[-1] == pytest.approx(8.0)
    for i, (a, b) in enumerate(zip(plain, ntk, strict=True)):
        assert a / b == pytest.approx(8.0 ** (2 * i / 62))  # YaRN, definition 1


# --- rotation ------------------------------------------------------------------------------------


def rotated(rope: dk.Rope, x: Tensor, positions: Tensor, *, inverse: bool = False) -> Tensor:
    turns = rope.turns(x.shape[-1], CPU)
    rotation = Rotation(turns, rope.interleaved, rope.attention_factor, None, None)
    return rotate(x, positions, rotation, inverse=inverse)


def by_complex_numbers(rope: dk.Rope, x: Tensor, positions: Tensor) -> Tensor:
    """Independent: pairs as complex numbers times e^(i t f), angles reduced with integers.

    t f / 2 pi is formed exactly: f / 2 pi as a 128-bit fixed point number, t as an integer.
    """
    (inv_freq,) = rope.frequencies(x.shape[-1])
    half = len(inv_freq)
    fixed = [int(math.ldexp(f / math.tau, 100)) for f in inv_freq]
    angles = torch.tensor(
        [
            [math.ldexp((t * f) % 2**100, -100) * math.tau for f in fixed]
            for t in positions.tolist()
        ],
        dtype=torch.float64,
    )
    phase = torch.polar(torch.full_like(angles, rope.attention_factor), angles)
    y = x.double().clone()
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if rope.interleaved
        else (slice(0, half), slice(half, 2 * half))
    )
    z = torch.complex(y[..., first], y[..., second]) * phase
    y[..., first], y[..., second] = z.real, z.imag
    return y


POSITIONS = torch.tensor([0, 1, -1, 7, 511, 65_535, 999_999, 1_000_000, 2**24 - 1, 2**24, -(2**24)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "rope",
    [
        dk.Rope(),
        dk.Rope(interleaved=True),
        dk.Rope(dim=16, attention_factor=1.3),
        dk.Rope(theta=500_000.0, dim=20, interleaved=True),
        dk.Rope.yarn(**YARN),
    ],
)
def test_rotation_up_to_two_to_the_24(rope: dk.Rope, dtype: torch.dtype) -> None:
    x = torch.randn(1, 3, len(POSITIONS), 32, dtype=torch.float64).to(dtype)
    expected = by_complex_numbers(rope, x, POSITIONS)
    ours = rotated(rope, x, POSITIONS[None])
    # hi + lo float32 hold 48 bits of the turns: 2**24 * 2**-50 * 2 pi = 1e-7 at the fastest pair
    tolerance = 4e-7 if dtype == torch.float64 else 2e-6
    assert (ours.double() - expected).abs().max() < tolerance
    near = POSITIONS.abs() <= 1_000_000
    if dtype == torch.float64:
        assert (ours.double() - expected)[:, :, near].abs().max() < 4e-8


def test_float32_angles_would_fail_this() -> None:
    """The planted error: angles as float32 products, what most implementations do."""
    x = torch.randn(1, 1, len(POSITIONS), 32, dtype=torch.float64)
    expected = by_complex_numbers(dk.Rope(), x, POSITIONS)
    angles = (POSITIONS.float()[:, None] * torch.tensor(dk.Rope().frequencies(32)[0])).double()
    z = torch.complex(x[..., :16], x[..., 16:]) * torch.polar(torch.ones_like(angles), angles)
    naive = torch.cat((z.real, z.imag), dim=-1)
    assert (naive - expected)[0, 0, 7].abs().max() > 1e-3


@pytest.mark.parametrize("interleaved", [False, True])
def test_inverse_is_the_transpose(interleaved: bool) -> None:
    """<R x, y> = <x, R^T y>, with the attention factor on both sides."""
    rope = dk.Rope(dim=12, interleaved=interleaved, attention_factor=1.3)
    positions = torch.tensor([[0, 5, 1_000_000]])
    x, y = torch.randn(2, 1, 2, 3, 16, dtype=torch.float64)
    left = (rotated(rope, x, positions) * y).sum()
    right = (x * rotated(rope, y, positions, inverse=True)).sum()
    torch.testing.assert_close(left, right)


def test_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)

    def score(i: int, j: int) -> float:
        rope = dk.Rope()
        at_i, at_j = torch.tensor([[i]]), torch.tensor([[j]])
        return float((rotated(rope, q, at_i) * rotated(rope, k, at_j)).sum())

    assert score(1000, 993) == pytest.approx(score(7, 0), abs=1e-6)
    assert score(2**24, 2**24 - 7) == pytest.approx(score(7, 0), abs=2e-6)
    assert abs(score(8, 0) - score(7, 0)) > 1e-3


def test_each_query_head_turns_by_its_kv_heads_table() -> None:
    table = [[0.0] * 8, [0.3] * 8, [0.7] * 8]
    x, positions = torch.randn(1, 6, 5, 16, dtype=torch.float64), torch.arange(5)[None]
    ours = rotated(dk.Rope(inv_freq=table), x, positions)
    for head in range(6):
        alone = rotated(dk.Rope(inv_freq=table[head // 2]), x[:, head : head + 1], positions)
        assert torch.equal(ours[:, head : head + 1], alone)
    assert torch.equal(ours[:, :2], x[:, :2])


# --- the dataclass -------------------------------------------------------------------------------


def test_high_and_low_parts_hold_the_frequency() -> None:
    rope = dk.Rope(theta=123.0)
    turns = rope.turns(64, CPU)
    assert turns.dtype == torch.float32
    assert turns.shape == (2, 1, 32)
    exact = torch.tensor(rope.frequencies(64)[0], dtype=torch.float64) / math.tau
    high, low = turns.double()[:, 0]
    assert torch.equal(high, exact.float().double())
    assert ((high + low - exact).abs() <= exact * 2.0**-47).all()


def test_strength_multiplies_every_angle() -> None:
    rope = dk.Rope.yarn(**YARN)
    half = rope.with_strength(0.5)
    for a, b in zip(rope.frequencies(64)[0], half.frequencies(64)[0], strict=True):
        assert b == a / 2
    assert half.attention_factor == rope.attention_factor
    assert half.with_strength(0.5).frequencies(64) == rope.with_strength(0.25).frequencies(64)
    assert set(rope.with_strength(0.0).frequencies(64)[0]) == {0.0}
    table = dk.Rope(inv_freq=[[0.2, 0.4], [0.0, 1.0]]).with_strength(0.5).with_strength(0.5)
    assert table.frequencies(4) == ((0.05, 0.1), (0.0, 0.25))


def test_no_strength_is_position_free() -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 16).unbind()
    zero = dk.attention(q, k, v, rope=dk.Rope().with_strength(0.0))
    assert torch.equal(zero, dk.attention(q, k, v))


def test_equal_values_are_one_key() -> None:
    """Hashable, tensors and lists alike; the cache is no part of the value."""
    listed = dk.Rope(inv_freq=[[0.5, 0.25]])
    tensor = dk.Rope(inv_freq=torch.tensor([0.5, 0.25]))
    tensor.turns(4, CPU)
    assert listed == tensor
    assert len({listed, tensor, dk.Rope(), dk.Rope(theta=10_000.0), dk.Rope(dim=8)}) == 3
    assert pickle.loads(pickle.dumps(tensor)) == listed
    assert "_turns" not in repr(tensor)


def test_table_is_built_once_per_head_dim_and_device() -> None:
    rope = dk.Rope()
    assert rope.turns(64, CPU) is rope.turns(64, CPU)
    assert rope.turns(32, CPU).shape[-1] == 16


def test_more_channels_than_the_head_has() -> None:
    for rope in (dk.Rope(dim=128), dk.Rope(inv_freq=[1.0] * 33)):
        with pytest.raises(ValueError, match="rope: expected an even dim of at most head_dim = 64"):
            rope.turns(64, CPU)
    with pytest.raises(ValueError, match="rope: expected an even dim"):
        dk.Rope().turns(63, CPU)


def test_frequencies_that_require_grad_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="inv_freq"):
        dk.Rope(inv_freq=torch.ones(4, requires_grad=True))
