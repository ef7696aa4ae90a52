"""A teacher's state: what is saved, and what a saved state must be like to be loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._checks import check_int, check_number, check_tensor, describe, refuse
from .distributed import rank_and_world
from .lesson import Lesson
from .store import ScoreStore

if TYPE_CHECKING:
    from .harvest import Harvest
    from .teacher import Teacher

VERSION = 1
_KEYS = {"version", "settings", "anneal_from", "steps", "position", "counts", "seconds", "lessons", "harvest"}


def settings(teacher: Teacher) -> dict[str, Any]:
    """What a teacher was made with; a state fits teachers with the same settings only."""
    plan, policy = teacher._plan, teacher._policy
    return {
        "num_examples": teacher.num_examples,
        f"total_{plan.unit}s": plan.total,
        "ratio": plan.ratio.describe(),
        "temperature": policy.temperature,
        "floor": policy.floor,
        "warmup": plan.warmup,
        "anneal_start": plan.anneal_start,
        "reweight": policy.reweight,
        "groups": None if policy.groups is None else int(policy.groups.max()) + 1,
        "demote_after": policy.demote_after,
        "seed": policy.seed,
        "interval": plan.interval.describe(),
    }


def save(teacher: Teacher) -> dict[str, Any]:
    """The state of a teacher whose records are merged; nothing in it is shared with the teacher."""
    harvest, lessons, sampler = teacher._harvest, teacher._lessons, teacher._sampler
    lesson = None if lessons is None else lessons.latest
    if sampler is None:
        position = dict(zip(("epoch", "position"), teacher._resume, strict=True))
    else:
        own = range(sampler.num_replicas) if rank_and_world()[1] > 1 else [sampler.rank]
        position = sampler._position(own)
    return {
        "version": VERSION,
        "settings": settings(teacher),
        "anneal_from": teacher._plan.full_from,
        "steps": teacher._steps,
        "position": position,
        "counts": dict(teacher._counts),
        "seconds": {"teaching": teacher._teaching_seconds},
        "lessons": None
        if lessons is None
        else {
            "drawn": lessons.drawn,
            "turnover": list(lessons.turnover),
            "latest": None
            if lesson is None
            else {"epoch": lesson.epoch, "index": lesson.index.clone(), "inclusion": lesson.inclusion.clone()},
        },
        "harvest": None
        if harvest is None
        else {
            "epoch": harvest.epoch,
            "trained": harvest.trained.clone(),
            "trained_on": harvest.trained_on,
            "training_seconds": harvest.seconds(),
            "rows_recorded": harvest.rows_recorded,
            "nonfinite": harvest.store.nonfinite,
            **{name: getattr(harvest.store, name).clone() for name in ScoreStore.TENSORS},
        },
    }


def load(teacher: Teacher, state: Mapping[str, Any]) -> None:
    """Put a saved state into a teacher made with the same settings; nothing changes if it does not fit."""
    state = _part("state", state, _KEYS)
    if not isinstance(state["version"], int) or state["version"] != VERSION:
        refuse("state['version']", describe(state["version"]), f"{VERSION}, the version this release writes")
    own_settings = settings(teacher)
    saved_settings = _part("state['settings']", state["settings"], ())
    for name, value in own_settings.items():
        saved = saved_settings.get(name, "nothing")
        if not _equal(saved, value):
            got = f"{describe(saved)} in the saved state"
            refuse(name, got, f"this teacher's {value!r}; make the Teacher with what it was saved with")
    anneal_from, steps = (_count(f"state[{name!r}]", state[name]) for name in ("anneal_from", "steps"))
    position = _counts("state['position']", state["position"], ("epoch", "position"))
    counts = _counts("state['counts']", state["counts"], teacher._counts)
    seconds = _part("state['seconds']", state["seconds"], ("teaching",))
    teaching = check_number("state['seconds']['teaching']", seconds["teaching"], low=0)
    lessons = harvest = None
    if teacher._harvest is not None and teacher._lessons is not None:
        lessons = _lessons(teacher._num_examples, state["lessons"])
        harvest = _harvest(teacher._harvest, state["harvest"])

    # All of it fits: from here on nothing raises.
    teacher._plan = replace(teacher._plan, full_from=anneal_from)
    teacher._steps = steps
    teacher._counts = counts
    teacher._pool_since_merge = [0, 0]
    teacher._teaching_seconds = teaching
    teacher._sampler, teacher._resume = None, (position["epoch"], position["position"])
    if lessons is not None and teacher._lessons is not None:
        latest, teacher._lessons.drawn, teacher._lessons.turnover = lessons
        teacher._lessons.restore(latest)
    if harvest is not None and teacher._harvest is not None:
        tensors, numbers, trained = harvest
        for name, tensor in tensors.items():
            setattr(teacher._harvest.store, name, tensor)
        teacher._harvest.store.nonfinite = int(numbers["nonfinite"])
        teacher._harvest.trained_on = int(numbers["trained_on"])
        teacher._harvest.rows_recorded = int(numbers["rows_recorded"])
        teacher._harvest.training_seconds = numbers["training_seconds"]
        teacher._harvest.restore_pass(int(numbers["epoch"]), trained)
        for sampler in teacher._harvest.samplers:
            sampler._reset(*teacher._resume)


def _lessons(n: int, saved: object) -> tuple[Lesson | None, int, list[float]]:
    """The latest lesson, how many were drawn, and how much each changed."""
    name = "state['lessons']"
    part = _part(name, saved, ("drawn", "turnover", "latest"))
    drawn = _count(f"{name}['drawn']", part["drawn"])
    turnover = part["turnover"]
    if not isinstance(turnover, list):
        refuse(f"{name}['turnover']", describe(turnover), "a list of shares in [0, 1]")
    turnover = [check_number(f"{name}['turnover']", share, low=0, high=1) for share in turnover]
    return _lesson(n, part["latest"]), drawn, turnover


def _lesson(n: int, saved: object) -> Lesson | None:
    if saved is None:
        return None
    name = "state['lessons']['latest']"
    part = _part(name, saved, ("epoch", "index", "inclusion"))
    epoch = _count(f"{name}['epoch']", part["epoch"])
    index = _tensor(f"{name}['index']", part["index"], None, torch.int64)
    inclusion = _tensor(f"{name}['inclusion']", part["inclusion"], len(index), torch.float32)
    _within(f"{name}['index']", index, (index >= 0) & (index < n), f"ids in [0, {n})")
    _within(f"{name}['index']", index, index.diff() > 0, "rising ids, each once")
    _within(f"{name}['inclusion']", inclusion, (inclusion > 0) & (inclusion <= 1), "probabilities in (0, 1]")
    return Lesson(epoch, index, inclusion)


def _harvest(harvest: Harvest, saved: object) -> tuple[dict[str, Tensor], dict[str, float], Tensor]:
    """The store's tensors, the numbers beside them, and who has been trained on in the running pass."""
    name, n = "state['harvest']", harvest.store.num_examples
    counted = ("trained_on", "rows_recorded", "nonfinite")
    part = _part(name, saved, (*ScoreStore.TENSORS, *counted, "epoch", "trained", "training_seconds"))
    tensors = {
        tensor: _tensor(f"{name}[{tensor!r}]", part[tensor], n, getattr(harvest.store, tensor).dtype)
        for tensor in ScoreStore.TENSORS
    }
    for tensor, values in tensors.items():
        if tensor == "score":
            right = values.isnan() | ((values >= 0) & values.isfinite())
            takes = "scores, finite and at least 0, or NaN where there is none"
        elif values.is_floating_point():
            right, takes = values >= 0, "scores from 0, inf where there is none"
        else:
            low = -1 if tensor == "last_seen" else 0
            right, takes = values >= low, f"whole numbers from {low}"
        _within(f"{name}[{tensor!r}]", values, right, takes)
    numbers: dict[str, float] = {one: _count(f"{name}[{one!r}]", part[one]) for one in counted}
    check_int(f"{name}['epoch']", part["epoch"], low=-1)
    numbers["epoch"] = part["epoch"]
    numbers["training_seconds"] = check_number(f"{name}['training_seconds']", part["training_seconds"], low=0)
    return tensors, numbers, _tensor(f"{name}['trained']", part["trained"], n, torch.bool)


