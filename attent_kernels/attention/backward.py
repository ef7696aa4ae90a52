"""The gradients of attention in query, key and value: one kernel prepares, one goes over key blocks, one over queries.

Each of the last two computes the probabilities again, from the logsumexp, and neither adds to what another program
writes. So nothing of the size [queries, keys] is stored, and the same call gives the same bits. Formulas are in the
kernels' files: backward_prepare, backward_key_value, backward_query.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .. import autotune, runtime
from .backward_configurations import Case, Configuration, candidates, choose
from .backward_key_value import key_value_gradients
from .backward_prepare import prepare
from .backward_query import query_gradient
from .backward_tiles import Numbers
from .configurations import FEW_QUERIES, padded
from .launch import Attention
from .layout import Rows, Segments, packed_tiles, rows_of
from .masks import window_of

#: Entries of the output that a program of the preparation holds: 32 of each of 128 threads.
PREPARED = 4096


class ToOutput(NamedTuple):
    """What comes back to the output; None: nothing. Of any floating dtype and strides."""

    output: Tensor | None  # like output
    pooled: Tensor | None  # [B, H * DV], of the output pooled by ``pool``
    losses: Tensor | None  # [B], of 1/Lq Σ_t ½‖output_t - target_t‖²
    target: Tensor | None  # like output; there with losses
    pool: str  # mean | first | last row of an example


class Into(NamedTuple):
    """Where gradients go, shaped like what they are of; None: not wanted."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None


