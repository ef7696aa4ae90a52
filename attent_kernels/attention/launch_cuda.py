"""Launches the CUDA C++ form of scored attention (csrc/cuda/scored_attention.h): tensors in, tensors out, one launch.

Python's part is to describe tensors, by address and strides, and to lend memory; the module's plan says how much. The
tensors are the caller's, alive until this returns, and their memory is of the current stream after that.

Which of two kernels runs is the plan's to say (``hopper_attention_refuses`` in csrc/scored_attention_plan.cpp): on
compute capability 9.0 the Hopper kernel where there are more than 16 queries, head dimensions up to 64 or from 97 to
128, and tensor maps find query, key and value; else, and elsewhere, the portable one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native, runtime
from .layout import rows_of
from .records import Attention, Into, Loss, TopK

#: csrc/cuda/dtype.h's and scored_attention.h's enumerations.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
POOLS = {"mean": 0, "first": 1, "last": 2}
SCORES = {None: 0, "loss": 1, "residual": 2, "logit": 3, "head": 4}
PER_EXAMPLE = {"sum": 0, "mean": 1, "rms": 2}

#: A window's side beyond which no tensor reaches; sums of it and a row number stay within 32 bits.
_FAR = 1 << 30


def scored_attention(
    attention: Attention, loss: Loss, top_k: TopK | None, into: Into, *, only_pooled_row: bool, store: bool
) -> None:
    """Compute ``into``; one launch. ``only_pooled_row``: no other row of an example is computed."""
    query, key, value, cu = attention.query, attention.key, attention.value, attention.cu_seqlens_q
    packed, device = cu is not None, query.device
    batch = query.shape[0] if cu is None else cu.shape[0] - 1
    if batch == 0:
        return
    rows, keys = query.shape[0 if packed else 2], key.shape[0 if packed else 2]
    heads = query.shape[1]
    module = native.module
    assert module is not None  # else the backend is not available
    sizes = (
        batch, heads, heads // key.shape[1], rows, keys, query.shape[-1], value.shape[-1], packed, only_pooled_row,
        loss.target is not None, POOLS[loss.pool], runtime.processors(device),
        runs_hopper(device) and all(map(has_map, (query, key, value))),
    )  # fmt: skip
    plan = module.plan_scored_attention(sizes)
    scratch = [
        (plan.slots, torch.float32),
        (plan.split_slots, torch.float32),
        (batch, torch.int8),
        (0 if top_k is None else plan.choice_scratch, torch.int64),
    ]
    right = attention.window_right
    if attention.is_causal:
        right = 0
    with (
        runtime.on_device_of(query),
        runtime.workspace(device, plan.tickets, scratch) as (tickets, slots, split_slots, valid, ranks),
    ):
        logsumexp = into.logsumexp if store else None
        of_example = 0 if logsumexp is None or packed else logsumexp.stride(0)
        of_head = 0 if logsumexp is None else logsumexp.stride(0 if packed else 1)
        module.scored_attention(
            sizes, DTYPES[query.dtype], _rows(query), _rows(key), _rows(value), _rows(loss.target),
            _segments(cu, attention.query_lengths, rows),
            _segments(attention.cu_seqlens_k, attention.key_lengths, keys),
            min(attention.window_left, _FAR), min(right, _FAR), attention.scale, attention.softcap or 0.0,
            _classifier(loss, into), SCORES[loss.score], PER_EXAMPLE[loss.per_example],
            (
                _rows(into.output if store else None), _address(logsumexp), of_example, of_head,
                into.losses.data_ptr(), 0 if loss.score is None else into.scores.data_ptr(), valid.data_ptr(),
            ),
            _choice(top_k, into, ranks), (tickets.data_ptr(), slots.data_ptr(), split_slots.data_ptr(), native.DELAYED),
            torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0,
        )  # fmt: skip


def runs_hopper(device: torch.device) -> bool:
    """Whether the Hopper kernel runs there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0) and "90a" in native.cuda_archs()


def has_map(tensor: Tensor) -> bool:
    """Whether a tensor map finds its rows, at multiples of 16 bytes: no two may overlap, as expanded ones do."""
    *sizes, width = tensor.shape
    return all(size <= 1 or stride >= width for size, stride in zip(sizes, tensor.stride(), strict=False))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(tensor: Tensor | None) -> tuple[int, int, int, int]:
    rows = rows_of(tensor)
    return _address(tensor), rows.example, rows.head, rows.row


def _segments(cu: Tensor | None, lengths: Tensor | None, most: int) -> tuple[int, int, bool, int]:
    return _address(cu), _address(lengths), lengths is not None and lengths.dtype == torch.int64, most


def _view(tensor: Tensor | None) -> tuple[int, int, int, int]:
    if tensor is None:
        return 0, 0, 0, 0
    return tensor.data_ptr(), DTYPES[tensor.dtype], tensor.stride(0), tensor.stride(1) if tensor.dim() == 2 else 0


def _classifier(loss: Loss, into: Into) -> tuple[Any, ...]:
    labels = loss.labels
    if loss.weight is None or labels is None:
        return _view(None), _view(None), 0, 0, False, 0, 0, 0, 0
    return (
        _view(loss.weight), _view(loss.bias), labels.data_ptr(), labels.stride(0), labels.dtype == torch.int64,
        loss.weight.shape[0], into.pooled.data_ptr(), into.logits.data_ptr(), into.logit_gradient.data_ptr(),
    )  # fmt: skip


def _choice(top_k: TopK | None, into: Into, ranks: Tensor) -> tuple[Any, ...]:
    if top_k is None or top_k.k == 0:
        return 0, 0, 0, 0, 0, 0, 0, 0.0
    return (
        into.chosen.data_ptr(), into.chosen_score.data_ptr(), into.inclusion.data_ptr(), _address(top_k.seed),
        ranks.data_ptr(), top_k.k, top_k.k_floor, top_k.temperature,
    )  # fmt: skip
