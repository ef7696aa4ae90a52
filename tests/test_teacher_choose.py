"""Choosing from pools: one-pass and streams, in steps, without reading anything back to the host."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attent
from attent.schedules import Linear


def stream(**options: object) -> attent.Teacher:
    return attent.Teacher(**{"total_steps": 10, "warmup": 0, "anneal": 0.0, **options})  # type: ignore[arg-type]


def test_each_call_is_a_step_of_the_plan_and_the_plan_ends() -> None:
    teacher = attent.Teacher(total_steps=10, warmup=2, anneal=0.2, ratio=Linear(0.25, 0.75))
    sizes = [len(teacher.choose(torch.rand(21)).index) for _ in range(10)]
    assert sizes == [21, 21, 5, 7, 9, 12, 14, 16, 21, 21]  # floor(21·r + ½), r = 0.25, 0.35, …, 0.75
    with pytest.raises(ValueError, match=r"^choose: got call 11; takes 10 calls"):
        teacher.choose(torch.rand(21))


def test_a_float_warm_up_is_a_share_of_the_steps() -> None:
    teacher = attent.Teacher(total_steps=10, warmup=0.3, anneal=0.0)
    assert [len(teacher.choose(torch.rand(4)).index) for _ in range(10)] == [4] * 3 + [2] * 7


def test_k_may_be_given_and_is_then_taken_even_in_warm_up() -> None:
    teacher = attent.Teacher(total_steps=10, warmup=5)
    assert len(teacher.choose(torch.rand(8), 3).index) == 3
    over_epochs = attent.Teacher(100, total_epochs=2)
    assert len(over_epochs.choose(torch.rand(8), 3).index) == 3
    with pytest.raises(ValueError, match=r"^k: got None"):
        over_epochs.choose(torch.rand(8))


def test_hard_choice_takes_the_highest_and_leaves_non_finite_ones() -> None:
    teacher = stream(temperature=0, floor=0)
    chosen = teacher.choose(torch.tensor([math.nan, 1.0, 3.0, math.inf, 2.0, -math.inf]))
    assert chosen.index.tolist() == [2, 4, 1]
    assert chosen.score.tolist() == [3.0, 2.0, 1.0] and chosen.inclusion.tolist() == [1.0] * 3


def test_soft_choice_leaves_non_finite_ones_too_and_takes_negative_ones_for_zero() -> None:
    for _ in range(5):
        chosen = stream().choose(torch.tensor([math.nan, 1.0, -3.0, math.inf, 2.0, 0.5]))
        assert set(chosen.index.tolist()) <= {1, 2, 4, 5}
        assert torch.equal(chosen.score, torch.tensor([math.nan, 1.0, -3.0, math.inf, 2.0, 0.5])[chosen.index])


def test_steps_have_noise_of_their_own_and_a_second_run_the_same() -> None:
    scores = torch.ones(64)
    one, two = stream(), stream()
    first = [one.choose(scores).index.tolist() for _ in range(10)]
    assert first == [two.choose(scores).index.tolist() for _ in range(10)]
    assert len({tuple(sorted(index)) for index in first}) == 10
    other = stream(seed=1)
    assert other.choose(scores).index.tolist() not in first


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    stream().choose(torch.ones(64))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_read_back_to_the_host(temperature: float) -> None:
    teacher = attent.Teacher(100, total_steps=10, warmup=1, temperature=temperature, reweight="inverse")
    with FakeTensorMode():  # a fake tensor refuses to tell its values
        for _ in range(3):
            ids = torch.empty(32, dtype=torch.int64)
            chosen = teacher.choose(torch.empty(32), example_ids=ids)
            assert teacher.weights(chosen).shape == chosen.index.shape


def test_weights_of_a_selection_are_clipped_inverse_inclusions_over_their_mean() -> None:
    teacher = stream(reweight="inverse", ratio=0.25)
    chosen = teacher.choose(torch.linspace(0.01, 4, 64))
    expected = (1 / chosen.inclusion).clamp(max=4)
    torch.testing.assert_close(teacher.weights(chosen), expected / expected.mean(), rtol=1e-6, atol=0)
    assert torch.equal(stream().weights(chosen), torch.ones(16))


def test_scores_chosen_from_by_id_are_recorded_too() -> None:
    teacher = stream(num_examples=100)
    teacher.choose(torch.tensor([0.5, 0.25, math.nan]), example_ids=torch.tensor([7, 9, 11]))
    state = teacher.state_dict()["harvest"]
    assert state["score"][[7, 9]].tolist() == [0.5, 0.25]
    assert state["nonfinite"] == 1 and int(state["visits"].sum()) == 3


def test_groups_come_with_the_pool_or_from_the_teacher_by_id() -> None:
    scores = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0])
    ids = torch.tensor([0, 1, 2, 3, 4, 5])
    groups = torch.tensor([5, 5, 5, 5, 6, 6])
    assert stream(temperature=0, floor=0).choose(scores, groups=groups).index.tolist() == [0, 1, 5]
    by_id = stream(num_examples=6, groups=groups, temperature=0, floor=0)
    assert by_id.choose(scores, example_ids=ids).index.tolist() == [0, 1, 5]


def test_the_summary_counts_pools() -> None:
    teacher = stream()
    for _ in range(3):
        teacher.choose(torch.rand(10))
    summary = teacher.summary()
    assert summary["examples_offered"] == 30 and summary["examples_trained_on"] == 15
    assert summary["keep_ratio_asked"] == summary["keep_ratio_achieved"] == 0.5
    assert summary["teaching_seconds"] > 0 and summary["saved_seconds"] is None


def test_choosing_within_a_reduced_epoch_counts_each_example_once() -> None:
    teacher = attent.Teacher(40, total_epochs=1)
    for batch in teacher.sampler(batch_size=10):
        teacher.choose(torch.rand(10), 4, example_ids=torch.tensor(batch))
    summary = teacher.summary()
    assert summary["examples_offered"] == 40 and summary["examples_trained_on"] == 16


def test_anneal_now_makes_the_following_choices_full() -> None:
    teacher = stream()
    assert len(teacher.choose(torch.rand(6)).index) == 3
    teacher.anneal_now()
    assert len(teacher.choose(torch.rand(6)).index) == 6


def test_a_stream_resumes_at_its_step() -> None:
    scores = torch.ones(64)
    whole = stream()
    expected = [whole.choose(scores).index.tolist() for _ in range(10)]
    for stop in range(10):
        first, second = stream(), stream()
        for _ in range(stop):
            first.choose(scores)
        second.load_state_dict(first.state_dict())
        assert [second.choose(scores).index.tolist() for _ in range(10 - stop)] == expected[stop:]
        assert second.summary()["examples_trained_on"] == 320


def test_a_long_stream_with_ids_does_not_hoard_its_scores() -> None:
    teacher = stream(num_examples=10, total_steps=100)
    for _ in range(80):
        teacher.choose(torch.rand(30_000), example_ids=torch.zeros(30_000, dtype=torch.int64))
    assert teacher._harvest is not None and teacher._harvest._pending_rows < 1 << 21


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"scores": torch.ones(4, dtype=torch.int64)}, "scores"),
        ({"scores": torch.ones(2, 2)}, "scores"),
        ({"scores": torch.ones(4), "k": 5}, "k"),
        ({"scores": torch.ones(4), "k": -1}, "k"),
        ({"scores": torch.ones(4), "k": 1.0}, "k"),
        ({"scores": torch.ones(4), "example_ids": torch.zeros(3, dtype=torch.int64)}, "example_ids"),
        ({"scores": torch.ones(4), "example_ids": torch.full((4,), 99)}, "example_ids"),
        ({"scores": torch.ones(4), "groups": torch.zeros(4)}, "groups"),
    ],
)
def test_bad_pools_are_refused_by_name(arguments: dict[str, object], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: got "):
        stream(num_examples=10).choose(**arguments)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_recording_choosing_and_weighting_on_a_gpu_never_synchronise() -> None:
    groups = torch.arange(1000) % 7
    options = {"groups": groups, "reweight": "inverse", "warmup": 0}
    teacher = attent.Teacher(1000, total_steps=10, **options)  # type: ignore[arg-type]
    over_epochs = attent.Teacher(1000, total_epochs=2, **options)  # type: ignore[arg-type]
    lesson = torch.tensor(list(over_epochs.sampler()), device="cuda")
    ids, scores = torch.arange(256, device="cuda"), torch.rand(256, device="cuda")
    expected = over_epochs.weights(lesson)  # moves the tables, once per lesson
    teacher.choose(scores, example_ids=ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        chosen = teacher.choose(scores, example_ids=ids)
        weights = teacher.weights(chosen)
        of_lesson = over_epochs.weights(lesson)
        over_epochs.record(lesson, torch.ones_like(lesson, dtype=torch.float32))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert chosen.index.is_cuda and len(chosen.index) == 128 and weights.isfinite().all()
    assert torch.equal(of_lesson, expected)