def attention_backward(
    attention: Attention, output: Tensor, logsumexp: Tensor, to: ToOutput, into: Into, *, only_pooled_row: bool
) -> None:
    """Write the gradients in query, key and value; three launches at most.

    Args:
        attention: what was computed.
        output: ``[B, H, Tq, DV]``, packed ``[total_q, H, DV]``; with ``only_pooled_row`` ``[B, H, 1, DV]``, packed
            ``[B, H, DV]``: of each example the first or last row, as ``to.pool`` says.
        logsumexp: float32 ``[B, H, Tq]``, packed ``[H, total_q]``; with ``only_pooled_row`` ``[B, H, 1]``, packed
            ``[H, B]``.
        to: at least one gradient; without a target if ``only_pooled_row``.
        into: memory for the gradients.
    """
    query, key, value, query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k, is_causal, *rest = attention
    scale, window_left, window_right, softcap = rest
    batch = query.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    if batch == 0:
        for grad in into:
            if grad is not None:
                grad.zero_()  # nobody's rows, if there are any
        return
    queries = query.shape[-2] if cu_seqlens_q is None else query.shape[0]
    keys = key.shape[-2] if cu_seqlens_k is None else key.shape[0]
    only = to.pool if only_pooled_row else None
    others = to.output is not None or to.losses is not None or to.pool == "mean"  # whether other rows have a gradient
    if not only_pooled_row and not others and queries > 0:
        only = to.pool
        output, logsumexp = _pooled_rows(only, output, logsumexp, query_lengths, cu_seqlens_q)
    if only is not None and into.query is not None:
        into.query.zero_()

    heads, kv_heads, width, value_width = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
    rows = queries if only is None else 1
    in_one = cu_seqlens_q is not None and only is None  # rows of all examples one after another
    examples = 1 if in_one else batch
    numbers = query.new_empty((2, examples, heads, rows), dtype=torch.float32)
    base2, delta = (Numbers(x, 0 if in_one else heads * rows, rows) for x in numbers)
    total = None
    # A gradient whose columns are apart, such as that of a sum, is read often enough to be worth a copy.
    if to.output is None or to.pooled is not None or to.losses is not None or to.output.stride(-1) != 1:
        total = query.new_empty((examples, heads, rows, value_width))

    block_d, block_dv = padded(width), padded(value_width)
    window = window_of(is_causal, window_left, window_right)
    r_total = _result_rows(to.output if total is None else total, in_one)
    r_query, r_key, r_value = rows_of(query), rows_of(key), rows_of(value)
    query_segments = Segments(_dense(cu_seqlens_q), _dense(query_lengths), queries)
    key_segments = Segments(_dense(cu_seqlens_k), _dense(key_lengths), keys)
    widths = {"D": width, "DV": value_width, "BLOCK_D": block_d, "BLOCK_DV": block_dv}

    def query_tiles(block: int) -> int:
        return packed_tiles(queries, batch, block) if in_one else triton.cdiv(rows, block)

    def key_tiles(block: int) -> int:
        return triton.cdiv(keys, block) if cu_seqlens_k is None else packed_tiles(keys, batch, block)

    def launch_key_value(cut: Configuration) -> None:
        tiles = key_tiles(cut.keys)
        key_value_gradients[(tiles * kv_heads * (batch if cu_seqlens_k is None else 1),)](
            r_query, r_key, r_value, r_total, base2, delta, rows_of(into.key), rows_of(into.value),
            query_segments, key_segments, batch, tiles, kv_heads, heads // kv_heads, window, scale, softcap,
            WANT_KEY=into.key is not None, WANT_VALUE=into.value is not None, ONLY=only, BLOCK_M=cut.rows,
            BLOCK_N=cut.keys, num_warps=cut.warps, num_stages=cut.stages, **widths,
        )  # fmt: skip

    def launch_query(cut: Configuration) -> None:
        tiles = query_tiles(cut.rows)
        query_gradient[(tiles * heads * examples,)](
            r_query, r_key, r_value, r_total, base2, delta, rows_of(into.query),
            query_segments, key_segments, batch, tiles, heads, heads // kv_heads, window, scale, softcap,
            ONLY=only, BLOCK_M=cut.rows, BLOCK_N=cut.keys, num_warps=cut.warps, num_stages=cut.stages, **widths,
        )  # fmt: skip

    is_plain = softcap is None and width == block_d and value_width == block_dv
    case = Case(query.dtype, max(block_d, block_dv), rows <= FEW_QUERIES and not in_one, is_plain)
    with runtime.on_device_of(query):
        block = max(16, min(128, PREPARED // block_dv))
        tiles = query_tiles(block)
        if tiles * heads * examples > 0:
            prepare[(tiles * heads * examples,)](
                _result_rows(output, in_one), _logsumexp_rows(logsumexp, in_one), _result_rows(to.output, in_one),
                _pooled_gradient_rows(to.pooled, value_width), rows_of(None if to.losses is None else to.target),
                to.losses, 0 if to.losses is None else to.losses.stride(0), _result_rows(total, in_one), base2, delta,
                query_segments, batch, tiles, heads, ONLY=only, POOL=to.pool, DV=value_width, BLOCK_M=block,
                BLOCK_DV=block_dv, num_warps=4,
            )  # fmt: skip
        if (into.key is not None or into.value is not None) and keys * kv_heads > 0:
            launch_key_value(_cut("key_value", case, launch_key_value))
        if into.query is not None and queries > 0:
            launch_query(_cut("query", case, launch_query))


def _cut(kernel: str, case: Case, launch: Callable[[Configuration], None]) -> Configuration:
    """The table's configuration, or what a search finds where one is asked for."""
    return autotune.pick(
        f"scored_attention_backward {kernel}", case, choose(kernel, case), lambda: candidates(kernel, case), launch
    )


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _result_rows(tensor: Tensor | None, in_one: bool) -> Rows:
    """[B, H, R, ·], or packed [total, H, ·] or [1, H, total, ·] if examples are ``in_one``, else packed [B, H, ·]."""
    if tensor is None:
        return rows_of(None)
    if tensor.dim() == 3 and not in_one:
        tensor = tensor[:, :, None]
    rows = rows_of(tensor)
    return rows._replace(example=0) if in_one else rows


def _logsumexp_rows(logsumexp: Tensor, in_one: bool) -> Rows:
    """[B, H, R], packed [H, total] if examples are ``in_one``, else packed [H, B]."""
    if logsumexp.dim() == 3:
        return Rows(logsumexp, *logsumexp.stride(), 0)
    head, last = logsumexp.stride()
    return Rows(logsumexp, 0, head, last, 0) if in_one else Rows(logsumexp, last, head, 0, 0)


def _pooled_gradient_rows(grad_pooled: Tensor | None, value_width: int) -> Rows:
    """[B, H * DV]: the same for each row."""
    if grad_pooled is None:
        return rows_of(None)
    example, column = grad_pooled.stride()
    return Rows(grad_pooled, example, column * value_width, 0, column)


def _pooled_rows(
    pool: str, output: Tensor, logsumexp: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of all rows the pooled ones, as ``is_pooled`` has them. An example without a query gets any row."""
    if cu_seqlens is not None:
        offsets = cu_seqlens.clamp(0, len(output)).cummax(0).values
        index = (offsets[:-1] if pool == "first" else offsets[1:] - 1).clamp(min=0, max=len(output) - 1)
        return output[index], logsumexp[:, index]
    if pool == "first":
        return output[:, :, :1], logsumexp[:, :, :1]
    if lengths is None:
        return output[:, :, -1:], logsumexp[:, :, -1:]
    index, example = lengths.clamp(1, output.shape[2]) - 1, torch.arange(len(lengths), device=lengths.device)
    return output[example, :, index][:, :, None], logsumexp[example, :, index][:, :, None]
