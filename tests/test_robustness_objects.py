"""Objects under misuse: damaged states, copies by pickle, threads, workers, and ties by the million."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import attent

from .threads import assert_threads_agree


def taught() -> attent.Teacher:
    """A teacher in the middle of its first reduced lesson."""
    teacher = attent.Teacher(8, total_epochs=6, ratio=0.5, temperature=0.0, floor=0.0)
    sampler = teacher.sampler(batch_size=2)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for batch in sampler:
            teacher.record(torch.tensor(batch), torch.tensor(batch) / 8 + 0.1)
    return teacher


def content(teacher: attent.Teacher) -> str:
    """A teacher's state but for the seconds, which saving it adds to."""
    state = copy.deepcopy(teacher.state_dict())
    state["seconds"] = None
    return str(state)


# ------------------------------------------------------------------------------------------------------- damaged states

NO_SCORES = torch.full((8,), float("nan"))
BAD = (
    None, "x", float("nan"), -2, 0.5, True, [1], {}, torch.zeros(3), NO_SCORES,
    torch.full((8,), -5), torch.full((8,), -5, dtype=torch.int32), torch.empty(8, device="meta"),
)  # fmt: skip


def places(state: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in state.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


def test_a_damaged_state_is_refused_by_name_and_changes_nothing() -> None:
    saved, teacher = taught().state_dict(), taught()
    before = content(teacher)
    allowed = {
        ("settings", "groups"): (None,),
        ("settings", "demote_after"): (None,),
        ("lessons", "latest"): (None,),  # no lesson was drawn yet
        ("seconds", "teaching"): (0.5,),
        ("harvest", "training_seconds"): (0.5,),
        ("lessons", "turnover"): ([1],),
        ("settings", "ratio", "value"): (0.5,),
    }
    tried = 0
    for path in places(saved):
        for bad in ("missing", *BAD):
            if any(bad is good or (type(bad) is type(good) and bad == good) for good in allowed.get(path, ())):
                continue
            if bad is NO_SCORES and path == ("harvest", "score"):
                continue  # nobody has a score yet
            if bad is True and path[0] in ("settings", "version"):
                continue  # settings are compared by value, and there True == 1
            state = copy.deepcopy(saved)
            at = state
            for name in path[:-1]:
                at = at[name]
            if isinstance(bad, str) and bad == "missing":
                del at[path[-1]]
            else:
                at[path[-1]] = bad
            with pytest.raises(ValueError, match=r": got .*; "):
                teacher.load_state_dict(state)
                pytest.fail(f"{path} = {bad!r} was taken")
            tried += 1
    assert tried > 400
    assert content(teacher) == before
    for state in (None, [1], {}, "state"):
        with pytest.raises(ValueError, match=r"^state: got "):
            teacher.load_state_dict(state)  # type: ignore[arg-type]
    assert content(teacher) == before


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("lessons", "latest", "index"), torch.tensor([0, 1, 2, 8])),
        (("lessons", "latest", "index"), torch.tensor([0, 1, 1, 2])),
        (("lessons", "latest", "inclusion"), torch.tensor([0.0, 1, 1, 1])),
        (("harvest", "score"), torch.tensor([float("inf")] + [1.0] * 7)),
        (("harvest", "lowest"), torch.full((8,), -1.0)),
    ],
)
def test_values_that_no_teacher_saves_are_refused(where: tuple[str, ...], value: Tensor) -> None:
    state, teacher = taught().state_dict(), taught()
    before = content(teacher)
    at = state
    for name in where[:-1]:
        at = at[name]
    at[where[-1]] = value
    with pytest.raises(ValueError, match=f"'{where[-1]}'"):
        teacher.load_state_dict(state)
    assert content(teacher) == before


def test_what_is_more_in_a_state_is_left_alone() -> None:
    teacher = taught()
    teacher.load_state_dict({**teacher.state_dict(), "of a later release": 1})


@pytest.mark.parametrize(
    "make", [lambda: attent.ScoringHead(torch.nn.Linear(6, 5)), lambda: attent.AttentiveClassifier(8, 2, 5)]
)
def test_a_damaged_state_of_a_module_is_refused(make: Callable[[], torch.nn.Module]) -> None:
    module = make()
    state = module.state_dict()
    name = next(iter(state))
    for damaged in (
        {key: value for key, value in state.items() if key != name},
        {**state, "more": torch.zeros(1)},
        {**state, name: torch.zeros(1, 2, 3, 4)},
    ):
        with pytest.raises(RuntimeError, match="state_dict"):
            module.load_state_dict(damaged)


# --------------------------------------------------------------------------------------------------------------- pickle

Q = torch.arange(48.0).view(2, 2, 3, 4).sin()


def squared(x: Tensor) -> Tensor:
    return x.square().sum(1)


PICKLED: dict[str, Callable[[], Any]] = {
    "Selection": lambda: attent.select_top_k(Q.flatten(), 5),
    "ScoredAttention": lambda: attent.scored_attention(Q, Q, Q, target=Q, score="residual", top_k=1, backend="torch"),
    "Readout": lambda: attent.Readout(Q[0, 0], torch.tensor([0, 1])),
    "ScoringHead": lambda: attent.ScoringHead(torch.nn.Linear(6, 5)),
    "AttentiveClassifier": lambda: attent.AttentiveClassifier(8, 2, 5),
    "Teacher": taught,
    "TeachingSampler": lambda: taught().sampler(batch_size=2),
    "TeachingSummary": lambda: taught().summary(),
    "OnePass": lambda: attent.OnePass(squared, engine="eager", verify_every=3),
    "indexed": lambda: attent.indexed([{"x": i} for i in range(4)]),
    "preset": lambda: attent.presets.attent_simple(8, total_epochs=4),
    "schedule": lambda: attent.schedules.Constant(0.5),
}


