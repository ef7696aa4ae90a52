"""Scores of what a training step already has in hand: predictions, or losses and the outputs they came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import FLOATING, check_choice, check_cu_seqlens, check_tensor, describe, refuse, values_readable
from .ops.linear_cross_entropy import PER_EXAMPLE, check_target
from .ops.logits_passes import Targets
from .ops.tokens import list_tokens
from .ops.torch_linear_cross_entropy import Problem, run, statistics_dtype
from .ops.vocabulary_shards import whole

LOSSES = ("cross_entropy", "squared")
SCORES = {
    "cross_entropy": ("loss", "logit", "hidden", "head"),
    "squared": ("loss", "residual", "logit", "hidden", "head"),
}


def example_scores(
    prediction: Tensor,
    target: Tensor,
    *,
    loss: str = "cross_entropy",
    score: str = "logit",
    features: Tensor | None = None,
    linear_weight: Tensor | None = None,
    ignore_index: int = -100,
    per_example: str = "rms",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Score examples ``[B]`` from predictions already in hand, without gradient and without another forward.

    Args:
        prediction: under ``"cross_entropy"`` logits ``[B, V]``, ``[B, T, V]``, or ``[N, V]`` with ``cu_seqlens``; under
            ``"squared"``, ℓ_t = ½‖f_t − y_t‖², values ``[B]``, ``[B, C]``, ``[B, ..., C]``, or ``[N, C]`` packed.
        target: class indices or probabilities; under ``"squared"`` values shaped like ``prediction``.
        loss: ``"cross_entropy"`` or ``"squared"``.
        score: ``"loss"``; ``"logit"``, the norm of the loss's gradient in ``prediction`` (``"residual"`` names the same
            under ``"squared"``); ``"hidden"``, in the input of the last linear layer (needs ``linear_weight`` [V, D]);
            ``"head"``, in that layer's weight, exactly (needs ``features`` [..., D], its input; append a column of ones
            for a bias).
        ignore_index, per_example, cu_seqlens: as in :func:`attent.linear_cross_entropy`.

    Returns:
        Scores ``[B]``, float32 (float64 for float64 predictions). An example without a valid token scores 0.

    Raises:
        ValueError: naming the argument, what came and what is taken.

    >>> logits = torch.tensor([[2.0, -1.0, 0.0], [5.0, -4.0, -4.0]])
    >>> attent.example_scores(logits, torch.tensor([0, 0]))
    tensor([0.1955, 0.0003])
    """
    check_choice("loss", loss, LOSSES)
    check_choice("score", score, SCORES[loss])
    check_choice("per_example", per_example, PER_EXAMPLE)
    squared = loss == "squared"
    check_tensor("prediction", prediction, "a floating tensor [B, ...]", dtypes=FLOATING)
    if squared and prediction.dim() == 1 and cu_seqlens is None:
        check_tensor("target", target, "values shaped like prediction", shape=prediction.shape, dtypes=FLOATING)
        prediction, target = prediction[:, None], target[:, None]
    shapes = "[N, V] with cu_seqlens" if cu_seqlens is not None else "[B, V] or [B, T, V]"
    if cu_seqlens is not None and prediction.dim() != 2 or prediction.dim() < 2 or (prediction.dim() > 3 and not squared):
        refuse("prediction", describe(prediction), shapes)
    shape, width, device = tuple(prediction.shape[:-1]), prediction.shape[-1], prediction.device
    if width < 1:
        refuse("prediction", describe(prediction), f"{shapes}, V >= 1")
    if squared:
        check_tensor(
            "target", target, "values shaped like prediction", shape=(*shape, width), dtypes=FLOATING, device=device
        )
    else:
        check_target(target.detach() if isinstance(target, Tensor) else target, shape, width, ignore_index, device)
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, len(prediction), device, "the tokens of prediction")
    if score == "head":
        takes = f"[{', '.join(map(str, shape))}, D] {prediction.dtype}, the input of the last linear layer, for score='head'"
        check_tensor("features", features, takes, shape=(*shape, None), dtypes=(prediction.dtype,), device=device)
    if score == "hidden":
        takes = f"[{width}, D] {prediction.dtype}, the weight of the last linear layer, for score='hidden'"
        check_tensor("linear_weight", linear_weight, takes, shape=(width, None), dtypes=(prediction.dtype,), device=device)
    result: Tensor = torch.ops.attent.example_scores(
        prediction.detach(), target.detach(), features.detach() if score == "head" and features is not None else None,
        linear_weight.detach() if score == "hidden" and linear_weight is not None else None,
        cu_seqlens, squared, score, ignore_index, per_example,
    )  # fmt: skip
    return result


