"""The loss of a training step with each example's score, in whatever way the model gets to its own loss.

The trainer's own ``compute_loss`` runs, with all that it and the model add (normalisation over accumulated batches and
ranks, auxiliary losses). What differs is the head, and only while it does:

* :class:`FusedLoss`, language models: the head returns no logits. It takes loss and scores from
  :func:`attent.linear_cross_entropy` inside its own ``forward`` (so that its hooks run: sharded weights are there), and
  the model's ``loss_function`` returns that loss.
* :class:`LossBeside`, classifiers and ``keep_logits``: the model computes its own logits and its own loss; scores are
  computed beside them from what went into the head, inside its ``forward`` too.
* ``trl_head.py``: the trainer's own fused head computes the loss, without logits; scores beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._checks import describe, refuse
from ...ops.linear_cross_entropy import linear_cross_entropy
from .arguments import TeachingArguments
from .examples import IGNORED
from .heads import Head


@dataclass(frozen=True)
class Targets:
    """What a batch is to predict. ``shift``: targets ``[B, T]`` yet to be shifted by one. ``segments``: cu_seqlens of a
    batch that holds its examples in one row; None where rows are examples.
    """

    target: Tensor
    shift: bool
    segments: Tensor | None

    def counted(self) -> Tensor:
        """Which targets count, bool, as the loss sees them: shifted."""
        counted = self.target[:, 1:] if self.shift else self.target
        return counted != IGNORED

    def lengths(self) -> Tensor:
        """How many targets of each example count, ``[B]``."""
        counted = (self.target != IGNORED).long()
        if self.segments is None:
            return counted[:, 1 if self.shift else 0 :].sum(1)
        before = F.pad(counted[0].cumsum(0), (1, 0))
        begin, end = self.segments[:-1].long(), self.segments[1:].long()
        return before[end] - before[begin + 1 if self.shift else begin]


class ScoredLoss:
    """What the ways to a loss share: the head, the options, and the one call that scores."""

    def __init__(self, head: Head, teaching: TeachingArguments, smoothing: float) -> None:
        self.head, self.teaching, self.smoothing = head, teaching, smoothing
        self._checked = False

    def __call__(
        self,
        compute_loss: Callable[[bool], Any],
        base: Any,
        inputs: MutableMapping[str, Any],
        examples: int,
        cu_seqlens: Tensor | None,
        weight: Tensor | None,
        need_outputs: bool,
    ) -> tuple[Tensor, Any, Tensor]:
        """``(loss, outputs, scores [examples])``; with ``weight`` ``[examples]`` each example's loss counts so often.

        ``compute_loss(outputs_too)`` is the trainer's, ``base`` the bare model; ``outputs`` may be None unless
        ``need_outputs``.
        """
        raise NotImplementedError

    def score(self, hidden: Tensor, targets: Targets, reduction: str, weight: Tensor | None = None) -> Any:
        """Loss and scores of what goes into the head. Only while the head's module runs: sharded weights are there."""
        head, flat = self.head, targets.segments is not None
        if head.language and hidden.shape[:-1] != targets.target.shape:
            refuse("labels", describe(targets.target), f"[B, T] like the head's input, {describe(hidden)}")
        scaled = hidden if head.scale == 1 else hidden * head.scale
        return linear_cross_entropy(
            scaled.flatten(0, 1) if flat else scaled,
            head.linear.weight,
            targets.target.flatten() if flat else targets.target,
            linear_bias=None if head.linear.bias is None else head.linear.bias * head.scale,
            reduction=reduction,
            ignore_index=IGNORED,
            label_smoothing=self.smoothing,
            softcap=head.softcap,
            shift=targets.shift,
            example_weight=weight,
            score=self.teaching.score,
            per_example=self.teaching.per_example,
            cu_seqlens=targets.segments,
        )


class FusedLoss(ScoredLoss):
    """Loss and scores of a causal language model without its logits."""

    def __call__(
        self,
        compute_loss: Callable[[bool], Any],
        base: Any,
        inputs: MutableMapping[str, Any],
        examples: int,
        cu_seqlens: Tensor | None,
        weight: Tensor | None,
        need_outputs: bool,
    ) -> tuple[Tensor, Any, Tensor]:
        targets = language_targets(inputs, examples, cu_seqlens)
        head = self.head
        seen: dict[str, Any] = {}

        def forward(hidden: Tensor) -> Tensor:
            seen["total"], seen["scores"] = self.score(hidden, targets, "sum", weight)
            # One position each, once, to see what the model does to logits; then none at all.
            some = hidden[:, : 0 if self._checked else 1]
            output = seen["output"] = F.linear(some, head.linear.weight, head.linear.bias)
            return output

        def loss_function(*arguments: Any, num_items_in_batch: Any = None, **options: Any) -> Tensor:
            if not self._checked:
                head.check(
                    seen["output"].detach(), (options["logits"] if "logits" in options else arguments[0]).detach()
                )
                self._checked = True
            seen["used"] = True
            if num_items_in_batch is None:
                num_items_in_batch = targets.counted().sum().clamp(min=1)
            loss: Tensor = seen["total"] / num_items_in_batch
            return loss

        with in_place_of(head.linear, "forward", forward), in_place_of(base, "_loss_function", loss_function):
            loss, outputs = compute_loss(True)
        if "used" not in seen:
            refuse(
                "model",
                f"{type(base).__name__}, which computes its loss without transformers' common loss_function",
                "TeachingArguments(keep_logits=True) for such models: their own loss, with scores beside it",
            )
        return loss, outputs, seen["scores"]


