"""LogScale: the paper's numbers, its range, and the per-query form."""

from __future__ import annotations

import math

import pytest
import torch

import drope_kernels as dk

# beta at 2, 4, 8 and 16 times the training length, from 1 + c ln(s) with the paper's two fits
# (arXiv 2512.12167, appendix C.2), worked out by hand to three decimals.
PAPER = {0.412: (1.286, 1.571, 1.857, 2.142), 0.103: (1.071, 1.143, 1.214, 1.286)}


@pytest.mark.parametrize("c", PAPER)
def test_temperature_of_the_paper(c: float) -> None:
    scale = dk.LogScale(c, 2048)
    for factor, beta in zip((2, 4, 8, 16), PAPER[c], strict=True):
        assert scale(2048 * factor, 64) * 8 == pytest.approx(beta, abs=6e-4)


def test_up_to_the_training_length_it_is_the_default_scale() -> None:
    for length in (0, 1, 1000, 2048):
        assert dk.LogScale(0.412, 2048)(length, 80) == 80**-0.5


def test_c_zero_is_the_default_scale_at_every_length() -> None:
    assert dk.LogScale(0.0, 10)(10_000, 64) == 0.125


def test_rows_give_each_query_the_scale_of_its_own_length() -> None:
    scale = dk.LogScale(0.3, 16)
    index = torch.tensor([[0, 14, 15, 16], [31, 63, 100, 5]])
    rows = scale.rows(index, 32)
    assert rows.dtype == torch.float32
    assert rows.shape == index.shape
    for i, row in zip(index.flatten().tolist(), rows.flatten().tolist(), strict=True):
        assert row == pytest.approx(scale(i + 1, 32), rel=1e-7)


def test_rows_enter_attention_as_a_scale_per_query() -> None:
    q, k, v = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    scale = dk.LogScale(0.5, 2)
    rows = scale.rows(torch.arange(9).expand(2, -1), 8)
    out = dk.attention(q, k, v, scale=rows[:, None, :], backend="reference")
    for i in (0, 4, 8):
        alone = dk.attention(
            q[:, :, i : i + 1],
            k[:, :, : i + 1],
            v[:, :, : i + 1],
            scale=scale(i + 1, 8),
            backend="reference",
        )
        torch.testing.assert_close(out[:, :, i : i + 1], alone)


def test_is_a_value() -> None:
    assert dk.LogScale(0.1, 64) == dk.LogScale(0.1, 64)
    assert hash(dk.LogScale(0.1, 64)) == hash(dk.LogScale(0.1, 64))
    assert math.isclose(dk.LogScale(0.1, 64)(128, 64), (1 + 0.1 * math.log(2)) / 8)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: dk.LogScale(-0.1, 64), "c"),
        (lambda: dk.LogScale(math.nan, 64), "c"),
        (lambda: dk.LogScale(0.1, 0), "train_length"),
        (lambda: dk.LogScale(0.1, 64)(-1, 64), "length"),
        (lambda: dk.LogScale(0.1, 64)(1, 0), "head_dim"),
    ],
)
def test_wrong_numbers_are_refused_by_name(make: object, word: str) -> None:
    with pytest.raises(ValueError, match=f"^{word}: expected .*, got .*; "):
        make()  # type: ignore[operator]


def test_rows_want_integer_indices() -> None:
    with pytest.raises(TypeError, match=r"^index: expected an integer tensor, got torch\.float32"):
        dk.LogScale(0.1, 64).rows(torch.ones(3), 64)
