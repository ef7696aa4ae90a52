"""``select_top_k`` by CUDA C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .select_top_k import floor_count


def _refuses(scores: Tensor) -> str | None:
    if scores.dtype == torch.float64:
        return "it takes float16, bfloat16 and float32, these scores are float64"
    return None


@dispatch.register("select_top_k", "cuda", refuses=_refuses)
def _select_top_k_cuda(
    scores: Tensor,
    k: int,
    temperature: float,
    floor: float,
    valid: Tensor | None,
    seed: Tensor | None,
    sorted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from attent_kernels import cuda_select  # only here: its workspace asks for Triton, whose import takes a second

    return cuda_select.select_top_k(scores, k, temperature, floor_count(k, floor), valid, seed, sorted)
