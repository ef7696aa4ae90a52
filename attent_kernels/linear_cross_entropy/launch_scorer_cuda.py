"""Launcher of the scorer in CUDA C++ (csrc/cuda/scorer.h): outputs, workspace, cut. Not yet run on a GPU.

Results, workspace and the way the work is cut are those of the Triton launcher (:mod:`.launch_scorer`, whose header has
the arithmetic and the traffic); tiles are the kernels' own. On compute capability 9.0 the Hopper kernel runs where
input and linear_weight can be loaded by tensor maps, else, and elsewhere, the portable one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..runtime import on_device_of, processors, workspace
from .configurations import Configuration, cut
from .scorer_workspace import Choose, Scored, block_of_examples, lent_scratch, scratch_memory
from .views import token_rows

_NUMBERS = {
    torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3, torch.int32: 4, torch.int64: 5,
}  # fmt: skip
_REDUCTIONS = {None: 0, "mean": 1, "sum": 2, "none": 3, "example": 4}
_PER_EXAMPLE = {"mean": 0, "sum": 1, "rms": 2}


@lru_cache(maxsize=64)
def _tiles(module: Any, kernel: str, smoothed: bool, capped: bool) -> tuple[Configuration, int]:
    """A kernel's tiles, and how many numbers it keeps of each token and group of vocabulary tiles."""
    of = module.scorer_tiles(kernel, smoothed, capped)
    tiles = Configuration(
        of["rows"], of["classes"], of["width"], of["threads"] // 32, of["stages"], of["resident"], False
    )
    return tiles, of["kept"]


def kernels_of(device: torch.device) -> tuple[str, ...]:
    """The kernels that run there, best first."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0) and "90a" in native.cuda_archs():
        return "hopper", "portable"
    return ("portable",)


def score_tokens(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    example_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: str | None = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    shift: bool = False,
    score: Sequence[str] = (),
    per_example: str = "rms",
    choose: Choose | None = None,
) -> Scored:
    """What :func:`.launch_scorer.score_tokens` does, for bfloat16 and float16 and targets that are class indices."""
    linear_bias, weight = _adjacent(linear_bias), _adjacent(weight)
    batch = input.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tokens, width, classes = input.shape[:-1].numel(), input.shape[-1], linear_weight.shape[0]
    tokens_each = max(1, input.shape[1]) if input.dim() == 3 else 1
    device = input.device
    module: Any = native.module

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    counts, scores = floats(batch), floats(len(score), batch)
    loss = floats(*{"none": input.shape[:-1], "example": (batch,), None: (0,)}.get(reduction, ()))
    chosen = None
    if choose is not None:
        chosen = torch.empty(choose.k, dtype=torch.int64, device=device), floats(choose.k), floats(choose.k)
    if batch == 0:
        return Scored(loss.zero_(), scores, counts, chosen)

    by_name = dict(zip(score, scores.unbind(0), strict=True))
    targets = token_rows(target[..., None])
    hidden = token_rows(input)
    for kernel in kernels_of(device):
        tiles, kept = _tiles(module, kernel, label_smoothing > 0, softcap is not None)
        row_tiles = max(1, -(-tokens // tiles.rows))
        parts = cut(row_tiles, classes, width, input.element_size(), kept, processors(device), tiles)
        block_examples, _ = block_of_examples(tokens, tokens_each, batch, cu_seqlens is not None, tiles.rows)
        blocks = -(-batch // block_examples)
        memory = scratch_memory(
            kept * parts.groups,
            row_tiles * tiles.rows,
            blocks,
            batch,
            head="head" in score,
            share=weight is not None and reduction == "mean",
            choice=None if choose is None else _selection_scratch(batch),
        )
        with on_device_of(input), workspace(device, row_tiles + blocks + 1, memory) as (tickets, *lent):
            scratch = lent_scratch(memory, lent)
            choice: tuple[int, ...] = (0,) * 7
            if choose is not None and chosen is not None:
                choice = (
                    scores[0].data_ptr(), choose.k, choose.k_floor, _address(choose.seed),
                    *(part.data_ptr() for part in chosen),
                )  # fmt: skip
            arguments = module.ScorerArgs(
                hidden=(input.data_ptr(), hidden.example, hidden.token, hidden.column, _NUMBERS[input.dtype]),
                weight=(linear_weight.data_ptr(), *linear_weight.stride()),
                target=(target.data_ptr(), targets.example, targets.token, _NUMBERS[target.dtype]),
                bias=_address(linear_bias),
                class_weight=_vector(weight),
                example_weight=_vector(example_weight),
                cu_seqlens=_vector(cu_seqlens)[:2],
                sizes=(tokens, tokens_each, batch, width, classes),
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                softcap=0.0 if softcap is None else softcap,
                how=(shift, _REDUCTIONS[reduction], _PER_EXAMPLE[per_example]),
                outputs=(
                    loss.data_ptr(), counts.data_ptr(), *(_address(by_name.get(n)) for n in ("loss", "logit", "head")),
                ),
                choice=choice,
                temperature=0.0 if choose is None else choose.temperature,
                scratch=(*(_address(part) for part in scratch), tickets.data_ptr()),
                cut=(row_tiles, parts.groups, parts.group_tiles, parts.sweep, blocks, block_examples),
            )  # fmt: skip
            if kernel == "hopper" and module.hopper_scorer_refuses(arguments) is not None:
                continue
            stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
            module.launch_scorer(kernel, arguments, processors(device), stream)
            break
    return Scored(loss, scores, counts, chosen)


def _adjacent(values: Tensor | None) -> Tensor | None:
    """[V] as the kernels read it; a copy of V numbers only where somebody cut a column out of a matrix."""
    return None if values is None else values.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _vector(values: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if values is None else (values.data_ptr(), values.stride(0), _NUMBERS[values.dtype])


def _selection_scratch(batch: int) -> int:
    """int64 elements that csrc/cuda/select.cuh takes: ranks, an even number of them, and a power of two of keys."""
    return batch + batch % 2 + (1 << max(0, batch - 1).bit_length())
