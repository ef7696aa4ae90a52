"""Turns a graph of the batch into a function for one number of rows.

A graph is traced once, with the number of rows a symbol. For Inductor it is compiled anew for each number, sizes being
plain integers: its choices of kernels and layouts depend on sizes (one guard seen is ``65·B > 4096``), so that what is
made for the batch cannot simply run on fewer rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import SymInt, Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from .pinned_random import drop_random_states

BACKENDS = ("inductor", "aot_eager")
#: Called with its list of arguments, which it empties, so that each is freed after its last use.
Lowered = Callable[[list[Any]], Any]


def expression(size: Any) -> Any:
    """A size as sympy's expression."""
    import sympy  # type: ignore[import-untyped]

    return size.node.expr if isinstance(size, SymInt) else sympy.Integer(int(size))


def at_count(size: Any, symbol: Any, count: int) -> int:
    """A size with ``count`` rows in the batch."""
    return int(expression(size).subs({symbol: count}))


def interpreted(graph: fx.GraphModule) -> Lowered:
    """The graph's operations one after another, for any number of rows."""
    module = copy.deepcopy(graph)
    drop_random_states(module.graph)
    # Boxed: each argument is dropped after its last use. PyTorch 2.9 generates no such code; its interpreter, slower by
    # some microseconds for each operation, keeps the same order and drops the same.
    boxed = getattr(fx.graph, "_BoxedCodeGen", None)
    if boxed is None:
        return lambda arguments: fx.Interpreter(module).boxed_run(arguments)
    module.graph.set_codegen(boxed())
    module.recompile()
    return lambda arguments: module(arguments)


def compiled_by_inductor(graph: fx.GraphModule, arguments: list[Any]) -> Lowered:
    """The graph compiled for the shapes and strides of ``arguments`` alone."""
    module = copy.deepcopy(graph)
    tensors = [i for i, value in enumerate(arguments) if isinstance(value, Tensor)]
    for node, value in zip(placeholders(module), arguments, strict=True):
        if not isinstance(value, Tensor):
            _replace(node, value)
    drop_random_states(module.graph)
    for node in module.graph.nodes:
        node.meta.clear()  # shapes in symbols
    module.recompile()
    # On the first call AOTAutograd watches custom operators with a mode of its own; a compiler must not meet it.
    with torch.no_grad(), _disable_current_modes():
        compiled = torch._inductor.compile(module, [arguments[i] for i in tensors])

    def run(arguments: list[Any]) -> Any:
        given = [arguments[i] for i in tensors]
        arguments.clear()
        with torch.no_grad():
            return compiled(*given)

    return run


def placeholders(graph: fx.GraphModule) -> list[fx.Node]:
    """A graph's arguments."""
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _replace(node: fx.Node, value: Any) -> None:
    """Put a number in the place of an argument."""

    def numbered(argument: fx.Node) -> Any:
        return value if argument is node else argument

    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, numbered)
        user.kwargs = fx.node.map_arg(user.kwargs, numbered)
    node.graph.erase_node(node)
