"""The few collectives the teacher needs. Each does nothing where torch.distributed is not initialised."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def rank_and_world(group: ProcessGroup | None = None) -> tuple[int, int]:
    """This process's rank and the number of ranks in ``group`` (None: all); (0, 1) where there is one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def gather_rows(rows: Tensor, group: ProcessGroup | None = None) -> list[Tensor]:
    """Every rank's ``rows`` ``[n, …]``, on the CPU, by rank; n may differ between ranks, the other sizes may not."""
    _, world = rank_and_world(group)
    if world == 1:
        return [rows.cpu()]
    device = _device_for(group)
    count = torch.tensor([len(rows)], device=device)
    counts = [torch.empty_like(count) for _ in range(world)]
    dist.all_gather(counts, count, group=group)
    sizes = [int(size) for size in torch.cat(counts).tolist()]
    padded = torch.zeros((max(sizes), *rows.shape[1:]), dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(world)]
    if padded.numel() > 0:
        dist.all_gather(gathered, padded, group=group)
    return [part[:size].cpu() for part, size in zip(gathered, sizes, strict=True)]


def sum_over_ranks(values: list[int]) -> list[int]:
    """Sums of host numbers over all ranks."""
    if rank_and_world()[1] == 1:
        return values
    total = torch.tensor(values, dtype=torch.int64, device=_device_for(None))
    dist.all_reduce(total)
    return [int(value) for value in total.tolist()]


def max_over_ranks(value: Tensor) -> Tensor:
    """The largest of all ranks' elements, on the CPU."""
    if rank_and_world()[1] == 1:
        return value.cpu()
    carrier = value.to(_device_for(None), copy=True)
    dist.all_reduce(carrier, dist.ReduceOp.MAX)
    return carrier.cpu()


def from_rank_0(value: Tensor) -> Tensor:
    """Rank 0's ``value``; the other ranks pass a tensor of its shape and dtype, whose contents do not matter."""
    if rank_and_world()[1] == 1:
        return value
    carrier = value.to(_device_for(None))
    dist.broadcast(carrier, group_src=0)
    return carrier.to(value.device)


def _device_for(group: ProcessGroup | None) -> torch.device:
    """Where tensors must lie for ``group``'s backend: the CPU if it can, else the current accelerator (NCCL alone)."""
    if "cpu" in dist.get_backend_config(group):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