class LossBeside(ScoredLoss):
    """The model's own logits and loss, and scores from what went into its head."""

    def __call__(
        self,
        compute_loss: Callable[[bool], Any],
        base: Any,
        inputs: MutableMapping[str, Any],
        examples: int,
        cu_seqlens: Tensor | None,
        weight: Tensor | None,
        need_outputs: bool,
    ) -> tuple[Tensor, Any, Tensor]:
        head = self.head
        if head.language:
            targets = language_targets(inputs, examples, cu_seqlens)
        else:
            targets = Targets(labels_of(inputs), False, None)
            if targets.target.shape != (examples,) or targets.target.is_floating_point():
                refuse("labels", describe(targets.target), f"int64 [B={examples}], a class for each example")
        seen: dict[str, Any] = {}

        def forward(hidden: Tensor) -> Tensor:
            output: Tensor = F.linear(hidden, head.linear.weight, head.linear.bias)
            of, flat = targets, hidden
            if not head.language and output.dim() == 3:
                # The model pools after its head, at a position that shows later: each is scored, classes being few.
                of = Targets(targets.target[:, None].expand(output.shape[:2]).flatten(), False, None)
                flat = hidden.flatten(0, 1)
            with torch.no_grad():
                seen["beside"] = self.score(flat, of, "example")
            if weight is not None:
                spread = by_target(weight, targets)
                by_element = spread.view(*spread.shape, *[1] * (output.dim() - spread.dim()))
                output = _GradientTimes.apply(output, by_element)  # type: ignore[no-untyped-call]
            seen["output"] = output
            return output

        with in_place_of(head.linear, "forward", forward):
            loss, outputs = compute_loss(True)
        if "output" not in seen:
            refuse("head", f"{head.name!r}, which did not run", "the layer that the model's logits come from")
        output, (means, scores) = seen["output"], seen["beside"]
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
        if not head.language and output.dim() == 3:
            # The position that a row of the logits came from is where its gradient is.
            (of_output,) = torch.autograd.grad(logits.float().sum(), output, retain_graph=True)
            row, position = torch.arange(len(output), device=output.device), of_output[..., 0].argmax(1)
            output = output[row, position]
            means, scores = (value.view(of_output.shape[:2])[row, position] for value in (means, scores))
        if not self._checked:
            head.check(output.detach(), logits.detach())
            self._checked = True
        if weight is not None:
            # Gradients are weighted; the value is to say so. The trainer's loss is c·Σℓ with a c of its own (tokens of
            # all accumulated batches and ranks), and a mixture of experts' auxiliary loss. c is found without reading
            # anything back.
            sums = means * targets.lengths() if head.language else means
            rest = outputs.get("aux_loss") if isinstance(outputs, dict) else None
            rest = 0.0 if rest is None else rest.detach() * base.router_aux_loss_coef
            share = (loss.detach() - rest) / sums.sum().clamp(min=torch.finfo(sums.dtype).tiny)
            loss = loss + share * ((weight - 1) * sums).sum()
        return loss, outputs, scores


class _GradientTimes(torch.autograd.Function):
    """The identity, whose gradient is multiplied: what a loss that is a sum over examples needs to weight them."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight.to(output.dtype)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.weight, None


@contextmanager
def in_place_of(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` inside; hooks and parameters of a module stay where they are."""
    had, before = name in owner.__dict__, owner.__dict__.get(name)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if had:
            owner.__dict__[name] = before
        else:
            del owner.__dict__[name]


def by_target(weight: Tensor, targets: Targets) -> Tensor:
    """Each example's weight where its targets are predicted: ``[B]`` by rows, ``[1, T]`` of a padding-free batch."""
    if targets.segments is None:
        return weight
    spread = weight.repeat_interleave(targets.segments.diff().long(), output_size=targets.target.shape[1])[None]
    return spread.roll(-1, 1) if targets.shift else spread


def labels_of(inputs: MutableMapping[str, Any]) -> Tensor:
    """The batch's labels."""
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor):
        refuse("labels", describe(labels), "a tensor under 'labels' in each batch")
    return labels


def language_targets(inputs: MutableMapping[str, Any], examples: int, cu_seqlens: Tensor | None) -> Targets:
    """A language model's targets, by row or, of a padding-free batch, by the items' own ``cu_seqlens``."""
    shifted = inputs.get("shift_labels")
    target, shift = (shifted, False) if isinstance(shifted, Tensor) else (labels_of(inputs), True)
    if len(target) == examples:
        return Targets(target, shift, None)
    if len(target) == 1 and cu_seqlens is not None:
        return Targets(target, shift, cu_seqlens)
    takes = "a row for each example, or all of them in one row. A data set packed beforehand is chosen from by row"
    refuse("data_collator", f"{examples} examples in {len(target)} rows", takes)
