"""The loss of chosen rows: where a cut backward begins."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import OnePassError


class CutsBackward(Protocol):
    """A forward whose backward can be cut to chosen rows."""

    def gradient(self, gradient: Tensor, index: Tensor, batch: int) -> Tensor:
        """The gradient of losses [B] that is ``gradient`` [k] in rows ``index``; from here on this backward is cut."""


def chosen_loss(losses: Tensor, index: Tensor, weights: Tensor, forward: CutsBackward) -> Tensor:
    """Σ weights · losses[index], whose backward runs on the chosen rows."""
    chosen: Tensor = _ChosenLoss.apply(losses, index, weights, forward)  # type: ignore[no-untyped-call]
    return chosen


def whole_loss(losses: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The same with the whole batch's backward, rows that were not chosen having weight 0."""
    return (losses * losses.new_zeros(losses.shape).index_add_(0, index, weights)).sum()


def two_rows_or_more(gradient: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """A size of 1 broadcasts: a whole-batch tensor met by mistake would go unnoticed. Rows of weight 0 fill up."""
    if len(index) >= 2:
        return gradient, index
    filler = index[:1] if len(index) else index.new_zeros(1)
    missing = 2 - len(index)
    index = torch.cat([index, filler.expand(missing)])
    return torch.cat([gradient, gradient.new_zeros(missing)]), index


class _ChosenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Tensor, index: Tensor, weights: Tensor, forward: CutsBackward) -> Tensor:
        ctx.save_for_backward(index, weights)
        ctx.pending, ctx.batch = forward, len(losses)
        return (losses.index_select(0, index) * weights).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():
            raise OnePassError("create_graph=True: a backward on chosen rows cannot be differentiated again")
        index, weights = ctx.saved_tensors
        return ctx.pending.gradient(weights * grads[0], index, ctx.batch), None, None, None
