"""The eager engine: one forward of the whole batch whose backward can be cut to chosen rows.

Every tensor that autograd saves passes through a hook. In a backward that began at :class:`_ChosenLoss`, the hook
hands back the chosen rows of it as a :class:`RowTensor`, and the gradient that enters is one too, so autograd's own
engine runs every node on the rows alone. In any other backward the hook hands back what was saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .batch import Batch
from .errors import OnePassError
from .layout import Layout, cut
from .probe import Plan
from .row_tensor import Cut, RowTensor


class EagerForward:
    """One forward that waits for its backward: what it saved, by number, and which backward cuts it."""

    def __init__(self, plan: Plan | None) -> None:
        self.plan = plan  # None: the backward is never cut
        self.shapes: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._cut: Cut | None = None
        self._task = -1  # autograd's number of the backward pass that _cut belongs to

    def run(self, function: Callable[..., Any], batch: Batch) -> Any:
        """The whole batch's forward; rows that want gradients get them as [B, ...]."""
        args, kwargs = batch.map(_with_whole_gradient)
        if self.plan is None:
            return function(*args, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return function(*args, **kwargs)

    def fits_plan(self) -> bool:
        """Whether the forward saved what its plan says."""
        return self.plan is None or self.shapes == self.plan.shapes

    def loss(self, losses: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Σ weights · losses[index], whose backward runs on the chosen rows."""
        chosen: Tensor = _ChosenLoss.apply(losses, index, weights, self)  # type: ignore[no-untyped-call]
        return chosen

    def whole_loss(self, losses: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The same with the whole batch's backward, rows not chosen having weight 0."""
        return (losses * row_weights(losses, index, weights)).sum()

    def gradient(self, gradient: Tensor, index: Tensor, batch: int) -> Tensor:
        """The gradient [B] of losses that is ``gradient`` [k] in the chosen rows; from here on this backward is cut."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            raise OnePassError("one backward pass has two choices of rows from one forward: join them in one step.loss")
        if len(index) < 2:
            # A size of 1 broadcasts: a whole-batch tensor met by mistake would go unnoticed. Rows of weight 0 fill up.
            filler = index[:1] if len(index) else index.new_zeros(1)
            missing = 2 - len(index)
            index = torch.cat([index, filler.expand(missing)])
            gradient = torch.cat([gradient, gradient.new_zeros(missing)])
        self._task, self._cut = task, Cut(index, batch)
        return RowTensor(gradient, (batch,), (1,), Layout(0, 1, 1), self._cut)

    def _pack(self, tensor: Tensor) -> tuple[int, Tensor, int]:
        number = len(self.shapes)
        self.shapes.append((tuple(tensor.shape), tensor.dtype))
        # Detached, for a result that its own node saves would keep that node alive forever.
        return number, tensor if tensor.is_leaf else tensor.detach(), tensor._version

    def _unpack(self, packed: tuple[int, Tensor, int]) -> Tensor:
        number, tensor, version = packed
        if tensor._version != version:
            raise RuntimeError(
                f"saved tensor {number} of shape {tuple(tensor.shape)} was changed in place after the forward"
                f" (version {tensor._version}, saved at {version}), as by an optimizer step before the backward"
            )
        if self._cut is None or self._task != torch._C._current_graph_task_id():
            return tensor
        assert self.plan is not None
        layout = self.plan.layouts[number]
        if layout is None:
            return tensor
        rows = cut(tensor, layout, self._cut.index)
        if layout.dim < 0:
            layout = Layout(0, 1, 1)
        return RowTensor(rows, tuple(tensor.shape), tensor.stride(), layout, self._cut)


def row_weights(losses: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Weights [B] of all rows: the chosen ones', 0 elsewhere."""
    return losses.new_zeros(losses.shape).index_add_(0, index, weights)


def _with_whole_gradient(rows: Tensor) -> Tensor:
    if not rows.requires_grad:
        return rows
    passed: Tensor = _WholeGradient.apply(rows)  # type: ignore[no-untyped-call]
    return passed


class _ChosenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Tensor, index: Tensor, weights: Tensor, forward: EagerForward) -> Tensor:
        ctx.save_for_backward(index, weights)
        ctx.pending, ctx.batch = forward, len(losses)
        return (losses.index_select(0, index) * weights).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():
            raise OnePassError("create_graph=True: a backward on chosen rows cannot be differentiated again")
        index, weights = ctx.saved_tensors
        return ctx.pending.gradient(weights * grads[0], index, ctx.batch), None, None, None


class _WholeGradient(torch.autograd.Function):
    """Hands the gradient of chosen rows back as one of the batch, 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        gradient = grads[0]
        if not isinstance(gradient, RowTensor):
            return gradient
        if gradient.place != Layout(0, 1, 1):
            raise OnePassError("the gradient of a batch argument has lost its batch dimension")
        whole = gradient.rows.new_zeros(gradient.shape)
        return whole.index_add_(0, gradient.cut.index, gradient.rows)