# ------------------------------------------------------------------------------------------------------ what is checked


def _part(name: str, value: object, keys: Iterable[str]) -> Mapping[str, Any]:
    """A mapping that has all of ``keys``; what more it has is left alone."""
    if not isinstance(value, Mapping):
        refuse(name, describe(value), "what Teacher.state_dict() returned")
    if missing := sorted(set(keys) - set(value)):
        refuse(name, f"one without {missing}", "what Teacher.state_dict() returned")
    return value


def _count(name: str, value: Any) -> int:
    check_int(name, value, low=0)
    return int(value)


def _counts(name: str, value: object, keys: Iterable[str]) -> dict[str, int]:
    keys = list(keys)
    part = _part(name, value, keys)
    return {key: _count(f"{name}[{key!r}]", part[key]) for key in keys}


def _tensor(name: str, value: object, size: int | None, dtype: torch.dtype) -> Tensor:
    """A copy of a saved tensor, on the CPU."""
    takes = f"{str(dtype).removeprefix('torch.')} [{'k' if size is None else size}]"
    tensor = check_tensor(name, value, takes, shape=(size,), dtypes=(dtype,))
    if tensor.is_meta:
        refuse(name, describe(tensor), f"{takes} with values")
    return tensor.cpu().clone()


def _within(name: str, values: Tensor, right: Tensor, takes: str) -> None:
    """Refuse a tensor if one of its values is not right."""
    if not bool(right.all()):
        refuse(name, f"one with {values[: len(right)][~right][0].item()}", takes)


def _equal(saved: object, own: object) -> bool:
    """Whether a saved setting is the teacher's; settings are numbers, words and mappings of them."""
    try:
        return bool(saved == own)
    except (RuntimeError, TypeError, ValueError):  # a tensor or an array, itself or within
        return False
