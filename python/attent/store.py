"""What the teacher knows of each example, and the buffer that new scores wait in until they are merged."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNKS_BEFORE_COMPACTION = 1024  # a device allocation takes 512 bytes at least: many small tensors waste memory


class RecordBuffer:
    """Scores as they come, on whatever device they come: nothing is read back until :meth:`take`."""

    def __init__(self) -> None:
        self._ids: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._sizes: list[int] = []
        self._compact = 0  # how many tensors at the start of the lists hold many calls each
        self._calls_taken = 0

    def add(self, example_ids: Tensor, scores: Tensor) -> None:
        """Keep copies: loaders and CUDA graphs reuse their memory."""
        self._ids.append(example_ids.to(torch.int64, copy=True))
        self._scores.append(scores.detach().to(torch.float32, copy=True))
        self._sizes.append(scores.numel())
        if len(self._ids) - self._compact >= _CHUNKS_BEFORE_COMPACTION:
            self._ids[self._compact :] = [_concatenate(self._ids[self._compact :])]
            self._scores[self._compact :] = [_concatenate(self._scores[self._compact :])]
            self._compact += 1

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """Empty the buffer, to the CPU: ids int64, scores float32, call numbers int64, each ``[n]``, in call order."""
        sizes = torch.tensor(self._sizes, dtype=torch.int64)
        calls = torch.arange(self._calls_taken, self._calls_taken + len(sizes)).repeat_interleave(sizes)
        ids = _concatenate(self._ids).cpu() if self._ids else torch.empty(0, dtype=torch.int64)
        scores = _concatenate(self._scores).cpu() if self._scores else torch.empty(0, dtype=torch.float32)
        self._calls_taken += len(sizes)
        self._ids, self._scores, self._sizes, self._compact = [], [], [], 0
        return ids, scores, calls


def _concatenate(tensors: list[Tensor]) -> Tensor:
    one_device = all(tensor.device == tensors[0].device for tensor in tensors)
    return torch.cat(tensors if one_device else [tensor.cpu() for tensor in tensors])


class ScoreStore:
    """One row per example, on the CPU.

    ``score`` float32: the last finite score, NaN where there is none yet. ``lowest`` float32: the lowest so far (+inf).
    ``visits`` int32: merges that held the example. ``last_seen`` int32: the epoch of its last visit (−1: never).
    ``stale_visits`` int32: scores since it last reached a new lowest. ``times_chosen`` int32: reduced lessons that
    chose it.
    """

    TENSORS = ("score", "lowest", "visits", "last_seen", "stale_visits", "times_chosen")

    def __init__(self, num_examples: int) -> None:
        self.num_examples = num_examples
        self.score = torch.full((num_examples,), float("nan"), dtype=torch.float32)
        self.lowest = torch.full((num_examples,), float("inf"), dtype=torch.float32)
        self.visits = torch.zeros(num_examples, dtype=torch.int32)
        self.last_seen = torch.full((num_examples,), -1, dtype=torch.int32)
        self.stale_visits = torch.zeros(num_examples, dtype=torch.int32)
        self.times_chosen = torch.zeros(num_examples, dtype=torch.int32)
        self.nonfinite = 0

    def update(self, example_ids: Tensor, scores: Tensor, epoch: int) -> Tensor:
        """Take in rows in their order, later over earlier; returns which examples they were about, bool
        ``[num_examples]``.

        A non-finite score is counted and otherwise changes nothing but the visit.
        """
        new = torch.full((self.num_examples,), torch.nan, dtype=torch.float32)
        new[example_ids] = scores
        scored = new.isfinite()
        seen = scored
        if int(scored.sum()) < len(example_ids):  # an id came twice, or a score is not finite
            seen = torch.zeros_like(scored)
            seen[example_ids] = True
            finite = scores.isfinite()
            self.nonfinite += int((~finite).sum())
            # Writing through repeated indices is a race, so the last row of each id is found first.
            example_ids, scores = example_ids[finite], scores[finite]
            row = torch.arange(len(example_ids))
            last = torch.full((self.num_examples,), -1).scatter_reduce_(0, example_ids, row, "amax")
            scored = last >= 0
            new[scored] = scores[last[scored]]
        self.visits += seen
        self.last_seen.masked_fill_(seen, epoch)
        improved = scored & (new < self.lowest)
        self.stale_visits = torch.where(improved, 0, self.stale_visits + scored.to(torch.int32))
        self.lowest = torch.where(improved, new, self.lowest)
        self.score = torch.where(scored, new, self.score)
        return seen

    def demoted(self, after: int, share: float) -> Tensor:
        """Examples among the top ``share`` of scores that reached no new lowest in ``after`` scores or more, bool
        ``[n]``.

        Such an example is hard and stays hard: a wrong label more often than a lesson. The share is small, so that a
        plateau of the whole learner demotes few.
        """
        known = self.score[self.score.isfinite()]
        most = int(share * len(known))
        if most == 0:
            return torch.zeros(self.num_examples, dtype=torch.bool)
        threshold = known.kthvalue(len(known) - most + 1).values
        return (self.score >= threshold) & (self.stale_visits >= after)
