"""Back through scored attention's readout: small matrix products, the same for every backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .scored_attention_op import Gradients, Problem, Saved
from .torch_attention import as_dtype, working_dtype


class ReadoutGradients(NamedTuple):
    """What comes back from losses, logits and pooled outputs; of parameters that take no gradient an empty tensor."""

    weight: Tensor  # [C, Hq * Dv]
    bias: Tensor  # [C]
    pooled: (
        Tensor | None
    )  # [B, Hq * Dv], in the working dtype where it comes from the logits; None: nothing, or not wanted


def readout_gradients(problem: Problem, saved: Saved, grads: Gradients, wanted: list[bool]) -> ReadoutGradients:
    """Gradients in the readout's parameters and in the pooled outputs that it reads."""
    acc = working_dtype(problem.query)
    weight, bias, pooled = problem.query.new_empty(0), problem.query.new_empty(0), grads.pooled
    if problem.readout_weight is not None and (grads.losses is not None or grads.logits is not None):
        grad_logits = _grad_logits(saved, grads)  # [B, C]
        if wanted[3]:
            weight = as_dtype(grad_logits.mT @ as_dtype(saved.pooled, acc), problem.readout_weight.dtype)
        if wanted[4]:
            assert problem.readout_bias is not None
            bias = as_dtype(grad_logits.sum(0), problem.readout_bias.dtype)
        if any(wanted[:3]):
            through = grad_logits @ as_dtype(problem.readout_weight, acc)
            pooled = through if pooled is None else through + pooled
    return ReadoutGradients(weight, bias, pooled)


def _grad_logits(saved: Saved, grads: Gradients) -> Tensor:
    """What comes back to the logits [B, C], from the losses and from themselves, in the working dtype."""
    through = grads.logits
    if grads.losses is not None:
        from_losses = saved.logit_gradient * grads.losses[:, None]
        return from_losses if through is None else from_losses + through
    assert through is not None
    return as_dtype(through, saved.logit_gradient.dtype)
