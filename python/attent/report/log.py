"""The teaching log: one JSON object a line, appended as the run goes, so that a killed run has a report too.

| event | when | what |
|---|---|---|
| ``run`` | at the start, and again when resumed | settings, N, planned sizes; earlier events beyond ``step`` are void |
| ``metric`` | as measured | ``name``, ``value`` |
| ``lesson`` | at each epoch's end | sizes, seconds, score histogram, coverage, turnover, examples to look at |

Every event has ``step`` and ``seconds``, the measured seconds of training so far (teaching included, evaluation between
epochs not; a resumed run goes on counting).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import teacher_state
from .._checks import check_tensor, refuse
from .pictures import as_data_uri

if TYPE_CHECKING:
    from ..teacher import Teacher

FILE = "teaching.jsonl"
VERSION = 1
# Forty bins a decade: a factor of 1.06 each. The outermost two take what lies beyond (scores of 0 among it).
DECADES, PER_DECADE = (-6, 3), 40
LENGTH_BINS = 8
SHOWN = 20  # examples named of each kind
STALE_VISITS = 2  # scores since the lowest one, for an example to be suspected
SUSPECTED_SHARE = 0.02


class TeachingLog:
    """Writes ``teaching.jsonl`` of a teacher's run. One process writes it: in a distributed run, rank 0.

    Args:
        folder: where the file goes; it is made. An existing log is taken up where ``step`` stands.
        teacher: whose run it is; made with ``num_examples`` and ``total_epochs``.
        step: optimizer steps done before; 0 starts a new log.
        group_names: what classes or sources are called, by number.
        show: text of an example by its id, for the lists of examples; None: their ids only.
        picture: image of an example by its id, ``[H, W]``, ``[1, H, W]`` or ``[3, H, W]``, uint8 or floats from 0 to 1,
            for the same lists; shrunk to 64 pixels. None: no images.

    Raises:
        ValueError: the teacher has no epochs; ``picture`` returns something else than an image.

    >>> import tempfile
    >>> teacher = attent.Teacher(4, total_epochs=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     log = TeachingLog(folder, teacher)
    ...     for i in teacher.sampler():
    ...         teacher.record(torch.tensor([i]), torch.rand(1))
    ...     log.metric("accuracy", 0.5, step=4)
    ...     log.lesson(step=4)
    ...     len(read_log(folder))
    3
    """

    def __init__(
        self,
        folder: str | Path,
        teacher: Teacher,
        *,
        step: int = 0,
        group_names: list[str] | None = None,
        show: Callable[[int], str] | None = None,
        picture: Callable[[int], Tensor] | None = None,
    ) -> None:
        teacher._need_epochs("TeachingLog")
        self._teacher = teacher
        self._show, self._picture = show, picture
        self._path = Path(folder) / FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if step == 0:
            self._path.write_text("")
        elif self._path.is_file() and not self._path.read_bytes().endswith(b"\n"):
            with open(self._path, "a", encoding="utf-8") as file:  # a killed run's last line must not take in ours
                file.write("\n")
        settings = {name: value for name, value in teacher_state.settings(teacher).items() if name != "groups"}
        self._write(
            "run",
            step,
            version=VERSION,
            num_examples=teacher.num_examples,
            epoch_sizes=teacher.epoch_sizes(),
            settings=settings,
            group_names=group_names,
        )

    def metric(self, name: str, value: float, step: int) -> None:
        """Note a figure of the trainer's, such as a loss: its ``name``, its ``value``, the optimizer ``step`` it is of.

        Values that are not finite are left out.
        """
        if math.isfinite(value):
            self._write("metric", step, name=name, value=float(value))

    def lesson(self, step: int, groups: Tensor | None = None, lengths: Tensor | None = None) -> None:
        """Note how an epoch went, which ended at optimizer ``step``.

        ``groups``, ``lengths`` int ``[N]``: class and tokens of each example, −1: unknown.

        In a distributed run, after :meth:`attent.Teacher.state_dict` or another merge; this one is no collective.

        Raises:
            ValueError: no epoch was begun; ``groups`` or ``lengths`` are not int ``[N]``.
        """
        teacher = self._teacher
        harvest, lessons = teacher._harvest, teacher._lessons
        assert harvest is not None and lessons is not None
        summary = teacher.summary()
        n, store, epoch = harvest.store.num_examples, harvest.store, harvest.epoch
        if epoch < 0:
            refuse("lesson", "a teacher that has not begun an epoch", "one whose sampler was iterated")
        chosen = torch.ones(n, dtype=torch.bool) if harvest._in_lesson is None else harvest._in_lesson
        coverage = {}
        for name, of in (("group", groups), ("length", lengths)):
            if of is not None:
                check_tensor(f"{name}s", of, f"int [N={n}]", shape=(n,))
                bins, labels = _by_group(of.cpu().long()) if name == "group" else _by_length(of.cpu().long())
                coverage[name] = {
                    "labels": labels,
                    "examples": _count(bins, torch.ones_like(chosen), len(labels)),
                    "chosen": _count(bins, chosen, len(labels)),
                    "never_seen": _count(bins, store.visits == 0, len(labels)),
                }
        suspects = store.demoted(STALE_VISITS, SUSPECTED_SHARE)
        always = torch.zeros(n, dtype=torch.bool)
        if lessons.drawn >= 2:
            always[summary["always_chosen_ids"]] = True
        self._write(
            "lesson",
            step,
            epoch=epoch,
            full=teacher._plan.is_full(epoch),
            asked=int(chosen.sum()),
            trained_on=int(harvest.trained.sum()),
            teaching_seconds=summary["teaching_seconds"],
            saved_seconds=summary["saved_seconds"],
            saved_seconds_are=summary["saved_seconds_are"],
            histogram=_histogram(store.score),
            quantiles=_quantiles(store.score),
            turnover=lessons.turnover[-1] if lessons.turnover and not teacher._plan.is_full(epoch) else None,
            lessons_drawn=lessons.drawn,
            nonfinite_scores=store.nonfinite,
            coverage=coverage,
            never_seen=self._examples(store.visits == 0, groups),
            always_chosen=self._examples(always, groups),
            suspected=self._examples(suspects, groups),
        )

    def _examples(self, which: Tensor, groups: Tensor | None) -> dict[str, Any]:
        """How many, and the first of them by score (those without one by id)."""
        assert self._teacher._harvest is not None
        ids = which.nonzero().squeeze(1)
        score = self._teacher._harvest.store.score[ids]
        first = ids[score.nan_to_num(nan=-1.0).argsort(descending=True, stable=True)][:SHOWN].tolist()
        scores = self._teacher._harvest.store.score
        return {
            "count": len(ids),
            "first": [
                {
                    "id": i,
                    "score": float(scores[i]) if bool(scores[i].isfinite()) else None,
                    "group": int(groups[i]) if groups is not None and groups[i] >= 0 else None,
                    "text": None if self._show is None else self._show(i)[:300],
                    "picture": None if self._picture is None else as_data_uri(self._picture(i)),
                }
                for i in first
            ],
        }

    def _write(self, event: str, step: int, **values: Any) -> None:
        seconds = self._teacher._harvest.seconds() if self._teacher._harvest is not None else 0.0
        line = json.dumps({"event": event, "step": step, "seconds": seconds, **values}, ensure_ascii=False)
        with open(self._path, "a", encoding="utf-8") as file:  # opened each time: a killed run leaves whole lines
            file.write(line + "\n")


def read_log(run: str | Path) -> list[dict[str, Any]]:
    """The events of a run, a dict each, without those that a resumed run trained anew.

    ``run``: the run's folder, or its ``teaching.jsonl``. Each event has ``event`` (``"run"``, ``"metric"`` or
    ``"lesson"``), ``step`` and ``seconds``.

    Raises:
        ValueError: there is no log in ``run``, or it is another version's.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     TeachingLog(folder, attent.Teacher(4, total_epochs=2)).metric("loss", 1.5, step=1)
    ...     [(event["event"], event["step"]) for event in read_log(folder)]
    [('run', 0), ('metric', 1)]
    """
    path = Path(run) / FILE if Path(run).is_dir() else Path(run)
    if not path.is_file():
        refuse("run", f"{run}, without {FILE}", "a folder that TeachingTrainer or attent.report.TeachingLog wrote to")
    events: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that a killed run was writing
        if event["event"] == "run":
            if event["version"] != VERSION:
                refuse("run", f"a log of version {event['version']}", f"version {VERSION}, which this release reads")
            events = [earlier for earlier in events if earlier["step"] <= event["step"]]
        events.append(event)
    if not any(event["event"] == "run" for event in events):
        refuse("run", f"{path}, which holds no run", "a log that TeachingLog wrote")
    return events


# -------------------------------------------------------------------------------------------------------------- figures


def bin_edges() -> list[float]:
    """The inner edges of the score histogram."""
    return [10 ** (DECADES[0] + i / PER_DECADE) for i in range((DECADES[1] - DECADES[0]) * PER_DECADE + 1)]


def _histogram(score: Tensor) -> dict[str, int]:
    """Counts by bin, those not empty: bin i lies below the i-th edge."""
    known = score[score.isfinite()].double()
    counts = torch.bucketize(known, torch.tensor(bin_edges(), dtype=torch.float64), right=True).bincount()
    return {str(i): int(counts[i]) for i in counts.nonzero().squeeze(1).tolist()}


def _quantiles(score: Tensor) -> list[float]:
    """5, 25, 50, 75 and 95 % of the scores."""
    known = score[score.isfinite()].double().sort().values
    if len(known) == 0:
        return []
    return [float(known[min(int(share * len(known)), len(known) - 1)]) for share in (0.05, 0.25, 0.5, 0.75, 0.95)]


def _by_group(groups: Tensor) -> tuple[Tensor, list[str]]:
    return groups, [str(group) for group in range(int(groups.max()) + 1)]


def _by_length(lengths: Tensor) -> tuple[Tensor, list[str]]:
    """Bins of about equally many examples."""
    known = lengths[lengths >= 0].sort().values
    if len(known) == 0:
        return lengths, []
    starts = torch.unique(known[[len(known) * i // LENGTH_BINS for i in range(LENGTH_BINS)]])
    bins = (torch.bucketize(lengths, starts, right=True) - 1).masked_fill(lengths < 0, -1)
    ends = [*(starts[1:] - 1).tolist(), int(known[-1])]
    return bins, [f"{a}–{b}" if a != b else f"{a}" for a, b in zip(starts.tolist(), ends, strict=True)]


def _count(bins: Tensor, where: Tensor, number: int) -> list[int]:
    counts: list[int] = bins[where & (bins >= 0)].bincount(minlength=number).tolist()
    return counts
