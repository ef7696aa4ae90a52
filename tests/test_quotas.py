"""Quotas: groups get their proportional share, and within a group the choice is select_top_k's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import attent
from attent.ops.select_top_k import select_top_k
from attent.quotas import group_labels, quotas, select_by_quota, top_per_group


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=12), data=st.data())
def test_quotas_are_proportional_shares_rounded_by_largest_remainder(counts: list[int], data: st.DataObject) -> None:
    n = sum(counts)
    k = data.draw(st.integers(0, n))
    share = quotas(torch.tensor(counts), k).tolist()
    assert sum(share) == k
    for q, count in zip(share, counts, strict=True):
        assert k * count // max(n, 1) <= q <= -(-k * count // max(n, 1)) <= count
    remainders = [k * count % max(n, 1) for count in counts]
    rounded_up = [q > k * count // max(n, 1) for q, count in zip(share, counts, strict=True)]
    # Whoever was rounded up has a larger remainder than whoever was not, or an equal one and a lower number.
    place = [(-remainder, group) for group, remainder in enumerate(remainders)]
    up, down = ([p for p, r in zip(place, rounded_up, strict=True) if r is which] for which in (True, False))
    assert not up or not down or max(up) < min(down)


@given(groups=st.lists(st.integers(-3, 40), max_size=20))
def test_labels_number_the_groups_in_their_order(groups: list[int]) -> None:
    in_order = sorted(set(groups))
    assert group_labels(torch.tensor(groups, dtype=torch.int64)).tolist() == [in_order.index(g) for g in groups]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("floor", [0.0, 0.3, 1.0])
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 24))
def test_within_a_group_the_choice_is_select_top_ks(temperature: float, floor: float, seed: int, n: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=draw)
    scores = torch.randint(1, 9, (n,), generator=draw) / 8  # ties are common
    valid = torch.rand(n, generator=draw) < 0.8
    quota = torch.tensor(
        [int(torch.randint(int((valid & (labels == g)).sum()) + 1, (), generator=draw)) for g in range(4)]
    )
    index, inclusion = top_per_group(
        scores, labels, quota, int(quota.sum()), temperature=temperature, floor=floor, valid=valid, seed=seed
    )
    assert index.tolist() == sorted(index.tolist())
    expected: dict[int, float] = {}
    for g in range(4):  # the same pool with everyone else ruled out: noise belongs to the place in the pool
        of_group = valid & (labels == g)
        alone = select_top_k(scores, int(quota[g]), temperature=temperature, floor=floor, valid=of_group, seed=seed)
        expected |= dict(zip(alone.index.tolist(), alone.inclusion.tolist(), strict=True))
    found = dict(zip(index.tolist(), inclusion.tolist(), strict=True))
    assert found.keys() == expected.keys()
    for i, value in found.items():
        assert value == pytest.approx(expected[i], rel=1e-5)  # float32 exponentials of the same keys


def test_a_selection_by_quota_is_ordered_by_score_and_leaves_invalid_ones_for_last() -> None:
    scores = torch.tensor([0.1, 5.0, 0.3, 4.0, float("nan"), 2.0])
    groups = torch.tensor([7, 7, 7, 9, 9, 9])
    chosen = select_by_quota(scores, 4, groups, temperature=0.0, floor=0.0, valid=scores.isfinite(), seed=0)
    assert chosen.index.tolist() == [1, 3, 5, 2]
    assert chosen.score.tolist() == scores[chosen.index].tolist()
    assert chosen.inclusion.tolist() == [1.0] * 4


def test_choosing_by_quota_reads_nothing_back_to_the_host() -> None:
    teacher = attent.Teacher(total_steps=4, warmup=0)
    with FakeTensorMode():  # a fake tensor refuses to tell its values
        chosen = teacher.choose(torch.empty(32), groups=torch.zeros(32, dtype=torch.int64))
        assert chosen.index.shape == (16,)


def test_an_empty_pool_gives_an_empty_choice() -> None:
    none = torch.empty(0)
    chosen = select_by_quota(none, 0, none.long(), temperature=1.0, floor=0.2, valid=none.bool(), seed=0)
    assert chosen.index.shape == (0,) and chosen.inclusion.shape == (0,)
