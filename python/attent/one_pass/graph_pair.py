"""The forward and backward graphs of a compiled learner, and how the backward runs on chosen rows.

AOTAutograd hands out both graphs with the number of rows B as a symbol. Every saved tensor in which the forward's probe
found the batch is cut to the chosen rows, every size that counts the batch is counted anew, and the backward graph runs
on that. Parameters' gradients come out as they are; those of batch arguments are put back among the batch's rows.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import SymInt, Tensor, fx

from .errors import OnePassError
from .layout import Layout, cut, cut_aliases
from .lowering import Lowered, at_count, compiled_by_inductor, expression, interpreted, placeholders
from .pinned_random import inner_operation, pin_random, refuse_random
from .probe import Run, learn_layouts
from .probe_mode import ProbeMode, no_trace, seed_all

#: Key of a node's metadata under which its forward is found.
FORWARD = "attent_one_pass_forward"
#: The backward is compiled for each number of chosen rows; more of them would spend the run on compiling.
MOST_COUNTS = 4


class Choice(Protocol):
    """What a backward asks the forward that it belongs to."""

    interpret: bool

    def chosen(self, tangent: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rows [k] and their gradients [k], if this backward, which ``tangent`` [B] enters, is cut to rows."""


class GraphPair:
    """What torch.compile made of a learner; one of these for each of its compilations."""

    def __init__(self, graph: fx.GraphModule, backend: str) -> None:
        self.lasting = False  # the probed rows all differed, so the layouts hold for other batches
        self.verified: set[int] = set()  # numbers of rows for which a gradient was compared with the full backward's
        self._backend = backend
        outputs = graph.graph.output_node().args[0]
        assert isinstance(outputs, (list, tuple))
        differentiable = [i for i, x in enumerate(outputs) if isinstance(x, fx.Node) and _requires_grad(x)]
        if len(differentiable) != 1:
            raise OnePassError(
                f"the compiled learner gives out {len(differentiable)} tensors with gradient where one, the losses, is"
                " taken: it keeps others as attributes or elsewhere, or all its parameters are frozen"
            )
        self._losses_from_end = len(outputs) - differentiable[0]
        self._layouts: dict[str, Layout | None] = {}
        self._lowered: dict[tuple[str, int], Lowered] = {}

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Dtypes of what the forward saves."""
        values = [node.meta["val"] for node in self._outputs() if isinstance(node, fx.Node)]
        return {value.dtype for value in values if isinstance(value, Tensor)}

    # ------------------------------------------------------------------------------------------ called by AOTAutograd

    def partition(self, joint: fx.GraphModule, *args: Any, num_fwd_outputs: int, **options: Any) -> Any:
        """Split forward from backward, with every random result saved."""
        from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition

        # Inductor fuses what min-cut recomputes; operation by operation, recomputing costs more than it saves.
        split = min_cut_rematerialization_partition if self._backend == "inductor" else default_partition
        pin_random(joint.graph)
        self._num_outputs = num_fwd_outputs
        graphs = split(joint, *args, num_fwd_outputs=num_fwd_outputs, **options)
        refuse_random(graphs[1].graph)
        return graphs

    def compile_forward(self, graph: fx.GraphModule, examples: object) -> Lowered:
        # AOTAutograd would refuse retain_graph=True, for a compiler might reuse saved tensors' memory; ours does not.
        context = torch._guards.TracingContext.try_get()
        if context is not None and context.fw_metadata is not None:
            context.fw_metadata.bw_donated_idxs = []
            # What outputs are views of comes out behind them.
            self._losses_from_end += context.fw_metadata.num_intermediate_bases
        self._forward_graph = graph
        self._symbol, self._environment = _batch_symbol(graph)
        return _boxed(self._run_forward)

    def compile_backward(self, graph: fx.GraphModule, examples: object) -> Lowered:
        self._backward_graph = graph
        return _boxed(self._run_backward)

    # ----------------------------------------------------------------------------------------------------- the forward

    def _run_forward(self, arguments: list[Any]) -> Any:
        size = self._batch_size(arguments)
        if not self.lasting:
            self._learn(arguments, size)
        return self._lower("forward", self._forward_graph, size, arguments)(arguments)

    def _batch_size(self, arguments: list[Any]) -> int:
        for node, value in zip(placeholders(self._forward_graph), arguments, strict=True):
            meta = node.meta["val"]
            if isinstance(meta, Tensor) and meta.dim() > 0 and expression(meta.shape[0]) == self._symbol:
                return int(value.shape[0])
        raise OnePassError("no argument of the compiled learner has the batch as its first dimension")

    def _learn(self, arguments: list[Any], size: int) -> None:
        """Find where the batch is in what the forward saves, by running its graph on a few rows; no trace is left."""
        device = next(value.device for value in arguments if isinstance(value, Tensor))
        nodes = self._outputs()[self._num_outputs :]
        names = [node.name for node in nodes if isinstance(node.meta["val"], Tensor)]

        def run(rows: list[int], log: bool) -> Run:
            at = torch.tensor(rows, device=device)
            mode = ProbeMode(log)
            seed_all(device)
            given = [
                self._on_rows(node, value, at)
                for node, value in zip(placeholders(self._forward_graph), arguments, strict=True)
            ]
            try:
                with mode:
                    results = _Interpreter(self._forward_graph).run(*given)
            except NotImplementedError as error:
                raise OnePassError(f"an operation of the compiled learner cannot be probed: {error}") from error
            except (RuntimeError, ValueError, IndexError) as error:
                if isinstance(error, OnePassError):
                    raise
                raise OnePassError(
                    f"per_example_loss does not run on {len(rows)} of the batch's rows: {error}"
                ) from error
            saved = [x for x in results[self._num_outputs :] if isinstance(x, Tensor)]
            return Run(saved, results[self._num_outputs - self._losses_from_end], mode.log or [])

        with torch.no_grad(), no_trace([], device):
            layouts, run_on_few = learn_layouts(run, size)
        self._layouts = dict(zip(names, layouts, strict=True))
        self.lasting = run_on_few.rows_differ()

    def _on_rows(self, node: fx.Node, value: Any, rows: Tensor) -> Any:
        """An argument of the forward with the given rows alone."""
        meta = node.meta["val"]
        if isinstance(meta, SymInt):
            return at_count(meta, self._symbol, len(rows))
        if not isinstance(meta, Tensor) or not self._counts_batch(meta):
            return value
        if expression(meta.shape[0]) != self._symbol:
            raise OnePassError(f"an argument of shape {tuple(value.shape)} has the batch in another than its first dim")
        return value.index_select(0, rows.to(value.device))

    def _outputs(self) -> tuple[Any, ...]:
        outputs: Any = self._forward_graph.graph.output_node().args[0]
        return tuple(outputs)

    def _counts_batch(self, meta: Tensor) -> bool:
        return any(self._symbol in expression(size).free_symbols for size in meta.shape)

    # ---------------------------------------------------------------------------------------------------- the backward

    def _run_backward(self, arguments: list[Any]) -> Any:
        node: Any = torch._C._current_autograd_node()
        forward: Choice | None = None if node is None else node.metadata.get(FORWARD)
        nodes = placeholders(self._backward_graph)
        tangents = [i for i, x in enumerate(nodes) if x.name.startswith("tangents")]
        if len(tangents) != 1:
            raise OnePassError(
                f"the compiled backward takes {len(tangents)} gradients where one, the losses', is served"
            )
        tangent = arguments[tangents[0]]
        choice = None if forward is None else forward.chosen(tangent)
        if forward is None or choice is None:
            if forward is not None and forward.interpret:
                return interpreted(self._backward_graph)(arguments)
            return self._lower("backward", self._backward_graph, len(tangent), arguments)(arguments)
        index, gradient = choice
        self._check_guards(len(index))
        arguments[tangents[0]] = None
        chosen = self._cut(nodes, arguments, index)
        chosen[tangents[0]] = gradient
        results = self._lower("backward of rows", self._backward_graph, len(index), chosen)(chosen)
        outputs: Any = self._backward_graph.graph.output_node().args[0]
        return [self._whole(out, result, index, len(tangent)) for out, result in zip(outputs, results, strict=True)]

    def _cut(self, nodes: list[fx.Node], arguments: list[Any], index: Tensor) -> list[Any]:
        """The backward's arguments on chosen rows; each whole tensor is let go as soon as it is cut."""
        chosen: list[Any] = list(arguments)
        by_storage: dict[int, list[int]] = {}
        for i, (node, value) in enumerate(zip(nodes, arguments, strict=True)):
            meta = node.meta["val"]
            if isinstance(meta, SymInt):
                chosen[i] = at_count(meta, self._symbol, len(index))
            elif isinstance(value, Tensor) and self._layout(node) is not None:
                by_storage.setdefault(value.untyped_storage()._cdata, []).append(i)
        for group in by_storage.values():
            tensors = [arguments[i] for i in group]
            layouts = [self._layout(nodes[i]) for i in group]
            found: list[Layout] = [layout for layout in layouts if layout is not None]
            together = cut_aliases(tensors, found, index) if len(group) > 1 else None
            if together is None:
                together = [cut(x, layout, index) for x, layout in zip(tensors, found, strict=True)]
            del tensors
            for i, rows in zip(group, together, strict=True):
                chosen[i], arguments[i] = rows, None
        arguments.clear()
        return chosen

    def _layout(self, node: fx.Node) -> Layout | None:
        if node.name not in self._layouts:
            meta = node.meta["val"]
            if isinstance(meta, Tensor) and self._counts_batch(meta):
                raise OnePassError(f"the compiled backward takes {node.name} of shape {tuple(meta.shape)}, not probed")
            return None
        return self._layouts[node.name]

    def _whole(self, node: Any, result: Any, index: Tensor, size: int) -> Any:
        """A gradient of a batch argument with all rows, 0 in those that were not chosen."""
        if not isinstance(result, Tensor) or not isinstance(node, fx.Node) or not self._counts_batch(node.meta["val"]):
            return result
        if expression(node.meta["val"].shape[0]) != self._symbol:
            raise OnePassError(f"the gradient of a batch argument, {node.name}, has lost its batch dimension")
        return result.new_zeros((size, *result.shape[1:])).index_add_(0, index, result)

    def _check_guards(self, count: int) -> None:
        """Refuse a number of rows for which the learner would have been traced otherwise."""
        import sympy  # type: ignore[import-untyped]

        for guard in self._environment.guards:
            if guard.expr.free_symbols == {self._symbol} and guard.expr.subs({self._symbol: count}) == sympy.false:
                raise OnePassError(f"the learner was compiled for {guard.expr}, which k = {count} chosen rows break")

    def _lower(self, direction: str, graph: fx.GraphModule, count: int, arguments: list[Any]) -> Lowered:
        if self._backend != "inductor":
            key = (direction, 0)
            if key not in self._lowered:
                self._lowered[key] = interpreted(graph)
            return self._lowered[key]
        key = (direction, count)
        if key not in self._lowered:
            if direction == "backward of rows":
                known = sorted(count for kind, count in self._lowered if kind == direction)
                if len(known) == MOST_COUNTS:
                    raise OnePassError(
                        f"k = {count} would be a fifth number of chosen rows to compile the backward for, after"
                        f" {', '.join(map(str, known))}: keep k the same from step to step (rows of weight 0 fill up),"
                        " or take engine='eager'"
                    )
            self._lowered[key] = compiled_by_inductor(graph, arguments)
        return self._lowered[key]


