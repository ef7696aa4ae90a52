"""One layout for scored attention's examples, padded or packed: [B, H, T, D], where packed ones are a batch of one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .key_ranges import key_ranges
from .scored_attention_op import Problem
from .tokens import segment_sum
from .torch_attention import Attention, as_dtype, empty_rows_first, on_cpu, working_dtype


class Batch(NamedTuple):
    """A problem laid out for :mod:`.torch_attention`, and what it takes to come back from there."""

    dtype: torch.dtype  # what the problem came in, and results go out in; it is computed in the working dtype
    query: Tensor  # [B, Hq, R, D], packed [1, Hq, R, D]; R rows: all of them, or of each example the pooled one
    key: Tensor  # [B, Hkv, Tk, D], packed [1, Hkv, total_k, D]
    value: Tensor  # [B, Hkv, Tk, Dv], packed [1, Hkv, total_k, Dv]
    attention: Attention
    counts: Tensor  # [B] queries of each example, as numbers of the working dtype
    valid: Tensor | None  # [B] which examples have a query; None: all of them
    row: Tensor | None  # int64 [B] the row that is pooled, counted within its example; None: the mean of all
    is_only_row: bool  # nothing but the pooled rows is computed
    offsets: Tensor | None  # packed: int64 [B + 1], where an example's queries start among all
    example: Tensor | None  # packed: int64 [R], whose query a row is

    def from_rows(self, rows: Tensor) -> Tensor:
        """[B, H, R, D] as callers know it: in their dtype, and packed [R, H, D]."""
        rows = as_dtype(rows, self.dtype)
        return rows if self.offsets is None else rows[0].transpose(0, 1)

    def to_rows(self, tensor: Tensor) -> Tensor:
        """The way back."""
        tensor = as_dtype(tensor, self.counts.dtype)
        return tensor if self.offsets is None else tensor.transpose(0, 1)[None]

    def inside(self) -> Tensor | None:
        """Padded: which rows are queries of their example, bool [B, R]; None: all of them."""
        if self.offsets is not None or self.valid is None or self.is_only_row:
            return None
        return torch.arange(self.query.shape[2], device=self.query.device) < self.counts[:, None]

    def sum_by_example(self, per_row: Tensor) -> Tensor:
        """Numbers of rows, [B, R] or packed [1, R], summed within examples [B]."""
        if self.offsets is not None:
            return segment_sum(per_row[0], self.offsets)
        inside = self.inside()
        return (per_row if inside is None else per_row.where(inside, 0)).sum(1)

    def to_each_row(self, per_example: Tensor) -> Tensor:
        """Numbers of examples [B] handed to each one's rows: [B, 1, 1, 1], packed [1, 1, R, 1]."""
        if self.example is None:
            return per_example[:, None, None, None]
        return per_example[self.example][None, None, :, None]

    def blank(self, rows: Tensor) -> Tensor:
        """[B, H, R, D] with 0 in the rows that are no query of their example."""
        inside = self.inside()
        return rows if inside is None else rows.where(inside[:, None, :, None], 0)

    def pool(self, output: Tensor) -> Tensor:
        """Output [B, H, R, Dv] pooled to [B, H * Dv], in the callers' dtype; 0 for an example without a query."""
        if self.row is not None:
            pooled = self._pooled_rows(output)
        elif self.offsets is not None:
            total = segment_sum(output[0].transpose(0, 1).flatten(1), self.offsets)
            pooled = total / self.counts.clamp(min=1)[:, None]
        elif self.valid is not None:
            pooled = output.sum(2).flatten(1) / self.counts.clamp(min=1)[:, None]
        else:
            pooled = output.mean(2).flatten(1)
        return as_dtype(pooled, self.dtype)

    def unpool(self, grad_pooled: Tensor, width: int) -> Tensor:
        """The gradient of :meth:`pool`: [B, H * Dv] handed back to the rows [B, H, R, Dv]."""
        _, heads, rows, _ = self.query.shape
        grad = as_dtype(grad_pooled, self.counts.dtype).unflatten(1, (heads, width))  # [B, H, Dv]
        if self.row is not None:
            return self._to_pooled_rows(grad, self.query.shape[2], self.is_only_row)
        grad = grad / (rows if self.valid is None else self.counts.clamp(min=1)[:, None, None])
        return grad[:, :, None].expand(-1, -1, rows, -1) if self.example is None else self.to_rows(grad[self.example])

    def from_only_row(self, grad_query: Tensor, rows: int) -> Tensor:
        """The gradient in the pooled rows' queries [B, H, 1, D] put where those stand among all ``rows`` queries."""
        grad = grad_query[:, :, 0] if self.offsets is None else grad_query[0].transpose(0, 1)
        return self._to_pooled_rows(grad, rows, False)

    def _pooled_rows(self, output: Tensor) -> Tensor:
        """The pooled row of each example [B, H * Dv], a copy."""
        batch, heads, rows, width = output.shape
        if rows == 0:
            return output.new_zeros(len(self.counts), heads * width)
        if self.offsets is None:
            if self.is_only_row:
                return output[:, :, 0].flatten(1).clone()
            return output[torch.arange(batch, device=output.device), :, self.row].flatten(1)
        pooled = output[0].transpose(0, 1)  # [R, H, Dv]
        if not self.is_only_row:
            pooled = pooled[self._row_among(rows)]
        assert self.valid is not None
        return pooled.flatten(1).where(self.valid[:, None], 0)  # without a query of its own, the row is a neighbour's

    def _to_pooled_rows(self, grad: Tensor, rows: int, is_only_row: bool) -> Tensor:
        """[B, H, D] put to each example's pooled row among ``rows`` rows of zeros: [B, H, R, D]."""
        batch, heads, width = grad.shape
        if self.valid is not None:
            grad = grad.where(self.valid[:, None, None], 0)
        if is_only_row:
            return grad[:, :, None] if self.offsets is None else grad.transpose(0, 1)[None]
        spread = empty_rows_first(grad, batch if self.offsets is None else 1, heads, rows, width).zero_()
        if rows == 0:
            return spread
        if self.offsets is None:
            spread[torch.arange(batch, device=grad.device), :, self.row] = grad
        else:  # added, since an example without a query has a neighbour's row
            spread[0].transpose(0, 1).index_add_(0, self._row_among(rows), grad)
        return spread

    def _row_among(self, rows: int) -> Tensor:
        """Where the pooled rows of packed examples stand among all."""
        assert self.offsets is not None and self.row is not None
        return (self.offsets[:-1] + self.row).clamp(max=rows - 1)


