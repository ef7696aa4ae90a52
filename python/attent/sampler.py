"""The epoch's lesson as a torch sampler: shuffled, dealt out to ranks, batched or packed, resumable at any batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ._checks import INTEGER, check_has_values, check_int, check_tensor, describe, refuse
from .distributed import rank_and_world
from .packing import check_fits, pack
from .seeds import Use, mix_seed

if TYPE_CHECKING:
    from .teacher import Teacher


class TeachingSampler(Sampler[Any]):
    """The ids that each epoch trains on; made by :meth:`attent.Teacher.sampler`, used as ``DataLoader(sampler=…)``.

    With ``batch_size`` it yields lists of ids and is a ``DataLoader(batch_sampler=…)``; :meth:`packed` gives one that
    fills batches up to a number of tokens.

    *Epochs.* Iterating trains on the next epoch: ``for epoch in range(E): for batch in loader`` needs no
    :meth:`set_epoch`, and with it works too. An epoch counts as used once a score was recorded in it or its iteration
    came to the end (for workers: once they fetched all), so ``next(iter(loader))`` to look at a batch uses none up. The
    lesson is drawn when the first id of the epoch is asked for (with worker processes, at ``iter(loader)``), from all
    scores recorded until then. That draw is collective where torch.distributed is initialised, so every rank must
    iterate.

    *Ranks.* Position p of the epoch's order goes to rank ``p % num_replicas``: disjoint shares, equally many per rank.
    What does not divide evenly is left out (``drop_last=True``) or filled up from the order's beginning (``False``), as
    in torch's DistributedSampler. Give the DataLoader the same ``drop_last``.

    *Resume.* The position saved is that of the training loop, not of the workers that fetch ahead: the furthest example
    whose score was recorded. So record every batch, before saving, and other examples (a rescoring) between epochs
    only. A position counts over all ranks; the rest of an epoch is the same at any number of them.
    ``DataLoader(in_order=True)``, the default, is needed.

    Args:
        teacher: whose lessons these are; made with ``num_examples`` and ``total_epochs``.
        num_replicas, rank: number of processes, and which of them this is; None: torch.distributed's, or one process.
        shuffle: an order drawn anew each epoch, the same on all ranks; else ids ascend.
        drop_last: leave out what does not divide evenly.
        batch_size: of each rank, for a batch sampler; None: single ids.

    Raises:
        ValueError: an argument is out of its range; iterating, beyond the teacher's last epoch.

    >>> teacher = attent.Teacher(6, total_epochs=1)
    >>> list(attent.TeachingSampler(teacher, num_replicas=2, rank=1, shuffle=False))
    [1, 3, 5]
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        batch_size: int | None = None,
    ) -> None:
        own_rank, world = rank_and_world()
        self.num_replicas = world if num_replicas is None else num_replicas
        check_int("num_replicas", self.num_replicas, low=1)
        self.rank = own_rank if rank is None else rank
        check_int("rank", self.rank, low=0, high=self.num_replicas - 1, why="num_replicas - 1 at most")
        for argument, value in (("shuffle", shuffle), ("drop_last", drop_last)):
            if not isinstance(value, bool):
                refuse(argument, describe(value), "True or False")
        if batch_size is not None:
            check_int("batch_size", batch_size, low=1)
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.batch_size = batch_size
        assert teacher._harvest is not None
        self._teacher, self._harvest = teacher, teacher._harvest
        self._packing: tuple[Tensor, int] | None = None
        self._unit_of: Tensor | None = None  # int64 [N]: the place of each id's unit in the epoch's order, -1: none
        self._reset(0, 0)

    def packed(self, lengths: Tensor | Sequence[int], max_tokens: int) -> TeachingSampler:
        """A batch sampler over the same lessons whose batches hold ``max_tokens`` tokens at most, packed after the
        choice.

        ``lengths`` ``[num_examples]`` int: tokens of each example as the learner sees it, in [1, max_tokens]. Chosen
        examples are packed best-fit within shuffled windows; every rank gets the same number of batches. How many there
        are depends on the lesson, so ``len`` is known only while the epoch runs.

        Raises:
            ValueError: ``lengths`` are not as many, or one is outside [1, max_tokens]; this sampler has a batch size.

        >>> teacher = attent.Teacher(4, total_epochs=1)
        >>> list(teacher.sampler(shuffle=False).packed([5, 2, 3, 1], max_tokens=6))
        [[0, 3], [2, 1]]
        """
        if self.batch_size is not None:
            refuse("batch_size", self.batch_size, "None for a packed sampler: batches are filled up to max_tokens")
        check_int("max_tokens", max_tokens, low=1)
        each = f"[num_examples={self._teacher.num_examples}] int, each in [1, max_tokens={max_tokens}]"
        takes = f"{each} (truncate longer ones)"
        if not isinstance(lengths, Tensor):
            if not isinstance(lengths, Sequence) or not all(_is_length(length) for length in lengths):
                refuse("lengths", describe(lengths), takes)
            lengths = torch.tensor(lengths, dtype=torch.int64)
        check_tensor("lengths", lengths, takes, shape=(self._teacher.num_examples,), dtypes=INTEGER)
        check_has_values("lengths", lengths)
        lengths = lengths.cpu()
        wrong = check_fits(lengths, max_tokens)
        if wrong is not None:
            refuse("lengths", wrong, takes)
        sampler = TeachingSampler(
            self._teacher,
            num_replicas=self.num_replicas,
            rank=self.rank,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
        )
        sampler._packing = (lengths, max_tokens)
        return self._teacher._attach(sampler)

    # ------------------------------------------------------------------------------------------------- epochs

    @property
    def epoch(self) -> int:
        """The epoch that runs, or once it has ended the next.

        ``range(sampler.epoch, total_epochs)`` resumes a loop.
        """
        return self._epoch + 1 if self._finished() else self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Iterate ``epoch`` next. Not needed: epochs follow one another. A resumed epoch keeps its position.

        Raises:
            ValueError: ``epoch`` is not in [0, total_epochs).
        """
        check_int(
            "epoch", epoch, low=0, high=self._teacher._total_epochs - 1, why="beyond the last epoch there is no plan"
        )
        if epoch != self._epoch or self._used():
            self._reset(epoch, 0)

    def __len__(self) -> int:
        """Examples (with ``batch_size``: batches) of this epoch on this rank; of a resumed one: all, not the rest."""
        if self._packing is not None:
            if not self._begun:
                raise TypeError(
                    "how many packed batches an epoch has is known only while it runs, once its lesson is drawn"
                )
            return self._share
        size = self._teacher._size_of(min(self.epoch, self._teacher._total_epochs - 1))
        share = share_of(size, self.num_replicas, self.drop_last)
        return share if self.batch_size is None else batches_of(share, self.batch_size, self.drop_last)

    def __iter__(self) -> Iterator[Any]:
        return _Pass(self)

    def _begin(self) -> list[Any]:
        """Draw the lesson of the epoch that is due; this rank's units from the current position on."""
        self._reset(*self._due())
        if self._epoch >= self._teacher._total_epochs:
            refuse("epoch", self._epoch, f"an epoch in [0, {self._teacher._total_epochs - 1}]: the plan ends there")
        ids = self._teacher._begin_pass(self)
        seed = mix_seed(self._teacher._policy.seed, Use.SHUFFLE, self._epoch)
        if self.shuffle:
            ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
        unit_of = torch.full((self._teacher._num_examples,), -1)
        units: list[list[int]] = []
        if self._packing is not None:
            lengths, max_tokens = self._packing
            seed = mix_seed(self._teacher._policy.seed, Use.PACK, self._epoch)
            units = pack(ids.tolist(), lengths[ids].tolist(), max_tokens, seed if self.shuffle else None)
            for number, batch in enumerate(units):
                unit_of[torch.tensor(batch)] = number
        else:
            unit_of[ids] = torch.arange(len(ids))
        self._unit_of = unit_of
        self._total = len(ids) if self._packing is None else len(units)
        rest = self._total - min(self._start, self._total)
        self._share = share_of(rest, self.num_replicas, self.drop_last)
        self._reached = [0] * self.num_replicas
        self._begun, self._exhausted = True, False
        dealt = slice(self._start + self.rank, None, self.num_replicas)
        own: list[Any] = ids[dealt].tolist() if self._packing is None else units[dealt]
        if len(own) < self._share:
            filler = (self._start + self.rank + len(own) * self.num_replicas) % self._total
            own.append(int(ids[filler]) if self._packing is None else units[filler])
        return own[: self._share]

    def _reset(self, epoch: int, start: int) -> None:
        """Stand before ``epoch``, ``start`` of whose units were consumed earlier."""
        self._epoch, self._start = epoch, start
        self._begun = self._exhausted = False
        self._total = self._share = 0
        self._reached = [0] * self.num_replicas  # units of each rank whose scores were recorded since _start
        self._heard: list[Tensor] = []
        self._unit_of = None

    def _used(self) -> bool:
        """Whether the epoch was trained on since it was begun, so that iterating again means the next one."""
        return self._begun and (self._exhausted or self._records_now())

    def _records_now(self) -> bool:
        """Whether scores were recorded in the pass that runs, and it is over this sampler's epoch."""
        return self._harvest.epoch == self._epoch and self._harvest.records > 0

    def _due(self) -> tuple[int, int]:
        """The epoch and position that iterating now would start from."""
        return (self._epoch + 1, 0) if self._used() else (self._epoch, self._start)

    def _finished(self, ranks: Sequence[int] | None = None) -> bool:
        """Whether the training loop (of ``ranks``; None: this one) is through with the epoch, as far as known."""
        if not (self._begun and self._exhausted):
            return False
        if self._harvest.rows_recorded == 0:
            return True  # a loop that records nothing leaves no other trace
        if not self._records_now():
            return False  # workers fetched all of it before the loop was through with its first batch
        self._teacher._flush()
        return self._share - self._consumed(ranks or [self.rank]) < self._tail()

    # ------------------------------------------------------------------------------------------------ position

    def _hear(self, example_ids: Tensor) -> None:
        """Scores of these ids were recorded; looked at when a position is asked for, which most epochs do not see."""
        if self._unit_of is not None:
            self._heard.append(example_ids)

    def _count_heard(self) -> None:
        """An example whose score was recorded is consumed with its unit, and with all units before it on its rank."""
        if not self._heard or self._unit_of is None:
            return
        ids = torch.cat(self._heard)
        self._heard = []
        unit = self._unit_of[ids[(ids >= 0) & (ids < len(self._unit_of))]] - self._start
        unit = unit[unit >= 0]
        reached = torch.tensor(self._reached)
        reached.scatter_reduce_(0, unit % self.num_replicas, unit // self.num_replicas + 1, "amax")
        self._reached = reached.tolist()

    def _consumed(self, ranks: Sequence[int]) -> int:
        """Units consumed by every one of ``ranks`` since ``_start``; what other ranks recorded is known once merged."""
        self._count_heard()
        # A filler at the end of a rank's share is recorded under its original's id: the share counts as done without.
        own = [(self._total - self._start - rank + self.num_replicas - 1) // self.num_replicas for rank in ranks]
        return min(
            self._share if self._reached[rank] >= min(units, self._share) else self._reached[rank]
            for rank, units in zip(ranks, own, strict=True)
        )

    def _tail(self) -> int:
        """Units that a DataLoader may leave unused at the end: a last, incomplete batch under ``drop_last``.

        The sampler knows its own batches; of the DataLoader's it knows the largest number of scores recorded at once.
        """
        if not self.drop_last or self._packing is not None:
            return 1
        return self.batch_size or max(self._harvest.largest_record, 1)

    def _position(self, ranks: Sequence[int]) -> dict[str, int]:
        """Where the slowest of ``ranks`` stands: a batch is rather trained on twice than left out."""
        if self._finished(ranks) and self._harvest.rows_recorded > 0:
            return {"epoch": self._epoch + 1, "position": 0}
        consumed = self._consumed(ranks) if self._begun else 0
        return {"epoch": self._epoch, "position": self._start + self.num_replicas * consumed}

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its units all ranks together have trained on; small, and no collective.

        The lesson itself is in :meth:`Teacher.state_dict`, which holds this too; use that one, except where a loader
        (such as torchdata's StatefulDataLoader) saves its sampler by itself.
        """
        self._teacher._flush()
        return self._position([self.rank])

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at a saved position, on any number of ranks; :meth:`attent.Teacher.load_state_dict` does it too.

        Raises:
            ValueError: ``state`` is not what :meth:`state_dict` returned.
        """
        if not isinstance(state, Mapping) or set(state) != {"epoch", "position"}:
            refuse("state", describe(state), "what TeachingSampler.state_dict() returned: 'epoch' and 'position'")
        check_int("state['epoch']", state["epoch"], low=0, high=self._teacher._total_epochs)
        check_int("state['position']", state["position"], low=0)
        self._reset(state["epoch"], state["position"])


class _Pass(Iterator[Any]):
    """One iteration over an epoch. It draws at the first ``next``, so that an iterator not used changes nothing."""

    def __init__(self, sampler: TeachingSampler) -> None:
        self._sampler = sampler
        self._units: list[Any] | None = None
        self._yielded = 0

    def __next__(self) -> Any:
        if self._units is None:
            self._units = self._sampler._begin()
        batch_size = self._sampler.batch_size
        left = len(self._units) - self._yielded
        if left == 0 or (batch_size is not None and self._sampler.drop_last and left < batch_size):
            self._sampler._exhausted = True
            raise StopIteration
        begin = self._yielded
        if batch_size is None:
            self._yielded += 1
            return self._units[begin]
        self._yielded += min(batch_size, left)
        return self._units[begin : self._yielded]

    def state_dict(self) -> dict[str, int]:
        """The position after what was given out: for loaders that pair it with the batch they deliver (torchdata's)."""
        epoch, start = self._sampler._due() if self._units is None else (self._sampler._epoch, self._sampler._start)
        return {"epoch": epoch, "position": start + self._sampler.num_replicas * self._yielded}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Give out what follows a saved position.

        A loader that stopped at an epoch's last batch saved that place, and going on there would make an epoch of
        nothing. A teacher that was loaded too knows that the epoch was over.
        """
        self._sampler.load_state_dict(state)
        resume = self._sampler._teacher._resume
        if resume[0] > state["epoch"]:
            self._sampler._reset(*resume)
        self._units, self._yielded = None, 0


def _is_length(value: object) -> bool:
    """Whether an item of a list is an int that int64 holds."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def share_of(size: int, num_replicas: int, drop_last: bool) -> int:
    """How many of ``size`` units each rank gets."""
    return size // num_replicas if drop_last else -(-size // num_replicas)


def batches_of(share: int, batch_size: int, drop_last: bool) -> int:
    """How many batches a rank makes of its share."""
    return share // batch_size if drop_last else -(-share // batch_size)
