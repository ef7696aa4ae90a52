"""Runs an operation on chosen rows, and works out what its results would be on the batch.

Most operations run on the rows as they would on the batch, and only the shape they claim has to be worked out. What
would mix rows is refused. What is decided here depends on shapes alone: once a comparison with the full backward has
confirmed it, it stays right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .errors import OnePassError
from .layout import Layout
from .row_tensor import Cut, RowTensor


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], row_args: tuple[Any, ...] | None = None) -> Any:
    """Run on the rows and wrap what comes out; ``row_args``: arguments with the batch's size already replaced."""
    row_tensors = list(row_tensors_in((args, kwargs)))
    the_cut = one_cut(func, row_tensors)
    _check_dims(func, args, kwargs)
    shapes = _claimed_shapes(func, args, kwargs)
    try:
        result = func(*_to_rows(args if row_args is None else row_args), **_to_rows(kwargs))
    except (RuntimeError, IndexError, ValueError) as error:
        raise OnePassError(
            f"{func} cannot run on {the_cut.count} of {the_cut.batch} rows: {error}. Does it meet a whole-batch tensor"
            " that autograd has not saved (the gradient of another loss; what a checkpointed region closes over instead"
            " of being handed it as an argument), or does it carry the batch's size as a number?"
        ) from error
    if func._schema.is_mutable:
        return _written(func, args, result)
    if isinstance(result, (list, tuple)):
        return type(result)(_wrap(func, x, shape, row_tensors) for x, shape in zip(result, shapes, strict=True))
    return _wrap(func, result, shapes[0], row_tensors)


def row_tensors_in(value: Any) -> Iterator[RowTensor]:
    if isinstance(value, RowTensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from row_tensors_in(item)
    elif isinstance(value, dict):
        yield from row_tensors_in(list(value.values()))


def _to_rows(value: Any) -> Any:
    if isinstance(value, RowTensor):
        return value.rows
    if isinstance(value, (list, tuple)):
        return type(value)(_to_rows(item) for item in value)
    if isinstance(value, dict):
        return {name: _to_rows(item) for name, item in value.items()}
    return value


def one_cut(func: Any, row_tensors: list[RowTensor]) -> Cut:
    """The choice of rows that all arguments share, laid out alike where their batch dimension is of one size."""
    first = row_tensors[0]
    for other in row_tensors[1:]:
        if other.cut is not first.cut:
            raise OnePassError(
                f"{func} meets two choices of rows: use one step.loss for each forward in a backward pass"
            )
        same_size = other.shape[other.place.dim] == first.shape[first.place.dim]
        if same_size and other.place.outer != first.place.outer:
            raise OnePassError(f"{func} meets {first} and {other}, whose rows are in different orders")
    return first.cut


def _wrap(func: Any, rows: Any, claimed: tuple[tuple[int, ...], tuple[int, ...]] | None, given: list[RowTensor]) -> Any:
    """A result on the rows as what it would be on the batch."""
    if not isinstance(rows, Tensor) or claimed is None:
        return rows
    shape, stride = claimed
    if tuple(rows.shape) == shape:  # no batch in it, for instance a parameter's gradient
        return rows
    the_cut = given[0].cut
    differs = [i for i, (a, b) in enumerate(zip(rows.shape, shape, strict=False)) if a != b]
    if rows.dim() != len(shape) or len(differs) != 1:
        raise OnePassError(f"{func} gives {tuple(rows.shape)} on the rows where the batch gives {shape}")
    dim = differs[0]
    if rows.shape[dim] * the_cut.batch == shape[dim] * the_cut.count:
        for tensor in given:
            if tensor.shape[tensor.place.dim] == shape[dim]:
                layout = Layout(dim, tensor.place.outer, tensor.place.inner)
                return RowTensor(rows, shape, stride, layout, the_cut)
    raise OnePassError(f"{func} rearranges the batch: {tuple(rows.shape)} on the rows, {shape} on the batch")


def _written(func: Any, args: tuple[Any, ...], result: Any) -> Any:
    """In-place operations return the tensor they wrote to."""
    schema = func._schema
    if len(schema.returns) == 0:
        return None
    if len(schema.returns) != 1 or schema.arguments[0].alias_info is None:
        raise OnePassError(f"{func} writes to its arguments in a way that has no rule")
    return args[0] if isinstance(args[0], RowTensor) else result


# ----------------------------------------------------------------------------------------------- what rows must not do

#: These may name the batch's dimension: a sum over it is the gradient of what all rows share, the rest keep rows apart.
_MAY_NAME_THE_BATCH = frozenset(
    (
        "sum",
        "unsqueeze",
        "squeeze",
        "squeeze_",
        "unsqueeze_",
        "permute",
        "stack",
        "select_backward",
        "transpose",
        "any",
        "all",
    )
)
#: Index tensors smaller than the tensor they index are allowed here, so a missing cut would go unnoticed.
_INDEXED = frozenset(
    ("gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_")
)


def _check_dims(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what runs along the batch: softmax, flip, cumsum, selection, …"""
    name = func._schema.name.removeprefix("aten::")
    first = args[0] if args else None
    if name in _INDEXED and not isinstance(first, RowTensor):
        index = args[2]
        if isinstance(index, RowTensor) and args[1] % index.dim() != index.place.dim:
            raise OnePassError(f"{func} indexes a tensor that is not cut to the chosen rows by one that is")
    if not isinstance(first, RowTensor) or name in _MAY_NAME_THE_BATCH:
        return
    if name in ("index", "index_put", "index_put_", "_index_put_impl_") and len(args[1]) > first.place.dim:
        of_batch = args[1][first.place.dim]
        if of_batch is not None and not isinstance(of_batch, RowTensor):
            raise OnePassError(f"{func} indexes the batch by the same numbers whatever rows are in it")
    for i, argument in enumerate(func._schema.arguments):
        if argument.name not in ("dim", "dims"):
            continue
        dims = args[i] if i < len(args) else kwargs.get(argument.name)
        dims = dims if isinstance(dims, (list, tuple)) else [dims]
        if any(isinstance(dim, int) and dim % max(first.dim(), 1) == first.place.dim for dim in dims):
            raise OnePassError(f"{func} works along the batch: the result of a row depends on other rows")


# ------------------------------------------------------------------------------------------------- shapes of the batch

_shapes: dict[Any, list[tuple[tuple[int, ...], tuple[int, ...]] | None]] = {}
_MOST_SHAPES = 20_000


def _claimed_shapes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Shapes and strides that the results have on the batch, from a run without data, remembered."""
    key = (func, _key(args), _key(kwargs))
    known = _shapes.get(key)
    if known is not None:
        return known
    meta_kwargs = {
        name: value for name, value in _to_meta(kwargs).items() if name not in ("device", "pin_memory", "generator")
    }
    try:
        result = func(*_to_meta(args), **meta_kwargs)
    except (RuntimeError, NotImplementedError, IndexError) as error:
        raise OnePassError(
            f"{func} has no rule for its results' shapes (no kernel for meta tensors): {error}"
        ) from error
    results = result if isinstance(result, (list, tuple)) else [result]
    shapes = [(tuple(x.shape), x.stride()) if isinstance(x, Tensor) else None for x in results]
    if len(_shapes) >= _MOST_SHAPES:
        _shapes.clear()
    _shapes[key] = shapes
    return shapes


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(_key(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    return value, type(value)


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return type(value)(_to_meta(item) for item in value)
    if isinstance(value, dict):
        return {name: _to_meta(item) for name, item in value.items()}
    return value
