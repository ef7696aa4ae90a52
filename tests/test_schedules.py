"""Keep ratios over a run: the schedules' formulas, and the plan that fixes every epoch's size in advance."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

import attent
from attent.plan import make_plan
from attent.schedules import Constant, Cosine, Incremental, Linear, Schedule, Step

EVERY = [
    Constant(0.7),
    Linear(0.2, 0.8),
    Cosine(0.2, 0.8),
    Step((0.3, 0.5, 0.9), (0.25, 0.5)),
    Incremental(0.2, 0.8, cycles=7),
]


@given(progress=st.floats(0, 1))
def test_each_schedule_is_its_formula(progress: float) -> None:
    assert Constant(0.7)(progress) == 0.7
    assert Linear(0.2, 0.8)(progress) == pytest.approx(0.2 + 0.6 * progress, abs=1e-15)
    assert Cosine(0.2, 0.8)(progress) == pytest.approx(0.5 - 0.3 * math.cos(math.pi * progress), abs=1e-15)
    assert Step((0.3, 0.5), (0.25,))(progress) == (0.3 if progress < 0.25 else 0.5)
    stage = min(int(progress * 4), 3)
    assert Incremental(0.2, 0.8, cycles=4)(progress) == pytest.approx(0.2 + 0.6 * stage / 3, abs=1e-15)


@pytest.mark.parametrize("schedule", [Linear(0.2, 0.8), Cosine(0.2, 0.8), Incremental(0.2, 0.8)])
def test_rising_schedules_start_and_end_where_they_say_and_never_fall(schedule: Schedule) -> None:
    values = [schedule(i / 1000) for i in range(1001)]
    assert values[0] == pytest.approx(0.2) and values[-1] == pytest.approx(0.8)
    assert values == sorted(values)


def test_incremental_rises_in_exactly_its_cycles() -> None:
    values = {Incremental(0.2, 0.8, cycles=10)(i / 1000) for i in range(1001)}
    assert sorted(values) == pytest.approx([0.2 + 0.6 * c / 9 for c in range(10)])


@pytest.mark.parametrize("schedule", EVERY)
def test_schedules_pickle_and_describe_themselves_in_plain_values(schedule: Schedule) -> None:
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    description = schedule.describe()
    assert description.pop("name") == type(schedule).__name__
    assert type(schedule)(**description) == schedule


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: Constant("half"), "value"),
        (lambda: Linear(math.nan, 1), "start"),
        (lambda: Cosine(0.1, math.inf), "end"),
        (lambda: Step((0.3, 0.5), ()), "values"),
        (lambda: Step((0.3, 0.5, 0.7), (0.5, 0.5)), "milestones"),
        (lambda: Step((0.3, 0.5), (1.5,)), "milestones"),
        (lambda: Incremental(0.2, 0.8, cycles=1), "cycles"),
    ],
)
def test_bad_parameters_are_refused_by_name(make: object, argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: got "):
        make()  # type: ignore[operator]


@dataclass(frozen=True)
class Halving(Schedule):
    """A user's schedule."""

    start: float

    def __call__(self, progress: float) -> float:
        return self.start * 0.5**progress


def test_a_schedule_of_ones_own_is_a_subclass() -> None:
    teacher = attent.Teacher(100, total_epochs=4, warmup=1, anneal=0.0, ratio=Halving(0.8))
    assert teacher.epoch_sizes() == [100, 80, 57, 40]  # 0.8, 0.8/√2 = 0.566, 0.4
    assert teacher.state_dict()["settings"]["ratio"] == {"name": "Halving", "start": 0.8}


def test_a_schedule_without_a_rule_says_what_to_define() -> None:
    with pytest.raises(NotImplementedError, match=r"__call__"):
        Schedule()(0.5)


# ------------------------------------------------------------------------------------------------------------ the plan


def sizes(total: int, n: int, **options: object) -> list[int]:
    return attent.Teacher(n, total_epochs=total, **options).epoch_sizes()  # type: ignore[arg-type]


@given(n=st.integers(1, 10**6), parts=st.integers(1, 64))
def test_k_is_the_floor_of_ratio_times_n_plus_a_half(n: int, parts: int) -> None:
    ratio = parts / 64  # exact in binary, so that the exact arithmetic is the same
    assert sizes(2, n, ratio=ratio)[1] == math.floor(Fraction(parts, 64) * n + Fraction(1, 2))


def test_warm_up_epochs_are_full_and_then_the_ratio_holds() -> None:
    assert sizes(6, 10, warmup=2, anneal=0.0, ratio=0.3) == [10, 10, 3, 3, 3, 3]
    assert sizes(3, 10, warmup=0, anneal=0.0, ratio=0.3) == [3, 3, 3]


@pytest.mark.parametrize(("total", "anneal", "full"), [(8, 0.125, 1), (9, 0.125, 2), (100, 0.07, 7), (4, 0.125, 1)])
def test_the_last_ceil_anneal_times_epochs_are_full(total: int, anneal: float, full: int) -> None:
    assert sizes(total, 10, warmup=0, anneal=anneal) == [5] * (total - full) + [10] * full


@pytest.mark.parametrize("total", [1, 2, 3])
def test_fewer_than_four_epochs_are_not_annealed(total: int) -> None:
    assert sizes(total, 10, warmup=0, anneal=1.0) == [5] * total


def test_a_float_warm_up_is_a_share_of_the_run() -> None:
    assert sizes(10, 10, warmup=0.2, anneal=0.0) == [10, 10] + [5] * 8
    assert sizes(10, 10, warmup=1.0) == [10] * 10
    assert sizes(10, 10, warmup=1, anneal=0.0) == [10] + [5] * 9


def test_a_schedule_spans_the_reduced_epochs_only() -> None:
    assert sizes(8, 100, warmup=2, anneal=0.125, ratio=Linear(0.2, 0.6)) == [100, 100, 20, 30, 40, 50, 60, 100]


def test_a_lesson_held_for_an_interval_keeps_its_size() -> None:
    plan = make_plan("epoch", 10, Linear(0.1, 0.9), 1, 0.0, Linear(2, 4))
    assert [plan.lesson_start(epoch) for epoch in range(1, 10)] == [1, 1, 3, 3, 3, 6, 6, 6, 9]
    assert [plan.size(epoch, 100) for epoch in range(10)] == [100, 10, 10, 30, 30, 30, 60, 60, 60, 90]


def test_warm_up_and_anneal_may_meet() -> None:
    assert sizes(4, 10, warmup=4, anneal=0.5) == [10] * 4


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"ratio": 0.0}, "ratio"),
        ({"ratio": 1.5}, "ratio"),
        ({"ratio": Linear(0.5, 1.2)}, "ratio"),
        ({"ratio": Linear(0.5, -0.1)}, "ratio"),
        ({"ratio": "half"}, "ratio"),
        ({"warmup": -1}, "warmup"),
        ({"warmup": 9}, "warmup"),
        ({"warmup": 1.5}, "warmup"),
        ({"anneal": 2}, "anneal"),
        ({"interval": 0}, "interval"),
        ({"interval": Linear(3, 0)}, "interval"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_before_training(options: dict[str, object], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: got "):
        attent.Teacher(10, total_epochs=8, **options)  # type: ignore[arg-type]


def test_lessons_of_a_stream_cannot_be_held() -> None:
    with pytest.raises(ValueError, match=r"^interval: got "):
        attent.Teacher(total_steps=8, interval=2)
