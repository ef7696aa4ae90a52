"""The teacher on 1 to 4 ranks: one merge per lesson, equal counts, no hang on uneven data, and elastic resume."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import attent

from .ranks import on_ranks

N = 64
EPOCHS = 4
GLOBAL_BATCH = 8


def score(ids: Tensor, epoch: int) -> Tensor:
    return (ids * 37 % 11 + 1) * (1 + (ids + epoch) % 3) / 10


def make_teacher(**options: Any) -> attent.Teacher:
    return attent.Teacher(N, total_epochs=EPOCHS, ratio=0.75, **options)


def run(rank: int, state: dict[str, Any] | None, steps: int, workers: int = 0) -> tuple[list[list[int]], bytes | None]:
    """Train for ``steps`` steps of one global batch (−1: all that is left); this rank's batches, the state after."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    teacher = make_teacher()
    if state is not None:
        teacher.load_state_dict(state)
    sampler = teacher.sampler(batch_size=GLOBAL_BATCH // world)
    data = attent.indexed(TensorDataset(torch.arange(N)))
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers, prefetch_factor=3 if workers else None)
    taken: list[list[int]] = []
    for epoch in range(sampler.epoch, EPOCHS):
        for ids, _ in loader:
            if len(taken) == steps:
                break
            teacher.record(ids, score(ids, epoch))
            taken.append(ids.tolist())
        if len(taken) == steps:
            break
    file = io.BytesIO()
    torch.save(teacher.state_dict(), file)
    return taken, file.getvalue()


def load(state: bytes) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(io.BytesIO(state), weights_only=True)
    return loaded


def global_batches(by_rank: list[list[list[int]]]) -> list[list[int]]:
    """What all ranks together trained on in each step."""
    assert len({len(batches) for batches in by_rank}) == 1  # equal numbers of steps
    return [sorted(i for batch in step for i in batch) for step in zip(*by_rank, strict=True)]


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_trains_on_the_same_global_batches(world: int, tmp_path: Path) -> None:
    alone, _ = run(0, None, -1)
    answers = on_ranks(world, run, tmp_path, None, -1)
    assert global_batches([batches for batches, _ in answers]) == [sorted(batch) for batch in alone]


def test_elastic_resume_on_2_then_4_then_1_ranks_goes_on_with_the_same_lessons(tmp_path: Path) -> None:
    alone, _ = run(0, None, -1)
    got: list[list[int]] = []
    state = None
    for world, steps in ((2, 11), (4, 9), (1, -1)):  # stops within epochs 1 and 3
        answers = on_ranks(world, run, tmp_path, state, steps, 2 if world == 2 else 0)
        got += global_batches([batches for batches, _ in answers])
        state = load(answers[-1][1])  # any rank's
    assert got == [sorted(batch) for batch in alone]


def test_every_rank_saves_the_same_state(tmp_path: Path) -> None:
    def without_seconds(state: bytes) -> str:
        loaded = load(state)
        loaded["seconds"] = loaded["harvest"]["training_seconds"] = None
        return str(loaded)

    answers = on_ranks(2, run, tmp_path, None, 11)
    one, two = (without_seconds(state) for _, state in answers)
    assert one == two


def one_is_ahead(rank: int) -> dict[str, int]:
    teacher = attent.Teacher(40, total_epochs=2)
    iterator = iter(teacher.sampler(batch_size=5))
    for _ in range(3 - rank):  # rank 0 has recorded a batch more when the state is saved
        teacher.record(torch.tensor(next(iterator)), torch.ones(5))
    position: dict[str, int] = teacher.state_dict()["position"]
    return position


def test_the_slowest_rank_sets_the_position_so_that_no_batch_is_left_out(tmp_path: Path) -> None:
    assert on_ranks(2, one_is_ahead, tmp_path) == [{"epoch": 0, "position": 2 * 2 * 5}] * 2


def uneven(rank: int, drop_last: bool) -> list[int]:
    teacher = attent.Teacher(31, total_epochs=3, ratio=0.33)
    sampler = teacher.sampler(batch_size=4, drop_last=drop_last)
    batches = []
    for _ in range(3):
        for batch in sampler:
            teacher.record(torch.tensor(batch), torch.ones(len(batch)))
            dist.barrier()  # a rank with a step more than the others would wait here for ever
            batches.append(len(batch))
    assert len(batches) == teacher.total_steps(4, drop_last=drop_last)
    return batches


