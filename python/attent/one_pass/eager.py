"""The eager engine: one forward of the whole batch whose backward can be cut to chosen rows.

Every tensor that autograd saves passes through a hook. In a backward that began at :func:`chosen_loss`, the hook
hands back the chosen rows of it as a :class:`RowTensor`, and the gradient that enters is one too, so autograd's own
engine runs every node on the rows alone. In any other backward the hook hands back what was saved.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .batch import Batch, modules_of
from .chosen_loss import two_rows_or_more
from .errors import OnePassError
from .layout import Layout, cut
from .probe import Plan, graph_nodes, losses_of, probe
from .row_tensor import Cut, RowTensor

_COMPILED = (
    "the eager engine cannot cut a compiled region's backward; take engine='compile', or leave out torch.compile"
)


class EagerForward:
    """One forward that waits for its backward: what it saved, by number, and which backward cuts it."""

    name = "eager"

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

    @property
    def cuts(self) -> bool:
        return self.plan is not None

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Dtypes of what the forward saved."""
        return {dtype for _, dtype in self.shapes}

    def is_verified(self, count: int) -> bool:
        """Whether a gradient was compared with the full backward's: what is cut does not depend on how many rows."""
        return self.plan is not None and self.plan.verified

    def note_verified(self, count: int) -> None:
        if self.plan is not None:
            # Without weight or loss there is nothing to see: look again at the next gradient.
            self.plan.verified = count > 0

    def stop_cutting(self) -> None:
        """From here on the backward is the whole batch's."""
        self.plan = None

    @contextmanager
    def being_compared(self) -> Iterator[None]:
        """While a cut gradient is compared with the whole batch's."""
        yield

    def gradient(self, gradient: Tensor, index: Tensor, batch: int) -> Tensor:
        """The gradient [B] of losses that is ``gradient`` [k] in the chosen rows; from here on this backward is cut."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            raise OnePassError("one backward pass has two choices of rows from one forward: join them in one step.loss")
        gradient, index = two_rows_or_more(gradient, index)
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


class EagerEngine:
    """Probes a learner once per signature."""

    name = "eager"

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._plans: dict[Hashable, Plan] = {}
        self.probes = 0

    def forward(
        self, batch: Batch, signature: Hashable, refused: Callable[[Exception], None]
    ) -> tuple[EagerForward, Any]:
        """The whole batch's forward; raises :class:`OnePassError` if the learner cannot be served.

        Where that shows only in the forward itself, ``refused`` is told, and the forward's backward will be whole.
        """
        forward = EagerForward(self._plan(signature, batch))
        result = forward.run(self._function, batch)
        try:
            self._check(forward, signature, batch, losses_of(result)[0])
        except (OnePassError, NotImplementedError) as error:
            forward.plan = None
            self.forget(signature)
            refused(error)
        return forward, result

    def forget(self, signature: Hashable) -> None:
        """Probe anew the next time."""
        self._plans.pop(signature, None)

    def _plan(self, signature: Hashable, batch: Batch) -> Plan | None:
        """What is known of a signature, from a probe if need be; None: there is nothing to choose from."""
        if batch.size < 3:  # a cut takes two rows or more, and fewer than there are
            return None
        known = self._plans.get(signature)
        if known is not None and known.lasting:
            return known
        modules = modules_of(self._function)
        compiled = what_is_compiled(self._function)
        if compiled is not None:
            raise OnePassError(f"{compiled}: {_COMPILED}")
        self.probes += 1
        plan = self._plans[signature] = probe(self._function, batch, modules)
        return plan

    def _check(self, forward: EagerForward, signature: Hashable, batch: Batch, losses: Tensor) -> None:
        """Whether a forward that has been run is the one that was probed; if not, learn it anew."""
        if forward.plan is None:
            return
        if not forward.fits_plan():  # a mode that the signature does not show has changed
            self.forget(signature)
            forward.plan = self._plan(signature, batch)
            if not forward.fits_plan():
                raise OnePassError("the forward saves other tensors for the batch than for a few of its rows")
        if forward.plan is not None and not forward.plan.verified:
            for node in graph_nodes(losses):
                if "CompiledFunction" in node.name():
                    raise OnePassError(f"{node.name()}: {_COMPILED}")


def what_is_compiled(function: object) -> str | None:
    """The name of what is seen to be under torch.compile, if anything is."""
    for root in modules_of(function):
        for module in root.modules():
            if module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule):
                return type(module).__name__
    return "per_example_loss" if hasattr(function, "_torchdynamo_orig_callable") else None


def _with_whole_gradient(rows: Tensor) -> Tensor:
    if not rows.requires_grad:
        return rows
    passed: Tensor = _WholeGradient.apply(rows)  # type: ignore[no-untyped-call]
    return passed


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
