"""``select_top_k`` by our kernels: Triton's and CUDA C++'s."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attent_kernels import cuda_select

from . import dispatch
from .select_top_k import floor_count

ThreeTensors = tuple[Tensor, Tensor, Tensor]


def _refuses(scores: Tensor) -> str | None:
    if scores.dtype == torch.float64:
        return "it takes float16, bfloat16 and float32, these scores are float64"
    return None


@dispatch.register("select_top_k", "cuda", refuses=_refuses)
def _by_cuda(scores: Tensor, k: int, temperature: float, floor: float, *arguments: Any) -> ThreeTensors:
    return cuda_select.select_top_k(scores, k, temperature, floor_count(k, floor), *arguments)


@dispatch.register("select_top_k", "triton", refuses=_refuses)
def _by_triton(scores: Tensor, k: int, temperature: float, floor: float, *arguments: Any) -> ThreeTensors:
    from attent_kernels import select  # only now: Triton need not be installed, and takes a second

    chosen: ThreeTensors = select.select_top_k(scores, k, temperature, floor_count(k, floor), *arguments)
    return chosen
