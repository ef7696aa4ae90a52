"""The teacher's arithmetic in an epoch: recording, drawing, weights, quotas, demotion, and the account of it all."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import attent
from attent.lesson import draw
from attent.schedules import Linear


def after_warm_up(teacher: attent.Teacher, scores: Tensor) -> attent.TeachingSampler:
    """A sampler that has gone through a full first epoch with these scores."""
    sampler = teacher.sampler(shuffle=False)
    for i in sampler:
        teacher.record(torch.tensor([i]), scores[i : i + 1])
    return sampler


# ----------------------------------------------------------------------------------------------------------- recording


def test_scores_recorded_in_warm_up_decide_the_first_reduced_lesson() -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, 0.8, 0.2, 0.3])
    sampler = after_warm_up(attent.Teacher(6, total_epochs=3, temperature=0, floor=0), scores)
    assert list(sampler) == [1, 2, 3]


def test_the_last_call_counts_for_an_id_that_came_twice() -> None:
    teacher = attent.Teacher(4, total_epochs=2, ratio=0.25, temperature=0, floor=0)
    teacher.record(torch.tensor([0, 1, 2, 3, 0]), torch.tensor([9.0, 1, 1, 1, 0]))
    teacher.record(torch.tensor([1, 2, 3]), torch.tensor([5.0, 1, 1]))
    sampler = teacher.sampler()
    sampler.set_epoch(1)
    assert list(sampler) == [1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_score_keeps_the_previous_one_and_is_counted(bad: float) -> None:
    teacher = attent.Teacher(4, total_epochs=2, ratio=0.25, temperature=0, floor=0)
    teacher.record(torch.arange(4), torch.tensor([1.0, 9.0, 2.0, 3.0]))
    teacher.record(torch.tensor([1, 2]), torch.tensor([bad, bad]))
    sampler = teacher.sampler()
    sampler.set_epoch(1)
    assert list(sampler) == [1]
    assert teacher.summary()["nonfinite_scores"] == 2


def test_an_example_that_never_had_a_finite_score_is_not_unseen_and_left_to_the_floor() -> None:
    scores = torch.tensor([1.0, math.nan, 2.0, 3.0])
    assert list(after_warm_up(attent.Teacher(4, total_epochs=2, ratio=0.75, floor=0.0), scores)) == [0, 2, 3]
    seeds = range(40)
    by_floor = [
        list(after_warm_up(attent.Teacher(4, total_epochs=2, ratio=0.75, floor=0.34, seed=s), scores)) for s in seeds
    ]
    assert any(1 in lesson for lesson in by_floor)


@pytest.mark.parametrize(
    ("ids", "scores", "argument"),
    [
        (torch.tensor([0, 10]), torch.ones(2), "example_ids"),
        (torch.tensor([-1, 2]), torch.ones(2), "example_ids"),
        (torch.tensor([0.0]), torch.ones(1), "example_ids"),
        (torch.tensor([[0]]), torch.ones(1, 1), "example_ids"),
        ([0], torch.ones(1), "example_ids"),
        (torch.tensor([0, 1]), torch.ones(1), "scores"),
        (torch.tensor([0]), torch.ones(1, dtype=torch.int64), "scores"),
        (torch.tensor([0]), torch.tensor(1.0), "scores"),
    ],
)
def test_what_cannot_be_recorded_is_refused_at_once(ids: object, scores: object, argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: got "):
        attent.Teacher(10, total_epochs=2).record(ids, scores)  # type: ignore[arg-type]


class RecordsInItsWorker(Dataset[int]):
    def __init__(self) -> None:
        self.teacher = attent.Teacher(2, total_epochs=1)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        self.teacher.record(torch.tensor([index]), torch.ones(1))
        return index


def test_recording_in_a_loader_worker_would_be_lost_and_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="call it in the training loop"):
        list(DataLoader(RecordsInItsWorker(), num_workers=1))


# ------------------------------------------------------------------------------------------------------------- drawing


def test_unseen_ids_come_first_in_random_order() -> None:
    lessons = []
    for seed in range(30):
        teacher = attent.Teacher(20, total_epochs=3, warmup=0, ratio=0.25, seed=seed)
        teacher.record(torch.arange(10), torch.full((10,), 100.0))
        sampler = teacher.sampler(shuffle=False)
        lessons.append(list(sampler))
        assert all(i >= 10 for i in lessons[-1])  # five of the ten unseen, however high the others score
        teacher.record(torch.tensor(lessons[-1]), torch.ones(5))
        second = list(sampler)
        assert set(second) == set(range(10, 20)) - set(lessons[-1])  # the other five
    chosen = torch.tensor(lessons).flatten().bincount(minlength=20)[10:]
    # 30 draws of 5 of 10: each is binomial(30, 1/2), 15 ± 2.7; 5 sigma of room, and no fixed order passes.
    assert bool((chosen > 1).all()) and bool((chosen < 29).all())


def test_when_unseen_ids_do_not_fill_the_lesson_the_scores_decide_about_the_rest() -> None:
    teacher = attent.Teacher(8, total_epochs=2, warmup=0, ratio=0.5, temperature=0, floor=0)
    teacher.record(torch.arange(6), torch.tensor([1.0, 6.0, 2.0, 5.0, 3.0, 4.0]))
    assert list(teacher.sampler(shuffle=False)) == [1, 3, 6, 7]


def test_a_lesson_is_a_pure_function_of_seed_epoch_and_scores() -> None:
    def lesson(seed: int, epoch: int, scores: Tensor) -> list[int]:
        torch.rand(3)  # whatever else moves the global generator
        teacher = attent.Teacher(100, total_epochs=9, seed=seed)
        teacher.record(torch.arange(100), scores)
        sampler = teacher.sampler()
        sampler.set_epoch(epoch)
        before = torch.random.get_rng_state()
        drawn = list(sampler)
        assert torch.equal(torch.random.get_rng_state(), before)
        return drawn

    scores = torch.rand(100)
    one = lesson(0, 1, scores)
    assert one == lesson(0, 1, scores)
    others = [lesson(1, 1, scores), lesson(0, 2, scores), lesson(0, 1, scores.flip(0))]
    assert all(sorted(other) != sorted(one) for other in others)


def test_neighbouring_seeds_and_epochs_share_no_lesson() -> None:
    scores = torch.ones(64)
    lessons = set()
    for seed in range(4):
        teacher = attent.Teacher(64, total_epochs=6, warmup=0, anneal=0.0, seed=seed)
        teacher.record(torch.arange(64), scores)
        sampler = teacher.sampler()
        lessons |= {tuple(sorted(sampler)) for _ in range(6)}
    assert len(lessons) == 24


def test_the_draw_prefers_high_scores_and_the_floor_forgets_nobody() -> None:
    scores = torch.cat([torch.full((50,), 10.0), torch.full((50,), 0.1)])
    times = torch.zeros(100)
    for seed in range(40):
        lesson = list(after_warm_up(attent.Teacher(100, total_epochs=2, ratio=0.4, floor=0.5, seed=seed), scores))
        times[lesson] += 1
    # Half of the 40 by score, nearly all from the high 50; half uniformly from the other 80, 20/80 each.
    assert times[50:].mean() / 40 == pytest.approx(20 / 80, abs=0.03)  # 2,000 trials: sigma 0.01
    assert times[:50].mean() / 40 == pytest.approx(20 / 50 + (1 - 20 / 50) * 20 / 80, abs=0.03)
    assert bool((times[50:] > 0).all())


def test_horvitz_thompson_sums_over_lessons_are_unbiased_unseen_ones_included() -> None:
    value = torch.arange(1.0, 13.0, dtype=torch.float64)
    scores = torch.cat([torch.linspace(0.2, 2.0, 10), torch.tensor([math.nan, math.nan])])
    unseen = scores.isnan()
    estimates = []
    for seed in range(600):
        lesson = draw(scores, unseen, 6, temperature=1.0, floor=0.2, groups=None, seed=seed, epoch=1)
        assert len(lesson.index) == 6 and set(lesson.index.tolist()) >= {10, 11}
        estimates.append(float((value[lesson.index] / lesson.inclusion).sum()))
    sample = torch.tensor(estimates, dtype=torch.float64)
    error = float(sample.mean() - value.sum())
    assert abs(error) < 5 * float(sample.std()) / math.sqrt(len(sample))  # five standard errors: 1 in 2 million
    assert float(sample.std()) / math.sqrt(len(sample)) < 0.03 * float(value.sum())  # and the test can tell


def test_no_guard_changes_the_sizes() -> None:
    options = {"ratio": Linear(0.2, 0.6), "groups": torch.arange(50) % 7, "demote_after": 1, "reweight": "inverse"}
    teacher = attent.Teacher(50, total_epochs=8, **options)  # type: ignore[arg-type]
    planned, sampler = teacher.epoch_sizes(), teacher.sampler()
    for size in planned:
        ids = torch.tensor(list(sampler))
        assert len(ids) == size
        teacher.record(ids, torch.where(ids % 3 == 0, math.nan, 1.0 + ids))
    assert teacher.epoch_sizes() == planned


def test_a_held_lesson_is_drawn_once_and_shuffled_each_epoch() -> None:
    teacher = attent.Teacher(40, total_epochs=7, anneal=0.0, interval=3)
    sampler = teacher.sampler()
    epochs = []
    for epoch in range(7):
        epochs.append(list(sampler))
        teacher.record(torch.tensor(epochs[-1]), torch.rand(len(epochs[-1])) * (epoch + 1))
    sets = [set(ids) for ids in epochs]
    assert sets[1] == sets[2] == sets[3] != sets[4] == sets[5] == sets[6]
    assert epochs[1] != epochs[2]
    assert teacher.summary()["lessons"] == 2


def test_anneal_now_makes_what_follows_full_and_changes_nothing_before() -> None:
    teacher = attent.Teacher(20, total_epochs=10, ratio=0.4)
    sampler = teacher.sampler()
    sizes = []
    for epoch in range(10):
        batches = list(sampler)
        teacher.record(torch.tensor(batches), torch.ones(len(batches)))
        sizes.append(len(batches))
        if epoch == 4:
            teacher.anneal_now()
            assert teacher.epoch_sizes() == [20, 8, 8, 8, 8, 20, 20, 20, 20, 20]
    assert sizes == teacher.epoch_sizes()


# ------------------------------------------------------------------------------------------------------------- weights


def test_weights_are_clipped_inverse_inclusions_over_their_mean_in_the_lesson() -> None:
    teacher = attent.Teacher(100, total_epochs=4, ratio=0.2, floor=0.25, reweight="inverse", anneal=0.0)
    sampler = after_warm_up(teacher, torch.linspace(0.01, 2.0, 100))
    ids = torch.tensor(list(sampler))
    inclusion = teacher.state_dict()["lessons"]["latest"]["inclusion"]
    expected = (1 / inclusion).clamp(max=4)
    assert bool((1 / inclusion > 4).any()) and bool((1 / inclusion < 4).any())
    weights = teacher.weights(ids)
    torch.testing.assert_close(weights, expected / expected.mean(), rtol=1e-6, atol=0)  # one float32 division
    assert float(weights.mean()) == pytest.approx(1, abs=1e-6)
    assert torch.equal(teacher.weights(ids.flip(0)), weights.flip(0))


def test_weights_are_1_in_warm_up_in_anneal_and_without_reweighting() -> None:
    teacher = attent.Teacher(20, total_epochs=4, anneal=0.25, reweight="inverse")
    sampler = teacher.sampler()
    uniform = []
    for _ in range(4):
        ids = torch.tensor(list(sampler))
        uniform.append(bool((teacher.weights(ids) == 1).all()))
        teacher.record(ids, 1.0 + ids)
    assert uniform == [True, False, False, True]
    assert torch.equal(attent.Teacher(20, total_epochs=4).weights(torch.tensor([3, 4])), torch.ones(2))


def test_an_id_outside_the_lesson_has_no_weight() -> None:
    teacher = attent.Teacher(10, total_epochs=2, reweight="inverse")
    sampler = after_warm_up(teacher, torch.ones(10))
    left_out = sorted(set(range(10)) - set(sampler))
    for wrong in (left_out[0], -1, 10):
        with pytest.raises(ValueError, match=f"^example_ids: got {wrong};"):
            teacher.weights(torch.tensor([wrong]))


# -------------------------------------------------------------------------------------------------------------- quotas


def test_groups_get_proportional_shares_by_largest_remainder_in_every_lesson() -> None:
    groups = torch.tensor([3] * 60 + [8] * 30 + [9] * 10)
    for options in ({}, {"temperature": 0.0, "floor": 0.0}, {"warmup": 0}):
        teacher = attent.Teacher(100, total_epochs=3, ratio=0.25, groups=groups, anneal=0.0, **options)  # type: ignore[arg-type]
        teacher.record(torch.arange(50), torch.rand(50))  # groups 8 and 9 unseen
        sampler = teacher.sampler()
        sampler.set_epoch(1)
        counts = groups[list(sampler)].bincount(minlength=10)
        assert counts[[3, 8, 9]].tolist() == [15, 8, 2]  # 15, 7.5, 2.5: the equal remainders go to the lower group


def test_unseen_ids_come_first_within_their_group() -> None:
    groups = torch.tensor([0] * 10 + [1] * 10)
    teacher = attent.Teacher(20, total_epochs=2, ratio=0.5, groups=groups, temperature=0, floor=0, warmup=0)
    teacher.record(torch.arange(7), torch.arange(7.0))
    lesson = list(teacher.sampler(shuffle=False))
    assert lesson[:5] == [5, 6, 7, 8, 9] and len(lesson) == 10


# ------------------------------------------------------------------------------------------------------------ demotion


def test_demoted_examples_are_left_to_the_floor_until_they_improve() -> None:
    def lessons(demote_after: int | None, stuck: float, epochs: int) -> list[bool]:
        teacher = attent.Teacher(
            100, total_epochs=epochs, ratio=0.5, temperature=0, floor=0.1, demote_after=demote_after, anneal=0.0
        )
        sampler, held = teacher.sampler(), []
        for epoch in range(epochs):
            ids = torch.tensor(list(sampler))
            held.append(7 in ids.tolist())
            teacher.record(ids, torch.where(ids == 7, 50.0 - stuck * epoch, 2.0 + ids / 100 - epoch / 10))
        return held

    assert lessons(None, 0.0, 8) == [True] * 8
    held = lessons(3, 0.0, 8)
    assert held[:4] == [True] * 4  # its first score and three without improvement
    assert held.count(True) < 8
    assert lessons(3, 1.0, 8) == [True] * 8  # hard, but getting better


# -------------------------------------------------------------------------------------------------------------- account


def test_the_summary_counts_what_was_done() -> None:
    teacher = attent.Teacher(10, total_epochs=4, ratio=0.5, temperature=0, floor=0, anneal=0.0)
    sampler = teacher.sampler(shuffle=False)
    for scores in (torch.arange(10.0), None, None):
        ids = torch.tensor(list(sampler))
        teacher.record(ids, scores if scores is not None else torch.where(ids == 9, 99.0, 0.0))
    summary = teacher.summary()
    assert summary["passes"] == 3 and summary["lessons"] == 2
    assert summary["examples_offered"] == 30 and summary["examples_trained_on"] == 20
    assert summary["keep_ratio_asked"] == summary["keep_ratio_achieved"] == pytest.approx(2 / 3)
    assert summary["never_seen_ids"].tolist() == []
    # Lesson 1: 5..9. Their new scores are 0 and 99, so lesson 2 is 9 and the four highest left: 4, 3, 2, 1.
    assert summary["turnover"] == [pytest.approx(4 / 5)]
    assert summary["always_chosen_ids"].tolist() == [9]
    assert "always_chosen_ids      1 (9)" in str(summary)


def test_never_seen_examples_are_listed() -> None:
    teacher = attent.Teacher(10, total_epochs=2, warmup=0, ratio=0.3)
    ids = list(teacher.sampler())
    teacher.record(torch.tensor(ids), torch.ones(3))
    assert teacher.summary()["never_seen_ids"].tolist() == sorted(set(range(10)) - set(ids))


def test_achieved_is_below_asked_where_batches_drop_their_tails() -> None:
    teacher = attent.Teacher(10, total_epochs=1)
    for batch in teacher.sampler(batch_size=4):
        teacher.record(torch.tensor(batch), torch.ones(4))
    assert teacher.summary()["keep_ratio_asked"] == 1.0
    assert teacher.summary()["keep_ratio_achieved"] == 0.8


def test_seconds_are_measured_and_what_is_estimated_says_so() -> None:
    teacher = attent.Teacher(1000, total_epochs=2, ratio=0.5)
    assert teacher.summary()["saved_seconds_are"] == "unknown"
    sampler = teacher.sampler(batch_size=10)
    for _ in range(2):
        for batch in sampler:
            torch.rand(30_000).sort()  # some work to be saved
            teacher.record(torch.tensor(batch), torch.rand(10))
    summary = teacher.summary()
    assert 0 < summary["teaching_seconds"] < summary["training_seconds"]
    assert summary["saved_seconds_are"] == "estimated"
    per_example = (summary["training_seconds"] - summary["teaching_seconds"]) / 1500
    assert summary["saved_seconds"] == pytest.approx(2000 * per_example - summary["training_seconds"])
    measured = teacher.summary(full_seconds=100.0)
    assert measured["saved_seconds_are"] == "measured"
    assert measured["saved_seconds"] == pytest.approx(100.0 - measured["training_seconds"])
    with pytest.raises(ValueError, match=r"^full_seconds: got "):
        teacher.summary(full_seconds=-1)


def test_seconds_saved_are_unknown_where_no_training_was_timed() -> None:
    stream = attent.Teacher(total_steps=4, ratio=0.5)
    stream.choose(torch.rand(8))
    unrecorded = attent.Teacher(8, total_epochs=1)
    assert len(list(unrecorded.sampler())) == 8
    for teacher in (stream, unrecorded):
        summary = teacher.summary(full_seconds=100.0)
        assert summary["training_seconds"] is None
        assert (summary["saved_seconds"], summary["saved_seconds_are"]) == (None, "unknown")


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({}, "total_epochs"),
        ({"num_examples": 5}, "total_epochs"),
        ({"num_examples": 5, "total_epochs": 2, "total_steps": 2}, "total_epochs"),
        ({"total_epochs": 2}, "num_examples"),
        ({"num_examples": 0, "total_epochs": 2}, "num_examples"),
        ({"num_examples": 5.0, "total_epochs": 2}, "num_examples"),
        ({"num_examples": 5, "total_epochs": 0}, "total_epochs"),
        ({"total_steps": 1.5}, "total_steps"),
        ({"total_steps": 4, "temperature": -1}, "temperature"),
        ({"total_steps": 4, "floor": 1.1}, "floor"),
        ({"total_steps": 4, "reweight": "all"}, "reweight"),
        ({"total_steps": 4, "seed": 0.5}, "seed"),
        ({"total_steps": 4, "demote_after": 3}, "demote_after"),
        ({"num_examples": 5, "total_epochs": 2, "demote_after": 0}, "demote_after"),
        ({"total_steps": 4, "groups": torch.zeros(4, dtype=torch.int64)}, "groups"),
        ({"num_examples": 5, "total_epochs": 2, "groups": torch.zeros(4, dtype=torch.int64)}, "groups"),
        ({"num_examples": 5, "total_epochs": 2, "groups": torch.zeros(5)}, "groups"),
        ({"num_examples": 5, "total_epochs": 2, "groups": torch.full((5,), -1)}, "groups"),
    ],
)
def test_bad_arguments_are_refused_by_name(options: dict[str, object], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: got "):
        attent.Teacher(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("argument", ["batch_size", "accumulate", "world_size"])
def test_steps_are_counted_for_positive_numbers_only(argument: str) -> None:
    options = {"batch_size": 2, argument: 0}
    with pytest.raises(ValueError, match=f"^{argument}: got 0"):
        attent.Teacher(10, total_epochs=2).total_steps(**options)


def test_a_teacher_of_streams_has_no_epochs_and_says_so() -> None:
    teacher = attent.Teacher(total_steps=4)
    for call in (teacher.sampler, teacher.epoch_sizes, lambda: teacher.total_steps(4)):
        with pytest.raises(ValueError, match=r"made with total_steps; takes one made with num_examples"):
            call()
    with pytest.raises(ValueError, match="without num_examples"):
        teacher.record(torch.tensor([0]), torch.ones(1))


def test_two_teachers_share_nothing() -> None:
    def lessons(disturb: bool) -> list[list[int]]:
        teacher, other = (attent.Teacher(30, total_epochs=4) for _ in range(2))
        sampler, other_sampler = teacher.sampler(), other.sampler()
        out = []
        for _ in range(4):
            ids = list(sampler)
            teacher.record(torch.tensor(ids), torch.tensor(ids) + 1.0)
            if disturb:
                other.record(torch.tensor(list(other_sampler)), torch.rand(other.epoch_sizes()[len(out)]))
            out.append(ids)
        return out

    assert lessons(True) == lessons(False)


def test_a_teacher_shows_its_settings_and_pickles() -> None:
    teacher = attent.Teacher(30, total_epochs=4, ratio=0.3)
    sampler = teacher.sampler()
    next(iter(sampler))
    copy = pickle.loads(pickle.dumps(teacher))
    assert repr(copy) == repr(teacher)
    assert "num_examples=30" in repr(teacher) and "'value': 0.3" in repr(teacher)
