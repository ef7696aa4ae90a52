"""A tensor that claims the whole batch and carries the chosen rows.

Autograd checks the shape of every gradient against the forward's. A :class:`RowTensor` says it is ``[B, …]``, which
passes, and holds ``[k, …]``; every operation that autograd's nodes call on it arrives at ``__torch_dispatch__`` and
runs on the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layout import Layout


class Cut:
    """One choice of rows in one backward pass."""

    __slots__ = ("batch", "count", "index")

    def __init__(self, index: Tensor, batch: int) -> None:
        self.index = index  # int64 [k]
        self.count = len(
            index
        )  # k, not 1 and not B: so that a row-shaped and a batch-shaped tensor never fit by chance
        self.batch = batch  # B


class RowTensor(torch.Tensor):
    """``rows`` [.., outer · k · inner, ..], of a tensor that claims [.., outer · B · inner, ..]."""

    rows: Tensor
    place: Layout
    cut: Cut

    @staticmethod
    def __new__(
        cls, rows: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], layout: Layout, cut: Cut
    ) -> RowTensor:
        tensor: RowTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=stride, dtype=rows.dtype, device=rows.device
        )
        tensor.rows, tensor.place, tensor.cut = rows, layout, cut
        return tensor

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"RowTensor({self.cut.count} rows of {tuple(self.shape)}, {self.place})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from .rules import run_on_rows

        return run_on_rows(func, args, kwargs or {})
