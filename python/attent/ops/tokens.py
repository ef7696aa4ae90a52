"""Every layout of a batch as one list of tokens: padded [B, T, D], one row an example [N, D], or packed segments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """The tokens that are computed, in the order of their examples (N of them, of B examples)."""

    hidden: Tensor  # [N, D]
    target: Tensor  # [N] int64 in [0, V), or [N, V] class probabilities
    scale: Tensor | None  # [N] factor of a token's loss and gradient: its class weight, 0 masked, NaN for a bad label
    masked: Tensor | None  # [N] True: to be left out, where leaving it out of the list would need a device read
    offsets: Tensor | None  # [B + 1] int64, first token of each example; None: token i is example i
    tokens_each: int | None  # tokens of every example, if all have the same number
    counts: Tensor  # [B] valid tokens of each example, computed or not
    denominator: Tensor  # [] what reduction "mean" divides by
    rows: Tensor | None  # [N] where these tokens stand among all tokens; None: they are all there
    total: int  # number of all tokens, left-out ones included

    def starts(self) -> list[int]:
        """First token of each example, and the end [B + 1], on the host (on CUDA, for packed examples, a device read)."""
        if self.tokens_each is not None:
            return [i * self.tokens_each for i in range(len(self.counts) + 1)]
        assert self.offsets is not None
        starts: list[int] = self.offsets.tolist()
        return starts

    def part(self, a: int, b: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens [a, b): hidden, with 0 where masked (what stands there could be inf or NaN), target and scale."""
        hidden = self.hidden[a:b]
        if self.masked is not None:
            hidden = hidden.masked_fill(self.masked[a:b, None], 0)
        return hidden, self.target[a:b], None if self.scale is None else self.scale[a:b]

    def by_example(self, values: Tensor) -> Tensor:
        """Token values [N] summed within examples [B], in a fixed order on every device."""
        if self.offsets is None:
            return values
        return segment_sum(values, self.offsets)

    def to_tokens(self, values: Tensor) -> Tensor:
        """Example values [B] handed to each of the example's tokens [N]."""
        if self.offsets is None:
            return values
        return values.repeat_interleave(self.offsets.diff(), output_size=len(self.hidden))

    def to_all(self, values: Tensor) -> Tensor:
        """Token values [N, ...] put back among all tokens [total, ...], 0 elsewhere."""
        if self.rows is None:
            return values
        return values.new_zeros(self.total, *values.shape[1:]).index_copy_(0, self.rows, values)

    def of_all(self, values: Tensor) -> Tensor:
        """The computed tokens' share [N] of values given for all tokens [total]."""
        return values if self.rows is None else values.index_select(0, self.rows)


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum values [N] within [offsets[i], offsets[i + 1]), 0 for an empty one; unsafe: the offsets are not read back."""
    return torch.segment_reduce(values, "sum", offsets=offsets, axis=0, unsafe=True, initial=0)


def list_tokens(
    input: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None,
    example_weight: Tensor | None,
    cu_seqlens: Tensor | None,
    classes: int,
    ignore_index: int,
    smoothed: bool,
    shift: bool,
    dtype: torch.dtype,
) -> Tokens:
    """Lay a batch out as a list of tokens; on CPU, where looking is free, leave out those that need no computing.

    ``smoothed``: label smoothing spreads the class weights over all classes, so they are no factor of a token any more.
    """
    device = input.device
    on_cpu = device.type == "cpu"
    hidden = input.reshape(-1, input.shape[-1])
    total = len(hidden)
    soft = target.is_floating_point()
    labels = target.reshape(total, classes) if soft else target.reshape(total).long()

    tokens_each: int | None = None
    offsets: Tensor | None = None
    if cu_seqlens is not None:
        offsets = cu_seqlens.long().clamp(0, total).cummax(0).values if not on_cpu else cu_seqlens.long()
    else:
        tokens_each = input.shape[1:-1].numel()
        if tokens_each != 1:
            offsets = torch.arange(len(input) + 1, device=device) * tokens_each

    valid: Tensor | None = None  # None: all of them
    if shift:  # token t predicts target t + 1; an example's last token predicts nothing
        assert offsets is not None
        labels = labels.roll(-1, 0)
        valid = torch.ones(total, dtype=torch.bool, device=device)
        valid[(offsets[1:] - 1).clamp(min=0)] = False
        if total:
            valid[-1] = False
    if not soft:
        counted = labels != ignore_index
        if not on_cpu or not bool(counted.all()):
            valid = counted if valid is None else valid & counted

    outside: Tensor | None = None
    if not soft:
        outside = (labels < 0) | (labels >= classes)
        if valid is not None:
            outside &= valid
        if on_cpu and not bool(outside.any()):
            outside = None
        if outside is not None or valid is not None:
            labels = labels.clamp(0, classes - 1)
    scale = None
    if class_weight is not None and not soft and not smoothed:
        scale = class_weight.to(dtype)[labels]

    per_token = torch.ones(total, dtype=dtype, device=device) if valid is None else valid.to(dtype)
    if offsets is None:
        counts = per_token
    elif valid is None:
        counts = offsets.diff().to(dtype)
    else:
        counts = segment_sum(per_token, offsets)
    if class_weight is not None and not soft:
        per_token = per_token * class_weight.to(dtype)[labels]
    denominator = per_token.sum()

    if outside is not None:
        scale = (torch.ones_like(per_token) if scale is None else scale).masked_fill(outside, torch.nan)

    computed = valid
    if example_weight is not None:
        weighty = example_weight != 0
        if offsets is not None:
            weighty = weighty.repeat_interleave(offsets.diff(), output_size=total)
        computed = weighty if computed is None else computed & weighty

    rows: Tensor | None = None
    masked: Tensor | None = None
    if computed is not None and on_cpu:
        if not bool(computed.all()):
            rows = computed.nonzero().squeeze(1)
            hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
            scale = None if scale is None else scale.index_select(0, rows)
            if offsets is None:
                offsets = torch.arange(total + 1, device=device)
            before = torch.cat([computed.new_zeros(1, dtype=torch.int64), computed.cumsum(0)])
            offsets, tokens_each = before[offsets], None
    elif computed is not None:
        masked = ~computed
        scale = (torch.ones_like(per_token) if scale is None else scale).masked_fill(masked, 0)
    return Tokens(hidden, labels, scale, masked, offsets, tokens_each, counts, denominator, rows, total)