@pytest.mark.parametrize("name", PICKLED)
@pytest.mark.parametrize("copied", [lambda thing: pickle.loads(pickle.dumps(thing)), copy.deepcopy])
def test_public_objects_survive_copies(name: str, copied: Callable[[Any], Any]) -> None:
    thing = PICKLED[name]()
    found = copied(thing)
    assert type(found) is type(thing)
    if isinstance(thing, tuple):
        pairs = [(a, b) for a, b in zip(thing, found, strict=True) if isinstance(a, Tensor)]
        assert all(torch.equal(a, b) for a, b in pairs)
    if isinstance(thing, torch.nn.Module):
        assert str(found.state_dict()) == str(thing.state_dict())
    if isinstance(thing, attent.Teacher):
        assert content(found) == content(thing)
    if isinstance(thing, attent.TeachingSampler):
        assert list(found) == list(thing)


def test_a_copied_one_pass_step_trains_and_leaves_the_first_ones_forwards_alone() -> None:
    x = torch.randn(6, 3, requires_grad=True)
    first = attent.OnePass(squared, engine="eager")
    losses = first(x)
    second = pickle.loads(pickle.dumps(first))
    second.backward(second(x), torch.tensor([1, 4]))
    found, x.grad = x.grad, None
    first.backward(losses, torch.tensor([1, 4]))
    assert x.grad is not None and torch.equal(x.grad, found)


# ----------------------------------------------------------------------------------------------------- threads, workers


def test_many_threads_get_the_same_bits() -> None:
    scores, hidden, weight = torch.rand(300), torch.randn(4, 6, 8), torch.randn(11, 8)
    target = torch.arange(24).view(4, 6) % 11

    def everything() -> tuple[Tensor, ...]:
        loss, found = attent.linear_cross_entropy(hidden, weight, target, score="head", backend="torch")
        chosen = attent.select_top_k(scores, 40, temperature=1.0, floor=0.2, seed=7, backend="torch")
        attended = attent.scored_attention(Q, Q, Q, target=Q, score="residual", top_k=1, backend="torch")
        return loss, found, *chosen, attended.scores, attended.selection.index

    assert_threads_agree(everything, times=10)


class Counting(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, int]:
        attent.select_top_k(torch.arange(5.0), 2, backend="torch")  # an op of attent's within a worker
        return {"x": 10 * i}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_of_either_kind_see_what_the_loop_without_workers_sees(method: str) -> None:
    def epochs(workers: int) -> list[list[int]]:
        teacher = attent.Teacher(8, total_epochs=6, ratio=0.5, temperature=0.0, floor=0.0)
        context = {"multiprocessing_context": method} if workers else {}
        sampler = teacher.sampler(batch_size=2)
        loader = DataLoader(attent.indexed(Counting()), batch_sampler=sampler, num_workers=workers and 1, **context)
        seen = []
        for _ in range(2):
            ids = []
            for batch in loader:
                assert torch.equal(batch["x"], 10 * batch["example_id"])
                ids += batch["example_id"].tolist()
                teacher.record(batch["example_id"], batch["example_id"] / 8 + 0.1)
            seen.append(ids)
        return seen

    assert epochs(2) == epochs(0)


# ----------------------------------------------------------------------------------------------------------------- ties

N = 1_000_000


def adversarial() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    scores = torch.zeros(N)
    late = scores.clone()
    late[-1000:] = 1.0  # the winners stand behind all of the equals
    signs = torch.where(torch.rand(N, generator=draw) < 0.5, 0.0, -0.0)
    neighbours = (
        torch.tensor(1.0).view(torch.int32).add(torch.randint(2, (N,), generator=draw).int()).view(torch.float32)
    )
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-42])
    return {
        "all equal": scores,
        "winners last": late,
        "both zeros": signs,
        "a bit apart": neighbours,
        "special": special[torch.randint(6, (N,), generator=draw)],
    }


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 1000, N // 2, N])
def test_a_million_ties_fall_to_the_lower_index(k: int) -> None:
    for name, scores in adversarial().items():
        found = attent.select_top_k(scores, k, backend="torch")
        expected = torch.sort(scores, descending=True, stable=True).indices[:k]
        assert torch.equal(found.index, expected), name


@pytest.mark.slow
def test_a_million_ties_drawn_are_each_once_and_as_likely_as_said() -> None:
    for name, scores in adversarial().items():
        scores = scores.clamp(min=0)  # what is drawn has no scores below 0
        found = attent.select_top_k(scores, N // 4, temperature=1.0, floor=0.2, seed=3, backend="torch")
        assert len(found.index.unique()) == N // 4, name
        assert bool(((found.inclusion > 0) & (found.inclusion <= 1)).all()), name
        if name == "all equal":
            # Horvitz-Thompson: sum of 1/π estimates N; of a quarter drawn its deviation is below √(3N) = 1700.
            assert abs(float((1 / found.inclusion.double()).sum()) - N) < 5 * 1732


@pytest.mark.gpu
def test_streams_get_the_same_bits() -> None:
    scores = torch.rand(5000, device="cuda")
    expected = attent.select_top_k(scores, 700, temperature=1.0, floor=0.2, seed=7)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(attent.select_top_k(scores, 700, temperature=1.0, floor=0.2, seed=7))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for selection in found for a, b in zip(selection, expected, strict=True))
