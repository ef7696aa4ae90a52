"""The op behind :func:`attent.linear_cross_entropy`: its schema, its fake kernel and its autograd.

The op computes loss, scores and, for reductions whose upstream gradient is one number, the gradients in the same pass
over the logits: three GEMMs in all instead of four. The backward multiplies them by that number. For the reductions
"none" and "example" the upstream gradient differs from token to token, so the backward computes the logits again; so it
does for float16, where a loss scaler's factor has to be in the gradients before they are rounded.

A backend is a pair of functions registered with :mod:`.dispatch` under the op's name and that name + ``_backward``::

    forward(call) -> loss, scores, counts, gradients in input, linear_weight, linear_bias
    backward(d_loss, call) -> gradients in input, linear_weight, linear_bias
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .dispatch import implementation
from .plain_eager import nobody_listens

ThreeTensors = tuple[Tensor, Tensor, Tensor]
SixTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Call(NamedTuple):
    """The op's arguments, in the order of its schema: what every backend is handed."""

    input: Tensor  # [B, T, D] or [N, D]
    linear_weight: Tensor  # [V, D]
    target: Tensor  # [B, T] or [N] int32 or int64, or [..., V] probabilities
    linear_bias: Tensor | None  # [V]
    weight: Tensor | None  # [V] class weights
    example_weight: Tensor | None  # [B]
    cu_seqlens: Tensor | None  # [B + 1] int32
    reduction: str
    ignore_index: int
    label_smoothing: float
    softcap: float | None
    shift: bool
    score: list[str]
    per_example: str
    group: str | None  # the name of the process group that holds the vocabulary's shards
    backend: str
    input_gradient: bool  # which gradients are wanted
    weight_gradient: bool
    bias_gradient: bool

    @property
    def batch(self) -> int:
        return self.input.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def gradients_in_forward(self) -> bool:
        """Whether the forward computes the gradients, up to a factor that the backward knows."""
        return self.reduction in ("mean", "sum") and self.input.dtype != torch.float16


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
_TENSORS = 7  # the first fields of Call are tensors, or None
_DIFFERENTIABLE = (0, 1, 3)  # of them: input, linear_weight, linear_bias


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """What losses and scores are computed and returned in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ----------------------------------------------------------------------------------------------------- the kernels


def _forward(*arguments: Any) -> SixTensors:
    call = Call(*arguments)
    result: SixTensors = implementation("linear_cross_entropy", call.backend)(call)
    return result


def _backward(d_loss: Tensor, *arguments: Any) -> ThreeTensors:
    call = Call(*arguments)
    result: ThreeTensors = implementation("linear_cross_entropy_backward", call.backend)(d_loss, call)
    return result


# ---------------------------------------------------------------------------------------------------- shapes alone


def _fake_forward(*arguments: Any) -> SixTensors:
    call = Call(*arguments)
    dtype = statistics_dtype(call.input.dtype)
    shape = {"none": call.input.shape[:-1], "example": (call.batch,)}.get(call.reduction, ())
    loss = call.input.new_empty(shape, dtype=dtype)
    scores = call.input.new_empty((len(call.score), call.batch), dtype=dtype)
    counts = call.input.new_empty((call.batch,), dtype=dtype)
    return loss, scores, counts, *_empty_gradients(call, call.gradients_in_forward)


def _fake_backward(d_loss: Tensor, *arguments: Any) -> ThreeTensors:
    return _empty_gradients(Call(*arguments), True)


def _empty_gradients(call: Call, computed: bool) -> ThreeTensors:
    """Tensors shaped as the gradients that are computed, [0] for the others."""

    def like(wanted: bool, value: Tensor | None) -> Tensor:
        return call.input.new_empty(value.shape if wanted and computed and value is not None else (0,))

    return (
        like(call.input_gradient, call.input),
        like(call.weight_gradient, call.linear_weight),
        like(call.bias_gradient, call.linear_bias),
    )


# -------------------------------------------------------------------------------------------------------- autograd

# By hand and not by torch.library.register_autograd: what that puts around each call reads the schema once per
# argument, each time as a new list of all of them, which took 0.25 ms of a call on a CPU core.


class _LinearCrossEntropy(torch.autograd.Function):
    """Takes the op's arguments, then whether the call is plain (:func:`.plain_eager.nobody_listens`)."""

    @staticmethod
    def forward(ctx: Any, *arguments_and_plain: Any) -> SixTensors:
        *arguments, is_plain = arguments_and_plain
        results = _below_autograd(arguments, is_plain)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        ctx.gradients_in_forward = Call(*arguments).gradients_in_forward
        ctx.wanted = arguments[-3:]
        if ctx.gradients_in_forward:
            ctx.save_for_backward(*results[3:])
        else:
            ctx.save_for_backward(*arguments[:_TENSORS])
            ctx.options = arguments[_TENSORS:]
        return results

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing: list[Tensor | None] = [None] * (len(Call._fields) + 1)
        d_loss = upstream[0]
        if d_loss is None:
            return tuple(nothing)
        # once_differentiable would let a second derivative pass as 0. (What a compiler traces is not a plain Tensor.)
        if torch.is_grad_enabled() and type(d_loss) is Tensor:
            raise RuntimeError("linear_cross_entropy is differentiable once: call backward without create_graph=True")
        if ctx.gradients_in_forward:
            gradients: Sequence[Tensor] = [gradient * d_loss for gradient in ctx.saved_tensors]
        else:
            tensors = ctx.saved_tensors
            is_plain = nobody_listens((d_loss, *tensors))
            backward = _backward if is_plain else torch.ops.attent.linear_cross_entropy_backward
            gradients = backward(d_loss, *tensors, *ctx.options)
        for i, wanted, gradient in zip(_DIFFERENTIABLE, ctx.wanted, gradients, strict=True):
            nothing[i] = gradient if wanted else None
        return tuple(nothing)


def _with_autograd(arguments: Sequence[Any], is_plain: bool) -> SixTensors:
    if torch.is_grad_enabled():
        for i in _DIFFERENTIABLE:
            if arguments[i] is not None and arguments[i].requires_grad:
                apply: Any = _LinearCrossEntropy.apply
                return cast(SixTensors, apply(*arguments, is_plain))
    return _below_autograd(arguments, is_plain)


def _below_autograd(arguments: Sequence[Any], is_plain: bool) -> SixTensors:
    with torch._C._AutoDispatchBelowAutograd():
        if is_plain:
            return _forward(*arguments)
        return cast(SixTensors, torch.ops.attent.linear_cross_entropy(*arguments))


def _autograd(*arguments: Any) -> SixTensors:
    return _with_autograd(arguments, False)


def run(*arguments: Any) -> SixTensors:
    """Call the op, past the dispatcher where nobody listens there."""
    if nobody_listens(arguments[:_TENSORS]):
        return _with_autograd(arguments, True)
    return cast(SixTensors, torch.ops.attent.linear_cross_entropy(*arguments))


torch.library.impl("attent::linear_cross_entropy", "CompositeExplicitAutograd", _forward)
torch.library.impl("attent::linear_cross_entropy", "Autograd", _autograd)
torch.library.register_fake("attent::linear_cross_entropy", _fake_forward)
torch.library.impl("attent::linear_cross_entropy_backward", "CompositeExplicitAutograd", _backward)
torch.library.register_fake("attent::linear_cross_entropy_backward", _fake_backward)
