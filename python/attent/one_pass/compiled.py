"""The compile engine: the learner under torch.compile, its backward graph run on the chosen rows."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .batch import Batch, modules_of
from .chosen_loss import two_rows_or_more
from .eager import EagerForward
from .errors import OnePassError
from .graph_pair import FORWARD, GraphPair
from .probe import graph_nodes


class CompiledForward:
    """One forward that waits for its backward."""

    name = "compile"

    def __init__(self, pair: GraphPair) -> None:
        self.cuts = True  # False: the backward is the whole batch's
        self.interpret = False  # run an uncut backward operation by operation
        self.dtypes: set[torch.dtype] = pair.dtypes
        self._pair = pair
        self._task = self._version = -1
        self._entering: Tensor | None = None  # the gradient [B] that begins the cut backward
        self._choice: tuple[Tensor, Tensor] | None = None

    def is_verified(self, count: int) -> bool:
        """Whether a gradient of this many rows was compared with the full backward's."""
        return count in self._pair.verified

    def note_verified(self, count: int) -> None:
        # Rows that are all alike hide what a row takes from others: look again at the next batch.
        if self._pair.lasting:
            self._pair.verified.add(count)

    def stop_cutting(self) -> None:
        """From here on the backward is the whole batch's."""
        self.cuts = False

    @contextmanager
    def being_compared(self) -> Iterator[None]:
        """While a cut gradient is compared with the whole batch's, for which nothing is compiled."""
        self.interpret = True
        try:
            yield
        finally:
            self.interpret = False

    def gradient(self, gradient: Tensor, index: Tensor, batch: int) -> Tensor:
        """The gradient [B] of losses that is ``gradient`` [k] in the chosen rows; from here on this backward is cut."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            raise OnePassError("one backward pass has two choices of rows from one forward: join them in one step.loss")
        entering = gradient.new_zeros(batch).index_add_(0, index, gradient)
        gradient, index = two_rows_or_more(gradient, index)
        self._task, self._entering, self._choice = task, entering, (index, gradient)
        self._version = entering._version
        return entering

    def chosen(self, tangent: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rows and their gradients, if ``tangent`` is what :meth:`gradient` has sent and nothing else.

        Another loss's gradient may have been added to it on the way: then all rows matter, and the backward is whole.
        """
        entering, choice = self._entering, self._choice
        self._entering = self._choice = None
        if entering is None or choice is None or self._task != torch._C._current_graph_task_id():
            return None
        same = tangent.data_ptr() == entering.data_ptr() and entering._version == self._version
        return choice if same else None


class CompileEngine:
    """Compiles a learner once per signature."""

    name = "compile"

    def __init__(self, function: Callable[..., Any], backend: str) -> None:
        self._function = getattr(function, "_torchdynamo_orig_callable", function)
        self._backend = backend
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self._ran: GraphPair | None = None  # the graphs that the last call ran
        self.probes = 0

    def forward(
        self, batch: Batch, signature: Hashable, refused: Callable[[Exception], None]
    ) -> tuple[CompiledForward | EagerForward, Any]:
        """The whole batch's forward; raises :class:`OnePassError`, without a trace, of what cannot be served."""
        if batch.size < 3:  # a cut takes two rows or more, and fewer than there are
            whole = EagerForward(None)
            return whole, whole.run(self._function, batch)
        for root in modules_of(self._function):
            for module in root.modules():
                _refuse_wrapper(module)
        compiled = self._compiled.get(signature)
        if compiled is None:
            learner = _named_anew(self._function, batch.row_leaves, len(self._compiled))
            compiled = self._compiled[signature] = torch.compile(learner, backend=self._compile, fullgraph=True)
        args, kwargs = batch.map(_of_any_size)
        self._ran = None
        try:
            with (
                # The batch is the one size that varies.
                torch._dynamo.config.patch(automatic_dynamic_shapes=False, assume_static_by_default=True),
                # A gradient may be looked at twice.
                torch._functorch.config.patch(donated_buffer=False),
            ):
                result = compiled(*args, **kwargs)
        except Exception as error:
            self._compiled.pop(signature, None)
            raise _refusal(error) from error
        pair: GraphPair | None = self._ran
        if pair is None:
            self._compiled.pop(signature, None)
            raise OnePassError("torch.compile is switched off here, so there is no compiled backward to cut")
        forward = CompiledForward(pair)
        losses = result[0]
        nodes = [node for node in graph_nodes(losses) if "CompiledFunction" in node.name()]
        if len(nodes) != 1:
            raise OnePassError(f"the compiled learner has {len(nodes)} backward graphs where one is served")
        nodes[0].metadata[FORWARD] = forward
        return forward, losses if result[1] is None else result

    def forget(self, signature: Hashable) -> None:
        """Compile anew the next time."""
        self._compiled.pop(signature, None)

    def _compile(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd

        pair = GraphPair(graph, self._backend)
        options: dict[str, Any] = {}
        if self._backend == "inductor":
            import torch._inductor.lowering  # noqa: F401 - decompositions use it without importing it
            from torch._inductor.decomposition import select_decomp_table

            options["decompositions"] = select_decomp_table
        made = aot_autograd(
            fw_compiler=pair.compile_forward, bw_compiler=pair.compile_backward, partition_fn=pair.partition, **options
        )(graph, examples)

        def run(*args: Any) -> Any:
            learned = pair.lasting
            self._ran = pair
            result = made(*args)
            self.probes += not learned
            return result

        return run


def _named_anew(function: Callable[..., Any], row_leaves: list[int], number: int) -> Callable[..., Any]:
    """The function that is compiled: losses of their own storage, scores without gradient, one size for all arguments.

    Its code object is its own, for torch.compile keeps what it made by code object and gives up after a few.
    """

    def one_pass(*args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        for i in row_leaves[1:]:  # else each would have a size of its own wherever the learner does not compare them
            torch._check(leaves[i].shape[0] == leaves[row_leaves[0]].shape[0])
        result = function(*args, **kwargs)
        losses, scores = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        return losses.clone(), pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, scores)

    code = one_pass.__code__.replace(co_name=f"one_pass_{number}")
    return types.FunctionType(code, one_pass.__globals__, code.co_name, one_pass.__defaults__, one_pass.__closure__)


def _of_any_size(rows: Tensor) -> Tensor:
    """A view of an argument whose number of rows torch.compile leaves open; the caller's tensor stays unmarked."""
    view = rows.view_as(rows) if rows.requires_grad else rows.detach()
    torch._dynamo.mark_dynamic(view, 0)
    return view


def _refuse_wrapper(module: nn.Module) -> None:
    name = type(module).__name__
    if isinstance(module, nn.parallel.DistributedDataParallel):
        raise OnePassError(f"{name}: torch.compile splits it into several graphs; take engine='eager'")
    if "FSDP" in name:
        raise OnePassError(f"{name}: its hooks gather parameters outside of the compiled graph; take engine='eager'")


def _refusal(error: Exception) -> OnePassError:
    """What went wrong in torch.compile, in words."""
    inner = getattr(error, "inner_exception", None) or error
    if isinstance(inner, OnePassError):
        return inner
    said = " ".join(str(inner).split("\n\nfrom user code")[0].split())[:400]
    if isinstance(inner, torch._dynamo.exc.Unsupported):
        return OnePassError(f"graph break: {said}")
    if "mark_dynamic" in said or "ConstraintViolation" in type(inner).__name__:
        return OnePassError(f"the learner is made for one batch size: {said}")
    return OnePassError(f"torch.compile fails on the learner: {type(inner).__name__}: {said}")
