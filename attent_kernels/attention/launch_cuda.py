"""Launches the CUDA C++ form of scored attention (csrc/cuda/scored_attention.h): tensors in, tensors out, one launch.

Training repeats the same kind of call, whose launches differ in addresses alone. So all else is worked out once for
each kind and kept, in the module, as an ``AttentionLaunch``: a call looks it up and hands addresses over. Tensors are
the caller's, alive until this returns, and their memory is of the current stream after that.

Which of two kernels runs is the plan's to say (``hopper_attention_refuses`` in csrc/scored_attention_plan.cpp): on
compute capability 9.0 the Hopper kernel where there are more than 16 queries, head dimensions up to 64 or from 97 to
128, and tensor maps find query, key and value; else, and elsewhere, the portable one.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from .. import native, runtime
from ..native import DTYPES, PER_EXAMPLE, runs_hopper
from .records import Attention, Into, Loss, TopK

#: csrc/cuda/scored_attention.h's enumerations.
POOLS = {"mean": 0, "first": 1, "last": 2}
SCORES = {None: 0, "loss": 1, "residual": 2, "logit": 3, "head": 4}

#: A window's side beyond which no tensor reaches; sums of it and a row number stay within 32 bits.
_FAR = 1 << 30

#: Kind of call -> its ``AttentionLaunch``.
_launches: dict[Hashable, Any] = {}


def scored_attention(
    attention: Attention, loss: Loss, top_k: TopK | None, into: Into, *, only_pooled_row: bool, store: bool
) -> None:
    """Compute ``into``; one launch. ``only_pooled_row``: no other row of an example is computed."""
    query, key, value, query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k, *options = attention
    target, weight, bias, labels, *loss_options = loss
    device = query.device
    # All that a launch depends on but addresses.
    kind = (
        device, query.dtype, query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride(),
        None if target is None else target.stride(), _kind(weight), _kind(bias), _kind(labels), _kind(query_lengths),
        _kind(key_lengths), None if cu_seqlens_q is None else cu_seqlens_q.shape, *options, *loss_options,
        None if top_k is None else top_k[:3], only_pooled_row, store, native.portable_alone,
    )  # fmt: skip
    launch = _launches.get(kind)
    if launch is None:
        launch = _first_launch(attention, loss, top_k, into, only_pooled_row, store)
        runtime.remember(_launches, kind, launch)
    index = chosen_score = inclusion = seed = 0
    if top_k is not None and top_k.k > 0:
        index, chosen_score = into.chosen.data_ptr(), into.chosen_score.data_ptr()
        inclusion, seed = into.inclusion.data_ptr(), _address(top_k.seed)
    with runtime.on_device_of(query), runtime.lend(device, launch.tickets, launch.scratch_bytes) as lent:
        launch.start(  # of what is not wanted the tensors are empty, their addresses 0
            query.data_ptr(), key.data_ptr(), value.data_ptr(), _address(target), _address(query_lengths),
            _address(key_lengths), _address(cu_seqlens_q), _address(cu_seqlens_k), _address(weight), _address(bias),
            _address(labels), seed, into.output.data_ptr(), into.logsumexp.data_ptr(), into.losses.data_ptr(),
            into.logits.data_ptr(), into.pooled.data_ptr(), into.logit_gradient.data_ptr(), into.scores.data_ptr(),
            index, chosen_score, inclusion, lent.scratch, lent.tickets, lent.stream,
        )  # fmt: skip


def has_map(tensor: Tensor) -> bool:
    """Whether a tensor map finds its rows, at multiples of 16 bytes: no two may overlap, as expanded ones do."""
    *sizes, width = tensor.shape
    return all(size <= 1 or stride >= width for size, stride in zip(sizes, tensor.stride(), strict=False))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _kind(tensor: Tensor | None) -> tuple[Hashable, ...] | None:
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride())


# ----------------------------------------------------------------------------------------------- a kind's first launch


def _first_launch(
    attention: Attention, loss: Loss, top_k: TopK | None, into: Into, only_pooled_row: bool, store: bool
) -> Any:
    query, key, value, cu = attention.query, attention.key, attention.value, attention.cu_seqlens_q
    packed = cu is not None
    batch = query.shape[0] if cu is None else cu.shape[0] - 1
    rows, keys = query.shape[0 if packed else 2], key.shape[0 if packed else 2]
    heads = query.shape[1]
    module = native.module
    assert module is not None  # else the backend is not available
    sizes = (
        batch, heads, heads // key.shape[1], rows, keys, query.shape[-1], value.shape[-1], packed, only_pooled_row,
        loss.target is not None, POOLS[loss.pool], runtime.processors(query.device),
        runs_hopper(query.device) and all(map(has_map, (query, key, value))),
    )  # fmt: skip
    logsumexp = into.logsumexp if store else None
    right = 0 if attention.is_causal else attention.window_right
    choice = (0, 0, 0.0) if top_k is None else top_k[:3]
    return module.AttentionLaunch(
        sizes, DTYPES[query.dtype], _rows(query), _rows(key), _rows(value), _rows(loss.target),
        _segments(cu, attention.query_lengths, rows), _segments(attention.cu_seqlens_k, attention.key_lengths, keys),
        min(attention.window_left, _FAR), min(right, _FAR), attention.scale, attention.softcap or 0.0,
        _classifier(loss), SCORES[loss.score], PER_EXAMPLE[loss.per_example],
        (
            _rows(into.output if store else None), _address(logsumexp),
            0 if logsumexp is None or packed else logsumexp.stride(0),
            0 if logsumexp is None else logsumexp.stride(0 if packed else 1),
        ),
        choice, native.DELAYED,
    )  # fmt: skip


def _rows(tensor: Tensor | None) -> tuple[int, int, int, int]:
    """Address and strides of examples, heads and rows: [B, H, T, ·], or packed [total, H, ·]."""
    if tensor is None:
        return 0, 0, 0, 0
    if tensor.dim() == 3:
        row, head, _ = tensor.stride()
        return tensor.data_ptr(), 0, head, row
    example, head, row, _ = tensor.stride()
    return tensor.data_ptr(), example, head, row


def _segments(cu: Tensor | None, lengths: Tensor | None, most: int) -> tuple[int, int, bool, int]:
    return _address(cu), _address(lengths), lengths is not None and lengths.dtype == torch.int64, most


def _view(tensor: Tensor | None) -> tuple[int, int, int, int]:
    if tensor is None:
        return 0, 0, 0, 0
    return tensor.data_ptr(), DTYPES[tensor.dtype], tensor.stride(0), tensor.stride(1) if tensor.dim() == 2 else 0


def _classifier(loss: Loss) -> tuple[Any, ...]:
    labels = loss.labels
    if loss.weight is None or labels is None:
        return _view(None), _view(None), 0, False, 0
    return (
        _view(loss.weight), _view(loss.bias), labels.stride(0), labels.dtype == torch.int64, loss.weight.shape[0],
    )  # fmt: skip
