"""Cutting rows out of saved tensors: the values of the chosen rows, in an order in memory that views still fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attent.one_pass.layout import Layout, cut, cut_aliases

B, INDEX = 6, torch.tensor([4, 0, 0, 5])


@given(dim=st.integers(0, 2), outer=st.integers(1, 3), inner=st.integers(1, 3), order=st.permutations(range(3)))
def test_rows_are_cut_wherever_the_batch_is_merged(dim: int, outer: int, inner: int, order: list[int]) -> None:
    sizes = [2, 3, 4]
    sizes[dim] = outer * B * inner
    tensor = torch.randn([sizes[i] for i in order]).permute([order.index(i) for i in range(3)])  # any order in memory
    rows = cut(tensor, Layout(dim, outer, inner), INDEX)
    expected = tensor.unflatten(dim, (outer, B, inner)).index_select(dim + 1, INDEX).flatten(dim, dim + 2)
    assert torch.equal(rows, expected)


def qkv() -> tuple[torch.Tensor, ...]:
    """Query, key and value as most attention layers make them: views [B, H, T, D] of one storage [B, T, 3, H, D]."""
    return torch.randn(B, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind()


def test_views_of_one_storage_are_cut_together_and_keep_their_strides() -> None:
    views = [*qkv()[:2]]
    views.append(views[0].transpose(1, 2))
    rows = cut_aliases(views, [Layout(0, 1, 1)] * 3, INDEX)
    assert rows is not None and len({x.untyped_storage().data_ptr() for x in rows}) == 1
    for view, cut_view in zip(views, rows, strict=True):
        assert torch.equal(cut_view, view[INDEX]) and cut_view.stride() == view.stride()


@pytest.mark.parametrize("case", ["a part", "batch inside", "two dtypes", "all rows one"])
def test_views_that_are_laid_out_otherwise_are_cut_one_by_one(case: str) -> None:
    query, _, value = qkv()
    batch_first = Layout(0, 1, 1)
    views, layouts = {
        "a part": ([query[..., :1], query[..., 1:2]], [batch_first] * 2),  # a copy of the storage would not pay
        "batch inside": ([torch.randn(4, B).t(), query], [Layout(0, 1, 1)] * 2),
        "two dtypes": ([query, value.view(torch.int32)], [batch_first] * 2),
        "all rows one": ([torch.randn(1, 4).expand(B, 4), query], [batch_first] * 2),
    }[case]
    assert cut_aliases(views, layouts, INDEX) is None
