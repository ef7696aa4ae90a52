"""Launcher of ``csrc/cuda/select_top_k.h``: top-k selection by CUDA C++ kernels, one launch for up to 16,384 scores.

As ``select.py`` launches the Triton kernels, and with the same results up to rounding in ``log`` and ``exp``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import native
from .runtime import on_device_of, workspace

#: ``enum class Dtype`` of csrc/cuda/dtype.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def select_top_k(
    scores: Tensor, k: int, temperature: float, k_floor: int, valid: Tensor | None, seed: Tensor | None, sorted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`attent_kernels.select.select_top_k` does, of the same arguments."""
    module: Any = native.module
    index = scores.new_empty(k, dtype=torch.int64)
    outputs = index, scores.new_empty(k), scores.new_empty(k, dtype=torch.float32)
    if k == 0:
        return outputs
    scores = scores.contiguous()
    valid = None if valid is None else valid.contiguous()
    n, dtype = scores.numel(), DTYPES[scores.dtype]
    plan = module.plan_select_top_k(n, k, k_floor, temperature, dtype)
    codes = kinds = chosen = None
    if plan.launches > 1:  # not from the workspace, which never shrinks: as long as the pool, or sorted by torch
        codes = scores.new_empty(plan.code_length, dtype=torch.int32)
        kinds = scores.new_empty(plan.kind_length, dtype=torch.int8)
        chosen = scores.new_empty(plan.chosen_length, dtype=torch.int64)
    with (
        on_device_of(scores),
        workspace(scores.device, plan.ticket_count, [(plan.scratch_length, torch.int64)]) as (tickets, scratch),
    ):
        stream = torch.cuda.current_stream(scores.device).cuda_stream

        def arguments() -> Any:
            return module.SelectTopKArgs(
                scores.data_ptr(), dtype, address(valid), n, k, k_floor, temperature, address(seed), sorted,
                *map(address, outputs), *map(address, (scratch, tickets, chosen, codes, kinds)), native.DELAYED,
            )  # fmt: skip

        module.select_top_k(arguments(), stream)
        if not plan.finished and chosen is not None:
            chosen = chosen.sort().values if sorted else chosen
            module.select_outputs(arguments(), stream)
    return outputs


def address(tensor: Tensor | None) -> int:
    """Where its data lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