def as_batch(problem: Problem) -> Batch:
    """Lay a problem out."""
    return _padded(problem) if problem.cu_seqlens_q is None else _packed(problem)


def _padded(problem: Problem) -> Batch:
    dtype = working_dtype(problem.query)
    query, key, value = (as_dtype(x, dtype) for x in (problem.query, problem.key, problem.value))
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    query_lengths = _lengths(problem.query_lengths, queries)
    key_lengths = _lengths(problem.key_lengths, keys)
    valid = None
    if query_lengths is not None:
        query = without_padding(query, query_lengths)
        counts, valid = query_lengths.to(dtype), query_lengths > 0
    else:
        counts = query.new_full((batch,), queries)
        valid = counts > 0 if queries == 0 else None
    if key_lengths is not None:
        key, value = without_padding(key, key_lengths), without_padding(value, key_lengths)

    row = _pooled_row(problem.pool, counts)
    is_only_row = row is not None and problem.rows != "all" and queries > 0
    if is_only_row:
        query = query[torch.arange(batch, device=query.device), :, row][:, :, None]

    windowed = problem.window_left >= 0 or problem.window_right >= 0
    square = queries == keys and not is_only_row and problem.scale > 0  # as flash attention's own causal mask needs it
    is_causal = problem.is_causal and queries > 1  # a single query stands beside the last key: it sees them all
    ranges = None
    if query_lengths is not None or key_lengths is not None or windowed or (is_causal and not square):
        if is_only_row:
            assert row is not None
            rows = row[:, None]  # [B, 1]
        elif problem.is_causal or windowed or query_lengths is not None:
            rows = torch.arange(queries, device=query.device)[None]  # [1, R]
        else:
            rows = torch.zeros(1, 1, dtype=torch.int64, device=query.device)  # they all look at the same keys
        ranges = key_ranges(
            rows,
            queries if query_lengths is None else query_lengths[:, None],
            keys if key_lengths is None else key_lengths[:, None],
            is_causal=problem.is_causal,
            window_left=problem.window_left,
            window_right=problem.window_right,
        )
        is_causal = False
    attention = Attention(problem.scale, problem.softcap, is_causal, ranges)
    return Batch(problem.query.dtype, query, key, value, attention, counts, valid, row, is_only_row, None, None)