@pytest.mark.parametrize("drop_last", [True, False])
def test_uneven_data_gives_equal_steps_and_no_hang(drop_last: bool, tmp_path: Path) -> None:
    answers = on_ranks(3, uneven, tmp_path, drop_last)
    assert answers[0] == answers[1] == answers[2]


def merge_order(rank: int) -> list[float]:
    teacher = attent.Teacher(6, total_epochs=2)
    # id 0: in call 0 of both ranks, so rank 1's counts. id 1: rank 0 in call 1, rank 1 in call 0, so rank 0's counts.
    # id 2: twice in rank 0's last call. id 3: rank 1's later NaN leaves rank 0's. Ranks record unequal numbers.
    if rank == 0:
        teacher.record(torch.tensor([0, 3]), torch.tensor([1.0, 30.0]))
        teacher.record(torch.tensor([1, 2, 2]), torch.tensor([10.0, 20.0, 21.0]))
    else:
        teacher.record(torch.tensor([0, 1]), torch.tensor([2.0, 11.0]))
        teacher.record(torch.tensor([3]), torch.tensor([float("nan")]))
        teacher.record(torch.tensor([4]), torch.tensor([2.0**-140]))  # a subnormal: bits survive the way
    scores: list[float] = teacher.state_dict()["harvest"]["score"].nan_to_num(-1).tolist()
    return scores


def test_records_merge_by_id_in_call_order_then_by_rank(tmp_path: Path) -> None:
    expected = [2.0, 10.0, 21.0, 30.0, 2.0**-140, -1.0]
    assert on_ranks(2, merge_order, tmp_path) == [expected, expected]


