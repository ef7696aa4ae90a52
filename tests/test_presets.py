"""The paper's two schedules: what they train on, when they choose anew, and what they save."""

from __future__ import annotations

import pytest
import torch

import attent


def lessons(teacher: attent.Teacher) -> list[list[int]]:
    """What each epoch trains on; the score of example i in epoch e rises with i, turning around every third epoch."""
    sampler, out = teacher.sampler(shuffle=False), []
    for epoch in range(len(teacher.epoch_sizes())):
        out.append(list(sampler))
        ids = torch.tensor(out[-1])
        teacher.record(ids, 1.0 + (ids if epoch % 3 == 0 else 1000 - ids))
    return out


def test_simple_trains_once_on_everything_and_then_on_its_hardest_70_per_cent() -> None:
    epochs = lessons(attent.presets.attent_simple(100))
    assert epochs[0] == list(range(100))
    assert epochs[1:] == [list(range(30, 100))] * 4  # the highest of epoch 0, chosen once, kept


def test_simple_saves_24_per_cent_of_the_passes() -> None:
    sizes = attent.presets.attent_simple(1000).epoch_sizes()
    assert 1 - sum(sizes) / (5 * 1000) == pytest.approx(0.24)


def test_complex_raises_the_ratio_in_equal_stages_over_all_reduced_epochs() -> None:
    sizes = attent.presets.attent_complex(1000, 101, initial_interval=1, final_interval=1).epoch_sizes()
    stages = [1000, *(round(1000 * (0.2 + 0.6 * c / 9)) for c in range(10) for _ in range(10))]
    assert sizes == stages


def test_complex_holds_lessons_longer_and_longer() -> None:
    teacher = attent.presets.attent_complex(100, 40, initial_interval=2, final_interval=5)
    epochs = lessons(teacher)
    changes = [e for e in range(2, 40) if epochs[e] != epochs[e - 1]]
    held = [after - before for before, after in zip([1, *changes], changes, strict=False)]
    assert held == sorted(held) and held[0] == 2 and held[-1] >= 4
    assert teacher.summary()["lessons"] == len(changes) + 1


def test_complex_chooses_softly() -> None:
    first = lessons(attent.presets.attent_complex(100, 4, cycles=2, initial_interval=1, final_interval=1))[1]
    other = lessons(attent.presets.attent_complex(100, 4, cycles=2, initial_interval=1, final_interval=1, seed=1))[1]
    assert first != other and first != list(range(80, 100))
    assert sum(first) / len(first) > 50  # high scores are preferred all the same


def test_the_arithmetic_in_its_description_holds() -> None:
    teacher = attent.presets.attent_complex(1000)
    plan = teacher._plan
    drawn = len({plan.lesson_start(epoch) for epoch in range(1, 800)})
    assert drawn == 112 and round(drawn / 3) == 37
    assert 1 - sum(teacher.epoch_sizes()) / (800 * 1000) == pytest.approx(0.5, abs=0.01)


def test_a_full_rescoring_between_epochs_is_recorded_without_counting_as_training() -> None:
    def train(rescore: bool) -> attent.Teacher:
        teacher = attent.presets.attent_complex(100, 6, cycles=2, initial_interval=1, final_interval=1)
        assert teacher.epoch_sizes() == [100, 20, 20, 80, 80, 80]
        sampler = teacher.sampler(batch_size=5)
        for _ in range(3):
            for batch in sampler:
                teacher.record(torch.tensor(batch), torch.ones(5))
            if rescore:
                for ids in torch.arange(100).split(50):
                    teacher.record(ids, torch.where(ids < 20, 1e9, 1.0))
        assert sampler.epoch == 3
        return teacher

    teacher = train(rescore=True)
    assert teacher.summary()["examples_trained_on"] == 140 == train(rescore=False).summary()["examples_trained_on"]
    assert set(teacher.sampler()) >= set(range(20))  # the lesson is that of the new scores


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: attent.presets.attent_simple(0), "num_examples"),
        (lambda: attent.presets.attent_simple(10, 0), "total_epochs"),
        (lambda: attent.presets.attent_simple(10, ratio=0), "ratio"),
        (lambda: attent.presets.attent_complex(10, cycles=1), "cycles"),
        (lambda: attent.presets.attent_complex(10, initial_interval=0), "initial_interval"),
        (lambda: attent.presets.attent_complex(10, final_ratio=1.2), "ratio"),
    ],
)
def test_bad_arguments_are_refused_by_name(make: object, argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: got "):
        make()  # type: ignore[operator]