class _Interpreter(fx.Interpreter):
    """Runs operations that checkpointing has wrapped in saving or setting the random state without that."""

    def run_node(self, n: fx.Node) -> Any:
        target, _ = inner_operation(n)
        if target is n.target:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        result = target(*args[list(n.args).index(target) + 1 :], **kwargs)
        return (torch.get_rng_state(), result) if "save" in str(n.target) else result


def _batch_symbol(graph: fx.GraphModule) -> tuple[Any, Any]:
    """The symbol that counts the batch's rows, and the environment that holds guards on it."""
    sizes = []
    for node in placeholders(graph):
        meta = node.meta["val"]
        sizes += list(meta.shape) if isinstance(meta, Tensor) else [meta]
    symbolic = [size for size in sizes if isinstance(size, SymInt) and expression(size).free_symbols]
    symbols = {symbol for size in symbolic for symbol in expression(size).free_symbols}
    if len(symbols) != 1:
        raise OnePassError(
            f"the compiled learner has {len(symbols)} sizes that vary where one, the batch's, is served"
            + ("" if symbols else ": it is made for one batch size")
        )
    return symbols.pop(), symbolic[0].node.shape_env


def _requires_grad(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.requires_grad


def _boxed(function: Lowered) -> Lowered:
    def run(arguments: list[Any]) -> Any:
        return function(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
