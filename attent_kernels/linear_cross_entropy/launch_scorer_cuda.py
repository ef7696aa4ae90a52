"""Launcher of the scorer in CUDA C++ (csrc/cuda/scorer.h): outputs, workspace, cut. Not yet run on a GPU.

Results and the way the work is cut are those of the Triton launcher (:mod:`.launch_scorer`, whose header has the
arithmetic and the traffic); tiles are the kernels' own. On compute capability 9.0 the Hopper kernel runs where input
and linear_weight can be loaded by tensor maps, else, and elsewhere, the portable one.

Training repeats the same kind of call, whose launches differ in addresses alone. So all else is worked out once for
each kind and kept, in the module, as a ``ScorerLaunch``: a call looks it up, allocates its outputs and hands addresses
over.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..runtime import Allocate, allocator, contiguous_strides, lend, on_device_of, processors, remember
from .cut import Configuration, cut
from .scorer_workspace import Choose, Scored, ToScore, block_of_examples
from .views import token_rows

_NUMBERS = {
    torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3, torch.int32: 4, torch.int64: 5,
}  # fmt: skip
_REDUCTIONS = {None: 0, "mean": 1, "sum": 2, "none": 3, "example": 4}


def score_tokens(what: ToScore, choose: Choose | None = None) -> Scored:
    """What :func:`.launch_scorer.score_tokens` does, for bfloat16 and float16 and targets that are class indices."""
    (
        input, linear_weight, target, linear_bias, weight, example_weight, cu_seqlens, reduction, _, _, _, _, score, _
    ) = what  # fmt: skip
    linear_bias, weight = _adjacent(linear_bias), _adjacent(weight)
    batch = input.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    device = input.device
    empty = allocator(device)
    counts, scores = empty((batch,), (1,), torch.float32), empty((len(score), batch), (batch, 1), torch.float32)
    loss = _empty_loss(empty, input.shape[:-1], batch, reduction)
    chosen = None
    if choose is not None:
        k = choose.k
        chosen = (
            empty((k,), (1,), torch.int64), empty((k,), (1,), torch.float32), empty((k,), (1,), torch.float32),
        )  # fmt: skip
    if batch == 0:
        return Scored(loss.zero_(), scores, counts, chosen)

    # All that a launch depends on but addresses. Of these it depends on how they are aligned (tensor maps).
    aligned = (input.data_ptr() | linear_weight.data_ptr()) % 16 == 0
    kind = (
        device, aligned, input.dtype, input.shape, input.stride(), linear_weight.shape, linear_weight.stride(),
        target.dtype, target.stride(), linear_bias is None, _kind(weight), _kind(example_weight), _kind(cu_seqlens),
        batch, what[7:12], tuple(score), what.per_example, None if choose is None else choose[:3],
        native.portable_alone,
    )  # fmt: skip
    launch = _launches.get(kind)
    if launch is None:
        launch = _first_launch(what._replace(linear_bias=linear_bias, weight=weight), batch, choose, scores)
        remember(_launches, kind, launch)
    index, chosen_score, inclusion = (None, None, None) if chosen is None else chosen
    with on_device_of(input), lend(device, launch.tickets, launch.scratch_bytes) as lent:
        launch.start(
            input.data_ptr(), linear_weight.data_ptr(), target.data_ptr(), _address(linear_bias), _address(weight),
            _address(example_weight), _address(cu_seqlens), 0 if choose is None else _address(choose.seed),
            loss.data_ptr(), counts.data_ptr(), scores.data_ptr(), _address(index), _address(chosen_score),
            _address(inclusion), lent.scratch, lent.tickets, lent.stream,
        )  # fmt: skip
    return Scored(loss, scores, counts, chosen)


def _empty_loss(empty: Allocate, tokens: torch.Size, batch: int, reduction: str | None) -> Tensor:
    if reduction in ("mean", "sum"):
        return empty((), (), torch.float32)
    if reduction == "none":
        return empty(tuple(tokens), contiguous_strides(tokens), torch.float32)
    return empty((batch if reduction == "example" else 0,), (1,), torch.float32)


def _adjacent(values: Tensor | None) -> Tensor | None:
    """[V] as the kernels read it; a copy of V numbers only where somebody cut a column out of a matrix."""
    return None if values is None else values.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _kind(values: Tensor | None) -> tuple[torch.dtype, int] | None:
    return None if values is None else (values.dtype, values.stride(0))


# ----------------------------------------------------------------------------------------------- a kind's first launch

#: Kind of call -> its ``ScorerLaunch``.
_launches: dict[Hashable, Any] = {}


def _first_launch(what: ToScore, batch: int, choose: Choose | None, scores: Tensor) -> Any:
    """The ``ScorerLaunch`` of the best kernel that takes the call."""
    module: Any = native.module
    (
        input, linear_weight, target, linear_bias, weight, example_weight, cu_seqlens, reduction, ignore_index,
        label_smoothing, softcap, shift, score, per_example,
    ) = what  # fmt: skip
    device = input.device
    tokens, width, classes = input.shape[:-1].numel(), input.shape[-1], linear_weight.shape[0]
    tokens_each = max(1, input.shape[1]) if input.dim() == 3 else 1
    by_name = dict(zip(score, scores.unbind(0), strict=True))
    hidden, targets = token_rows(input), token_rows(target[..., None])
    refused = None
    for kernel in kernels_of(device):
        tiles, kept = _tiles(module, kernel, label_smoothing > 0, softcap is not None)
        row_tiles = max(1, -(-tokens // tiles.rows))
        parts = cut(row_tiles, classes, width, input.element_size(), kept, processors(device), tiles)
        block_examples, _ = block_of_examples(tokens, tokens_each, batch, cu_seqlens is not None, tiles.rows)
        choice = (0,) * 7 if choose is None else (scores.data_ptr(), choose.k, choose.k_floor, 0, 0, 0, 0)
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
            how=(shift, _REDUCTIONS[reduction], native.PER_EXAMPLE[per_example]),
            outputs=(0, 0, *(_address(by_name.get(name)) for name in ("loss", "logit", "head"))),
            choice=choice,
            temperature=0.0 if choose is None else choose.temperature,
            delayed=native.DELAYED,
            cut=(row_tiles, parts.groups, parts.group_tiles, parts.sweep, -(-batch // block_examples), block_examples),
        )
        refused = module.hopper_scorer_refuses(arguments) if kernel == "hopper" else None
        if refused is None:
            return module.ScorerLaunch(kernel, arguments, processors(device))
    raise RuntimeError(f"no scorer kernel takes this call: {refused}")


def kernels_of(device: torch.device) -> tuple[str, ...]:
    """The kernels that run there, best first."""
    return ("hopper", "portable") if native.runs_hopper(device) else ("portable",)


@lru_cache(maxsize=64)
def _tiles(module: Any, kernel: str, smoothed: bool, capped: bool) -> tuple[Configuration, int]:
    """A kernel's tiles, and how many numbers it keeps of each token and group of vocabulary tiles."""
    of = module.scorer_tiles(kernel, smoothed, capped)
    tiles = Configuration(
        of["rows"], of["classes"], of["width"], of["threads"] // 32, of["stages"], of["resident"], False
    )
    return tiles, of["kept"]


def _vector(values: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if values is None else (values.data_ptr(), values.stride(0), _NUMBERS[values.dtype])
