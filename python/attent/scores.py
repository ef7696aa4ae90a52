"""Scores of what a training step already has in hand: predictions, or losses and the outputs they came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import (
    FLOATING,
    check_choice,
    check_cu_seqlens,
    check_int,
    check_tensor,
    describe,
    refuse,
    values_readable,
)
from .ops.linear_cross_entropy import PER_EXAMPLE, check_target, check_whole
from .ops.linear_cross_entropy_op import statistics_dtype
from .ops.logits_passes import Targets, square_norms
from .ops.tokens import list_tokens
from .ops.torch_linear_cross_entropy import Problem, run
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
    tensor([0.1980, 0.0003])
    """
    check_choice("loss", loss, LOSSES)
    check_choice("score", score, SCORES[loss])
    check_choice("per_example", per_example, PER_EXAMPLE)
    check_int("ignore_index", ignore_index)
    squared = loss == "squared"
    check_whole("prediction", prediction)
    check_tensor("prediction", prediction, "a floating tensor [B, ...]", dtypes=FLOATING)
    if squared and cu_seqlens is None and prediction.dim() == 1:  # one number per example
        check_values(target, prediction)
        prediction, target = prediction[:, None], target[:, None]
    dims = (2,) if cu_seqlens is not None else range(2, 99) if squared else (2, 3)
    if prediction.dim() not in dims or prediction.shape[-1] < 1:
        shapes = (
            "[N, V] with cu_seqlens" if cu_seqlens is not None else "[B, ..., C]" if squared else "[B, V] or [B, T, V]"
        )
        refuse("prediction", describe(prediction), f"{shapes}, the last dimension at least 1")
    tokens, width, device = tuple(prediction.shape[:-1]), prediction.shape[-1], prediction.device
    if squared:
        check_values(target, prediction)
    else:
        check_target(target.detach() if isinstance(target, Tensor) else target, tokens, width, ignore_index, device)
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, prediction.shape[0], device, "the tokens of prediction")
    if score == "head":
        takes = f"[..., D] {prediction.dtype}, a row for each of prediction's: the input of the last linear layer"
        check_tensor("features", features, takes, shape=(*tokens, None), dtypes=(prediction.dtype,), device=device)
    if score == "hidden":
        takes = f"[V, D] {prediction.dtype}, V as in prediction: the weight of the last linear layer"
        check_tensor(
            "linear_weight", linear_weight, takes, shape=(width, None), dtypes=(prediction.dtype,), device=device
        )
    result: Tensor = torch.ops.attent.example_scores(
        prediction.detach(), target.detach(), features.detach() if score == "head" and features is not None else None,
        linear_weight.detach() if score == "hidden" and linear_weight is not None else None,
        cu_seqlens, squared, score, ignore_index, per_example,
    )  # fmt: skip
    return result


def check_values(target: object, prediction: Tensor) -> None:
    """Refuse anything but values shaped like the prediction."""
    takes = "floating values shaped like prediction"
    check_tensor("target", target, takes, shape=prediction.shape, dtypes=FLOATING, device=prediction.device)


def gradient_scores(losses: Tensor, outputs: Tensor | Sequence[Tensor], example_index: Tensor | None = None) -> Tensor:
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
    if not losses.requires_grad:
        refuse("losses", "a tensor without a graph", "losses computed from outputs, with gradients enabled")
    batch = rows = losses.shape[0]
    if example_index is not None:
        check_tensor(
            "example_index", example_index, "[rows] int64", shape=(None,), dtypes=(torch.int64,), device=losses.device
        )
        rows = example_index.shape[0]
        if rows and values_readable(example_index):
            low, high = (int(example) for example in example_index.aminmax())
            if low < 0 or high >= batch:
                refuse("example_index", f"values in [{low}, {high}]", f"examples in [0, {batch})")
    takes = f"[{rows}, ...] that losses was computed from, or several"
    tensors = tuple(outputs) if isinstance(outputs, (list, tuple)) else (outputs,)
    if not tensors:
        refuse("outputs", "no tensor", takes)
    for output in tensors:
        check_tensor("outputs", output, takes, dtypes=FLOATING, device=losses.device)
        if output.dim() < 1 or output.shape[0] != rows:
            refuse("outputs", describe(output), takes)
        if not output.requires_grad:
            refuse("outputs", "a tensor without a graph", takes)
    gradients = torch.autograd.grad(losses.sum(), tensors, retain_graph=True, allow_unused=True)
    dtype = statistics_dtype(losses.dtype)
    squares = torch.zeros(batch, dtype=dtype, device=losses.device)
    for gradient in gradients:
        if gradient is None:
            refuse("outputs", "a tensor that losses does not depend on", takes)
        square = square_norms(gradient.to(dtype)[..., None].flatten(1))
        squares = squares + square if example_index is None else squares.index_add(0, example_index, square)
    return squares.sqrt()


# ------------------------------------------------------------------------------------------------------------------ op

torch.library.define(
    "attent::example_scores",
    "(Tensor prediction, Tensor target, Tensor? features, Tensor? linear_weight, Tensor? cu_seqlens, bool squared,"
    " str score, int ignore_index, str per_example) -> Tensor",
)


def _fake(prediction: Tensor, target: Any, features: Any, weight: Any, cu_seqlens: Tensor | None, *_: Any) -> Tensor:
    batch = prediction.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return prediction.new_empty((batch,), dtype=statistics_dtype(prediction.dtype))


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
            tokens = tokens._replace(hidden=features.flatten(0, -2))
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


torch.library.impl("attent::example_scores", "CompositeExplicitAutograd", _example_scores)
torch.library.register_fake("attent::example_scores", _fake)
