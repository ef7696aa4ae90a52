"""Every layout of a batch as one list of tokens: padded [B, T, D], one row an example [N, D], or packed segments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """The N tokens that are computed, of B examples, in the order of their examples; ``total`` with those left out.

    What is given for all tokens stays where it is: a chunk's rows are gathered when the chunk is computed.
    """

    hidden: Tensor  # [total, D]
    target: Tensor  # [N] int64 in [0, V), or [total, V] class probabilities (or values, of a squared loss)
    target_rows: Tensor | None  # [N] which row of such a target is a token's; None: its own
    scale: Tensor | None  # [N] factor of a token's loss and gradient: its class weight, 0 masked, NaN for a bad label
    masked: Tensor | None  # [N] True: to be left out, where leaving it out of the list would need a device read
    single: bool  # no example has more than one token
    offsets: Tensor | None  # [B + 1] int64, first token of each example; None: token i is example i
    tokens_each: int | None  # tokens of every example, if all have the same number
    counts: Tensor  # [B] valid tokens of each example, computed or not
    denominator: Tensor  # [] what reduction "mean" divides by
    rows: Tensor | None  # [N] where these tokens stand among all tokens; None: they are all there

    @property
    def length(self) -> int:
        return len(self.hidden) if self.rows is None else len(self.rows)

    def starts(self) -> list[int]:
        """First token of each example, and the end [B + 1], on the host: for packed examples a read of the device."""
        if self.tokens_each is not None:
            return [i * self.tokens_each for i in range(len(self.counts) + 1)]
        assert self.offsets is not None
        starts: list[int] = self.offsets.tolist()
        return starts

    # ------------------------------------------------------------------------------------------ rows of tokens [a, b)

    def part(self, values: Tensor, a: int, b: int) -> Tensor:
        """The rows of tokens [a, b) among rows of all tokens [total, ·]."""
        return self._gather(values, self.rows, a, b)

    def target_part(self, a: int, b: int, first: int, last: int) -> Tensor:
        """The targets of tokens [a, b): indices [C], or columns [first, last) of probabilities [C, ·]."""
        if self.target.dim() == 1:
            return self.target[a:b]
        return self._gather(self.target[:, first:last], self.target_rows, a, b)

    def scale_part(self, a: int, b: int) -> Tensor | None:
        return None if self.scale is None else self.scale[a:b]

    def _gather(self, values: Tensor, rows: Tensor | None, a: int, b: int) -> Tensor:
        part = values[a:b] if rows is None else values.index_select(0, rows[a:b])
        # What stands in a masked token's row could be inf or NaN, which a scale of 0 would not undo.
        return part if self.masked is None else part.masked_fill(self.masked[a:b, None], 0)

    # -------------------------------------------------------------------------------- between tokens and examples

    def by_example(self, values: Tensor) -> Tensor:
        """Token values [N] summed within examples [B], in a fixed order on every device."""
        if self.offsets is None:
            return values
        if self.tokens_each is not None:
            return values.view(len(self.counts), self.tokens_each).sum(1)
        # Segments are summed one value after the other: in float32 the error would grow with their length.
        return segment_sum(values.double(), self.offsets).to(values.dtype)

    def to_tokens(self, values: Tensor) -> Tensor:
        """Example values [B] handed to each of the example's tokens [N]."""
        if self.offsets is None:
            return values
        return values.repeat_interleave(self.offsets.diff(), output_size=self.length)

    def to_all(self, values: Tensor) -> Tensor:
        """Token values [N] put back among all tokens [total], 0 elsewhere."""
        if self.rows is None:
            return values
        return values.new_zeros(len(self.hidden)).index_copy_(0, self.rows, values)

    def of_all(self, values: Tensor) -> Tensor:
        """The computed tokens' share [N] of values given for all tokens [total]."""
        return values if self.rows is None else values.index_select(0, self.rows)


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """Sum values [N] within [offsets[i], offsets[i + 1]), 0 for an empty one; unsafe: the offsets are not read back."""
    return torch.segment_reduce(values, "sum", offsets=offsets, axis=0, unsafe=True, initial=0)


def may_look(device: torch.device) -> bool:
    """Whether values may be read to decide what is computed: on CPU; elsewhere the host would wait for the device."""
    return device.type == "cpu"


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
    """Lay a batch out as a list of tokens; where looking is free, leave out those that need no computing.

    ``smoothed``: label smoothing spreads the class weights over all classes, so they are no factor of a token any more.
    """
    device = input.device
    look = may_look(device)
    hidden = input.flatten(0, -2)
    total = len(hidden)
    soft = target.is_floating_point()
    tokens_each, offsets = _segments(input, cu_seqlens, total)
    single = tokens_each == 1

    valid: Tensor | None = None  # [total]; None: all of them
    target_rows: Tensor | None = None
    labels = target.flatten(0, -2) if soft else target.reshape(total).long().contiguous()
    if shift:  # token t predicts target t + 1; an example's last token predicts nothing
        if soft:
            target_rows = torch.arange(total, device=device).roll(-1)
        else:
            labels = labels.roll(-1)
        valid = torch.zeros(total, dtype=torch.bool, device=device)
        if offsets is not None and total:
            valid[:-1] = True
            valid[offsets[1:] - 1] = False  # of empty examples at the start, -1: the last token of all
    if not soft:
        counted = labels != ignore_index
        if not look or not bool(counted.all()):
            valid = counted if valid is None else valid & counted

    outside: Tensor | None = None  # [total] labels that are no class
    if not soft:
        outside = (labels < 0) | (labels >= classes)
        if valid is not None:
            outside &= valid
        if look and not bool(outside.any()):
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
    if computed is not None and look:
        if not bool(computed.all()):
            rows = computed.nonzero().squeeze(1)
            scale = None if scale is None else scale.index_select(0, rows)
            if not soft:
                labels = labels.index_select(0, rows)
            else:
                target_rows = rows if target_rows is None else target_rows.index_select(0, rows)
            if offsets is None:
                offsets = torch.arange(total + 1, device=device)
            before = torch.cat([computed.new_zeros(1, dtype=torch.int64), computed.cumsum(0)])
            offsets, tokens_each = before[offsets], None
    elif computed is not None:
        masked = ~computed
        scale = (torch.ones_like(per_token) if scale is None else scale).masked_fill(masked, 0)
    return Tokens(hidden, labels, target_rows, scale, masked, single, offsets, tokens_each, counts, denominator, rows)


def _segments(input: Tensor, cu_seqlens: Tensor | None, total: int) -> tuple[int | None, Tensor | None]:
    """Tokens of every example, if all have the same number, and where examples start (None: token i is example i)."""
    if cu_seqlens is not None:
        # A compiled call's values nobody has checked: whatever they are, no address may lie outside.
        offsets = cu_seqlens.long().clamp(0, total).cummax(0).values
        offsets[0] = 0
        offsets[-1] = total
        return None, offsets
    tokens_each = input.shape[1:-1].numel()
    if tokens_each == 1:
        return 1, None
    return tokens_each, torch.arange(len(input) + 1, device=input.device) * tokens_each
