"""The Triton backend of scored attention's forward."""

from __future__ import annotations

import torch

from .._checks import dtype_name
from . import dispatch
from .kernel_scored_attention import launched, too_wide
from .scored_attention_op import Problem, Results, Scoring

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def refuses(problem: Problem) -> str | None:
    """Why the Triton kernels do not take this problem; None if they do."""
    if problem.query.dtype not in TRITON_DTYPES:
        return f"it takes float16, bfloat16 and float32, not {dtype_name(problem.query.dtype)}"
    return too_wide(problem)


@dispatch.register("scored_attention", "triton", refuses=refuses)
def scored_attention_forward(problem: Problem, scoring: Scoring) -> Results:
    """Everything in one launch; a pool too large to choose from there is chosen from by a second one."""
    from attent_kernels.attention.launch import scored_attention

    return launched(problem, scoring, scored_attention)
