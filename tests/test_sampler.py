"""The sampler: every epoch's lesson, shuffled, dealt out evenly, batched or packed, with or without set_epoch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import attent


def train(teacher: attent.Teacher, batches: object) -> list[list[int]]:
    """A training loop over one epoch: scores are a fixed function of the id."""
    seen = []
    for batch in batches:  # type: ignore[attr-defined]
        ids = torch.as_tensor(batch).reshape(-1)
        teacher.record(ids, 1.0 + ids % 5)
        seen.append(ids.tolist())
    return seen


def flat(batches: list[list[int]]) -> list[int]:
    return [i for batch in batches for i in batch]


# -------------------------------------------------------------------------------------------------------------- epochs


def test_a_loop_without_set_epoch_goes_through_all_epochs_and_no_further() -> None:
    teacher = attent.Teacher(20, total_epochs=5, ratio=0.4)
    sampler = teacher.sampler()
    assert [len(flat(train(teacher, sampler))) for _ in range(5)] == teacher.epoch_sizes() == [20, 8, 8, 8, 20]
    assert sampler.epoch == 5
    with pytest.raises(ValueError, match=r"^epoch: got 5; takes an epoch in \[0, 4\]"):
        next(iter(sampler))


def test_a_loop_that_never_records_goes_through_all_epochs_too_and_is_told() -> None:
    sampler = attent.Teacher(20, total_epochs=5, ratio=0.4).sampler(batch_size=4)
    with pytest.warns(UserWarning, match="is taught and no score was ever recorded") as warned:
        assert [sum(len(batch) for batch in sampler) for _ in range(5)] == [20, 8, 8, 8, 20]
    assert len(warned) == 3  # each of the lessons


def test_a_first_lesson_without_warm_up_is_no_mistake() -> None:
    """There was nothing to record before; what the loop records in it, the next one is chosen by."""
    teacher = attent.Teacher(20, total_epochs=5, ratio=0.4, warmup=0)
    sampler = teacher.sampler()
    assert [len(flat(train(teacher, sampler))) for _ in range(5)] == [8, 8, 8, 8, 20]


def test_set_epoch_gives_the_same_epochs() -> None:
    runs = []
    for explicit in (True, False):
        teacher = attent.Teacher(20, total_epochs=5)
        sampler = teacher.sampler()
        orders = []
        for epoch in range(5):
            if explicit:
                sampler.set_epoch(epoch)
            orders.append(flat(train(teacher, sampler)))
        runs.append(orders)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("epoch", [-1, 5])
def test_an_epoch_outside_the_plan_is_refused(epoch: int) -> None:
    with pytest.raises(ValueError, match=r"^epoch: got "):
        attent.Teacher(20, total_epochs=5).sampler().set_epoch(epoch)


def test_a_look_at_the_first_batch_uses_no_epoch_up() -> None:
    teacher = attent.Teacher(20, total_epochs=5)
    sampler = teacher.sampler()
    first = next(iter(sampler))
    assert next(iter(sampler)) == first
    assert sampler.epoch == 0
    assert flat(train(teacher, sampler))[0] == first


def test_an_epoch_broken_off_is_followed_by_the_next() -> None:
    teacher = attent.Teacher(20, total_epochs=5)
    sampler = teacher.sampler(batch_size=4)
    for epoch in range(5):
        for batch in sampler:
            teacher.record(torch.tensor(batch), torch.ones(4))
            assert sampler.epoch == epoch
            break


def test_a_sampler_made_later_goes_on_where_the_teacher_stands() -> None:
    teacher = attent.Teacher(20, total_epochs=5, ratio=0.4)
    assert [len(flat(train(teacher, teacher.sampler()))) for _ in range(5)] == [20, 8, 8, 8, 20]


def test_an_epoch_can_be_replayed() -> None:
    teacher = attent.Teacher(20, total_epochs=5)
    sampler = teacher.sampler()
    train(teacher, sampler)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) == first


def test_the_lesson_is_drawn_from_all_that_was_recorded_before_its_first_id_is_asked_for() -> None:
    teacher = attent.Teacher(4, total_epochs=2, ratio=0.25, temperature=0, floor=0, anneal=0.0)
    sampler = teacher.sampler()
    train(teacher, sampler)
    iterator = iter(sampler)  # draws nothing yet
    teacher.record(torch.tensor([2]), torch.tensor([99.0]))
    assert list(iterator) == [2]


# ------------------------------------------------------------------------------------------------------- what is in it


def test_every_epoch_is_shuffled_anew_and_privately() -> None:
    teacher = attent.Teacher(50, total_epochs=3, warmup=3)
    before = torch.random.get_rng_state()
    first, second, _ = (flat(train(teacher, sampler)) for sampler in [teacher.sampler()] * 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second and first != sorted(first)


def test_without_shuffle_ids_ascend() -> None:
    teacher = attent.Teacher(50, total_epochs=2)
    sampler = teacher.sampler(shuffle=False)
    assert flat(train(teacher, sampler)) == list(range(50))
    reduced = list(sampler)
    assert len(reduced) == 25 and reduced == sorted(reduced)


def test_len_is_right_before_during_and_after_each_epoch() -> None:
    teacher = attent.Teacher(21, total_epochs=4, ratio=0.5, anneal=0.0)
    sampler = teacher.sampler(batch_size=4)
    for size in teacher.epoch_sizes():
        assert len(sampler) == size // 4  # what a progress bar asks before it starts
        for batch in sampler:
            assert len(sampler) == size // 4
            teacher.record(torch.tensor(batch), torch.ones(4))
    assert len(sampler) == 11 // 4  # after the last epoch: the last one's


@settings(max_examples=60)
@given(
    n=st.integers(1, 40),
    replicas=st.integers(1, 5),
    drop_last=st.booleans(),
    batch_size=st.one_of(st.none(), st.integers(1, 6)),
)
def test_ranks_get_disjoint_shares_of_equal_number(
    n: int, replicas: int, drop_last: bool, batch_size: int | None
) -> None:
    teacher = attent.Teacher(n, total_epochs=1)
    shares = []
    for rank in range(replicas):
        sampler = teacher.sampler(num_replicas=replicas, rank=rank, drop_last=drop_last, batch_size=batch_size)
        sampler.set_epoch(0)
        units = list(sampler)
        assert len(units) == len(sampler)
        if batch_size is not None:
            assert all(len(batch) == batch_size for batch in units[:-1])
            units = [i for batch in units for i in batch]
        shares.append(units)
    assert len({len(share) for share in shares}) == 1
    together = [i for share in shares for i in share]
    if drop_last:
        assert len(set(together)) == len(together)
        assert len(together) > n - replicas * (batch_size or 1)
    else:
        assert set(together) == set(range(n))
        assert len(together) < n + replicas  # filled up by less than one each


def test_what_fills_ranks_up_comes_from_the_orders_beginning_as_in_distributed_sampler() -> None:
    teacher = attent.Teacher(10, total_epochs=1)
    samplers = [teacher.sampler(num_replicas=4, rank=r, drop_last=False, shuffle=False) for r in range(4)]
    assert [list(sampler) for sampler in samplers] == [[0, 4, 8], [1, 5, 9], [2, 6, 0], [3, 7, 1]]
    dropped = [teacher.sampler(num_replicas=4, rank=r, shuffle=False) for r in range(4)]
    for sampler in dropped:
        sampler.set_epoch(0)
    assert [list(sampler) for sampler in dropped] == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_the_batch_of_all_ranks_together_is_the_same_at_any_number_of_ranks() -> None:
    def steps(replicas: int) -> list[set[int]]:
        teacher = attent.Teacher(64, total_epochs=1)
        samplers = [
            teacher.sampler(num_replicas=replicas, rank=rank, batch_size=8 // replicas) for rank in range(replicas)
        ]
        return [set(flat(list(step))) for step in zip(*samplers, strict=True)]

    assert steps(1) == steps(2) == steps(4)


@pytest.mark.filterwarnings("ignore:.*no score was ever recorded")  # it only counts
@settings(max_examples=30)
@given(
    n=st.integers(1, 60),
    batch_size=st.integers(1, 7),
    accumulate=st.integers(1, 4),
    world=st.integers(1, 4),
    drop_last=st.booleans(),
    as_batch_sampler=st.booleans(),
)
def test_total_steps_are_those_that_a_loop_takes(
    n: int, batch_size: int, accumulate: int, world: int, drop_last: bool, as_batch_sampler: bool
) -> None:
    teacher = attent.Teacher(n, total_epochs=5, ratio=0.4)
    data = TensorDataset(torch.arange(n))
    steps = []
    for rank in range(world):
        alone = attent.Teacher(n, total_epochs=5, ratio=0.4)
        options = {"num_replicas": world, "rank": rank, "drop_last": drop_last}
        if as_batch_sampler:
            loader = DataLoader(data, batch_sampler=alone.sampler(batch_size=batch_size, **options))
        else:
            loader = DataLoader(data, batch_size, sampler=alone.sampler(**options), drop_last=drop_last)
        taken = 0
        for _ in range(5):
            since_step = 0
            for _ in loader:
                since_step += 1
                if since_step == accumulate:
                    taken, since_step = taken + 1, 0
            taken += since_step > 0  # accelerate and transformers step at an epoch's end
        steps.append(taken)
    assert steps == [teacher.total_steps(batch_size, accumulate, world, drop_last)] * world


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"num_replicas": 0}, "num_replicas"),
        ({"num_replicas": 2, "rank": 2}, "rank"),
        ({"rank": 1}, "rank"),
        ({"batch_size": 0}, "batch_size"),
        ({"shuffle": 1}, "shuffle"),
        ({"drop_last": None}, "drop_last"),
    ],
)
def test_bad_sampler_arguments_are_refused_by_name(options: dict[str, object], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: got "):
        attent.Teacher(9, total_epochs=2).sampler(**options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- packing


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 16), min_size=1, max_size=60),
    replicas=st.integers(1, 3),
    drop_last=st.booleans(),
)
def test_packed_batches_hold_the_chosen_and_never_too_many_tokens(
    lengths: list[int], replicas: int, drop_last: bool
) -> None:
    teacher = attent.Teacher(len(lengths), total_epochs=1)
    samplers = [teacher.sampler(num_replicas=replicas, rank=r, drop_last=drop_last) for r in range(replicas)]
    ranks = [list(packed) for packed in [sampler.packed(lengths, 16) for sampler in samplers]]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for share in ranks for batch in share]
    assert all(sum(lengths[i] for i in batch) <= 16 for batch in batches)
    ids = sorted(flat(batches))
    if replicas == 1:
        assert ids == list(range(len(lengths)))
    if not drop_last:
        assert set(ids) == set(range(len(lengths)))
    else:
        assert len(ids) == len(set(ids))


def test_packing_fills_batches_well_and_keeps_the_shuffle() -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 513, (10_000,), generator=draw)
    teacher = attent.Teacher(10_000, total_epochs=2)
    sampler = teacher.sampler().packed(lengths, 2048)
    first = list(sampler)
    least = -(-int(lengths.sum()) // 2048)
    assert len(first) <= 1.02 * least + 3  # best-fit leaves one partly filled batch per window of 4,096, three here
    teacher.record(torch.arange(10_000), lengths.float())
    second = list(sampler)
    assert len(flat(second)) == teacher.epoch_sizes()[1]
    # Neighbours in the data set are not neighbours in batches: the first batch spans far.
    assert max(first[0]) - min(first[0]) > 1000


def test_the_number_of_packed_batches_is_known_while_the_epoch_runs() -> None:
    sampler = attent.Teacher(4, total_epochs=1).sampler().packed([4, 4, 4, 4], 8)
    with pytest.raises(TypeError, match=r"while it runs"):
        len(sampler)
    for _ in sampler:
        assert len(sampler) == 2


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "argument"),
    [
        ([1, 2], 8, "lengths"),
        ([1, 2, 9], 8, "lengths"),
        ([0, 2, 3], 8, "lengths"),
        ([1.0, 2.0, 3.0], 8, "lengths"),
        (torch.ones(3), 8, "lengths"),
        ([1, 2, 3], 0, "max_tokens"),
    ],
)
def test_lengths_that_cannot_be_packed_are_refused(lengths: object, max_tokens: int, argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: got "):
        attent.Teacher(3, total_epochs=1).sampler().packed(lengths, max_tokens)  # type: ignore[arg-type]


def test_a_batch_size_and_packing_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"^batch_size: got 2"):
        attent.Teacher(3, total_epochs=1).sampler(batch_size=2).packed([1, 1, 1], 8)
