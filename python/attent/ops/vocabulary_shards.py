"""A vocabulary split over the ranks of a process group: what each rank holds, and how row statistics are merged."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Shard(NamedTuple):
    """Rows [first, first + own) of the vocabulary are here; the other ranks of the group hold the rest."""

    first: int
    classes: int  # of the whole vocabulary
    group: dist.ProcessGroup | None  # None: the whole vocabulary is here

    def max_(self, values: Tensor) -> Tensor:
        """The elementwise maximum over the shards, in place."""
        if self.group is not None:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def sum_(self, values: Tensor) -> Tensor:
        """The elementwise sum over the shards, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)


def whole(classes: int) -> Shard:
    """The unsharded vocabulary."""
    return Shard(0, classes, None)


def find_shard(linear_weight: Tensor, group_name: str | None) -> Shard:
    """Where this rank's rows of the vocabulary lie: the shards stand in rank order. One small collective, one read."""
    own = len(linear_weight)
    if group_name is None:
        return whole(own)
    resolve: Any = torch._C._distributed_c10d._resolve_process_group
    group: dist.ProcessGroup = resolve(group_name)
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=linear_weight.device)
    rank = dist.get_rank(group)
    sizes[rank] = own
    dist.all_reduce(sizes, group=group)
    held = sizes.tolist()
    return Shard(sum(held[:rank]), sum(held), group)
