"""Attention in tiles of PyTorch operations, forward and backward, never a [T, T] over all heads and examples.

What computes a tile::

    asked for     | aten::_scaled_dot_product_flash_attention_for_cpu | matrix products (any device)
    --------------|---------------------------------------------------|-----------------------------------
    logsumexp     | natural, float32 [B, H, T]; 0 for a row without   | natural, -inf without a key
                  | a key, so -inf is written over it                 |
    causal        | top-left, -inf times scale: used only where       | by mask
                  | Tq = Tk and scale > 0, else by mask               |
    NaN, ±inf     | lost where all of a row's scores are: used only   | kept
                  | where none can be                                 |
    any mask      | added to the scores, in the query's dtype         | filled with -inf
    Dv != D       | no: both are padded with zeros to the larger      | yes
    Hq != Hkv     | not on every version: keys, values are repeated   | repeated too
    softcap       | no                                                | yes
    strides       | last must be 1, or it reads the wrong numbers     | any
    an empty size | divides by zero: such tiles are never made        | never made
    float64       | yes                                               | yes
    half floats   | no: an approximate exp puts its logsumexp 5e-5    | no
                  | off. They come here as float32                    |

Its public front, ``torch.nn.functional.scaled_dot_product_attention``, runs the same CPU kernel but keeps the logsumexp
to itself. On other devices tiles are matrix products: right, without host reads, and slower than a fused kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .key_ranges import KeyRanges

#: A tile's matrix of attention scores, or its mask. The backward keeps four of them at a time: 64 MB.
TILE_BYTES = 16 * 2**20
#: Rows of a CPU tile under a mask: few enough that the keys no row of it looks at are worth leaving out.
CPU_TILE_ROWS = 256

_HAS_FLASH = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")  # not a promise of PyTorch's
if _HAS_FLASH:
    _FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    _FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Attention(NamedTuple):
    """What is computed of query [B, H, Tq, D], key [B, Hkv, Tk, D], value [B, Hkv, Tk, Dv], all float32 or float64."""

    scale: float
    softcap: float | None
    is_causal: bool  # among Tq = Tk positions; where that is not so, causality is in the ranges
    ranges: KeyRanges | None  # None: every row looks at every key
    row_starts: Sequence[int] | None = None  # no tile shall cross these rows: where packed examples start


def working_dtype(tensor: Tensor) -> torch.dtype:
    """What scores and losses are computed in: float32, and float64 for float64 inputs."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without a call where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def on_cpu(tensor: Tensor) -> bool:
    """Where values can be looked at without waiting for a device, and where PyTorch's CPU kernels run."""
    return tensor.device.type == "cpu"


def rows_first(tensor: Tensor) -> Tensor:
    """[B, H, T, D], stored as [B, T, H, D]: merging the heads is then a view."""
    transposed = tensor.transpose(1, 2)
    return tensor if transposed.is_contiguous() else transposed.contiguous().transpose(1, 2)


def empty_rows_first(like: Tensor, batch: int, heads: int, rows: int, width: int) -> Tensor:
    """An uninitialised [B, H, T, D], stored as [B, T, H, D], in another tensor's dtype."""
    return like.new_empty(batch, rows, heads, width).transpose(1, 2)


def attention_forward(query: Tensor, key: Tensor, value: Tensor, what: Attention) -> tuple[Tensor, Tensor]:
    """Output [B, H, Tq, Dv], stored rows first, and logsumexp [B, H, Tq]; 0 and -inf for a row without a key."""
    batch, heads, rows, _ = query.shape
    key, value = _repeat_heads(key, heads), _repeat_heads(value, heads)
    flash = _flash_takes(query, key, what)
    tile_forward = _flash_forward if flash else _products_forward
    tiles = _tiles(query, key, what, flash)
    if len(tiles) == 1 and tiles[0].is_all(query, key):
        output, logsumexp = tile_forward(query, key, value, tiles[0].mask(), what)
        output, logsumexp = rows_first(output), logsumexp.contiguous()
    else:
        output = empty_rows_first(query, batch, heads, rows, value.shape[3]).zero_()
        logsumexp = query.new_full((batch, heads, rows), -torch.inf)
        for tile in tiles:
            at, k, v = tile.of_rows, key[tile.of_keys], value[tile.of_keys]
            output[at], logsumexp[at] = tile_forward(query[at], k, v, tile.mask(), what)
    if what.ranges is not None:
        logsumexp.masked_fill_(~what.ranges.has_key()[:, None], -torch.inf)
    if on_cpu(query) and not flash and what.softcap is None:
        # A row whose scores are all -inf though it has keys: its softmax is 0/0, and no row without a key.
        lost = logsumexp == -torch.inf
        if what.ranges is not None:
            lost &= what.ranges.has_key()[:, None]
        output.masked_fill_(lost[..., None], torch.nan)
        logsumexp.masked_fill_(lost, torch.nan)
    return output, logsumexp


