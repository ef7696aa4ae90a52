"""Linear cross-entropy and its scores in Triton: the backend ``"triton"``."""

from __future__ import annotations

import torch
from torch import Tensor

from . import triton_scorer
from .dispatch import register
from .linear_cross_entropy_op import Call, SixTensors, ThreeTensors
from .triton_chunks import backward_by_chunks, by_chunks


def _refuses(dtype: torch.dtype) -> str | None:
    return "it takes float16, bfloat16 and float32" if dtype == torch.float64 else None


@register("linear_cross_entropy", "triton", refuses=_refuses)
def linear_cross_entropy_forward(call: Call) -> SixTensors:
    """Loss, scores, counts and, up to the upstream factor, gradients: in one launch where it can, else by chunks."""
    if triton_scorer.takes(call):
        nothing = call.input.new_empty
        return *triton_scorer.score(call), nothing(0), nothing(0), nothing(0)
    return by_chunks(call)


@register("linear_cross_entropy_backward", "triton")
def linear_cross_entropy_backward(d_loss: Tensor, call: Call) -> ThreeTensors:
    """Gradients, the logits computed again."""
    return backward_by_chunks(d_loss, call)
