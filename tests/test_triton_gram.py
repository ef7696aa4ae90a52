"""Gram tiles of the rows within each example, for any mix of lengths: sums over products, a slab at a time."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from attent_kernels.linear_cross_entropy import gram
from attent_kernels.linear_cross_entropy.gram import Gram, tile_bytes

MIXES = [[37], [0, 5, 0, 0, 1, 20, 3], [16, 17, 15], [1] * 19]
# Float32 sums of some hundred products of order one.
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


def starts_of(lengths: list[int]) -> Tensor:
    """The first row of each row's example."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return ends[:-1].repeat_interleave(torch.tensor(lengths)).int()


def expected(p: Tensor, hidden: Tensor, factor: Tensor, lengths: list[int], one: float) -> Tensor:
    """Σ_ts f_t f_s (p_t·p_s) (h_t·h_s + 1) of each example, in float64."""
    squares = []
    for rows in torch.arange(len(p)).split(lengths):
        rows = rows[factor[rows] != 0]
        a, h, f = (value.double()[rows] for value in (p, hidden, factor))
        squares.append(((a @ a.T) * (h @ h.T + one) * f[:, None] * f).sum())
    return torch.stack(squares)


def by_example(values: Tensor, lengths: list[int]) -> Tensor:
    return torch.stack([part.double().sum() for part in values.split(lengths)])


@pytest.mark.parametrize("lengths", MIXES, ids=str)
def test_each_examples_sum_is_over_its_own_pairs_of_rows(lengths: list[int]) -> None:
    p, hidden, factor = torch.randn(sum(lengths), 50), torch.randn(sum(lengths), 9), torch.rand(sum(lengths)) + 0.5
    factor[::5] = 0
    p[::5], hidden[::5] = torch.nan, torch.nan  # what rows of factor 0 hold does not matter
    with mock.patch.multiple(gram, TILE=16, SUBTILE=8, STEP=32, MIN_COLUMNS=20):
        sums = Gram(starts_of(lengths), max(lengths), 50)
        assert sums.splits == 3
        sums.add(p)
        squares = sums.squares(hidden, factor, True)
        torch.testing.assert_close(by_example(squares, lengths), expected(p, hidden, factor, lengths, 1.0), **CLOSE)
        longer = Gram(starts_of(lengths), sum(lengths), 50)  # as where nobody knows how long the longest is
        longer.add(p)
        torch.testing.assert_close(longer.squares(hidden, factor, True), squares, **CLOSE)


def test_slabs_add_up_and_earlier_ones_are_rescaled() -> None:
    lengths = [7, 12, 2]
    p, hidden = torch.randn(21, 40), torch.randn(21, 6)
    scale, ones = torch.rand(21) + 0.5, torch.ones(21)
    with mock.patch.multiple(gram, TILE=8, SUBTILE=4):
        sums = Gram(starts_of(lengths), 12, 16)
        sums.add(p[:, :16])
        sums.add(p[:, 16:32], scale)
        sums.add(p[:, 32:])
        squares = sums.squares(hidden, None, False)
    rescaled = torch.cat([p[:, :16] * scale[:, None], p[:, 16:]], 1)
    torch.testing.assert_close(by_example(squares, lengths), expected(rescaled, hidden, ones, lengths, 0.0), **CLOSE)


def test_tiles_of_full_size_over_many_rows() -> None:
    lengths = [130, 3, 20]
    p, hidden = torch.randn(153, 70).bfloat16(), torch.randn(153, 5).bfloat16()
    sums = Gram(starts_of(lengths), 130, 70)
    assert sums.tiles.shape == (4, 128, 128) and tile_bytes(153, 130) == 4 * 128 * 128 * 4
    sums.add(p)
    squares = by_example(sums.squares(hidden, None, False), lengths)
    right = expected(p, hidden, torch.ones(153), lengths, 0.0)
    torch.testing.assert_close(squares, right, rtol=1e-5, atol=0)  # float32 sums, and no sum of squares cancels so far