def gradient_scores(
    losses: Tensor, outputs: Tensor | Sequence[Tensor], example_index: Tensor | None = None
) -> Tensor:
    """Score examples ``[B]`` by ‖∂losses[i]/∂outputs‖ for any loss, by autograd through the loss alone.

    The graph is kept: train on the same ``losses`` afterwards. Losses must not mix examples: ``losses[i]`` may depend
    on its own rows of ``outputs`` only, else the scores are those of the sum of the losses.

    Args:
        losses: ``[B]``, one per example, computed from ``outputs``.
        outputs: what the gradient is taken in, ``[B, ...]``; several tensors give the root of the sum of squares.
        example_index: int64 ``[rows]``: the example of each row of ``outputs``, where an example has several (a DPO
            pair has two). None: row i is example i.

    Returns:
        Scores ``[B]``, float32 (float64 for float64 losses), without gradient.

    Raises:
        ValueError: naming the argument, what came and what is taken, also when ``losses`` does not depend on
            ``outputs``.

    >>> prediction = torch.tensor([[3.0, 0.0], [0.0, 1.0]], requires_grad=True)
    >>> losses = prediction.abs().pow(3).sum(1)
    >>> attent.gradient_scores(losses, prediction)
    tensor([27.,  3.])
    """
    check_tensor("losses", losses, "[B], one loss per example, with a graph", shape=(None,), dtypes=FLOATING)
    tensors = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    if not tensors:
        refuse("outputs", "no tensor", "a tensor or several")
    if not losses.requires_grad:
        refuse("losses", "a tensor without a graph", "losses computed from outputs, with gradients enabled")
    batch, rows = len(losses), None if example_index is None else len(example_index)
    if example_index is not None:
        check_tensor("example_index", example_index, "[rows] int64", shape=(None,), dtypes=(torch.int64,), device=losses.device)
        if values_readable(example_index) and len(example_index):
            low, high = (int(x) for x in example_index.aminmax())
            if low < 0 or high >= batch:
                refuse("example_index", f"values in [{low}, {high}]", f"examples in [0, {batch})")
    for output in tensors:
        takes = f"[{batch if rows is None else rows}, ...] that losses was computed from"
        check_tensor("outputs", output, takes, device=losses.device)
        if output.dim() < 1 or len(output) != (batch if rows is None else rows):
            refuse("outputs", describe(output), takes)
        if not output.requires_grad:
            refuse("outputs", "a tensor without a graph", takes)
    gradients = torch.autograd.grad(losses.sum(), tensors, retain_graph=True, allow_unused=True)
    dtype = statistics_dtype(losses.dtype)
    squares = torch.zeros(batch, dtype=dtype, device=losses.device)
    for gradient in gradients:
        if gradient is None:
            refuse("outputs", "a tensor that losses does not depend on", "tensors that losses was computed from")
        square = gradient.detach().to(dtype).reshape(len(gradient), -1).square().sum(1)
        squares = squares + square if example_index is None else squares.index_add(0, example_index, square)
    return squares.sqrt()


# ------------------------------------------------------------------------------------------------------------------ op

torch.library.define(
    "attent::example_scores",
    "(Tensor prediction, Tensor target, Tensor? features, Tensor? linear_weight, Tensor? cu_seqlens, bool squared,"
    " str score, int ignore_index, str per_example) -> Tensor",
)


@torch.library.register_fake("attent::example_scores")
def _fake(prediction: Tensor, target: Tensor, features: Any, linear_weight: Any, cu_seqlens: Tensor | None, *_: Any) -> Tensor:
    batch = len(prediction) if cu_seqlens is None else len(cu_seqlens) - 1
    return prediction.new_empty((batch,), dtype=statistics_dtype(prediction.dtype))


@torch.library.impl("attent::example_scores", "default")
def _example_scores(
    prediction: Tensor,
    target: Tensor,
    features: Tensor | None,
    linear_weight: Tensor | None,
    cu_seqlens: Tensor | None,
    squared: bool,
    score: str,
    ignore_index: int,
    per_example: str,
) -> Tensor:
    with torch.no_grad(), torch.autocast(prediction.device.type, enabled=False):
        tokens = list_tokens(
            prediction,
            target,
            class_weight=None,
            example_weight=None,
            cu_seqlens=cu_seqlens,
            classes=prediction.shape[-1],
            ignore_index=ignore_index,
            smoothed=False,
            shift=False,
            dtype=statistics_dtype(prediction.dtype),
        )
        in_hand = tokens.hidden
        if features is not None:
            rows = features.reshape(-1, features.shape[-1])
            tokens = tokens._replace(hidden=rows if tokens.rows is None else rows.index_select(0, tokens.rows))
        problem = Problem(
            linear_weight,
            None,
            in_hand,
            Targets(None, 0.0, whole(prediction.shape[-1]), squared),
            None,
            ("logit" if score == "residual" else score,),
            per_example,
            False,
            False,
            False,
        )
        return run(tokens, problem, None).scores[0]