def _packed(problem: Problem) -> Batch:
    assert problem.cu_seqlens_q is not None and problem.cu_seqlens_k is not None
    dtype = working_dtype(problem.query)
    query, key, value = (as_dtype(x, dtype).transpose(0, 1)[None] for x in (problem.query, problem.key, problem.value))
    total, device = query.shape[2], query.device
    offsets, key_offsets = _offsets(problem.cu_seqlens_q, total), _offsets(problem.cu_seqlens_k, key.shape[2])
    queries, keys = offsets.diff(), key_offsets.diff()  # [B]
    counts = queries.to(dtype)
    row = _pooled_row(problem.pool, counts)
    is_only_row = row is not None and problem.rows != "all" and total > 0
    if is_only_row:
        assert row is not None
        example, rows = torch.arange(len(row), device=device), row
        query = query[:, :, (offsets[:-1] + row).clamp(max=total - 1)]
        starts = torch.arange(len(row) + 1)
    else:
        position = torch.arange(total, device=device)
        example = torch.bucketize(position, offsets[1:], right=True).clamp(max=len(queries) - 1)
        rows, starts = position - offsets[example], offsets
    ranges = key_ranges(
        rows[None],
        queries[example][None],
        keys[example][None],
        is_causal=problem.is_causal,
        window_left=problem.window_left,
        window_right=problem.window_right,
        first_key=key_offsets[example][None],
    )
    row_starts = starts.tolist() if on_cpu(query) else None
    attention = Attention(problem.scale, problem.softcap, False, ranges, row_starts)
    return Batch(
        problem.query.dtype, query, key, value, attention, counts, queries > 0, row, is_only_row, offsets, example
    )


def without_padding(tensor: Tensor, lengths: Tensor) -> Tensor:
    """[B, H, T, D] with rows t >= length set to 0: they may hold anything, and 0 times NaN would be NaN."""
    padding = torch.arange(tensor.shape[2], device=tensor.device) >= lengths[:, None]
    if on_cpu(padding) and not bool(padding.any()):
        return tensor
    return tensor.masked_fill(padding[:, None, :, None], 0)


def _pooled_row(pool: str, counts: Tensor) -> Tensor | None:
    """The row that is pooled [B], 0 where there is none; None for the mean."""
    if pool == "mean":
        return None
    return torch.zeros_like(counts, dtype=torch.int64) if pool == "first" else (counts.long() - 1).clamp(min=0)


def _lengths(lengths: Tensor | None, most: int) -> Tensor | None:
    """Lengths that lead to no address outside, whatever was passed: values are only checked where they can be read."""
    return None if lengths is None else lengths.long().clamp(0, most)


def _offsets(cu_seqlens: Tensor, total: int) -> Tensor:
    """The same for cu_seqlens."""
    return cu_seqlens.long().clamp(0, total).cummax(0).values
