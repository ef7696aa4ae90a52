"""``select_top_k`` by our kernels: Triton's and CUDA C++'s."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from . import dispatch
from .select_top_k import floor_count


def _refuses(scores: Tensor) -> str | None:
    if scores.dtype == torch.float64:
        return "it takes float16, bfloat16 and float32, these scores are float64"
    return None


def _register(backend: str, launcher: str) -> None:
    """``launcher``: the module, imported only when it is called: Triton need not be installed, and takes a second."""

    @dispatch.register("select_top_k", backend, refuses=_refuses)
    def select(
        scores: Tensor,
        k: int,
        temperature: float,
        floor: float,
        valid: Tensor | None,
        seed: Tensor | None,
        sorted: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        index, score, inclusion = import_module(launcher).select_top_k(
            scores, k, temperature, floor_count(k, floor), valid, seed, sorted
        )
        return index, score, inclusion


_register("triton", "attent_kernels.select")
_register("cuda", "attent_kernels.cuda_select")
