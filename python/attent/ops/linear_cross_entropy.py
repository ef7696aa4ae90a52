"""``attent.linear_cross_entropy``: what it computes, and the checks of its arguments.

:mod:`.linear_cross_entropy_op` is the op behind it, :mod:`.torch_linear_cross_entropy` what runs it in PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import (
    FLOATING,
    INTEGER,
    autocast_dtype,
    check_choice,
    check_cu_seqlens,
    check_int,
    check_number,
    check_tensor,
    describe,
    has_shape,
    refuse,
    values_readable,
)
from . import cuda_scorer as cuda_scorer  # registers the cuda backend
from . import torch_linear_cross_entropy as torch_linear_cross_entropy  # the torch backend
from . import triton_linear_cross_entropy as triton_linear_cross_entropy  # and the triton backend
from .dispatch import choose
from .linear_cross_entropy_op import run

SCORES = ("loss", "logit", "hidden", "head")
PER_EXAMPLE = ("mean", "sum", "rms")
REDUCTIONS = ("mean", "sum", "none", "example")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    shift: bool = False,
    example_weight: Tensor | None = None,
    score: str | tuple[str, ...] | None = None,
    per_example: str = "rms",
    cu_seqlens: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Any:
    """Cross-entropy of ``input @ linear_weight.T + linear_bias``, with each example's gradient norm as a by-product.

    The logits are never held in memory as a whole. Differentiable (once) in ``input``, ``linear_weight`` and
    ``linear_bias``; scores carry no gradient.

    Args:
        input: ``[B, T, D]``, B examples of T tokens; or ``[N, D]``, each row an example, or with ``cu_seqlens`` the
            tokens of packed examples. float16, bfloat16, float32 or float64.
        linear_weight: ``[V, D]``, of input's dtype (under autocast both are cast as ``F.linear`` would).
        target: int64 or int32 class indices, shaped like ``input`` without its last dimension; or class
            probabilities ``[..., V]``.
        linear_bias: ``[V]``.
        weight: class weights ``[V]``: they multiply token losses and their gradients, and so what scores are norms of.
        reduction: ``"mean"`` over valid tokens, as torch (with ``weight`` and indices: over their class weights; 0,
            not NaN, if they sum to 0); ``"sum"``; ``"none"``, one loss per token; ``"example"``, ``[B]`` means over
            each example's valid tokens.
        ignore_index: tokens with this target have no loss and are in no mean and no score.
        label_smoothing: ε in [0, 1]; the target becomes (1 − ε) q + ε/V.
        softcap: c > 0: logits become c·tanh(z/c).
        shift: token t predicts target t + 1, nothing is copied; an example's last token predicts nothing.
        example_weight: ``[B]``, multiplies each example's token losses, not the denominators of the means and not the
            scores. An example of weight 0 is not computed: its loss and scores are 0.
        score: a name, or a tuple of names, of ``"loss"``, ``"logit"``, ``"hidden"``, ``"head"``: the example's mean
            loss, or the norm of the gradient of its own loss L_i = s Σ_t ℓ_t in the logits, in ``input``, or in
            ``linear_weight`` (with a bias: in both), exactly.
        per_example: s for the scores, with n the example's valid tokens: ``"mean"`` 1/n, ``"sum"`` 1, ``"rms"`` 1/√n.
        cu_seqlens: int32 ``[B + 1]``, where each packed example starts, and the end.
        group: the process group over whose ranks the vocabulary is split, ``linear_weight`` (and bias) being this
            rank's rows, in rank order; ``input`` and ``target`` are the same on each rank. ``target`` then holds
            indices, and ``weight`` is None.
        backend: ``"auto"``, ``"cuda"``, ``"triton"`` or ``"torch"``; see :func:`attent.backends`.

    Returns:
        The loss; with ``score`` a name, ``(loss, scores [B])``; with a tuple of names, ``(loss, {name: scores [B]})``.
        Loss and scores are float32 (float64 for float64 inputs). An example without a valid token scores 0.

    Raises:
        ValueError: naming the argument, what came and what is taken. On CUDA, labels are not read back: one outside
            [0, V) makes its example's loss and scores NaN (``ATTENT_CHECK=1`` reads and refuses).

    Source: after ``torch.nn.functional.linear_cross_entropy``; the functional gradient as score is AtteNT's
    (arXiv 2602.20461), the per-example weight-gradient norm from Gram matrices is ghost clipping's (arXiv 2009.03106).

    >>> hidden, head = torch.randn(4, 7, 16), torch.nn.Linear(16, 100, bias=False)
    >>> target = torch.randint(100, (4, 7))
    >>> loss, scores = attent.linear_cross_entropy(hidden, head.weight, target, score="head")
    >>> loss.backward()
    >>> scores.shape
    torch.Size([4])
    """
    names = check_scores(score)
    check_options(reduction, ignore_index, label_smoothing, softcap, shift, per_example, group)
    input, linear_weight, linear_bias = cast_for_autocast(input, linear_weight, linear_bias)
    check_tensors(
        input, linear_weight, target, linear_bias, weight, example_weight, cu_seqlens, ignore_index, shift, group
    )
    backend = choose("linear_cross_entropy", backend, input.device, input.dtype)
    grad = torch.is_grad_enabled()
    loss, scores, *_ = run(
        input, linear_weight, target, linear_bias, weight, example_weight, cu_seqlens, reduction, ignore_index,
        label_smoothing, softcap, shift, names, per_example, None if group is None else group.group_name, backend,
        grad and input.requires_grad, grad and linear_weight.requires_grad,
        grad and linear_bias is not None and linear_bias.requires_grad,
    )  # fmt: skip
    if score is None:
        return loss
    if isinstance(score, str):
        return loss, scores[0]
    return loss, dict(zip(names, scores.unbind(0), strict=True))


# -------------------------------------------------------------------------------------------------------------- checks


def check_scores(score: object) -> list[str]:
    """The names asked for; a ``ValueError`` for anything else."""
    names = [] if score is None else [score] if isinstance(score, str) else score
    takes = f"None, a name or a tuple of names of {', '.join(map(repr, SCORES))}, each once"
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name in SCORES for name in names):
        refuse("score", describe(score), takes)
    if len(set(names)) != len(names) or (score is not None and not names):
        refuse("score", describe(score), takes)
    return list(names)


def check_options(
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    shift: bool,
    per_example: str,
    group: dist.ProcessGroup | None,
) -> None:
    """Refuse options that are wrong whatever the tensors are."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_int("ignore_index", ignore_index)
    check_number("label_smoothing", label_smoothing, low=0, high=1)
    if softcap is not None:
        check_number("softcap", softcap, low=0, open_low=True)
    if not isinstance(shift, bool):
        refuse("shift", describe(shift), "True or False")
    check_choice("per_example", per_example, PER_EXAMPLE)
    if group is not None and not isinstance(group, dist.ProcessGroup):
        refuse("group", describe(group), "a torch.distributed ProcessGroup or None")


