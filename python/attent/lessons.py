"""The lessons of a run: which one an epoch trains on, and the weights of its examples."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import refuse, values_readable
from .distributed import from_rank_0, rank_and_world
from .lesson import Lesson, draw, lesson_weights
from .plan import Plan
from .policy import Policy
from .store import ScoreStore

DEMOTED_SHARE = 0.02  # of all scored examples, the highest: guards of this kind take 1–2 %


class Lessons:
    """Draws reduced lessons as epochs come to need them, and keeps the latest."""

    def __init__(self, policy: Policy, store: ScoreStore) -> None:
        self._policy = policy
        self._store = store
        self._tables: dict[tuple[str, torch.device], Tensor] = {}  # per-example tables where they are looked up
        self.latest: Lesson | None = None
        self.drawn = 0
        self.turnover: list[float] = []  # of each lesson after the first: share that was not in the one before

    def of_epoch(self, epoch: int, plan: Plan, resumed: bool) -> Lesson:
        """The lesson of a reduced epoch: the latest if it is that epoch's, else a new draw. Collective."""
        first = plan.lesson_start(epoch)
        if self.latest is not None and self.latest.epoch == first:
            return self.latest
        if resumed:
            got = f"a position in epoch {epoch} without the lesson of that epoch"
            refuse("state", got, "Teacher.load_state_dict too, whose state holds the lesson")
        lesson = self._draw(first, plan.size(epoch, self._store.num_examples))
        if self.latest is not None and len(lesson.index) > 0:
            before = torch.zeros(self._store.num_examples, dtype=torch.bool)
            before[self.latest.index] = True
            self.turnover.append(float((~before[lesson.index]).double().mean()))
        self._store.times_chosen[lesson.index] += 1
        self.drawn += 1
        self.restore(lesson)
        return lesson

    def _draw(self, epoch: int, k: int) -> Lesson:
        """One rank draws for all: machines may differ in the last bit of a logarithm, ranks must not in the lesson."""
        lesson = Lesson(epoch, torch.empty(k, dtype=torch.int64), torch.empty(k))
        if rank_and_world()[0] == 0:
            lesson = draw(
                self._store.score.masked_fill(self.demoted(), 0.0),
                self._store.visits == 0,
                k,
                temperature=self._policy.temperature,
                floor=self._policy.floor,
                groups=self._policy.groups,
                seed=self._policy.seed,
                epoch=epoch,
            )
        return Lesson(epoch, from_rank_0(lesson.index), from_rank_0(lesson.inclusion))

    def restore(self, lesson: Lesson | None) -> None:
        """Make ``lesson`` the latest."""
        self.latest = lesson
        self._tables = {key: table for key, table in self._tables.items() if key[0] == "groups"}

    def demoted(self) -> Tensor:
        """Examples that draws leave to the floor for now, bool ``[N]``."""
        if self._policy.demote_after is None:
            return torch.zeros(self._store.num_examples, dtype=torch.bool)
        return self._store.demoted(self._policy.demote_after, DEMOTED_SHARE)

    def weights(self, example_ids: Tensor) -> Tensor:
        """Inverse-inclusion weights float32 ``[B]`` of examples of the latest lesson; NaN for others."""
        lesson, n = self.latest, self._store.num_examples
        assert lesson is not None
        on_cpu = ("weights", torch.device("cpu"))
        if on_cpu not in self._tables:
            table = torch.full((n,), torch.nan)
            table[lesson.index] = lesson_weights(lesson.inclusion)
            self._tables[on_cpu] = table
        ids = example_ids.long()
        weight = self._table("weights", self._tables[on_cpu], ids.device)[ids.clamp(0, n - 1)]
        weight = weight.masked_fill((ids < 0) | (ids >= n), torch.nan)
        if values_readable(weight) and bool(weight.isnan().any()):
            refuse("example_ids", int(ids[weight.isnan()][0]), f"ids in the lesson of epoch {lesson.epoch}")
        return weight

    def groups(self, example_ids: Tensor) -> Tensor | None:
        """The groups of examples, int64 ``[B]`` on the ids' device; None without groups."""
        if self._policy.groups is None:
            return None
        table = self._table("groups", self._policy.groups, example_ids.device)
        return table[example_ids.long().clamp(0, self._store.num_examples - 1)]

    def _table(self, name: str, host: Tensor, device: torch.device) -> Tensor:
        """A per-example table on ``device``, moved there once, so that looking ids up costs no synchronisation."""
        if (name, device) not in self._tables:
            self._tables[name, device] = host.to(device)
        return self._tables[name, device]
