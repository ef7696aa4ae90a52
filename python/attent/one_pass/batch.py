"""The arguments of a per-example loss as a batch: which tensors hold the examples, and a choice of rows of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._checks import describe, refuse


class Batch:
    """Arguments and keyword arguments, dicts, lists and tuples of them included.

    B is the leading size of the first tensor. Tensors of that leading size hold one row per example; what else there is
    (other sizes, parameters, options) is handed on as it is.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._leaves, self._tree = pytree.tree_flatten((args, kwargs))
        for leaf in self._leaves:
            if isinstance(leaf, Mapping):
                refuse(
                    "batch",
                    type(leaf).__name__,
                    "tensors, and dicts, lists or tuples of them: pass dict(batch), or **batch",
                )
        tensors = [x for x in self._leaves if isinstance(x, Tensor) and not isinstance(x, nn.Parameter) and x.dim() > 0]
        if not tensors:
            refuse("batch", "no tensor with a batch dimension", "tensors [B, ...], and dicts, lists or tuples of them")
        self.size: int = tensors[0].shape[0]
        self.device = tensors[0].device

    def is_rows(self, leaf: object) -> bool:
        """Whether an argument has one row per example."""
        if not isinstance(leaf, Tensor) or isinstance(leaf, nn.Parameter):
            return False
        return leaf.dim() > 0 and leaf.shape[0] == self.size

    @property
    def row_leaves(self) -> list[int]:
        """Which of the flattened arguments have one row per example."""
        return [i for i, leaf in enumerate(self._leaves) if self.is_rows(leaf)]

    def map(self, function: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with ``function`` applied to every tensor of rows."""
        return self._rebuilt([function(leaf) if self.is_rows(leaf) else leaf for leaf in self._leaves])

    def _rebuilt(self, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = pytree.tree_unflatten(leaves, self._tree)
        return args, kwargs

    def take(self, index: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the chosen rows alone; gradients flow back to rows that want them."""
        return self.map(lambda rows: rows.index_select(0, index.to(rows.device)))

    def signature(self, modules: list[nn.Module]) -> Hashable:
        """What decides how a forward runs: shapes, dtypes, options, modes. A new one is probed anew."""
        leaves = tuple(
            (tuple(x.shape), x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else describe(x)
            for x in self._leaves
        )
        kind = self.device.type
        autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        modes = tuple(module.training for root in modules for module in root.modules())
        frozen = tuple(parameter.requires_grad for root in modules for parameter in root.parameters())
        return (str(self._tree), leaves, autocast, modes, frozen)


def modules_of(function: object) -> list[nn.Module]:
    """The modules that a callable visibly uses: itself, its owner's, those it closes over or names."""
    found: dict[int, nn.Module] = {}
    for value in _reachable(function, depth=3):
        if isinstance(value, nn.Module):
            found.setdefault(id(value), value)
    return list(found.values())


def _reachable(value: object, depth: int) -> Iterator[object]:
    yield value
    if depth == 0 or isinstance(value, (nn.Module, Tensor)):
        return
    inside: list[object] = []
    if isinstance(value, functools.partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, MethodType):
        inside = [value.__self__, value.__func__]
    elif code := getattr(value, "__code__", None):
        for cell in getattr(value, "__closure__", None) or ():
            try:
                inside.append(cell.cell_contents)
            except ValueError:  # not filled yet
                continue
        inside += getattr(value, "__defaults__", None) or ()
        names = getattr(value, "__globals__", {})
        inside += [names[name] for name in code.co_names if name in names]
    elif isinstance(value, (list, tuple)):
        inside = list(value)
    elif isinstance(value, dict):
        inside = list(value.values())
    elif not isinstance(value, type) and not hasattr(value, "__path__"):
        inside = [x for x in vars(value).values() if isinstance(x, nn.Module)] if hasattr(value, "__dict__") else []
    for item in inside:
        yield from _reachable(item, depth - 1)
