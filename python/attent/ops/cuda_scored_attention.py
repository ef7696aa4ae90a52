"""The CUDA C++ backend of scored attention's forward: the op's records as the launcher's. Not yet run on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from attent_kernels.attention import launch_cuda

from .._checks import dtype_name
from . import dispatch
from .kernel_scored_attention import launched, too_wide
from .scored_attention_op import Problem, Results, Scoring

CUDA_DTYPES = (torch.float16, torch.bfloat16)
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_ALIGNED_NUMBERS = 8  # of 16 bits in 16 bytes


def refuses(problem: Problem) -> str | None:
    """Why the CUDA kernel does not take this problem; None if it does."""
    dtype = problem.query.dtype
    if dtype not in CUDA_DTYPES:
        return f"it takes float16 and bfloat16, not {dtype_name(dtype)}"
    reason = too_wide(problem)
    if reason is not None:
        return reason
    if problem.target is not None and problem.target.dtype != dtype:
        return f"it takes a target in query's {dtype_name(dtype)}, not {dtype_name(problem.target.dtype)}"
    for name, tensor in (
        ("query", problem.query), ("key", problem.key), ("value", problem.value), ("target", problem.target),
    ):  # fmt: skip
        reason = None if tensor is None else _unaligned(tensor)
        if reason is not None:
            return f"of {name}, {reason}"
    for name, tensor in (("weight", problem.readout_weight), ("bias", problem.readout_bias)):
        if tensor is not None and tensor.dtype not in WEIGHT_DTYPES:
            return f"it takes a readout {name} in float16, bfloat16 or float32, not {dtype_name(tensor.dtype)}"
    return None


def _unaligned(tensor: Tensor) -> str | None:
    """Why rows of ``tensor`` cannot be copied 16 bytes at a time; None if they can."""
    strides = tensor.stride()
    aligned = tensor.data_ptr() % 16 == 0
    for stride in strides[:-1]:  # before each launch: a loop is faster than any() of a generator
        aligned = aligned and stride % _ALIGNED_NUMBERS == 0
    if (aligned and strides[-1] == 1) or tensor.numel() == 0:
        return None
    if strides[-1] != 1 and tensor.shape[-1] > 1:
        return f"its columns are {strides[-1]} numbers apart, not side by side"
    return None if aligned else f"its rows do not all start at multiples of 16 bytes (strides {tuple(strides)})"


@dispatch.register("scored_attention", "cuda", refuses=refuses)
def scored_attention_forward(problem: Problem, scoring: Scoring) -> Results:
    """Everything in one launch; a pool too large to choose from there is chosen from by a second one."""
    return launched(problem, scoring, launch_cuda.scored_attention)
