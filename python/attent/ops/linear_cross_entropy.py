"""``attent.linear_cross_entropy``: checks, the torch.library op, its fake kernel and its autograd.

The op computes loss, scores and, for reductions whose upstream gradient is one number, the gradients in the same pass
over the logits: three GEMMs in all instead of four. Their scale is applied in the backward. For the reductions "none"
and "example" the upstream gradient differs from token to token, so the backward computes the logits again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import (
    FLOATING,
    INTEGER,
    check_choice,
    check_cu_seqlens,
    check_number,
    check_tensor,
    describe,
    refuse,
    values_readable,
)
from .dispatch import choose, implementation, register
from .logits_passes import Targets
from .tokens import Tokens, list_tokens
from .torch_linear_cross_entropy import Problem, Result, run, statistics_dtype
from .vocabulary_shards import find_shard

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
        weight: class weights ``[V]``.
        reduction: ``"mean"`` over valid tokens, as torch (with ``weight`` and indices: over their class weights; 0,
            not NaN, if no token is valid); ``"sum"``; ``"none"``, one loss per token; ``"example"``, ``[B]`` means.
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
            rank's rows, in rank order; ``input`` and ``target`` are the same on each rank.
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
    check_choice("reduction", reduction, REDUCTIONS)
    input, linear_weight, linear_bias = cast_for_autocast(input, linear_weight, linear_bias)
    check_arguments(
        input, linear_weight, target, linear_bias, weight, ignore_index, label_smoothing, softcap, shift,
        example_weight, per_example, cu_seqlens, group,
    )  # fmt: skip
    backend = choose("linear_cross_entropy", backend, input.device)
    grad = torch.is_grad_enabled()
    loss, scores, _, _, _, _ = torch.ops.attent.linear_cross_entropy(
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


def cast_for_autocast(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast, the dtype that ``F.linear`` would compute in."""
    if not isinstance(input, Tensor) or not torch.is_autocast_enabled(input.device.type):
        return input, linear_weight, linear_bias
    dtype = torch.get_autocast_dtype(input.device.type)

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.dtype in FLOATING[:3] else value

    return cast(input), cast(linear_weight), cast(linear_bias)


