"""A stream taught in one pass: killed anywhere, the rest of the run chooses and learns the same, bit by bit."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info

import attent
from tests.ranks import on_ranks

stateful_dataloader = pytest.importorskip("torchdata.stateful_dataloader")

POOL, STEPS, CLASSES = 8, 12, 3


class Stream(IterableDataset[tuple[Tensor, int]]):
    """An endless stream without ids; each rank's and each worker's part of it is its own, and knows where it stands."""

    def __init__(self, rank: int) -> None:
        self.rank, self.next = rank, 0

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        while True:
            number = 1000 * self.rank + 100 * (0 if worker is None else worker.id) + self.next
            self.next += 1
            yield torch.randn(6, generator=torch.Generator().manual_seed(number)), number % CLASSES

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Run:
    """All of a run that a checkpoint holds."""

    def __init__(self, workers: int, rank: int = 0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.9)
        self.teacher = attent.Teacher(total_steps=STEPS, ratio=0.5, warmup=2, anneal=0.1, reweight="inverse")
        self.loader = stateful_dataloader.StatefulDataLoader(
            Stream(rank), POOL, num_workers=workers, prefetch_factor=3 if workers else None
        )
        self.step = attent.OnePass(self.losses, engine="eager")
        self.done = 0

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(x)
        return nn.functional.cross_entropy(logits, y, reduction="none"), attent.example_scores(logits, y)

    def saved(self) -> bytes:
        file = io.BytesIO()
        names = ("teacher", "loader", "model", "optimizer")
        torch.save({**{name: getattr(self, name).state_dict() for name in names}, "done": self.done}, file)
        return file.getvalue()

    def load(self, file: bytes) -> None:
        state = torch.load(io.BytesIO(file), weights_only=True)
        self.done = state.pop("done")
        for name, value in state.items():
            getattr(self, name).load_state_dict(value)

    def train(self, until: int) -> list[tuple[list[int], list[float]]]:
        """Each step's choice, and the weights of the chosen."""
        chosen = []
        batches = iter(self.loader)
        while self.done < until:
            x, y = next(batches)
            losses, scores = self.step(x, y)
            selection = self.teacher.choose(scores)
            weights = self.teacher.weights(selection)
            self.step.backward(losses, selection.index, weights)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.done += 1
            chosen.append((selection.index.tolist(), weights.tolist()))
        return chosen


def parameters(run: Run) -> list[float]:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()]).tolist()


@pytest.mark.parametrize(
    ("workers", "stops"), [(0, (0, 1, 2, 5, 10, 12)), pytest.param(2, (3, 7), marks=pytest.mark.slow)]
)
def test_a_stream_goes_on_with_the_same_pools_choices_and_learner(workers: int, stops: Any) -> None:
    whole = Run(workers)
    expected = whole.train(STEPS)
    assert [len(index) for index, _ in expected] == [8] * 2 + [4] * 8 + [8] * 2
    assert len({tuple(index) for index, _ in expected[2:10]}) > 1
    for stop in stops:
        killed = Run(workers)
        before = killed.train(stop)
        resumed = Run(workers)
        resumed.load(killed.saved())
        assert before + resumed.train(STEPS) == expected
        assert parameters(resumed) == parameters(whole)
        assert resumed.teacher.summary()["keep_ratio_achieved"] == whole.teacher.summary()["keep_ratio_achieved"]


def on_rank(rank: int, files: list[bytes], until: int) -> tuple[list[tuple[list[int], list[float]]], bytes]:
    run = Run(1, rank)
    if files:
        run.load(files[rank])
    return run.train(until), run.saved()


@pytest.mark.slow
def test_each_rank_goes_on_with_its_own_pools_and_noise(tmp_path: Path) -> None:
    whole = on_ranks(2, on_rank, tmp_path, [], STEPS)
    first = on_ranks(2, on_rank, tmp_path, [], 5)
    second = on_ranks(2, on_rank, tmp_path, [file for _, file in first], STEPS)
    for rank in range(2):
        assert first[rank][0] + second[rank][0] == whole[rank][0]
    assert [index for index, _ in whole[0][0]] != [index for index, _ in whole[1][0]]