def count_collectives(rank: int) -> tuple[int, int]:
    calls = 0

    def counted(original: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return original(*args, **options)

        return call

    # All of torch.distributed goes through the group's methods, under whatever name it was called.
    verbs = ("all", "barrier", "broadcast", "gather", "monitored", "recv", "reduce", "scatter", "send")
    for name in dir(dist.ProcessGroup):
        if name.startswith(verbs) or name.startswith(tuple(f"_{verb}" for verb in verbs)):
            setattr(dist.ProcessGroup, name, counted(getattr(dist.ProcessGroup, name)))
    dist.barrier()
    dist.all_reduce(torch.ones(1))
    assert calls == 2
    teacher = attent.Teacher(64, total_epochs=3)
    sampler = teacher.sampler()
    in_steps, calls = 0, 0
    for _ in range(3):
        iterator = iter(sampler)
        next(iterator)
        before = calls
        for i in iterator:
            teacher.record(torch.tensor([i]), torch.ones(1))
            teacher.weights(torch.tensor([i]))
            sampler.state_dict()
            teacher.summary()
            len(sampler)
        in_steps += calls - before
    return in_steps, calls


def test_collectives_happen_once_per_lesson_and_never_in_a_step(tmp_path: Path) -> None:
    # A merge is two gathers (how many rows, and those; the first has none) and a sum, a draw two broadcasts. Of three
    # epochs, the last two draw.
    in_all = 3 * 3 - 1 + 2 * 2
    assert on_ranks(2, count_collectives, tmp_path) == [(0, in_all)] * 2


def bad_id(rank: int) -> str:
    # An id that could not be read when it was recorded (as on a GPU) comes to light at the merge, on every rank.
    teacher = attent.Teacher(6, total_epochs=2)
    assert teacher._harvest is not None
    teacher._harvest.record(torch.tensor([0, 99 if rank == 1 else 1]), torch.ones(2))
    with pytest.raises(ValueError) as error:
        teacher.state_dict()
    return str(error.value)


def test_a_bad_id_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    expected = "example_ids: got 99 among those recorded; takes ids in [0, num_examples=6)"
    assert on_ranks(2, bad_id, tmp_path) == [expected, expected]


def choose(rank: int) -> dict[str, Any]:
    teacher = attent.Teacher(total_steps=10, warmup=0, ratio=0.25)
    again = attent.Teacher(total_steps=10, warmup=0, ratio=0.25)
    same_pool = torch.ones(64)
    own = teacher.choose(same_pool).index.tolist()
    hard = attent.Teacher(total_steps=10, warmup=0, ratio=0.25, temperature=0, floor=0)
    pool = torch.arange(1.0, 9.0) * (1 if rank == 0 else 10) if rank < 2 else torch.tensor([0.5, 75.0])
    everywhere = hard.choose(pool, process_group=dist.group.WORLD)
    by_group = hard.choose(pool, 6, groups=torch.zeros(len(pool), dtype=torch.int64), process_group=dist.group.WORLD)
    soft = teacher.choose(pool, process_group=dist.group.WORLD)
    offered = teacher.state_dict()["counts"]
    return {
        "own": own,
        "own again": again.choose(same_pool).index.tolist(),
        "hard": hard.choose(pool).index.tolist(),
        "everywhere": everywhere.index.tolist(),
        "scores": everywhere.score.tolist(),
        "by group": by_group.index.tolist(),
        "soft": len(soft.index),
        "counts": (offered["pool_offered"], offered["pool_chosen"]),
    }


def test_each_rank_chooses_equally_many_of_its_own_pool_unless_a_group_chooses_together(tmp_path: Path) -> None:
    zero, one, two = on_ranks(3, choose, tmp_path)
    assert len(zero["own"]) == len(one["own"]) == 16
    assert sorted(zero["own"]) != sorted(one["own"])  # noise of its own,
    assert all(answer["own"] == answer["own again"] for answer in (zero, one, two))  # the same in a second run
    assert zero["hard"] == one["hard"] == [7, 6]
    # Together: 18 examples, floor(18/4 + ½) = 5: 80, 75, 70, 60, 50; pools may differ in size, and in their part.
    assert (zero["everywhere"], one["everywhere"], two["everywhere"]) == ([], [7, 6, 5, 4], [1])
    assert one["scores"] == [80.0, 70.0, 60.0, 50.0]
    assert (zero["by group"], one["by group"], two["by group"]) == ([], [7, 6, 5, 4, 3], [1])
    assert zero["soft"] + one["soft"] + two["soft"] == 5
    assert zero["counts"] == one["counts"] == (3 * 64 + 18, 3 * 16 + 5)


def packed(rank: int) -> list[list[int]]:
    lengths = [1 + i % 7 for i in range(50)]
    teacher = attent.Teacher(50, total_epochs=1)
    batches = []
    for batch in teacher.sampler().packed(lengths, 12):
        teacher.record(torch.tensor(batch), torch.ones(len(batch)))
        dist.barrier()
        batches.append(batch)
    return batches


def test_packed_batches_are_equally_many_on_each_rank(tmp_path: Path) -> None:
    shares = on_ranks(3, packed, tmp_path)
    assert len({len(share) for share in shares}) == 1
    ids = [i for share in shares for batch in share for i in batch]
    assert len(ids) == len(set(ids)) > 40


def same_lesson(rank: int) -> list[int]:
    teacher = attent.Teacher(100, total_epochs=2)
    # Ranks whose arithmetic differed would draw differently; here the difference is put in by hand.
    teacher.record(torch.arange(100), torch.rand(100))
    assert teacher._harvest is not None and teacher._lessons is not None
    teacher._merge()
    teacher._harvest.store.score += rank
    lesson = teacher._lessons.of_epoch(1, teacher._plan, resumed=False)
    index: list[int] = lesson.index.tolist()
    return index


def test_ranks_cannot_disagree_about_the_lesson(tmp_path: Path) -> None:
    one, two = on_ranks(2, same_lesson, tmp_path)
    assert one == two


@pytest.mark.slow
@pytest.mark.parametrize("worlds", [(4, 2, 1), (1, 4, 2), (2, 1, 4), (4, 4, 4)])
@pytest.mark.parametrize("stop", [1, 8, 12, 15])
def test_elastic_resume_at_many_places(worlds: tuple[int, ...], stop: int, tmp_path: Path) -> None:
    alone, _ = run(0, None, -1)
    got: list[list[int]] = []
    state = None
    for world, steps in zip(worlds, (stop, 5, -1), strict=True):
        answers = on_ranks(world, run, tmp_path, state, steps, 1)
        got += global_batches([batches for batches, _ in answers])
        state = load(answers[0][1])
    assert got == [sorted(batch) for batch in alone]