def check_arguments(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    shift: bool,
    example_weight: Tensor | None,
    per_example: str,
    cu_seqlens: Tensor | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Refuse what does not fit together, by name."""
    takes = "[B, T, D], or [N, D]" + (" (with cu_seqlens: [N, D])" if cu_seqlens is not None else "") + ", floating"
    check_tensor("input", input, takes, dtypes=FLOATING)
    if input.dim() not in ((2,) if cu_seqlens is not None else (2, 3)):
        refuse("input", describe(input), takes)
    device, width = input.device, input.shape[-1]
    if hasattr(linear_weight, "placements"):  # a DTensor, without importing torch.distributed.tensor to say so
        refuse("linear_weight", "a DTensor", "a whole tensor: use attent.ScoringHead, whose hooks gather the weight")
    check_tensor(
        "linear_weight", linear_weight, f"[V, {width}] {input.dtype}", shape=(None, width), dtypes=(input.dtype,),
        device=device,
    )  # fmt: skip
    classes = len(linear_weight)
    if classes < 1:
        refuse("linear_weight", describe(linear_weight), f"[V, {width}] with V >= 1")
    if linear_bias is not None:
        check_tensor("linear_bias", linear_bias, f"[{classes}] {input.dtype}", shape=(classes,), dtypes=(input.dtype,), device=device)
    check_target(target, tuple(input.shape[:-1]), classes, ignore_index, device, sharded=group is not None)
    if weight is not None:
        check_constant("weight", weight, classes, device)
        if group is not None:
            refuse("weight", describe(weight), "None with group=")
    check_number("label_smoothing", label_smoothing, low=0, high=1)
    if softcap is not None:
        check_number("softcap", softcap, low=0, open_low=True)
    check_choice("per_example", per_example, PER_EXAMPLE)
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, len(input), device, "the tokens of input")
    elif shift and input.dim() == 2:
        refuse("shift", shift, "True only with input [B, T, D] or cu_seqlens: a row that is an example has no next token")
    if example_weight is not None:
        check_constant("example_weight", example_weight, len(input) if cu_seqlens is None else len(cu_seqlens) - 1, device)
    if group is not None and not isinstance(group, dist.ProcessGroup):
        refuse("group", describe(group), "a torch.distributed ProcessGroup or None")


def check_constant(argument: str, value: object, length: int, device: torch.device) -> None:
    """Refuse anything but a floating tensor [length] that needs no gradient: it would get none."""
    tensor = check_tensor(argument, value, f"[{length}] floating", shape=(length,), dtypes=FLOATING, device=device)
    if tensor.requires_grad and torch.is_grad_enabled():
        refuse(argument, "a tensor that requires grad", f"[{length}] floating without gradient: none is computed for it")


def check_target(
    target: object, shape: tuple[int, ...], classes: int, ignore_index: int, device: torch.device, *, sharded: bool = False
) -> None:
    """Refuse targets that are neither class indices of this shape nor class probabilities."""
    indices = ", ".join(map(str, shape))
    takes = f"[{indices}] int64 or int32 indices in [0, {classes}) or {ignore_index}, or [{indices}, {classes}] probabilities"
    tensor = check_tensor("target", target, takes, dtypes=INTEGER + FLOATING, device=device)
    soft = tensor.is_floating_point()
    if tuple(tensor.shape) != (*shape, classes)[: len(shape) + soft] or (soft and sharded):
        refuse("target", describe(tensor), takes if not sharded else f"[{indices}] indices: group= takes no probabilities")
    if soft and tensor.requires_grad and torch.is_grad_enabled():
        refuse("target", "probabilities that require grad", "targets without gradient: none is computed for them")
    if not soft and not sharded and values_readable(tensor) and tensor.numel():
        low, high = (int(x) for x in tensor.aminmax())
        if low < 0 or high >= classes:
            wrong = tensor[((tensor < 0) | (tensor >= classes)) & (tensor != ignore_index)]
            if wrong.numel():
                refuse("target", f"the label {int(wrong[0])}", takes)


# ------------------------------------------------------------------------------------------------------------------ op


class Call(NamedTuple):
    """The op's arguments, in the order of its schema: what every backend is handed."""

    input: Tensor
    linear_weight: Tensor
    target: Tensor
    linear_bias: Tensor | None
    weight: Tensor | None
    example_weight: Tensor | None
    cu_seqlens: Tensor | None
    reduction: str
    ignore_index: int
    label_smoothing: float
    softcap: float | None
    shift: bool
    score: list[str]
    per_example: str
    group: str | None
    backend: str
    input_gradient: bool
    weight_gradient: bool
    bias_gradient: bool

    @property
    def batch(self) -> int:
        return len(self.input) if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def gradients_in_forward(self) -> bool:
        """Whether the upstream gradient is one number, so that the forward computes the gradients up to that factor."""
        return self.reduction in ("mean", "sum")


_ARGUMENTS = (
    "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, Tensor? example_weight,"
    " Tensor? cu_seqlens, str reduction, int ignore_index, float label_smoothing, float? softcap, bool shift,"
    " str[] score, str per_example, str? group, str backend, bool input_gradient, bool weight_gradient,"
    " bool bias_gradient"
)
_GRADIENTS = "Tensor d_input, Tensor d_weight, Tensor d_bias"
torch.library.define(
    "attent::linear_cross_entropy", f"({_ARGUMENTS}) -> (Tensor loss, Tensor scores, Tensor counts, {_GRADIENTS})"
)
torch.library.define("attent::linear_cross_entropy_backward", f"(Tensor d_loss, {_ARGUMENTS}) -> ({_GRADIENTS})")


@torch.library.impl("attent::linear_cross_entropy", "default")
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    result: tuple[Tensor, ...] = implementation("linear_cross_entropy", call.backend)(call)
    return result


@torch.library.impl("attent::linear_cross_entropy_backward", "default")
def _backward(d_loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    result: tuple[Tensor, ...] = implementation("linear_cross_entropy_backward", call.backend)(d_loss, call)
    return result


@torch.library.register_fake("attent::linear_cross_entropy")
def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = Call(*arguments)
    dtype = statistics_dtype(call.input.dtype)
    shape = {"none": call.input.shape[:-1], "example": (call.batch,)}.get(call.reduction, ())
    loss = call.input.new_empty(shape, dtype=dtype)
    scores = call.input.new_empty((len(call.score), call.batch), dtype=dtype)
    counts = call.input.new_empty((call.batch,), dtype=dtype)
    return loss, scores, counts, *_empty_gradients(call, call.gradients_in_forward)


@torch.library.register_fake("attent::linear_cross_entropy_backward")
def _fake_backward(d_loss: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return _empty_gradients(Call(*arguments), True)


def _empty_gradients(call: Call, computed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors shaped as the gradients that are computed, [0] for the others."""

    def like(wanted: bool, value: Tensor | None) -> Tensor:
        if wanted and computed and value is not None:
            return torch.empty_like(value, memory_format=torch.contiguous_format)
        return call.input.new_empty(0)

    return (
        like(call.input_gradient, call.input),
        like(call.weight_gradient, call.linear_weight),
        like(call.bias_gradient, call.linear_bias),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call = Call(*inputs)
    ctx.gradients_in_forward = call.gradients_in_forward
    ctx.set_materialize_grads(False)
    if call.gradients_in_forward:
        ctx.wanted = (call.input_gradient, call.weight_gradient, call.bias_gradient)
        ctx.save_for_backward(*output[3:])
    else:
        ctx.save_for_backward(*call[:7])
        ctx.options = call[7:]


def _differentiate(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    nothing: list[Tensor | None] = [None] * len(Call._fields)
    if d_loss is None:
        return tuple(nothing)
    if torch.is_grad_enabled() and type(d_loss) is Tensor:
        raise RuntimeError("linear_cross_entropy is differentiable once: call backward without create_graph=True")
    if ctx.gradients_in_forward:
        d_input, d_weight, d_bias = (gradient * d_loss for gradient in ctx.saved_tensors)
        wanted = ctx.wanted
    else:
        call = Call(*ctx.saved_tensors, *ctx.options)
        d_input, d_weight, d_bias = torch.ops.attent.linear_cross_entropy_backward(d_loss, *call)
        wanted = (call.input_gradient, call.weight_gradient, call.bias_gradient)
    if wanted[0]:
        nothing[0] = d_input
    if wanted[1]:
        nothing[1] = d_weight
    if wanted[2]:
        nothing[3] = d_bias
    return tuple(nothing)


torch.library.register_autograd("attent::linear_cross_entropy", _differentiate, setup_context=_setup_context)


# ------------------------------------------------------------------------------------------------------- backend "torch"


@register("linear_cross_entropy", "torch")
def _torch_forward(call: Call) -> tuple[Tensor, ...]:
    with torch.no_grad(), torch.autocast(call.input.device.type, enabled=False):
        tokens = _tokens(call)
        problem = _problem(call, gradients=call.gradients_in_forward)
        factor = None  # [N] what the example's weight multiplies its token losses by
        if call.example_weight is not None:
            factor = tokens.to_tokens(call.example_weight.to(tokens.counts.dtype))
        upstream = None
        if call.gradients_in_forward and (call.input_gradient or call.weight_gradient or call.bias_gradient):
            upstream = torch.ones_like(tokens.hidden[:, 0], dtype=tokens.counts.dtype) if factor is None else factor
            if call.reduction == "mean":
                upstream = upstream / nonzero(tokens.denominator)
        result = run(tokens, problem, upstream)
        losses = result.losses if factor is None else result.losses * factor
        if call.reduction == "none":
            loss = tokens.to_all(losses).view(call.input.shape[:-1])
        elif call.reduction == "example":
            loss = tokens.by_example(losses) / tokens.counts.clamp(min=1)
        else:
            loss = losses.sum()
            if call.reduction == "mean":
                loss = loss / nonzero(tokens.denominator)
        return loss, result.scores, tokens.counts, *_gradients(call, tokens, result)


@register("linear_cross_entropy_backward", "torch")
def _torch_backward(d_loss: Tensor, call: Call) -> tuple[Tensor, ...]:
    with torch.no_grad(), torch.autocast(call.input.device.type, enabled=False):
        tokens = _tokens(call)
        if call.reduction == "none":
            upstream = tokens.of_all(d_loss.reshape(-1))
        else:
            upstream = tokens.to_tokens(d_loss / tokens.counts.clamp(min=1))
        if call.example_weight is not None:
            upstream = upstream * tokens.to_tokens(call.example_weight.to(upstream.dtype))
        return _gradients(call, tokens, run(tokens, _problem(call._replace(score=[]), gradients=True), upstream))


def nonzero(denominator: Tensor) -> Tensor:
    """The denominator of a mean; 1 where nothing is counted, so that the mean is 0 instead of torch's NaN."""
    return torch.where(denominator == 0, 1, denominator)


def _tokens(call: Call) -> Tokens:
    return list_tokens(
        call.input,
        call.target,
        class_weight=call.weight,
        example_weight=call.example_weight,
        cu_seqlens=call.cu_seqlens,
        classes=len(call.linear_weight),
        ignore_index=call.ignore_index,
        smoothed=call.label_smoothing > 0,
        shift=call.shift,
        dtype=statistics_dtype(call.input.dtype),
    )


def _problem(call: Call, *, gradients: bool) -> Problem:
    spread = call.label_smoothing > 0 or call.target.is_floating_point()
    shard = find_shard(call.linear_weight, call.group)
    return Problem(
        call.linear_weight,
        call.linear_bias,
        None,
        Targets(call.weight if spread else None, call.label_smoothing, shard),
        call.softcap,
        tuple(call.score),
        call.per_example,
        gradients and call.input_gradient,
        gradients and call.weight_gradient,
        gradients and call.bias_gradient,
    )


def _gradients(call: Call, tokens: Tokens, result: Result) -> tuple[Tensor, Tensor, Tensor]:
    """The op's gradient outputs: among all tokens, in the input's shape; [0] where none is wanted."""

    def output(gradient: Tensor | None) -> Tensor:
        return call.input.new_empty(0) if gradient is None else gradient

    d_input = result.input_gradient
    if d_input is not None:
        d_input = tokens.to_all(d_input).view(call.input.shape)
    return output(d_input), output(result.weight_gradient), output(result.bias_gradient)
