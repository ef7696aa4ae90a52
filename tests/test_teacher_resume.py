"""Exact resume: killed at any batch, with workers fetching ahead, the rest of the run is the same to the last id."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import attent

EPOCHS = 4
N = 42
LENGTHS = [1 + i % 7 for i in range(N)]


def score(ids: Tensor, epoch: int) -> Tensor:
    """A score for each example that changes with the epoch, so that lessons differ."""
    return (ids * 37 % 11 + 1) * (1 + (ids + epoch) % 3) / 10


def make(kind: str, workers: int, **options: Any) -> tuple[attent.Teacher, attent.TeachingSampler, DataLoader[Any]]:
    teacher = attent.Teacher(N, total_epochs=EPOCHS, ratio=0.6, reweight="inverse", **options)
    data = attent.indexed(TensorDataset(torch.arange(N)))
    common: dict[str, Any] = {"num_workers": workers, "prefetch_factor": 4 if workers else None}
    if kind == "sampler":
        sampler = teacher.sampler()
        return teacher, sampler, DataLoader(data, 5, sampler=sampler, drop_last=True, **common)
    if kind == "keeps tails":
        sampler = teacher.sampler(drop_last=False)
        return teacher, sampler, DataLoader(data, 5, sampler=sampler, **common)
    sampler = teacher.sampler().packed(LENGTHS, 16) if kind == "packed" else teacher.sampler(batch_size=5)
    return teacher, sampler, DataLoader(data, batch_sampler=sampler, **common)


def batches(teacher: attent.Teacher, sampler: attent.TeachingSampler, loader: DataLoader[Any]) -> Iterator[Any]:
    """A training loop that yields what it trained on: ids and their weights."""
    for epoch in range(sampler.epoch, EPOCHS):
        for ids, _ in loader:
            weights = teacher.weights(ids)
            teacher.record(ids, score(ids, epoch))
            yield epoch, ids.tolist(), weights.tolist()


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


KINDS = ["sampler", "keeps tails", "batch sampler", "packed"]


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_batch_the_rest_is_the_same(kind: str) -> None:
    expected = list(batches(*make(kind, 0)))
    assert len({epoch for epoch, _, _ in expected}) == EPOCHS
    for stop in range(len(expected) + 1):
        teacher, sampler, loader = make(kind, 0)
        run = batches(teacher, sampler, loader)
        for _ in range(stop):
            next(run)
        state = through_a_file(teacher.state_dict())
        again = make(kind, 0)
        again[0].load_state_dict(state)
        assert list(batches(*again)) == expected[stop:]


@pytest.mark.parametrize("kind", KINDS)
def test_what_workers_fetched_ahead_does_not_count(kind: str) -> None:
    expected = list(batches(*make(kind, 0)))
    stops = [*random.sample(range(1, len(expected)), 2), len(expected) - 1]  # the last: all of it is fetched already
    for stop in stops:
        teacher, sampler, loader = make(kind, 2)
        run = batches(teacher, sampler, loader)
        for _ in range(stop):
            next(run)
        again = make(kind, 2)
        again[0].load_state_dict(through_a_file(teacher.state_dict()))
        assert list(batches(*again)) == expected[stop:]


def test_a_run_can_be_resumed_again_and_again() -> None:
    expected = list(batches(*make("batch sampler", 0)))
    got: list[Any] = []
    state = None
    while len(got) < len(expected):
        teacher, sampler, loader = make("batch sampler", 0)
        if state is not None:
            teacher.load_state_dict(state)
        got.append(next(batches(teacher, sampler, loader)))
        state = through_a_file(teacher.state_dict())
    assert got == expected


def test_the_loop_may_name_its_epochs() -> None:
    expected = list(batches(*make("batch sampler", 0)))
    for stop in range(len(expected)):
        teacher, sampler, loader = make("batch sampler", 0)
        run = batches(teacher, sampler, loader)
        for _ in range(stop):
            next(run)
        again, resumed, loader = make("batch sampler", 0)
        again.load_state_dict(teacher.state_dict())
        rest = []
        for epoch in range(resumed.epoch, EPOCHS):
            resumed.set_epoch(epoch)
            for ids, _ in loader:
                rest.append((epoch, ids.tolist(), again.weights(ids).tolist()))
                again.record(ids, score(ids, epoch))
        assert rest == expected[stop:]


def test_a_sampler_made_after_loading_stands_at_the_saved_position() -> None:
    teacher, sampler, loader = make("sampler", 0)
    run = batches(teacher, sampler, loader)
    for _ in range(11):
        next(run)
    again = attent.Teacher(N, total_epochs=EPOCHS, ratio=0.6, reweight="inverse")
    again.load_state_dict(teacher.state_dict())
    assert again.sampler().state_dict() == sampler.state_dict() == {"epoch": 1, "position": 15}


def test_a_state_loaded_into_the_running_teacher_takes_it_back() -> None:
    teacher, sampler, loader = make("batch sampler", 0)
    run = batches(teacher, sampler, loader)
    for _ in range(10):
        next(run)
    state = teacher.state_dict()
    first = [next(run) for _ in range(7)]
    teacher.load_state_dict(state)
    run = batches(teacher, sampler, loader)
    assert [next(run) for _ in range(7)] == first


def test_a_state_shares_nothing_with_its_teacher() -> None:
    teacher, sampler, loader = make("batch sampler", 0)
    run = batches(teacher, sampler, loader)
    for _ in range(10):
        next(run)
    state = teacher.state_dict()
    frozen = through_a_file(state)
    for _ in run:
        pass
    assert str(state) == str(frozen)
    again = make("batch sampler", 0)
    again[0].load_state_dict(state)
    for _ in batches(*again):
        pass
    assert str(state) == str(frozen)


def test_the_account_goes_on_where_it_stood() -> None:
    whole = make("batch sampler", 0)
    for _ in batches(*whole):
        pass
    teacher, sampler, loader = make("batch sampler", 0)
    run = batches(teacher, sampler, loader)
    for _ in range(13):
        next(run)
    again = make("batch sampler", 0)
    again[0].load_state_dict(teacher.state_dict())
    for _ in batches(*again):
        pass
    one, two = whole[0].summary(), again[0].summary()
    for key in one:
        if "seconds" not in key:
            assert str(one[key]) == str(two[key]), key
    assert two["training_seconds"] > 0 and two["saved_seconds_are"] == "estimated"


def test_an_example_recorded_again_after_a_resume_is_not_counted_again() -> None:
    teacher, sampler, _ = make("batch sampler", 0)
    batch = torch.tensor(next(iter(sampler)))
    teacher.record(batch, torch.ones(5))
    again = make("batch sampler", 0)[0]
    again.load_state_dict(teacher.state_dict())
    again.record(batch, torch.ones(5))
    assert again.summary()["examples_trained_on"] == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_whose_tail_the_loader_drops_is_over_all_the_same(workers: int) -> None:
    teacher, sampler, loader = make("sampler", workers)  # 42 in batches of 5: the loader never delivers the last 2
    for epoch, size in enumerate(teacher.epoch_sizes()[:-1]):
        for number, (ids, _) in enumerate(loader, start=1):
            assert teacher.state_dict()["position"]["epoch"] == epoch  # even if workers fetched all of it already
            teacher.record(ids, score(ids, epoch))
            if number < size // 5:
                assert sampler.epoch == epoch and len(sampler) == size
        assert sampler.epoch == epoch + 1 and len(sampler) == teacher.epoch_sizes()[epoch + 1]
        assert teacher.state_dict()["position"] == {"epoch": epoch + 1, "position": 0}


def test_held_lessons_and_an_early_anneal_survive() -> None:
    def run(teacher: attent.Teacher, stop: int | None) -> list[list[int]]:
        sampler, out = teacher.sampler(), []
        for epoch in range(sampler.epoch, 8):
            out.append(list(sampler))
            ids = torch.tensor(out[-1])
            teacher.record(ids, score(ids, epoch))
            if epoch == 5:
                teacher.anneal_now()
            if epoch == stop:
                break
        return out

    def make_teacher() -> attent.Teacher:
        return attent.Teacher(N, total_epochs=8, ratio=0.5, interval=2, anneal=0.0)

    expected = run(make_teacher(), None)
    assert [len(ids) for ids in expected] == [42, 21, 21, 21, 21, 21, 42, 42]
    for stop in range(7):
        first, second = make_teacher(), make_teacher()
        run(first, stop)
        second.load_state_dict(through_a_file(first.state_dict()))
        assert run(second, None) == expected[stop + 1 :]


# ----------------------------------------------------------------------------------- loaders that save their samplers


@pytest.mark.parametrize("kind", ["batch sampler", "packed", "sampler"])
def test_an_iterators_state_is_that_of_what_it_gave_out(kind: str) -> None:
    # What torchdata's StatefulDataLoader does: it saves sampler and iterator at each index it hands to its workers, and
    # keeps the state that belongs to the batch it delivers.
    teacher, sampler, _ = make(kind, 0)
    teacher.record(torch.arange(N), score(torch.arange(N), 0))
    sampler.set_epoch(1)
    iterator = iter(sampler)
    units, states = [], [(sampler.state_dict(), iterator.state_dict())]  # type: ignore[attr-defined]
    for unit in iterator:
        units.append(unit)
        states.append((sampler.state_dict(), iterator.state_dict()))  # type: ignore[attr-defined]
    saved = teacher.state_dict()
    for given_out, (of_sampler, of_iterator) in enumerate(states):
        again, resumed, _ = make(kind, 0)
        again.load_state_dict(saved)
        resumed.load_state_dict(of_sampler)
        rest = iter(resumed)
        rest.load_state_dict(of_iterator)  # type: ignore[attr-defined]
        assert list(rest) == units[given_out:]


def test_a_position_without_its_lesson_is_refused() -> None:
    sampler = attent.Teacher(N, total_epochs=EPOCHS).sampler()
    sampler.load_state_dict({"epoch": 1, "position": 5})
    with pytest.raises(ValueError, match=r"^state: got .*Teacher\.load_state_dict"):
        next(iter(sampler))
    full = attent.Teacher(N, total_epochs=EPOCHS).sampler()
    full.load_state_dict({"epoch": 0, "position": 5})  # a full epoch needs no more than the seed
    assert len(list(full)) == N - 5


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("other", "argument"),
    [
        ({"num_examples": 43}, "num_examples"),
        ({"total_epochs": 5}, "total_epochs"),
        ({"ratio": 0.5}, "ratio"),
        ({"ratio": attent.schedules.Linear(0.6, 0.6)}, "ratio"),
        ({"seed": 1}, "seed"),
        ({"floor": 0.0}, "floor"),
        ({"temperature": 0.5}, "temperature"),
        ({"warmup": 2}, "warmup"),
        ({"reweight": "inverse"}, "reweight"),
        ({"groups": torch.zeros(42, dtype=torch.int64)}, "groups"),
        ({"demote_after": 2}, "demote_after"),
        ({"interval": 2}, "interval"),
    ],
)
def test_a_state_of_other_settings_is_refused_by_the_setting(other: dict[str, Any], argument: str) -> None:
    settings: dict[str, Any] = {"num_examples": N, "total_epochs": EPOCHS, "ratio": 0.6}
    state = attent.Teacher(**settings).state_dict()
    with pytest.raises(ValueError, match=f"^{argument}: got .* in the saved state; takes this teacher's"):
        attent.Teacher(**{**settings, **other}).load_state_dict(state)


def test_a_state_of_epochs_does_not_fit_a_stream() -> None:
    with pytest.raises(ValueError, match=r"^num_examples: got 42 in the saved state"):
        attent.Teacher(total_steps=4).load_state_dict(attent.Teacher(N, total_epochs=4).state_dict())


@pytest.mark.parametrize("state", [None, {}, {"version": 1}, [1]])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match=r"^state: got "):
        attent.Teacher(N, total_epochs=4).load_state_dict(state)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 99),
        (("steps",), -1),
        (("position", "epoch"), 1.5),
        (("harvest", "score"), torch.zeros(3)),
        (("harvest", "visits"), torch.zeros(N)),
        (("harvest", "trained"), None),
        (("lessons", "latest"), {"epoch": 1, "index": torch.tensor([99]), "inclusion": torch.ones(1)}),
        (("lessons", "latest"), {"epoch": 1, "index": torch.tensor([9]), "inclusion": torch.ones(2)}),
    ],
)
def test_a_damaged_state_is_refused(path: tuple[str, ...], value: Any) -> None:
    state: Any = attent.Teacher(N, total_epochs=4).state_dict()
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=rf"^state\['{path[0]}'\]"):
        attent.Teacher(N, total_epochs=4).load_state_dict(state)


@pytest.mark.parametrize("state", [None, {"epoch": 0}, {"epoch": -1, "position": 0}, {"epoch": 0, "position": 0.5}])
def test_what_is_no_position_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match=r"^state"):
        attent.Teacher(N, total_epochs=4).sampler().load_state_dict(state)
