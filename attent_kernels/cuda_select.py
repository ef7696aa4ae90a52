"""Launcher of ``csrc/cuda/select_top_k.h``: top-k selection by CUDA C++ kernels, one launch for up to 16,384 scores.

As ``select.py`` launches the Triton kernels, and with the same results up to rounding in ``log`` and ``exp``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .native import DTYPES
from .runtime import allocator, lend, on_device_of


def select_top_k(
    scores: Tensor, k: int, temperature: float, k_floor: int, valid: Tensor | None, seed: Tensor | None, sorted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`attent_kernels.select.select_top_k` does, of the same arguments."""
    module: Any = native.module
    device, dtype = scores.device, scores.dtype
    empty = allocator(device)
    index = empty((k,), (1,), torch.int64)
    score = empty((k,), (1,), dtype)
    inclusion = empty((k,), (1,), torch.float32)
    if k == 0:
        return index, score, inclusion
    scores = scores.contiguous()
    valid = None if valid is None else valid.contiguous()
    n = scores.numel()
    plan = _plan(n, k, k_floor, temperature, DTYPES[dtype])
    codes = kinds = chosen = None
    if plan.launches > 1:  # not from the workspace, which never shrinks: as long as the pool, or sorted by torch
        codes = empty((plan.code_length,), (1,), torch.int32)
        kinds = empty((plan.kind_length,), (1,), torch.int8)
        chosen = empty((plan.chosen_length,), (1,), torch.int64)
    with on_device_of(scores), lend(device, plan.ticket_count, 8 * plan.scratch_length) as lent:

        def launch(function: Any) -> None:
            function(
                scores.data_ptr(), DTYPES[dtype], address(valid), n, k, k_floor, temperature, address(seed), sorted,
                index.data_ptr(), score.data_ptr(), inclusion.data_ptr(), lent.scratch, lent.tickets, address(chosen),
                address(codes), address(kinds), native.DELAYED, lent.stream,
            )  # fmt: skip

        launch(module.select_top_k)
        if not plan.finished and chosen is not None:
            chosen = chosen.sort().values if sorted else chosen
            launch(module.select_outputs)
    return index, score, inclusion


class _Plan(NamedTuple):
    """Of ``SelectTopKPlan`` in csrc/cuda/select_top_k.h."""

    launches: int
    finished: bool
    ticket_count: int
    scratch_length: int
    chosen_length: int
    code_length: int
    kind_length: int


@lru_cache(maxsize=256)
def _plan(n: int, k: int, k_floor: int, temperature: float, dtype: int) -> _Plan:
    # Kept as plain numbers: reading one of the module's object takes as long as a launcher's whole arithmetic.
    module: Any = native.module
    plan = module.plan_select_top_k(n, k, k_floor, temperature, dtype)
    return _Plan(*(getattr(plan, name) for name in _Plan._fields))


def address(tensor: Tensor | None) -> int:
    """Where its data lies; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
