"""The loss of a training step with each example's score, in whatever way the model gets to its own loss.

The trainer's own ``compute_loss`` runs, with all that it and the model add (normalisation over accumulated batches and
ranks, auxiliary losses). What differs is the head, and only while it does:

* :class:`FusedLoss`, language models: the head returns no logits. It takes loss and scores from
  :func:`attent.linear_cross_entropy` inside its own ``forward`` (so that its hooks run: sharded weights are there), and
  the model's ``loss_function`` returns that loss.
* :class:`LossBeside`, classifiers and ``keep_logits``: the model computes its own logits and its own loss; scores are
  computed beside them from what went into the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._checks import describe, refuse
from ...ops.linear_cross_entropy import linear_cross_entropy
from .arguments import TeachingArguments
from .heads import Head

IGNORED = -100


class FusedLoss:
    """Loss and scores of a causal language model without its logits."""

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
    ) -> tuple[Tensor, Any, Tensor]:
        """``(loss, outputs, scores [examples])``; ``compute_loss(True)`` is the trainer's, ``base`` the bare model."""
        target, shift = _targets(inputs)
        segments = _segments(cu_seqlens, examples, target)
        head = self.head
        seen: dict[str, Any] = {}

        def forward(hidden: Tensor) -> Tensor:
            linear = head.linear
            if hidden.shape[:-1] != target.shape:
                refuse("labels", describe(target), f"[B, T] like the head's input, {describe(hidden)}")
            scaled = hidden if head.scale == 1 else hidden * head.scale
            flat = segments is not None
            seen["total"], seen["scores"] = linear_cross_entropy(
                scaled.flatten(0, 1) if flat else scaled,
                linear.weight,
                target.flatten() if flat else target,
                linear_bias=None if linear.bias is None else linear.bias * head.scale,
                reduction="sum",
                ignore_index=IGNORED,
                label_smoothing=self.smoothing,
                softcap=head.softcap,
                shift=shift,
                example_weight=weight,
                score=self.teaching.score,
                per_example=self.teaching.per_example,
                cu_seqlens=segments,
            )
            # One position each, once, to see what the model does to logits; then none at all.
            output = seen["output"] = F.linear(hidden[:, : 0 if self._checked else 1], linear.weight, linear.bias)
            return output

        def loss_function(*arguments: Any, num_items_in_batch: Any = None, **options: Any) -> Tensor:
            if not self._checked:
                head.check(
                    seen["output"].detach(), (options["logits"] if "logits" in options else arguments[0]).detach()
                )
                self._checked = True
            seen["used"] = True
            if num_items_in_batch is None:
                counted = target[:, 1:] if shift else target
                num_items_in_batch = (counted != IGNORED).sum().clamp(min=1)
            loss: Tensor = seen["total"] / num_items_in_batch
            return loss

        with _in_place_of(head.linear, "forward", forward), _in_place_of(base, "_loss_function", loss_function):
            loss, outputs = compute_loss(True)
        if "used" not in seen:
            refuse(
                "model",
                f"{type(base).__name__}, which computes its loss without transformers' common loss_function",
                "TeachingArguments(keep_logits=True) for such models: their own loss, with scores beside it",
            )
        return loss, outputs, seen["scores"]


class LossBeside:
    """The model's own logits and loss, and scores from what went into its head."""

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
    ) -> tuple[Tensor, Any, Tensor]:
        """As :class:`FusedLoss`; with ``weight``, each example's loss counts that many times."""
        head = self.head
        seen: dict[str, Any] = {}
        if head.language:
            target, shift = _targets(inputs)
            segments = _segments(cu_seqlens, examples, target)
        else:
            target, shift, segments = _labels(inputs), False, None
            if target.shape != (examples,) or target.is_floating_point():
                refuse("labels", describe(target), f"int64 [B={examples}], a class for each example")

        def forward(hidden: Tensor) -> Tensor:
            seen["hidden"] = hidden
            output = seen["output"] = F.linear(hidden, head.linear.weight, head.linear.bias)
            return output

        with _in_place_of(head.linear, "forward", forward):
            loss, outputs = compute_loss(True)
        if "output" not in seen:
            refuse("head", f"{head.name!r}, which did not run", "the layer that the model's logits come from")
        hidden, output = seen["hidden"], seen["output"]
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[1]
        if not head.language and output.dim() == 3:
            # The model pools after its head: the position each row of its logits came from is where its gradient is.
            (of_output,) = torch.autograd.grad(logits.float().sum(), output, retain_graph=True)
            position = of_output[..., 0].argmax(1)
            row = torch.arange(len(output), device=output.device)
            hidden, output = hidden[row, position], output[row, position]
        if not self._checked:
            head.check(output.detach(), logits.detach())
            self._checked = True

        flat = segments is not None
        with torch.set_grad_enabled(weight is not None and torch.is_grad_enabled()):
            # Autocast ended with the model's forward: what is left of it is a narrower input than the weight's.
            hidden = hidden.to(head.linear.weight.dtype)
            scaled = hidden if head.scale == 1 else hidden * head.scale
            means, scores = linear_cross_entropy(
                scaled.flatten(0, 1) if flat else scaled,
                head.linear.weight,
                target.flatten() if flat else target,
                linear_bias=None if head.linear.bias is None else head.linear.bias * head.scale,
                reduction="example",
                ignore_index=IGNORED,
                label_smoothing=self.smoothing,
                softcap=head.softcap,
                shift=shift,
                score=self.teaching.score,
                per_example=self.teaching.per_example,
                cu_seqlens=segments,
            )
        if weight is not None:
            if head.language and not flat:
                means = means * ((target[:, 1:] if shift else target) != IGNORED).sum(1)
            elif flat:
                refuse("reweight", "'inverse' with packed examples and keep_logits", "'none', or keep_logits=False")
            # The trainer's loss is c·Σℓ with a c of its own (tokens of all accumulated batches and ranks). Found here,
            # without reading it back, so that the weights change nothing but the weights.
            share = (loss / means.sum().clamp(min=torch.finfo(means.dtype).tiny)).detach()
            loss = loss + share * ((weight - 1) * means).sum()
        return loss, outputs, scores


@contextmanager
def _in_place_of(owner: Any, name: str, value: Any) -> Iterator[None]:
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


def _labels(inputs: MutableMapping[str, Any]) -> Tensor:
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor):
        refuse("labels", describe(labels), "a tensor under 'labels' in each batch")
    return labels


def _targets(inputs: MutableMapping[str, Any]) -> tuple[Tensor, bool]:
    """A language model's targets, and whether they are yet to be shifted by one."""
    shifted = inputs.get("shift_labels")
    return (shifted, False) if isinstance(shifted, Tensor) else (_labels(inputs), True)


def _segments(cu_seqlens: Tensor | None, examples: int, target: Tensor) -> Tensor | None:
    """``cu_seqlens`` of a padding-free batch, one row that holds several examples; None where rows are examples."""
    if len(target) == examples:
        return None
    if len(target) == 1 and cu_seqlens is not None:
        return cu_seqlens
    takes = "a row for each example, or all of them in one row. A data set packed beforehand is chosen from by row"
    refuse("data_collator", f"{examples} examples in {len(target)} rows", takes)
