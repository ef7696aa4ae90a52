"""A packed batch: the examples are segments of one row of tokens, and a choice of them is a choice of segments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import refuse
from .batch import Batch

#: The argument, or key of a dict argument, that says where the segments begin and end: int32 [B+1].
CU_SEQLENS = "cu_seqlens"


class PackedBatch(Batch):
    """Tensors of the leading size ``cu_seqlens[-1]`` hold tokens, those of the leading size B hold an example a row."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], cu_seqlens: Tensor) -> None:
        super().__init__(args, kwargs)
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) == 0:
            refuse(CU_SEQLENS, f"shape {tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}", "int32 [B+1]")
        self._cu_seqlens = cu_seqlens
        self.size = len(cu_seqlens) - 1
        self._tokens = int(cu_seqlens[-1])  # to choose segments is to read how long they are
        if not any(self._is_tokens(leaf) for leaf in self._leaves):
            refuse(
                "batch",
                f"no tensor with the {self._tokens} tokens of {CU_SEQLENS} in its first dimension",
                "packed tensors [tokens, ...]",
            )

    def is_rows(self, leaf: object) -> bool:
        return self._is_tokens(leaf) or super().is_rows(leaf)

    def _is_tokens(self, leaf: object) -> bool:
        if not isinstance(leaf, Tensor) or isinstance(leaf, nn.Parameter) or leaf is self._cu_seqlens:
            return False
        return leaf.dim() > 0 and leaf.shape[0] == self._tokens

    def take(self, index: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the chosen segments alone, one behind the other in the order of ``index``."""
        starts = self._cu_seqlens[:-1].index_select(0, index)
        lengths = self._cu_seqlens.diff().index_select(0, index)
        ends = lengths.cumsum(0)
        shift = (starts - ends + lengths).repeat_interleave(lengths)
        positions = torch.arange(len(shift), device=shift.device) + shift
        cu_seqlens = torch.cat([ends.new_zeros(1), ends]).to(self._cu_seqlens.dtype)

        def chosen(leaf: Any) -> Any:
            if leaf is self._cu_seqlens:
                return cu_seqlens
            if self.is_rows(leaf):
                return leaf.index_select(0, (positions if self._is_tokens(leaf) else index).to(leaf.device))
            return leaf

        return self._rebuilt([chosen(leaf) for leaf in self._leaves])


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
    """The arguments as a batch of rows, or of segments if ``cu_seqlens`` is among them by name."""
    for named in (kwargs, *(argument for argument in (*args, *kwargs.values()) if isinstance(argument, dict))):
        if isinstance(named.get(CU_SEQLENS), Tensor):
            return PackedBatch(args, kwargs, named[CU_SEQLENS])
    return Batch(args, kwargs)
