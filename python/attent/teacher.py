"""The teacher: decides what the learner trains on, from scores that training itself gives."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.data import get_worker_info

from . import teacher_state
from ._checks import (
    FLOATING,
    INTEGER,
    check_has_values,
    check_ids,
    check_int,
    check_number,
    check_tensor,
    describe,
    refuse,
)
from .distributed import rank_and_world, sum_over_ranks
from .harvest import Harvest
from .lesson import lesson_weights
from .lessons import Lessons
from .plan import make_plan
from .policy import make_policy
from .pool import choose_across_ranks, choose_from_pool
from .sampler import TeachingSampler, batches_of, share_of
from .schedules import Schedule
from .selection import Selection
from .teacher_summary import TeachingSummary, summarise

if TYPE_CHECKING:
    from collections.abc import Iterator


class Teacher:
    """Chooses what each epoch (or step) of training is spent on.

    Five lines adopt it; deleting them undoes it::

        teacher = attent.Teacher(len(dataset), total_epochs=10)                                            # 1
        loader = DataLoader(attent.indexed(dataset), batch_sampler=teacher.sampler(batch_size=64))         # 2
        schedule = CosineAnnealingLR(optimizer, T_max=teacher.total_steps(batch_size=64))                  # 3
        for epoch in range(10):
            for ids, x, y in loader:
                loss, scores = head(model(x), y)        # an attent.ScoringHead; any scores [B] will do    # 4
                loss.backward(); optimizer.step(); schedule.step(); optimizer.zero_grad()
                teacher.record(ids, scores)                                                                # 5

    The first ``warmup`` epochs are full. Then each epoch draws ``k = floor(ratio · num_examples + ½)`` examples: those
    never seen, in random order, then by Gumbel top-k on the recorded scores with a uniform floor
    (:func:`attent.select_top_k`). The last ``ceil(anneal · total_epochs)`` epochs are full again (if there are 4 epochs
    or more). All sizes are fixed in advance. A lesson is a pure function of seed, epoch and recorded scores. No global
    random state is used or changed.

    For streams and in-batch selection give ``total_steps`` instead and call :meth:`choose` on each pool: each call is a
    step, and warm-up and anneal are counted in steps.

    Args:
        num_examples: N, the length of the data set; None for a stream without ids.
        total_epochs: passes of the training loop, full or reduced. Exactly one of this and ``total_steps``.
        total_steps: calls of :meth:`choose` in the run.
        ratio: keep ratio of reduced epochs, in (0, 1]: a number, or a schedule of :mod:`attent.schedules`.
        temperature: 0 takes the highest scores; 1 draws in proportion to them; above 1 flatter.
        floor: share of the k that is drawn uniformly from the rest, in [0, 1].
        warmup: full epochs (or steps) at the start; a float is a share of the run.
        anneal: share of the run at its end that is full.
        reweight: ``"inverse"``: :meth:`weights` are ``min(1/inclusion, 4)`` over their mean in the lesson, which makes
            the loss estimate that of the whole data set, up to the clip; ``"none"``: 1, which emphasises what scores
            high.
        groups: int64 ``[N]``, a class or source for each example: each gets its proportional share of k, by largest
            remainder.
        demote_after: n: an example among the highest 2 % of scores whose score reached no new lowest in n visits or
            more is likely mislabelled; while so, its score counts as 0 in draws, which leaves it to the floor. None:
            off.
        seed: of all that is random here.
        interval: epochs that a lesson is held for, a number or a schedule of it; 1 draws anew each epoch.

    Raises:
        ValueError: an argument is out of its range, or the schedule leaves (0, 1] somewhere in the run.

    Source: AtteNT (arXiv 2602.20461) for teaching by gradient norm; Kool et al. 2019 for the draw.

    >>> teacher = attent.Teacher(1000, total_epochs=8, ratio=0.3)
    >>> teacher.epoch_sizes()
    [1000, 300, 300, 300, 300, 300, 300, 1000]
    >>> teacher.total_steps(batch_size=100)
    38
    """

    def __init__(
        self,
        num_examples: int | None = None,
        *,
        total_epochs: int | None = None,
        total_steps: int | None = None,
        ratio: float | Schedule = 0.5,
        temperature: float = 1.0,
        floor: float = 0.2,
        warmup: float = 1,
        anneal: float = 0.125,
        reweight: str = "none",
        groups: Tensor | None = None,
        demote_after: int | None = None,
        seed: int = 0,
        interval: float | Schedule = 1,
    ) -> None:
        if (total_epochs is None) == (total_steps is None):
            got = f"total_epochs={total_epochs}, total_steps={total_steps}"
            refuse("total_epochs", got, "exactly one of total_epochs (over a data set) and total_steps (over pools)")
        if num_examples is not None:
            check_int("num_examples", num_examples, low=1)
        elif total_epochs is not None:
            refuse("num_examples", None, "the length of the data set, with total_epochs")
        unit, total = ("epoch", total_epochs) if total_epochs is not None else ("step", total_steps)
        self._plan = make_plan(unit, total, ratio, warmup, anneal, interval)  # type: ignore[arg-type]  # checked there
        self._policy = make_policy(num_examples, temperature, floor, reweight, groups, demote_after, seed)
        self.num_examples = num_examples
        self._harvest = None if num_examples is None else Harvest(num_examples)
        self._lessons = None if self._harvest is None else Lessons(self._policy, self._harvest.store)

        self._sampler: TeachingSampler | None = None  # the one that iterates
        self._resume = (0, 0)  # epoch and position for samplers yet to be made
        self._steps = 0  # calls of choose
        self._counts = dict.fromkeys(("passes", "offered", "asked", "pool_offered", "pool_chosen"), 0)
        self._pool_since_merge = [0, 0]
        self._teaching_seconds = 0.0

    # -------------------------------------------------------------------------------------------------- plan

    def sampler(
        self,
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        batch_size: int | None = None,
    ) -> TeachingSampler:
        """The epochs' lessons as a sampler for a DataLoader; it goes on where this teacher stands.

        ``num_replicas`` and ``rank`` default to torch.distributed's, or one process. ``shuffle=False`` keeps ids
        ascending. ``drop_last`` leaves out what ranks and batches do not divide evenly, else ranks are filled up. With
        ``batch_size`` (per rank) it is a batch sampler.

        >>> teacher = attent.Teacher(6, total_epochs=1)
        >>> list(teacher.sampler(shuffle=False, batch_size=2))
        [[0, 1], [2, 3], [4, 5]]
        """
        self._need_epochs("sampler()")
        sampler = TeachingSampler(
            self, num_replicas=num_replicas, rank=rank, shuffle=shuffle, drop_last=drop_last, batch_size=batch_size
        )
        return self._attach(sampler)

    def epoch_sizes(self) -> list[int]:
        """Examples that each epoch trains on, over all ranks: ``[total_epochs]``, known before training.

        >>> attent.Teacher(10, total_epochs=3).epoch_sizes()
        [10, 5, 5]
        """
        self._need_epochs("epoch_sizes()")
        return [self._size_of(epoch) for epoch in range(self._plan.total)]

    def total_steps(
        self, batch_size: int, accumulate: int = 1, world_size: int | None = None, drop_last: bool = True
    ) -> int:
        """Optimizer steps of the whole run, for learning rate schedules: exactly those of a loop over :meth:`sampler`.

        ``batch_size`` per rank; ``accumulate`` batches per step, an incomplete window at an epoch's end stepping too
        (as in accelerate and transformers); ``world_size`` ranks (None: torch.distributed's); ``drop_last`` as given to
        the sampler (and to a DataLoader that makes the batches).

        Raises:
            ValueError: a number is below 1, or the teacher was made with ``total_steps``.

        >>> attent.Teacher(100, total_epochs=2).total_steps(batch_size=8, accumulate=4)
        5
        """
        self._need_epochs("total_steps()")
        world_size = rank_and_world()[1] if world_size is None else world_size
        for argument, value in (("batch_size", batch_size), ("accumulate", accumulate), ("world_size", world_size)):
            check_int(argument, value, low=1)
        batches = [
            batches_of(share_of(size, world_size, drop_last), batch_size, drop_last) for size in self.epoch_sizes()
        ]
        return sum(-(-epoch // accumulate) for epoch in batches)

    def anneal_now(self) -> None:
        """Train on everything from the next epoch (or :meth:`choose`) on: for early stopping. Sizes after it change."""
        begun = self._steps - 1 if self._harvest is None or self._plan.unit == "step" else self._harvest.epoch
        self._plan = self._plan.annealing_from(begun + 1)

    # ------------------------------------------------------------------------------------------------ scores

    def record(self, example_ids: Tensor, scores: Tensor) -> None:
        """Take in the scores of a batch just trained on; once per batch, in warm-up and anneal too, as it counts
        progress.

        ``example_ids`` int64 ``[B]`` in [0, N), ``scores`` float ``[B]``, at least 0, on any device. Tensors are
        copied, never read back: they are merged by id and across ranks when the next lesson is drawn (or state saved).
        Repeated ids: the last in call order, then by rank. Non-finite scores leave the previous one and are counted.

        Raises:
            ValueError: shapes or dtypes are wrong; an id is outside [0, N) (on the CPU at once, else when merged).
            RuntimeError: called in a DataLoader worker, whose copy of the teacher nobody reads.

        >>> teacher = attent.Teacher(3, total_epochs=4, ratio=1/3, temperature=0, floor=0)
        >>> list(teacher.sampler(shuffle=False))                      # epoch 0: warm-up
        [0, 1, 2]
        >>> teacher.record(torch.tensor([0, 1, 2]), torch.tensor([0.1, 0.9, 0.5]))
        >>> list(teacher.sampler(shuffle=False))                      # epoch 1: the highest of three
        [1]
        """
        began = perf_counter()
        harvest = self._need_examples("record()")
        check_tensor("example_ids", example_ids, "int64 [B]", shape=(None,), dtypes=INTEGER)
        check_tensor("scores", scores, "floating-point [B], like example_ids", shape=example_ids.shape, dtypes=FLOATING)
        check_has_values("scores", scores)
        check_ids(example_ids, self._num_examples)
        if get_worker_info() is not None:
            raise RuntimeError("record() was called in a DataLoader worker; call it in the training loop")
        harvest.record(example_ids, scores)
        self._teaching_seconds += perf_counter() - began

    def choose(
        self,
        scores: Tensor,
        k: int | None = None,
        *,
        example_ids: Tensor | None = None,
        groups: Tensor | None = None,
        process_group: ProcessGroup | None = None,
    ) -> Selection:
        """Choose from a pool in hand (one-pass, streams): k of its n examples by their scores. Each call is a step.

        ``scores`` float ``[n]`` on any device; nothing is read back to the host. ``k`` None: ``floor(r · n + ½)`` by
        the plan, all in warm-up and anneal. ``example_ids`` int64 ``[n]`` records the scores as well. ``groups`` int64
        ``[n]``: quotas by largest remainder (default: the teacher's groups of ``example_ids``). Non-finite scores rank
        below all others.

        Each rank chooses the same k from its own pool, with noise of its own. Ranks that hold one pool together (tensor
        parallel) must choose on one and broadcast. With ``process_group`` the choice is the top k of all its ranks'
        pools (k: in all; None: by the plan of all n): each rank gets those of its own pool, of any number, at a
        synchronisation.

        Raises:
            ValueError: wrong shapes or dtypes; ``k`` is None without ``total_steps``; the plan's steps are used up.

        >>> teacher = attent.Teacher(total_steps=100, ratio=0.5, warmup=0, temperature=0, floor=0)
        >>> teacher.choose(torch.tensor([0.1, 0.9, 0.5, 0.2])).index
        tensor([1, 2])
        """
        with self._teaching():
            check_tensor("scores", scores, "floating-point [n]", shape=(None,), dtypes=FLOATING)
            check_has_values("scores", scores)
            if process_group is not None and not isinstance(process_group, ProcessGroup):
                refuse("process_group", describe(process_group), "a torch.distributed ProcessGroup or None")
            in_steps = self._plan.unit == "step"
            if in_steps and self._steps >= self._plan.total:
                refuse("choose", f"call {self._steps + 1}", f"{self._plan.total} calls: total_steps ends the plan")
            if k is None and not in_steps:
                refuse("k", None, "a number of examples; only a Teacher made with total_steps plans it")
            like_scores = f"int64 [n={len(scores)}] on {scores.device}"
            for argument, value in (("example_ids", example_ids), ("groups", groups)):
                if value is not None:
                    check_tensor(argument, value, like_scores, shape=scores.shape, dtypes=INTEGER, device=scores.device)
            scores = scores.detach()
            if example_ids is not None:
                self.record(example_ids, scores)
                if groups is None and self._lessons is not None:
                    groups = self._lessons.groups(example_ids)
            groups = None if groups is None else groups.long()
            if process_group is None:
                selection = choose_from_pool(self._policy, self._plan, scores, k, groups, self._steps)
            else:
                selection = choose_across_ranks(self._policy, self._plan, scores, k, groups, self._steps, process_group)
            self._steps += 1
            # In a pass, recording has already counted the whole pool as offered and trained on.
            counted = len(scores) if example_ids is not None and self._harvest and self._harvest.epoch >= 0 else 0
            self._pool_since_merge[0] += len(scores) - counted
            self._pool_since_merge[1] += len(selection.index) - counted
            return selection

    def weights(self, example_ids: Tensor | Selection) -> Tensor:
        """Loss weights float32 ``[B]`` of examples of the running lesson, or of a :class:`attent.Selection`, on its
        device.

        ``example_ids``: int64 ``[B]`` in [0, N), or the selection.

        1 with ``reweight="none"``, in warm-up and in anneal; else ``min(1/inclusion, 4)`` divided by its mean over the
        lesson (over the selection). Multiply per-example losses with them, for instance by ``example_weight`` of
        :func:`attent.linear_cross_entropy`.

        Raises:
            ValueError: an id is not in [0, N), or not in the running lesson (on other devices than the CPU its weight
                is NaN).

        >>> teacher = attent.Teacher(total_steps=10, ratio=0.5, warmup=0, reweight="inverse")
        >>> selection = teacher.choose(torch.rand(8))
        >>> float(teacher.weights(selection).mean())
        1.0
        """
        reweight = self._policy.reweight == "inverse"
        if isinstance(example_ids, Selection):
            takes = "int64 [B], or a Selection whose inclusion is floating-point [k]"
            inclusion = check_tensor("example_ids", example_ids.inclusion, takes, shape=(None,), dtypes=FLOATING)
            check_has_values("example_ids", inclusion)
            inclusion = inclusion.detach().float()
            return lesson_weights(inclusion) if reweight else torch.ones_like(inclusion)
        check_tensor("example_ids", example_ids, "int64 [B], or a Selection", shape=(None,), dtypes=INTEGER)
        epoch = self._need_examples("weights()").epoch
        check_ids(example_ids, self._num_examples)
        if not reweight or epoch < 0 or self._plan.is_full(epoch):
            return torch.ones(example_ids.shape, device=example_ids.device)
        assert self._lessons is not None
        return self._lessons.weights(example_ids)

    # ------------------------------------------------------------------------------------------------ report

    def summary(self, full_seconds: float | None = None) -> TeachingSummary:
        """What teaching did and cost so far: a dict that prints as a table.

        No collective: counts over all ranks are as of the last merge (lesson drawn or state saved).

        ``full_seconds``: measured seconds of the same epochs on full data; makes ``saved_seconds`` "measured".
        Otherwise they are "estimated" from this run's seconds per example, or "unknown" where no pass was timed. Keys:
        see :class:`attent.TeachingSummary`.

        Raises:
            ValueError: ``full_seconds`` is below 0.

        >>> attent.Teacher(10, total_epochs=2).summary()["never_seen_ids"].numel()
        10
        """
        if full_seconds is not None:
            check_number("full_seconds", full_seconds, low=0)
        if rank_and_world()[1] == 1:
            self._merge()
        return summarise(self, full_seconds)

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on, in plain tensors and numbers: ``torch.load(weights_only=True)``
        takes it.

        Merges first, so it is collective where torch.distributed is initialised: call it on every rank, save any one's
        (they differ in measured seconds only). Loadable on any number of ranks.

        >>> teacher = attent.Teacher(10, total_epochs=2)
        >>> teacher.load_state_dict(teacher.state_dict())
        """
        with self._teaching():
            self._merge()
            return teacher_state.save(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, of :meth:`state_dict`; samplers made before or after continue at the saved position.

        Raises:
            ValueError: it was saved by a teacher with other settings, or is no such state.
        """
        with self._teaching():
            teacher_state.load(self, state)

    def __repr__(self) -> str:
        settings = teacher_state.settings(self)
        return f"Teacher({', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    # ----------------------------------------------------------------------------------------------- inside

    @property
    def _num_examples(self) -> int:
        return self.num_examples or 0

    @property
    def _total_epochs(self) -> int:
        return self._plan.total

    def _size_of(self, epoch: int) -> int:
        return self._plan.size(epoch, self._num_examples)

    def _need_epochs(self, caller: str) -> None:
        if self._plan.unit != "epoch":
            refuse(caller, "a Teacher made with total_steps", "one made with num_examples and total_epochs")

    def _need_examples(self, caller: str) -> Harvest:
        if self._harvest is None:
            refuse(caller, "a Teacher without num_examples", "one made with num_examples, which ids count from 0")
        return self._harvest

    def _attach(self, sampler: TeachingSampler) -> TeachingSampler:
        assert self._harvest is not None
        sampler._reset(*(self._sampler._due() if self._sampler is not None else self._resume))
        self._harvest.samplers.add(sampler)
        return sampler

    @contextmanager
    def _teaching(self) -> Iterator[None]:
        """Count the seconds inside as teaching; nested uses once."""
        began, outer = perf_counter(), self._teaching_seconds
        try:
            yield
        finally:
            self._teaching_seconds = outer + perf_counter() - began

    def _flush(self) -> None:
        if self._harvest is not None:
            with self._teaching():
                self._harvest.flush()

    def _merge(self) -> None:
        if self._harvest is not None:
            self._harvest.merge()
        offered, chosen = sum_over_ranks(self._pool_since_merge)
        self._counts["pool_offered"] += offered
        self._counts["pool_chosen"] += chosen
        self._pool_since_merge = [0, 0]

    def _begin_pass(self, sampler: TeachingSampler) -> Tensor:
        """The ids of the lesson that ``sampler`` begins to iterate, ascending. Collective."""
        with self._teaching():
            assert self._harvest is not None and self._lessons is not None
            self._merge()
            self._sampler = sampler
            epoch = sampler._epoch
            if self._plan.is_full(epoch):
                ids, in_lesson = torch.arange(self._num_examples), None
            else:
                if self._counts["passes"] > 0 and not bool(self._harvest.store.visits.any()):
                    warnings.warn(
                        f"attent: epoch {epoch} is taught and no score was ever recorded, so its examples are drawn at"
                        " random: call teacher.record(example_ids, scores) after each step",
                        stacklevel=3,
                    )
                ids = self._lessons.of_epoch(epoch, self._plan, resumed=sampler._start > 0).index
                in_lesson = torch.zeros(self._num_examples, dtype=torch.bool)
                in_lesson[ids] = True
            if self._harvest.begin_pass(epoch, in_lesson):
                self._counts["passes"] += 1
                self._counts["offered"] += self._num_examples
                self._counts["asked"] += len(ids)
            return ids
