"""Operations that do not run on rows as they do on a batch: they carry its size, or draw random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import OnePassError
from .layout import cut, moved_by_view
from .on_rows import one_cut, row_tensors_in, run
from .row_tensor import RowTensor

aten = torch.ops.aten
Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def run_on_rows(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operation, some of whose arguments are :class:`RowTensor`."""
    rule = RULES.get(func)
    if rule is not None:
        return rule(func, args, kwargs)
    if torch.Tag.nondeterministic_seeded in func.tags or "philox_seed" in _argument_names(func):
        return _random(func, args, kwargs)
    return run(func, args, kwargs)


def _argument_names(func: Any) -> list[str]:
    return [argument.name for argument in func._schema.arguments]


# ------------------------------------------------------------------------------ operations that carry the batch's size


def _rows_of(size: int, tensor: RowTensor) -> int:
    """A size that counts the batch's rows as a size that counts the chosen ones."""
    return size * tensor.cut.count // tensor.cut.batch


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RowTensor:
    tensor, asked = args[0], list(args[1])
    if -1 in asked:
        known = 1
        for size in asked:
            known *= size if size != -1 else 1
        asked[asked.index(-1)] = tensor.numel() // max(known, 1)
    shape = tuple(asked)
    layout = moved_by_view(tuple(tensor.shape), tensor.place, tensor.cut.batch, shape)
    if layout is None:
        raise OnePassError(f"{func} of {tuple(tensor.shape)} as {shape} splits the batch")
    asked[layout.dim] = _rows_of(asked[layout.dim], tensor)
    return RowTensor(tensor.rows.reshape(asked), shape, _contiguous_stride(shape), layout, tensor.cut)


def _resized(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], position: int, at: int) -> Any:
    """Run with the size at ``position`` of the list ``args[at]`` counted in chosen rows."""
    tensor, sizes = args[0], list(args[at])
    if sizes[position] != -1:
        sizes[position] = _rows_of(sizes[position], tensor)
    return run(func, args, kwargs, (*args[:at], sizes, *args[at + 1 :]))


