"""The gradients of attention in query, key and value: one kernel prepares, one goes over key blocks, one over queries.

Each of the last two computes the probabilities again, from the logsumexp; neither adds to what another program writes.
So nothing of the size [queries, keys] is stored, and the same call gives the same bits. See the kernels' files for their
formulas: backward_prepare, backward_key_value, backward_query.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from ..autotune import is_searching, search
from ..runtime import INTERPRETED as INTERPRETED
from ..runtime import compute_capability, on_device_of
from .backward_configurations import CANDIDATES, Case, Configuration, configuration
from .backward_key_value import key_value_gradients
from .backward_prepare import prepare
from .backward_query import query_gradient
from .layout import Rows, Segments, packed_tiles, rows_of
from .masks import window_of

#: Entries of the output that a program of the preparation holds: 32 of each of 128 threads.
PREPARED = 4096
#: Queries of an example up to which tiles of 16 rows, the least that a matrix product takes, waste less.
FEW_QUERIES = 16


def attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    grad_output: Tensor | None = None,
    grad_pooled: Tensor | None = None,
    pool: str = "mean",
    target: Tensor | None = None,
    grad_losses: Tensor | None = None,
    is_pooled: bool = False,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    is_causal: bool = False,
    scale: float = 1.0,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float | None = None,
) -> None:
    """Write the gradients in query, key and value into ``grads``; None: not wanted.

    Args:
        query: ``[B, H, Tq, D]``, packed ``[total_q, H, D]``; float16, bfloat16 or float32, any strides, as all below.
        key: ``[B, KV, Tk, D]``, packed ``[total_k, KV, D]``.
        value: ``[B, KV, Tk, DV]``, packed ``[total_k, KV, DV]``.
        output: ``[B, H, Tq, DV]``, packed ``[total_q, H, DV]``; with ``is_pooled`` of each example the pooled row
            alone, ``[B, H, 1, DV]``, packed ``[B, H, DV]``.
        logsumexp: float32 ``[B, H, Tq]``, packed ``[H, total_q]``; with ``is_pooled`` ``[B, H, 1]``, packed ``[H, B]``.
        grads: where gradients go, shaped like query, key and value.
        grad_output: like output; at least one of this, ``grad_pooled`` and ``grad_losses`` is there.
        grad_pooled: ``[B, H * DV]``, of the output pooled by ``pool``: "mean", "first" or "last" row of an example.
        target: like output, of the loss ``1/Lq Σ_t ½‖output_t - target_t‖²``.
        grad_losses: ``[B]``, of those losses.
        is_pooled: what output and logsumexp hold; only with ``pool`` "first" or "last", and without a target.
    """
    if grad_losses is None:
        target = None
    batch = query.shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    grad_query, grad_key, grad_value = grads
    if batch == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()  # nobody's rows, if there are any
        return
    queries = query.shape[-2] if cu_seqlens_q is None else query.shape[0]
    keys = key.shape[-2] if cu_seqlens_k is None else key.shape[0]
    only = pool if is_pooled else None
    others = grad_output is not None or target is not None or pool == "mean"  # whether other rows have a gradient
    if not is_pooled and not others and queries > 0:
        only = pool
        output, logsumexp = _pooled_rows(pool, output, logsumexp, query_lengths, cu_seqlens_q)
    if only is not None and grad_query is not None:
        grad_query.zero_()

    heads, kv_heads, width, value_width = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
    rows = queries if only is None else 1
    in_one = cu_seqlens_q is not None and only is None  # rows of all examples one after another
    examples = 1 if in_one else batch
    delta = query.new_empty((examples, heads, rows), dtype=torch.float32)
    total = None
    # A gradient whose columns are apart, such as that of a sum, is read often enough to be worth a copy.
    if grad_output is None or grad_pooled is not None or target is not None or grad_output.stride(-1) != 1:
        total = query.new_empty((examples, heads, rows, value_width))

    block_d, block_dv = _block(width), _block(value_width)
    window = window_of(is_causal, window_left, window_right)
    r_output, r_grad = _result_rows(output, in_one), _result_rows(grad_output, in_one)
    r_total = r_grad if total is None else _result_rows(total, in_one)
    r_logsumexp, r_delta = _number_rows(logsumexp, in_one, only), _number_rows(delta, in_one, None)
    r_query, r_key, r_value = rows_of(query), rows_of(key), rows_of(value)
    query_segments = Segments(_dense(cu_seqlens_q), _dense(query_lengths), queries)
    key_segments = Segments(_dense(cu_seqlens_k), _dense(key_lengths), keys)
    few_queries = rows <= FEW_QUERIES and not in_one
    widths = {"D": width, "DV": value_width, "BLOCK_D": block_d, "BLOCK_DV": block_dv}

    def query_tiles(block: int) -> int:
        return packed_tiles(queries, batch, block) if in_one else triton.cdiv(rows, block)

    def key_tiles(block: int) -> int:
        return triton.cdiv(keys, block) if cu_seqlens_k is None else packed_tiles(keys, batch, block)

    def launch_key_value(cut: Configuration) -> None:
        tiles = key_tiles(cut.keys)
        key_value_gradients[(tiles * kv_heads * (batch if cu_seqlens_k is None else 1),)](
            r_query, r_key, r_value, r_total, r_logsumexp, r_delta, rows_of(grad_key), rows_of(grad_value),
            query_segments, key_segments, batch, tiles, kv_heads, heads // kv_heads, window, scale, softcap,
            WANT_KEY=grad_key is not None, WANT_VALUE=grad_value is not None, ONLY=only, BLOCK_M=cut.rows,
            BLOCK_N=cut.keys, num_warps=cut.warps, num_stages=cut.stages, **widths,
        )  # fmt: skip

    def launch_query(cut: Configuration) -> None:
        tiles = query_tiles(cut.rows)
        query_gradient[(tiles * heads * examples,)](
            r_query, r_key, r_value, r_total, r_logsumexp, r_delta, rows_of(grad_query),
            query_segments, key_segments, batch, tiles, heads, heads // kv_heads, window, scale, softcap,
            ONLY=only, BLOCK_M=cut.rows, BLOCK_N=cut.keys, num_warps=cut.warps, num_stages=cut.stages, **widths,
        )  # fmt: skip

    with on_device_of(query):
        case = Case(compute_capability(), query.element_size(), max(block_d, block_dv), few_queries)
        block = max(16, min(128, PREPARED // block_dv))
        tiles = query_tiles(block)
        if tiles * heads * examples > 0 and value_width > 0:
            prepare[(tiles * heads * examples,)](
                r_output, r_grad, _pooled_gradient_rows(grad_pooled, value_width), rows_of(target),
                grad_losses, 0 if grad_losses is None else grad_losses.stride(0), _result_rows(total, in_one), r_delta,
                query_segments, batch, tiles, heads, ONLY=only, POOL=pool, DV=value_width, BLOCK_M=block,
                BLOCK_DV=block_dv, num_warps=4,
            )  # fmt: skip
        if (grad_key is not None or grad_value is not None) and keys * kv_heads > 0:
            launch_key_value(_chosen("key_value", case, launch_key_value))
        if grad_query is not None and queries > 0:
            launch_query(_chosen("query", case, launch_query))


def _chosen(kernel: str, case: Case, launch: Callable[[Configuration], None]) -> Configuration:
    """From the table, or by search where that is asked for."""
    default = configuration(kernel, case)
    if not is_searching():
        return default
    return search(f"attention backward, {kernel}", case, [default, *CANDIDATES[kernel]], launch)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _result_rows(tensor: Tensor | None, in_one: bool) -> Rows:
    """[B, H, R, ·], or packed [total, H, ·] or [1, H, total, ·] if examples are ``in_one``, else packed [B, H, ·]."""
    if tensor is None:
        return rows_of(None)
    if tensor.dim() == 3 and not in_one:
        tensor = tensor[:, :, None]
    rows = rows_of(tensor)
    return rows._replace(example=0) if in_one else rows


def _number_rows(tensor: Tensor, in_one: bool, only: str | None) -> Rows:
    """[B, H, R], packed [H, total] or [1, H, total] if examples are ``in_one``, else packed [H, B]."""
    if tensor.dim() == 3:
        example, head, row = tensor.stride()
        return Rows(tensor, 0 if in_one else example, head, row, 0)
    head, last = tensor.stride()
    return Rows(tensor, 0, head, last, 0) if in_one else Rows(tensor, last, head, 0, 0)


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
