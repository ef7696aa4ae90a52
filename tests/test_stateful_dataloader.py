"""torchdata's StatefulDataLoader over a teacher's sampler: saved anywhere, it goes on exactly, workers or not."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

import attent
from tests.ranks import on_ranks

stateful_dataloader = pytest.importorskip("torchdata.stateful_dataloader")

N, EPOCHS = 42, 4
KINDS = ["sampler", "batch sampler", "packed"]


def make(kind: str, workers: int, batch: int = 5) -> tuple[attent.Teacher, attent.TeachingSampler, Any]:
    teacher = attent.Teacher(N, total_epochs=EPOCHS, ratio=0.6)
    data = attent.indexed(TensorDataset(torch.arange(N)))
    common: dict[str, Any] = {"num_workers": workers, "prefetch_factor": 4 if workers else None}
    if kind == "sampler":
        sampler = teacher.sampler()
        common |= {"batch_size": batch, "sampler": sampler, "drop_last": True}
    else:
        lengths = [1 + i % 7 for i in range(N)]
        sampler = teacher.sampler().packed(lengths, 16) if kind == "packed" else teacher.sampler(batch_size=batch)
        common["batch_sampler"] = sampler
    return teacher, sampler, stateful_dataloader.StatefulDataLoader(data, **common)


def batches(teacher: attent.Teacher, sampler: attent.TeachingSampler, loader: Any) -> Iterator[tuple[int, list[int]]]:
    for epoch in range(sampler.epoch, EPOCHS):
        for ids, _ in loader:
            teacher.record(ids, (ids * 37 % 11 + 1) * (1 + (ids + epoch) % 3) / 10)
            yield epoch, ids.tolist()


def saved(teacher: attent.Teacher, loader: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"teacher": teacher.state_dict(), "loader": loader.state_dict()}, file)
    return file.getvalue()


def load(file: bytes) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(file), weights_only=True)
    return state


def check_stops(kind: str, workers: int, stops: list[int], expected: list[tuple[int, list[int]]]) -> None:
    for number, stop in enumerate(stops):
        teacher, sampler, loader = make(kind, workers)
        run = batches(teacher, sampler, loader)
        for _ in range(stop):
            next(run)
        state = load(saved(teacher, loader))
        again = make(kind, workers)
        order = [(again[0], "teacher"), (again[2], "loader")]
        for who, name in order if number % 2 else reversed(order):  # in either order
            who.load_state_dict(state[name])
        assert list(batches(*again)) == expected[stop:], stop


@pytest.mark.parametrize("kind", KINDS)
def test_saved_after_any_batch_the_rest_is_the_same(kind: str) -> None:
    expected = list(batches(*make(kind, 0)))
    check_stops(kind, 0, list(range(len(expected) + 1)), expected)


def ends(expected: list[tuple[int, list[int]]]) -> list[int]:
    """Batches before each epoch's end."""
    return [sum(epoch <= last for epoch, _ in expected) for last in range(EPOCHS - 1)]


@pytest.mark.parametrize("kind", ["sampler", "batch sampler", pytest.param("packed", marks=pytest.mark.slow)])
def test_what_workers_fetched_ahead_does_not_count(kind: str) -> None:
    expected = list(batches(*make(kind, 0)))
    # Within an epoch and at the end of a full and of a reduced one, by when workers have all of it.
    check_stops(kind, 2, [random.randrange(1, 8), *ends(expected)[:2]], expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_at_many_places_with_workers(kind: str) -> None:
    expected = list(batches(*make(kind, 0)))
    check_stops(kind, 2, [*random.sample(range(1, len(expected)), 3), *ends(expected), len(expected)], expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_saved_between_epochs_the_next_one_follows(workers: int) -> None:
    expected = list(batches(*make("sampler", 0)))
    teacher, _, loader = make("sampler", workers)
    assert [(0, ids.tolist()) for ids, _ in recorded(teacher, loader)] == expected[: ends(expected)[0]]
    state = load(saved(teacher, loader))
    again = make("sampler", workers)
    again[0].load_state_dict(state["teacher"])
    again[2].load_state_dict(state["loader"])
    assert list(batches(*again)) == expected[ends(expected)[0] :]


def recorded(teacher: attent.Teacher, loader: Any) -> Iterator[Any]:
    for ids, x in loader:
        teacher.record(ids, (ids * 37 % 11 + 1) * (1 + ids % 3) / 10)
        yield ids, x


def on_rank(rank: int, world: int, files: list[bytes], steps: int) -> tuple[list[list[int]], bytes]:
    teacher, sampler, loader = make("batch sampler", 1, batch=4 // world)
    if files:
        teacher.load_state_dict(load(files[0])["teacher"])  # any rank's
        if len(files) == world:
            loader.load_state_dict(load(files[rank])["loader"])
    run = batches(teacher, sampler, loader)
    taken = [ids for _, ids in (run if steps < 0 else (next(run) for _ in range(steps)))]
    return taken, saved(teacher, loader)


@pytest.mark.slow
def test_two_ranks_go_on_exactly_and_one_rank_with_the_teachers_state_alone(tmp_path: Path) -> None:
    def together(ranks: list[tuple[list[list[int]], bytes]]) -> list[list[int]]:
        return [sorted(one + other) for one, other in zip(*(batches for batches, _ in ranks), strict=True)]

    whole = together(on_ranks(2, on_rank, tmp_path, 2, [], -1))
    first = on_ranks(2, on_rank, tmp_path, 2, [], 13)  # 10 steps, then 6: within the first reduced epoch
    files = [file for _, file in first]
    rest = together(on_ranks(2, on_rank, tmp_path, 2, files, -1))
    assert together(first) + rest == whole
    # Loaders' states belong to their ranks; the teacher's fits any number of them.
    alone, _ = on_ranks(1, on_rank, tmp_path, 1, files, 3)[0]
    assert [sorted(batch) for batch in alone] == whole[13:16]
