"""A teacher in a loop on Hugging Face's accelerate: its data loader, and its state in ``save_state``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Sampler

from .._checks import refuse
from ..indexed import indexed
from ..sampler import TeachingSampler
from ..teacher import Teacher


def prepare(
    accelerator: Any, teacher: Teacher, dataset: Any, *, batch_size: int, drop_last: bool = False, **options: Any
) -> tuple[Any, TeachingSampler]:
    """The prepared loader over the teacher's lessons, and its sampler; ``save_state`` then holds the teacher too.

    After ``accelerator.load_state`` the loader goes on after the last recorded batch, on any number of processes::

        loader, sampler = prepare(accelerator, teacher, dataset, batch_size=16)
        for epoch in range(sampler.epoch, total_epochs):
            for ids, x, y in loader:
                loss, scores = head(model(x), y)
                accelerator.backward(loss)
                ...
                teacher.record(ids, scores)

    Args:
        accelerator: an ``accelerate.Accelerator``. It deals batches out to its processes, so each goes through the
            whole lesson: a sampler that deals out ranks' shares too would train on a part of a part.
        teacher: made with ``num_examples`` and ``total_epochs``.
        dataset: the bare data set, of ``num_examples`` examples; batches hold ids as :func:`attent.indexed` puts them.
        batch_size: of each process.
        drop_last: leave out what makes no full batch on each process; else accelerate fills up from the beginning.
            Optimizer steps: ``teacher.total_steps(batch_size, accumulate, accelerator.num_processes, drop_last)``.
        **options: the DataLoader's: ``collate_fn``, ``num_workers``, …

    Raises:
        ValueError: the data set has another length; the accelerator splits or dispatches batches, which would deal them
            out otherwise; ``options`` bring a sampler.

    >>> from attent.integrations.accelerate import prepare
    """
    if len(dataset) != teacher.num_examples:
        refuse("dataset", f"{len(dataset)} examples", f"num_examples={teacher.num_examples}, as the teacher has")
    for name in ("split_batches", "dispatch_batches"):
        if getattr(accelerator, name, None):
            refuse("accelerator", f"one with {name}=True", "one without: each process makes its own batches")
    for name in ("sampler", "batch_sampler", "shuffle"):
        if name in options:
            refuse(name, repr(options[name]), "none: the teacher's is used")
    sampler = teacher.sampler(num_replicas=1, rank=0, drop_last=drop_last)
    loader = DataLoader(
        indexed(dataset), sampler=_Lessons(sampler), batch_size=batch_size, drop_last=drop_last, **options
    )
    accelerator.register_for_checkpointing(teacher)
    return accelerator.prepare(loader), sampler


class _Lessons(Sampler[int]):
    """The teacher's sampler without ``set_epoch``: a loader of accelerate calls that with its own count of passes,
    which begins at 0 again after ``load_state``.
    """

    def __init__(self, sampler: TeachingSampler) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[int]:
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)
