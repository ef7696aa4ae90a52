"""A teacher's state: what is saved, and what a saved state must be like to be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._checks import check_int, check_tensor, describe, refuse
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
    if not isinstance(state, Mapping) or not set(state) >= _KEYS:
        missing = sorted(_KEYS - set(state)) if isinstance(state, Mapping) else None
        refuse("state", f"one without {missing}" if missing else describe(state), "what Teacher.state_dict() returned")
    if state["version"] != VERSION:
        refuse("state['version']", state["version"], f"{VERSION}, the version this release writes")
    for name, value in settings(teacher).items():
        if state["settings"].get(name, "nothing") != value:
            got = f"{state['settings'].get(name, 'nothing')!r} in the saved state"
            refuse(name, got, f"this teacher's {value!r}; make the Teacher with what it was saved with")
    for name in ("anneal_from", "steps"):
        check_int(f"state[{name!r}]", state[name], low=0)
    position = (state["position"]["epoch"], state["position"]["position"])
    for name, value in zip(("epoch", "position"), position, strict=True):
        check_int(f"state['position'][{name!r}]", value, low=0)
    if teacher._harvest is not None and teacher._lessons is not None:
        lesson = _load_lesson(teacher._num_examples, state["lessons"]["latest"])
        _load_harvest(teacher._harvest, state["harvest"])
        teacher._lessons.restore(lesson)
        teacher._lessons.drawn = state["lessons"]["drawn"]
        teacher._lessons.turnover = list(state["lessons"]["turnover"])

    teacher._plan = replace(teacher._plan, full_from=state["anneal_from"])
    teacher._steps = state["steps"]
    teacher._counts = {name: state["counts"][name] for name in teacher._counts}
    teacher._pool_since_merge = [0, 0]
    teacher._teaching_seconds = state["seconds"]["teaching"]
    teacher._sampler, teacher._resume = None, position
    if teacher._harvest is not None:
        for sampler in teacher._harvest.samplers:
            sampler._reset(*position)


def _load_lesson(n: int, saved: Mapping[str, Any] | None) -> Lesson | None:
    if saved is None:
        return None
    index = _tensor("state['lessons']['latest']['index']", saved["index"], None, torch.int64)
    name = "state['lessons']['latest']['inclusion']"
    inclusion = _tensor(name, saved["inclusion"], len(index), torch.float32)
    if len(index) > 0 and not (int(index.min()) >= 0 and int(index.max()) < n):
        refuse(
            "state['lessons']['latest']['index']",
            f"ids in [{int(index.min())}, {int(index.max())}]",
            f"ids in [0, {n})",
        )
    return Lesson(saved["epoch"], index, inclusion)


def _load_harvest(harvest: Harvest, saved: Mapping[str, Any]) -> None:
    n = harvest.store.num_examples
    tensors = {
        name: _tensor(f"state['harvest'][{name!r}]", saved[name], n, getattr(harvest.store, name).dtype)
        for name in ScoreStore.TENSORS
    }
    trained = _tensor("state['harvest']['trained']", saved["trained"], n, torch.bool)
    for name, tensor in tensors.items():
        setattr(harvest.store, name, tensor)
    harvest.store.nonfinite = saved["nonfinite"]
    harvest.trained_on = saved["trained_on"]
    harvest.training_seconds = saved["training_seconds"]
    harvest.rows_recorded = saved["rows_recorded"]
    harvest.restore_pass(saved["epoch"], trained)


def _tensor(name: str, value: object, size: int | None, dtype: torch.dtype) -> Tensor:
    """A copy of a saved tensor, on the CPU."""
    takes = f"{str(dtype).removeprefix('torch.')} [{'k' if size is None else size}]"
    return check_tensor(name, value, takes, shape=(size,), dtypes=(dtype,)).cpu().clone()
