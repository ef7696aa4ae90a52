"""Scores harvested from training steps: buffered as they come, merged by example id across ranks once per lesson."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor

from ._checks import refuse
from .distributed import gather_rows, rank_and_world
from .store import RecordBuffer, ScoreStore

if TYPE_CHECKING:
    from .sampler import TeachingSampler


class Harvest:
    """The store and what is on its way into it, and which examples of the running pass have been trained on.

    A *pass* is one iteration of the training loop over one epoch's lesson. Recording is its heartbeat: an example of
    the lesson counts as trained on when its score arrives.
    """

    def __init__(self, num_examples: int) -> None:
        self.store = ScoreStore(num_examples)
        self.samplers: WeakSet[TeachingSampler] = WeakSet()
        self._buffer = RecordBuffer()
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []  # on the CPU, not yet merged: ids, scores, calls
        self._pending_rows = 0

        self.epoch = -1  # of the running pass; -1: none yet
        self.records = 0  # calls in this pass
        self.largest_record = 0  # scores in one call of this pass
        self.trained = torch.zeros(num_examples, dtype=torch.bool)  # in this pass, on any rank
        self._in_lesson: Tensor | None = None  # bool [N]; None: everything is
        self.trained_on = 0  # over all passes

        self.training_seconds = 0.0  # of ended passes, first draw to last record
        self.rows_recorded = 0  # by this rank, in passes
        self._pass_began = self._last_record = 0.0

    def __getstate__(self) -> dict[str, object]:
        """Weak references do not pickle, and teachers do: spawned loader workers get what their data set holds."""
        return {**self.__dict__, "samplers": list(self.samplers)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, samplers=WeakSet(state["samplers"]))

    # ------------------------------------------------------------------------------------------------- in

    def record(self, example_ids: Tensor, scores: Tensor) -> None:
        """Buffer one call's scores; reads nothing back from a device."""
        self._buffer.add(example_ids, scores)
        self.records += 1
        self.largest_record = max(self.largest_record, scores.numel())
        self._pending_rows += scores.numel()
        if self.epoch >= 0:
            self.rows_recorded += scores.numel()
            self._last_record = perf_counter()
        # In a lesson an example comes once; what is more comes from pools, which no lesson ever merges.
        elif self._pending_rows > max(2 * self.store.num_examples, 1 << 20) and rank_and_world()[1] == 1:
            self.merge()

    def flush(self) -> None:
        """Bring buffered scores to the CPU and tell the samplers how far the loop is. No collective."""
        ids, scores, calls = self._buffer.take()
        if len(ids) == 0:
            return
        self._pending.append((ids, scores, calls))
        for sampler in self.samplers:
            sampler._hear(ids)

    def merge(self) -> None:
        """Update the store with all that was recorded since the last merge on all ranks. Collective."""
        self.flush()
        ids, scores, calls = (torch.cat(parts) for parts in zip(*self._pending, _NOTHING, strict=True))
        self._pending, self._pending_rows = [], 0
        own_rank, world = rank_and_world()
        if world > 1:
            # One integer row each, scores as their bits: no id ever passes through a floating-point type.
            rows = torch.stack([ids, calls, scores.view(torch.int32).to(torch.int64)], dim=1)
            by_rank = gather_rows(rows)
            for rank, part in enumerate(by_rank):
                for sampler in self.samplers if rank != own_rank else ():
                    sampler._hear(part[:, 0])
            ids, calls, bits = torch.cat(by_rank).unbind(1)
            order = calls.argsort(stable=True)  # by call, then by rank
            ids, scores = ids[order], bits[order].to(torch.int32).view(torch.float32)
        if len(ids) == 0:
            return
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= self.store.num_examples:  # found on every rank alike, so none waits for another
            got = f"{low if low < 0 else high} among those recorded"
            refuse("example_ids", got, f"ids in [0, num_examples={self.store.num_examples})")
        seen = self.store.update(ids, scores, self.epoch)
        if self.epoch >= 0:
            new = seen & ~self.trained if self._in_lesson is None else seen & ~self.trained & self._in_lesson
            self.trained |= new
            self.trained_on += int(new.sum())

    # ------------------------------------------------------------------------------------------------- passes

    def begin_pass(self, epoch: int, in_lesson: Tensor | None) -> bool:
        """Start a pass over ``epoch``; False if it only goes on: begun before, and nothing recorded since."""
        goes_on = epoch == self.epoch and self.records == 0
        self._in_lesson = in_lesson
        if not goes_on:
            self.end_pass()
            self.epoch, self.records, self.largest_record = epoch, 0, 0
            self.trained = torch.zeros_like(self.trained)
        self._pass_began = self._last_record = perf_counter()
        return not goes_on

    def end_pass(self) -> None:
        """Close the account of the running pass's seconds."""
        self.training_seconds += self._last_record - self._pass_began
        self._pass_began = self._last_record

    def seconds(self) -> float:
        """Wall-clock seconds of all passes so far, from the draw of each to its last record."""
        return self.training_seconds + self._last_record - self._pass_began

    def restore_pass(self, epoch: int, trained: Tensor) -> None:
        """Stand in the middle of a saved pass; scores not merged by now are dropped."""
        self._buffer, self._pending, self._pending_rows = RecordBuffer(), [], 0
        self.epoch, self.trained = epoch, trained.clone()
        self.records = self.largest_record = 0
        self._pass_began = self._last_record = 0.0


_NOTHING = (torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0, dtype=torch.int64))