def _expand(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _resized(func, args, kwargs, args[0].place.dim + len(args[1]) - args[0].dim(), 1)


def _new(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``grad.new_zeros(sizes)``: the batch is the dimension of its size, the gradient's own if there are several."""
    tensor, sizes = args[0], args[1]
    if not isinstance(tensor, RowTensor):
        return run(func, args, kwargs)
    size = tensor.shape[tensor.place.dim]
    places = [i for i, s in enumerate(sizes) if s == size]
    if len(places) > 1 and tensor.place.dim in places:
        places = [tensor.place.dim]
    if len(places) != 1:
        raise OnePassError(f"{func} of sizes {list(sizes)}: cannot tell which of them counts the batch")
    return _resized(func, args, kwargs, places[0], 1)


def _select_backward(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    grad, sizes, dim = args[:3]
    return _resized(func, args, kwargs, grad.place.dim + (grad.place.dim >= dim % len(sizes)), 1)


def _slice_backward(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    grad, sizes, dim, start, end, step = args
    dim %= len(sizes)
    if dim != grad.place.dim:
        return _resized(func, args, kwargs, grad.place.dim, 1)
    span, sizes = _blocks(func, grad, sizes[dim], start, end, step), list(sizes)
    shape = tuple(sizes)
    sizes[dim] = _rows_of(sizes[dim], grad)
    rows = func(grad.rows, sizes, dim, *(_rows_of(edge, grad) for edge in span), 1)
    layout = grad.place._replace(outer=shape[dim] // (grad.cut.batch * grad.place.inner))
    return RowTensor(rows, shape, _contiguous_stride(shape), layout, grad.cut)


def _slice(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = [*args, *(0, None, None, 1)[len(args) - 1 :]]
    tensor, dim, start, end, step = given
    if not isinstance(tensor, RowTensor) or dim % tensor.dim() != tensor.place.dim:
        return run(func, args, kwargs)
    dim %= tensor.dim()
    first, last = _blocks(func, tensor, tensor.shape[dim], start or 0, end, step)
    shape = list(tensor.shape)
    shape[dim] = last - first
    rows = func(tensor.rows, dim, _rows_of(first, tensor), _rows_of(last, tensor))
    layout = tensor.place._replace(outer=(last - first) // (tensor.cut.batch * tensor.place.inner))
    return RowTensor(rows, tuple(shape), tensor.stride(), layout, tensor.cut)


def _blocks(func: Any, tensor: RowTensor, size: int, start: int, end: int | None, step: int) -> tuple[int, int]:
    """A slice of the batch's dimension that takes whole runs through the batch, as of two batches concatenated."""
    first = max(start + size, 0) if start < 0 else min(start, size)
    last = size if end is None else max(end + size, 0) if end < 0 else min(end, size)
    block = tensor.cut.batch * tensor.place.inner
    if step != 1 or first % block or last % block or last <= first:
        raise OnePassError(f"{func} takes some of the batch's rows and leaves others")
    return first, last


def _cat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = next(row_tensors_in(tensors))
    dim %= first.dim()
    if all(isinstance(x, RowTensor) and x.place.dim != dim for x in tensors) or dim != first.place.dim:
        return run(func, args, kwargs)
    one_cut(func, [first])
    for tensor in tensors:
        if not isinstance(tensor, RowTensor) or tensor.cut is not first.cut or tensor.place[::2] != first.place[::2]:
            raise OnePassError(f"{func} concatenates along the batch what is not all laid out alike")
    shape = list(first.shape)
    shape[dim] = sum(x.shape[dim] for x in tensors)
    layout = first.place._replace(outer=sum(x.place.outer for x in tensors))
    rows = func([x.rows for x in tensors], dim)
    return RowTensor(rows, tuple(shape), _contiguous_stride(tuple(shape)), layout, first.cut)


def _group_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """GroupNorm is handed N, the batch's size, as a number."""
    at = _argument_names(func).index("N")
    return run(func, args, kwargs, (*args[:at], _rows_of(args[at], next(row_tensors_in(args))), *args[at + 1 :]))


def _first_of_input_size(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Backwards of interpolation and unfolding are handed the input's sizes, the batch first."""
    names = _argument_names(func)
    at = names.index("input_size") if "input_size" in names else names.index("input_sizes")
    if args[0].place.dim != 0:
        raise OnePassError(f"{func} with the batch in dimension {args[0].place.dim}")
    return _resized(func, args, kwargs, 0, at)


def _no_rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise OnePassError(f"{func} carries the batch's size or strides as plain numbers, and has no rule for chosen rows")


RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default, aten.reshape.default), _view),
    **dict.fromkeys(
        (aten.new_zeros.default, aten.new_empty.default, aten.new_ones.default, aten.new_full.default), _new
    ),
    aten.expand.default: _expand,
    aten.select_backward.default: _select_backward,
    aten.slice_backward.default: _slice_backward,
    aten.slice.Tensor: _slice,
    aten.cat.default: _cat,
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm,
    aten.unfold_backward.default: _first_of_input_size,
    aten.upsample_nearest2d_backward.default: _first_of_input_size,
    aten.upsample_bilinear2d_backward.default: _first_of_input_size,
    aten.upsample_bicubic2d_backward.default: _first_of_input_size,
    **dict.fromkeys(
        (aten.as_strided.default, aten.new_empty_strided.default, aten.diagonal_backward.default, aten.repeat.default),
        _no_rule,
    ),
}


# ------------------------------------------------------------------------------------------------------ random numbers

_FILLS = ("bernoulli_", "uniform_", "normal_", "exponential_", "random_", "log_normal_", "geometric_", "cauchy_")
_LIKES = ("rand_like", "randn_like", "randint_like")


def _random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Random numbers that a checkpointed region draws again: drawn for the whole batch and cut to the rows."""
    name = func._schema.name.removeprefix("aten::")
    tensor = args[0]
    if attention_dropout(func, args, kwargs) == 0:
        return run(func, args, kwargs)
    drawn_whole = isinstance(tensor, RowTensor) and len(list(row_tensors_in((args, kwargs)))) == 1
    if drawn_whole and name in _FILLS:
        tensor.rows.copy_(cut(func(_whole(tensor), *args[1:], **kwargs), tensor.place, tensor.cut.index))
        return tensor
    if drawn_whole and name in _LIKES:
        whole = func(_whole(tensor), *args[1:], **kwargs)
        rows = cut(whole, tensor.place, tensor.cut.index)
        return RowTensor(rows, tuple(whole.shape), whole.stride(), tensor.place, tensor.cut)
    if drawn_whole and name == "native_dropout":
        whole = _whole(tensor).fill_(1)
        scaled, mask = (cut(x, tensor.place, tensor.cut.index) for x in func(whole, *args[1:], **kwargs))
        return tuple(
            RowTensor(rows, tuple(tensor.shape), whole.stride(), tensor.place, tensor.cut)
            for rows in (tensor.rows * scaled, mask)
        )
    raise OnePassError(
        f"{func} replays random numbers in the backward: on chosen rows it would draw those of other rows"
        " (fused attention with dropout is one such operation; it works with dropout 0)"
    )


def _whole(tensor: RowTensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def attention_dropout(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The dropout of a fused attention; None for other operations."""
    if "attention" not in func._schema.name:
        return None
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            value = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            return float(value)
    return 0.0