def attention_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, what: Attention
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in query, key and value, stored rows first; probabilities are computed again from the logsumexp."""
    heads, kv_heads = query.shape[1], key.shape[1]
    key, value = _repeat_heads(key, heads), _repeat_heads(value, heads)
    flash = _flash_takes(query, key, what)
    tile_backward = _flash_backward if flash else _products_backward
    if what.ranges is not None:
        # A row without a key has logsumexp -inf, and exp(-inf - -inf) is NaN; exp(-inf - inf) is the 0 it should be.
        logsumexp = logsumexp.masked_fill(logsumexp == -torch.inf, torch.inf)
    tiles = _tiles(query, key, what, flash)
    if len(tiles) == 1 and tiles[0].is_all(query, key):
        grad_query, grad_key, grad_value = tile_backward(
            grad_output, query, key, value, output, logsumexp, tiles[0].mask(), what
        )
    else:
        grad_query, grad_key, grad_value = (
            torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
        )
        for tile in tiles:
            at, k, v = tile.of_rows, key[tile.of_keys], value[tile.of_keys]
            grad_query[at], to_keys, to_values = tile_backward(
                grad_output[at], query[at], k, v, output[at], logsumexp[at], tile.mask(), what
            )
            grad_key[tile.of_keys] += to_keys
            grad_value[tile.of_keys] += to_values
    if kv_heads != heads:
        grad_key = grad_key.unflatten(1, (kv_heads, heads // kv_heads)).sum(2)
        grad_value = grad_value.unflatten(1, (kv_heads, heads // kv_heads)).sum(2)
    return rows_first(grad_query), rows_first(grad_key), rows_first(grad_value)


def _repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """Each key head once for every query head that reads it; a view if there is but one."""
    kv_heads = tensor.shape[1]
    if kv_heads == heads:
        return tensor
    return tensor.unsqueeze(2).expand(-1, -1, heads // kv_heads, -1, -1).flatten(1, 2)


def _flash_takes(query: Tensor, key: Tensor, what: Attention) -> bool:
    return _HAS_FLASH and on_cpu(query) and what.softcap is None and _scores_are_finite(query, key, what)


def _scores_are_finite(query: Tensor, key: Tensor, what: Attention) -> bool:
    """Whether |scale q·k| cannot pass the largest number; reads two values, so on the CPU only."""
    if query.numel() == 0 or key.numel() == 0:
        return True
    largest = (float(torch.linalg.vector_norm(x, torch.inf)) for x in (query, key))  # NaN if one is
    return abs(what.scale) * query.shape[3] * math.prod(largest) < torch.finfo(query.dtype).max


# -------------------------------------------------------------------------------------------------------------- tiles


class Tile(NamedTuple):
    """Some rows of some examples, and the keys that they look at."""

    examples: slice
    rows: slice
    keys: slice
    ranges: KeyRanges | None  # of these rows; None: they look at all of these keys

    @property
    def of_rows(self) -> tuple[slice, slice, slice]:
        return self.examples, slice(None), self.rows

    @property
    def of_keys(self) -> tuple[slice, slice, slice]:
        return self.examples, slice(None), self.keys

    def mask(self) -> Tensor | None:
        return None if self.ranges is None else self.ranges.mask(self.keys.start, self.keys.stop)

    def is_all(self, query: Tensor, key: Tensor) -> bool:
        parts = (self.examples, self.rows, self.keys)
        return parts == (slice(0, query.shape[0]), slice(0, query.shape[2]), slice(0, key.shape[2]))


def _tiles(query: Tensor, key: Tensor, what: Attention, flash: bool) -> list[Tile]:
    """Cut the work so that a tile's largest matrix stays within TILE_BYTES; none of them is empty."""
    batch, heads, rows, _ = query.shape
    keys = key.shape[2]
    if query.numel() == 0 or key.numel() == 0:
        return []
    look = on_cpu(query)
    ranges = what.ranges
    if ranges is None and what.is_causal and not flash:
        last = torch.arange(1, rows + 1, device=query.device)[None]
        ranges = KeyRanges(torch.zeros_like(last), last)
    each_row_masked = ranges is not None and ranges.first.shape[1] > 1
    # The largest matrix: the scores of all heads, or, where flash attention keeps those to itself, the mask of any.
    row_bytes = keys * query.element_size() * (1 if flash else heads)
    tile_rows, tile_examples = rows, batch
    if each_row_masked or not flash:
        tile_rows = max(1, min(rows, TILE_BYTES // row_bytes))
        tile_examples = max(1, TILE_BYTES // (row_bytes * tile_rows))
    elif ranges is not None:  # a mask of one row for all
        tile_examples = max(1, TILE_BYTES // row_bytes)
    if look and each_row_masked:
        tile_rows = min(tile_rows, CPU_TILE_ROWS)
    starts = [0, rows] if what.row_starts is None else what.row_starts

    tiles = []
    for example in range(0, batch, tile_examples):
        examples = slice(example, min(example + tile_examples, batch))
        for start, stop in pairwise(starts):
            for row in range(start, stop, tile_rows):
                part = slice(row, min(row + tile_rows, stop))
                if ranges is None:
                    tiles.append(Tile(examples, part, slice(0, keys), None))
                    continue
                here = ranges.part(examples, part)
                # On CPU, leave out the keys that no row looks at, and the mask where every row looks at all others.
                low, high, unmasked = here.span(keys) if look else (0, keys, False)
                if low < high:
                    tiles.append(Tile(examples, part, slice(low, high), None if unmasked else here))
    return tiles


# ------------------------------------------------------------------------------ a tile by PyTorch's CPU flash attention


def _flash_ready(tensor: Tensor, width: int) -> Tensor:
    """Padded with zeros to ``width``, in strides the kernel reads rightly: rows of neighbours that do not overlap."""
    if tensor.shape[3] != width:  # what pad returns may be laid out as images are, channels last
        tensor = torch.nn.functional.pad(tensor, (0, width - tensor.shape[3]))
    return tensor if tensor.stride(3) == 1 and tensor.stride(2) >= width else tensor.contiguous()


def _flash_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _narrow(tensor: Tensor, width: int) -> Tensor:
    return tensor if tensor.shape[3] == width else tensor[..., :width]


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, what: Attention) -> tuple[Tensor, Tensor]:
    width = max(q.shape[3], v.shape[3])
    ready = [_flash_ready(x, width) for x in (q, k, v)]
    output, logsumexp = _FLASH(*ready, 0.0, what.is_causal, attn_mask=_flash_mask(mask, q.dtype), scale=what.scale)
    return _narrow(output, v.shape[3]), logsumexp


def _flash_backward(
    grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, logsumexp: Tensor, mask: Tensor | None,
    what: Attention,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    width = max(q.shape[3], v.shape[3])
    ready = [_flash_ready(x, width) for x in (grad_output, q, k, v, output)]
    grad_q, grad_k, grad_v = _FLASH_BACKWARD(
        *ready, logsumexp, 0.0, what.is_causal, attn_mask=_flash_mask(mask, q.dtype), scale=what.scale
    )
    return _narrow(grad_q, q.shape[3]), _narrow(grad_k, k.shape[3]), _narrow(grad_v, v.shape[3])


# ----------------------------------------------------------------------------------------- a tile by matrix products


def _capped_scores(q: Tensor, k: Tensor, mask: Tensor | None, what: Attention) -> tuple[Tensor, Tensor | None]:
    """Scores s = scale q kᵀ, with softcap c tanh(s / c), -inf under the mask, [b, H, r, K]; and that tanh."""
    scores, tanh = (q * what.scale) @ k.mT, None
    if what.softcap is not None:
        tanh = scores.div_(what.softcap).tanh_()
        scores = tanh * what.softcap
    return scores if mask is None else scores.masked_fill_(~mask, -torch.inf), tanh


def _products_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, what: Attention) -> tuple[Tensor, Tensor]:
    scores, _ = _capped_scores(q, k, mask, what)
    logsumexp = scores.logsumexp(-1)
    probabilities = scores.sub_(logsumexp.masked_fill(logsumexp == -torch.inf, torch.inf)[..., None]).exp_()
    return probabilities @ v, logsumexp


def _products_backward(
    grad_output: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, logsumexp: Tensor, mask: Tensor | None,
    what: Attention,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    scores, tanh = _capped_scores(q, k, mask, what)
    probabilities = scores.sub_(logsumexp[..., None]).exp_()
    grad_v = probabilities.mT @ grad_output
    grad_scores = grad_output @ v.mT  # of the probabilities first, then of the scores
    grad_scores.sub_((grad_output * output).sum(-1, keepdim=True)).mul_(probabilities)
    if tanh is not None:
        grad_scores.mul_(tanh.square_().neg_().add_(1))
    return (grad_scores @ k).mul_(what.scale), (grad_scores.mT @ q).mul_(what.scale), grad_v