def cast_for_autocast(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast, the dtype that ``F.linear`` would compute in."""
    dtype = autocast_dtype(input.device) if isinstance(input, Tensor) else None
    if dtype is None:
        return input, linear_weight, linear_bias

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.dtype in FLOATING[:3] else value

    return cast(input), cast(linear_weight), cast(linear_bias)


def check_tensors(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    example_weight: Tensor | None,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    shift: bool,
    group: dist.ProcessGroup | None,
) -> None:
    """Refuse tensors that do not fit together, by name."""
    packed = cu_seqlens is not None
    check_whole("input", input)
    takes = "[N, D] floating, with cu_seqlens" if packed else "[B, T, D] or [N, D] floating"
    check_tensor("input", input, takes, dtypes=FLOATING)
    if input.dim() not in ((2,) if packed else (2, 3)) or input.shape[-1] < 1:
        refuse("input", describe(input), f"{takes}, D >= 1")
    device, width = input.device, input.shape[-1]
    check_whole("linear_weight", linear_weight)
    check_tensor(
        "linear_weight",
        linear_weight,
        lambda: f"[V, {width}] {input.dtype}",
        shape=(None, width),
        dtypes=(input.dtype,),
        device=device,
    )
    classes = linear_weight.shape[0]
    if classes < 1:
        refuse("linear_weight", describe(linear_weight), f"[V, {width}] with V >= 1")
    if linear_bias is not None:
        check_whole("linear_bias", linear_bias)
        check_tensor(
            "linear_bias",
            linear_bias,
            lambda: f"[{classes}] {input.dtype}",
            shape=(classes,),
            dtypes=(input.dtype,),
            device=device,
        )
    check_target(target, tuple(input.shape[:-1]), classes, ignore_index, device, sharded=group is not None)
    if weight is not None:
        check_constant("weight", weight, classes, device)
        if group is not None:
            refuse("weight", describe(weight), "None with group=")
    batch = input.shape[0]
    if cu_seqlens is not None:
        batch = check_cu_seqlens("cu_seqlens", cu_seqlens, batch, device, "the tokens of input").shape[0] - 1
    elif shift and input.dim() == 2:
        refuse("shift", shift, "True with input [B, T, D] or cu_seqlens: a row that is an example has no next token")
    if example_weight is not None:
        check_constant("example_weight", example_weight, batch, device)


def check_whole(argument: str, value: object) -> None:
    """Refuse a DTensor, known by its placements: that spares importing torch.distributed.tensor to ask."""
    if hasattr(value, "placements"):
        refuse(
            argument, "a DTensor", "a whole tensor: use attent.ScoringHead, whose hooks gather the weight, or group="
        )


def check_constant(argument: str, value: object, length: int, device: torch.device) -> None:
    """Refuse anything but a floating tensor [length] that needs no gradient: it would get none."""

    def takes() -> str:
        return f"[{length}] floating, without gradient: none is computed for it"

    tensor = check_tensor(argument, value, takes, shape=(length,), dtypes=FLOATING, device=device)
    if tensor.requires_grad and torch.is_grad_enabled():
        refuse(argument, "a tensor that requires grad", takes())


def check_target(
    target: object,
    shape: tuple[int, ...],
    classes: int,
    ignore_index: int,
    device: torch.device,
    *,
    sharded: bool = False,
) -> None:
    """Refuse targets that are neither class indices of this shape nor class probabilities."""

    def takes() -> str:
        tokens = ", ".join(map(str, shape))
        indices = f"[{tokens}] int64 or int32 indices"
        if sharded:  # how many classes there are is known to all ranks together
            return f"{indices}: group= takes no probabilities"
        return f"{indices} in [0, {classes}) or {ignore_index}, or [{tokens}, {classes}] probabilities"

    check_whole("target", target)
    tensor = check_tensor("target", target, takes, dtypes=INTEGER if sharded else INTEGER + FLOATING, device=device)
    soft = tensor.is_floating_point()
    if not has_shape(tensor, (*shape, classes) if soft else shape):
        refuse("target", describe(tensor), takes())
    if soft and tensor.requires_grad and torch.is_grad_enabled():
        refuse("target", "probabilities that require grad", "targets without gradient: none is computed for them")
    if not soft and not sharded and values_readable(tensor) and tensor.numel():
        low, high = (int(label) for label in tensor.aminmax())
        if low < 0 or high >= classes:
            wrong = tensor[((tensor < 0) | (tensor >= classes)) & (tensor != ignore_index)]
            if wrong.numel():
                refuse("target", f"the label {int(wrong[0])}", takes())
