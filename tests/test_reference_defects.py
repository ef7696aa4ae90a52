"""Each defect that reading the published code of AtteNT and its relatives showed, as a test that ours does not have it.

Sections follow the code bases: AtteNT's vision trainer (Complex), AtteNT's language trainer (Simple), GraNT, INT and
NINT. A test's name says what went wrong there; its body shows what holds here.
"""

from __future__ import annotations

import doctest
import inspect
import io
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

import attent
from attent import schedules

from .ranks import on_ranks

# Loops that only look at the order of examples record nothing.
pytestmark = pytest.mark.filterwarnings("ignore:.*no score was ever recorded")


class CountingLearner(nn.Module):
    """A classifier that counts its forward passes and notes its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.forwards = 0
        self.modes: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        self.modes.add(self.training)
        logits: Tensor = self.linear(x)
        return logits


def train(learner: CountingLearner, teacher: attent.Teacher, epochs: int) -> list[float]:
    """A plain loop in the harvest way over 40 examples; the learning rate used in each step."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(40, 4), torch.arange(40) % 3)
    loader = DataLoader(attent.indexed(data), batch_sampler=teacher.sampler(batch_size=5))
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    schedule = CosineAnnealingLR(optimizer, T_max=teacher.total_steps(batch_size=5))
    rates = []
    for _ in range(epochs):
        for ids, x, y in loader:
            logits = learner(x)
            F.cross_entropy(logits, y).backward()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            teacher.record(ids, attent.example_scores(logits.detach(), y))
    rates.append(optimizer.param_groups[0]["lr"])
    return rates


def lesson_of(teacher: attent.Teacher, scores: Tensor) -> list[int]:
    """The first reduced lesson after these scores."""
    teacher.record(torch.arange(len(scores)), scores)
    sampler = teacher.sampler()
    sampler.set_epoch(1)
    return sorted(sampler)


# ------------------------------------------------------------------------------------------------------- AtteNT Complex


def test_losses_were_batch_scalars_so_the_selector_had_no_score_per_example() -> None:
    teacher = attent.Teacher(4, total_epochs=2)
    with pytest.raises(ValueError, match=r"^scores: got a float32 tensor of shape \(\)"):
        teacher.record(torch.arange(4), torch.tensor(0.7))
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    assert attent.example_scores(logits, target).shape == (4,)


def shard(rank: int) -> tuple[list[int], int]:
    teacher = attent.Teacher(40, total_epochs=2, temperature=0, floor=0)
    sampler = teacher.sampler(batch_size=5)
    taken, recorded = [], 0
    for epoch in range(2):
        for batch in sampler:
            teacher.record(torch.tensor(batch), torch.tensor(batch) + 1.0)
            recorded += len(batch) if epoch == 0 else 0
            taken += batch if epoch == 1 else []
    return taken, recorded


def test_every_rank_scored_everything_and_trained_on_a_full_subset_of_its_own(tmp_path: Path) -> None:
    (first, scored_by_first), (second, scored_by_second) = on_ranks(2, shard, tmp_path)
    assert scored_by_first == scored_by_second == 20  # half of the data each
    assert len(first) == len(second) == 10  # half of the lesson each
    assert sorted(first + second) == list(range(20, 40))  # and both together are the one lesson, of both ranks' scores


def test_set_epoch_was_never_called_so_the_order_never_changed() -> None:
    sampler = attent.Teacher(40, total_epochs=2, warmup=2).sampler()
    assert list(sampler) != list(sampler)


def test_resume_ignored_the_cycle() -> None:
    def epochs(teacher: attent.Teacher, until: int) -> list[list[int]]:
        sampler, out = teacher.sampler(), []
        for epoch in range(sampler.epoch, until):
            ids = torch.tensor(list(sampler))
            teacher.record(ids, (ids * 7 % 13 + epoch) / 5)
            out.append(ids.tolist())
        return out

    def make() -> attent.Teacher:
        return attent.presets.attent_complex(60, 9, cycles=2, initial_interval=2, final_interval=4)

    whole = epochs(make(), 9)
    for stop in range(1, 9):  # also in the middle of an interval
        first, file = make(), io.BytesIO()
        assert epochs(first, stop) == whole[:stop]
        torch.save(first.state_dict(), file)
        second = make()
        second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        assert epochs(second, 9) == whole[stop:]


def test_subset_epochs_did_not_advance_the_step_so_learning_rates_repeated_and_never_ended() -> None:
    teacher = attent.Teacher(40, total_epochs=6, ratio=0.4)
    rates = train(CountingLearner(), teacher, 6)
    assert len(rates) - 1 == teacher.total_steps(batch_size=5)
    assert all(later < earlier for earlier, later in pairwise(rates))
    assert rates[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("epochs", [7, 50, 1600])
def test_the_defaults_stopped_early_and_the_last_epoch_never_came(epochs: int) -> None:
    teacher = attent.presets.attent_complex(4, epochs)
    sampler = teacher.sampler()
    sizes = [len(list(sampler)) for _ in range(epochs)]
    assert sizes == teacher.epoch_sizes() and len(sizes) == epochs
    assert sampler.epoch == epochs


@pytest.mark.parametrize("epochs", [800, 1600])
def test_the_defaults_could_not_save_what_was_claimed(epochs: int) -> None:
    teacher = attent.presets.attent_complex(1000, epochs)
    starts = {teacher._plan.lesson_start(epoch) for epoch in range(1, epochs)}
    passes = sum(teacher.epoch_sizes()) / 1000
    rescoring = len(starts) / 3  # if the data are rescored for each lesson: a forward is a third of a pass
    assert 1 - (passes + rescoring) / epochs > 0.2058


def test_temperature_scaled_the_noise_too_and_so_changed_nothing() -> None:
    scores = torch.rand(200)
    chosen = {
        t: attent.select_top_k(scores, 50, temperature=t, seed=3).index.sort().values.tolist() for t in (0.01, 1, 100)
    }
    assert chosen[0.01] != chosen[1] != chosen[100]
    hardest = set(scores.topk(50).indices.tolist())
    overlap = {t: len(hardest & set(index)) for t, index in chosen.items()}
    assert overlap[0.01] > 45 > overlap[1] > overlap[100]
    lessons = [lesson_of(attent.Teacher(200, total_epochs=2, ratio=0.25, temperature=t), scores) for t in (0.01, 100)]
    assert lessons[0] != lessons[1]


def test_choosing_at_random_and_each_soft_epoch_paid_for_scoring_all_data() -> None:
    learner = CountingLearner()
    teacher = attent.Teacher(40, total_epochs=6, ratio=0.4)
    train(learner, teacher, 6)
    assert learner.forwards == teacher.total_steps(batch_size=5)  # the training forwards and not one more
    at_random = attent.Teacher(40, total_epochs=6, ratio=0.4, floor=1.0)  # needs no scores to choose
    sampler = at_random.sampler()
    assert [len(list(sampler)) for _ in range(6)] == at_random.epoch_sizes()


def test_a_soft_choice_was_redrawn_within_its_interval() -> None:
    teacher = attent.presets.attent_complex(60, 7, cycles=2, initial_interval=3, final_interval=3)
    sampler = teacher.sampler()
    epochs = []
    for _ in range(7):
        ids = torch.tensor(list(sampler))
        teacher.record(ids, torch.rand(len(ids)))
        epochs.append(set(ids.tolist()))
    assert epochs[1] == epochs[2] == epochs[3] and epochs[4] == epochs[5] == epochs[6]


def test_scores_depended_on_random_masks_of_a_pass_of_their_own() -> None:
    # A harvested score is that of the forward that trained; choosing adds no randomness but the teacher's own.
    scores = torch.rand(50)
    first = lesson_of(attent.Teacher(50, total_epochs=2), scores)
    torch.rand(17)
    before = torch.random.get_rng_state()
    assert lesson_of(attent.Teacher(50, total_epochs=2), scores) == first
    assert torch.equal(torch.random.get_rng_state(), before)


def test_scores_were_unweighted_where_training_weighted_its_losses() -> None:
    torch.manual_seed(1)
    hidden, head = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    target, weight = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
    _, scores = attent.linear_cross_entropy(hidden, head, target, weight=weight, score="logit")
    logits = (hidden @ head.T).requires_grad_()
    weighted = F.cross_entropy(logits, target, weight=weight, reduction="none")
    (gradient,) = torch.autograd.grad(weighted.sum(), logits)
    torch.testing.assert_close(scores, gradient.norm(dim=1), rtol=1e-10, atol=0)  # float64
    # Several weighted losses: the score of their weighted sum, whatever balances them.
    both = 0.3 * F.cross_entropy(logits, target, weight=weight, reduction="none") + 0.7 * logits.square().sum(1)
    (gradient,) = torch.autograd.grad(both.sum(), logits, retain_graph=True)
    torch.testing.assert_close(attent.gradient_scores(both, logits), gradient.norm(dim=1), rtol=1e-10, atol=0)


def test_the_documented_flags_were_not_those_of_the_program() -> None:
    for preset in (attent.presets.attent_simple, attent.presets.attent_complex):
        (documented,) = doctest.DocTestFinder(recurse=False).find(preset, globs={"attent": attent})
        assert documented.examples
        assert doctest.DocTestRunner().run(documented).failed == 0


# -------------------------------------------------------------------------------------------------------- AtteNT Simple


def test_a_file_ended_in_the_middle_of_a_name() -> None:
    files = list(Path(attent.__file__).parent.rglob("*.py"))
    assert len(files) > 20
    for file in files:
        compile(file.read_text(encoding="utf-8"), str(file), "exec")


def test_scores_were_averaged_over_padding_and_prompt_and_depended_on_batch_mates() -> None:
    torch.manual_seed(2)
    hidden, head = torch.randn(2, 6, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    target = torch.randint(11, (2, 6))
    target[:, :2] = -100  # prompt
    target[0, 4:] = -100  # padding
    for name in ("loss", "logit", "hidden", "head"):
        _, scores = attent.linear_cross_entropy(hidden, head, target, score=name)
        _, alone = attent.linear_cross_entropy(hidden[:1, 2:4], head, target[:1, 2:4], score=name)
        # Summed in another order: float64 rounding of a few operations.
        torch.testing.assert_close(scores[:1], alone, rtol=1e-12, atol=1e-14)


def test_examples_were_known_by_a_hash_of_their_padded_ids_so_duplicates_collided() -> None:
    texts = TensorDataset(torch.tensor([[5, 6, 0], [5, 6, 0], [7, 8, 9]]))  # the first two are equal
    teacher = attent.Teacher(3, total_epochs=2)
    for ids, _ in DataLoader(attent.indexed(texts), batch_size=2):
        teacher.record(ids, ids + 1.0)
    assert teacher.state_dict()["harvest"]["score"].tolist() == [1.0, 2.0, 3.0]


def test_each_example_was_read_back_to_the_host() -> None:
    teacher = attent.Teacher(8, total_epochs=2)
    with FakeTensorMode():
        ids, scores = torch.empty(8, dtype=torch.int64, device="cuda"), torch.empty(8, device="cuda")
        teacher.record(ids, scores)  # fake tensors have nothing to read: one that is asked for a value raises
        with pytest.raises(RuntimeError):
            teacher.summary()  # here, at the merge, values are read


def test_all_epochs_ran_before_the_selection() -> None:
    teacher = attent.presets.attent_simple(40, 5)
    learner = CountingLearner()
    train(learner, teacher, 5)
    assert learner.forwards == (40 + 4 * 25) // 5  # 28 chosen make five whole batches: from the second epoch on
    assert teacher.summary()["lessons"] == 1


def test_the_loss_ignored_how_many_items_an_accumulated_step_holds() -> None:
    torch.manual_seed(3)
    hidden, target = torch.randn(4, 5, 8, dtype=torch.float64), torch.randint(11, (4, 5))
    target[0, 1:] = -100  # so that micro-batches hold unequal numbers of tokens
    head = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(attent.linear_cross_entropy(hidden, head, target), head)
    items = int((target != -100).sum())
    parts = [
        attent.linear_cross_entropy(hidden[i : i + 1], head, target[i : i + 1], reduction="sum", score="logit")[0]
        / items
        for i in range(4)
    ]
    (accumulated,) = torch.autograd.grad(torch.stack(parts).sum(), head)
    torch.testing.assert_close(accumulated, whole, rtol=1e-10, atol=1e-12)  # float64


def gather(rank: int) -> list[float]:
    teacher = attent.Teacher(4, total_epochs=2)
    teacher.record(torch.tensor([rank, rank + 2]), torch.tensor([rank + 1.0, rank + 3.0]))
    scores: list[float] = teacher.state_dict()["harvest"]["score"].tolist()
    return scores


def test_ranks_did_not_share_their_scores(tmp_path: Path) -> None:
    assert on_ranks(2, gather, tmp_path) == [[1.0, 2.0, 3.0, 4.0]] * 2


@pytest.mark.parametrize(
    "argument",
    {
        "total_epochs": 6,
        "ratio": 0.3,
        "temperature": 0.01,
        "floor": 1.0,
        "warmup": 2,
        "anneal": 0.5,
        "groups": torch.arange(100) // 50,
        "demote_after": 1,
        "seed": 1,
        "interval": 3,
    }.items(),
    ids=lambda argument: argument[0],
)
def test_an_argument_was_there_and_unused(argument: tuple[str, Any]) -> None:
    def epochs(options: dict[str, Any]) -> list[list[int]]:
        teacher = attent.Teacher(100, **{"total_epochs": 8, **options})
        sampler, out = teacher.sampler(), []
        for epoch in range(8):
            if epoch < len(teacher.epoch_sizes()):
                ids = torch.tensor(list(sampler))
                # Two examples stay as hard as they were at first, the others get easier.
                teacher.record(ids, torch.where(ids >= 98, 300.0, (ids + 1.0) / (1 + epoch)))
                out.append(sorted(ids.tolist()))
        return out

    assert epochs({argument[0]: argument[1]}) != epochs({})


def test_a_weight_that_was_asked_for_is_there() -> None:
    teacher = attent.Teacher(40, total_epochs=2, reweight="inverse")
    lesson = lesson_of(teacher, torch.rand(40))
    assert teacher.weights(torch.tensor(lesson)).unique().numel() > 1


# ---------------------------------------------------------------------------------------------------------------- GraNT


def test_scores_of_a_shuffled_pass_were_filed_under_positions_so_the_choice_was_random() -> None:
    difficulty = torch.rand(60)
    teacher = attent.Teacher(60, total_epochs=2, ratio=0.25, temperature=0, floor=0, anneal=0.0)
    for ids, x in DataLoader(attent.indexed(TensorDataset(difficulty)), batch_size=7, shuffle=True):
        teacher.record(ids, x)
    sampler = teacher.sampler()
    sampler.set_epoch(1)
    assert set(sampler) == set(difficulty.topk(15).indices.tolist())


def test_a_softmax_over_the_batch_made_scores_depend_on_batch_mates() -> None:
    logits, target = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 5
    together = attent.example_scores(logits, target)
    alone = torch.cat([attent.example_scores(logits[i : i + 1], target[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


def test_scoring_ran_in_whatever_mode_the_learner_was_left_in() -> None:
    learner = CountingLearner()
    train(learner, attent.Teacher(40, total_epochs=6), 6)
    assert learner.modes == {True} and learner.training  # no pass besides training's, so no mode to get wrong


def test_the_subset_was_not_shuffled() -> None:
    teacher = attent.Teacher(60, total_epochs=2)
    teacher.record(torch.arange(60), torch.rand(60))
    sampler = teacher.sampler()
    sampler.set_epoch(1)
    order = list(sampler)
    assert order != sorted(order)


def test_the_interval_lived_in_a_global_variable() -> None:
    one, two = (attent.presets.attent_complex(30, 9, cycles=2, initial_interval=2, final_interval=2) for _ in range(2))
    first, second = one.sampler(), two.sampler()
    interleaved = [(list(first), list(second)) for _ in range(9)]
    assert all(a == b for a, b in interleaved)  # each goes through its own intervals


def test_the_start_ratio_was_also_the_length_of_the_warm_up() -> None:
    assert attent.Teacher(10, total_epochs=10, ratio=0.3, warmup=2, anneal=0.0).epoch_sizes() == [10, 10] + [3] * 8
    assert attent.Teacher(10, total_epochs=10, ratio=0.6, warmup=2, anneal=0.0).epoch_sizes() == [10, 10] + [6] * 8


# --------------------------------------------------------------------------------------------------------- INT and NINT


def test_only_an_l1_residual_was_offered() -> None:
    prediction, target = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    scores = attent.example_scores(prediction, target, loss="squared", score="residual", per_example="sum")
    torch.testing.assert_close(scores, (prediction - target).norm(dim=1), rtol=1e-12, atol=0)


def test_incremental_did_not_increase() -> None:
    for name in ("Incremental", "Linear", "Cosine"):
        schedule = getattr(schedules, name)(0.2, 0.8)
        values = [schedule(i / 100) for i in range(101)]
        assert values == sorted(values) and values[-1] > values[0]
    intervals = attent.presets.attent_complex(10, 200)._plan.interval
    assert intervals(0.0) == 5 and intervals(1.0) == 10


def test_a_schedule_of_the_list_was_empty() -> None:
    arguments: dict[str, tuple[Any, ...]] = {"Constant": (0.5,), "Step": ((0.5, 0.6), (0.5,))}
    classes = [c for c in vars(schedules).values() if inspect.isclass(c) and issubclass(c, schedules.Schedule)]
    assert len(classes) > 4
    for schedule in classes:
        if schedule is not schedules.Schedule:
            value = schedule(*arguments.get(schedule.__name__, (0.4, 0.6)))(0.5)
            assert isinstance(value, float) and 0.4 <= value <= 0.6


@pytest.mark.parametrize(("floor", "uniform"), [(0.0, 0), (0.2, 4), (0.7, 14), (1.0, 20)])
def test_70_per_cent_were_drawn_at_random_whatever_one_asked_for(floor: float, uniform: int) -> None:
    # At temperature 0 what is not among the highest was drawn by the floor, which draws from the rest only.
    scores = torch.arange(1.0, 101.0)
    lesson = lesson_of(attent.Teacher(100, total_epochs=2, ratio=0.2, temperature=0, floor=floor), scores)
    assert set(lesson) >= set(range(80 + uniform, 100))
    assert len([i for i in lesson if i < 80 + uniform]) == uniform


def test_a_floor_division_turned_a_smooth_decay_into_jumps() -> None:
    for schedule in (schedules.Linear(0.9, 0.1), schedules.Cosine(0.9, 0.1)):
        values = [schedule(i / 1000) for i in range(1001)]
        steps = [before - after for before, after in pairwise(values)]
        assert all(0 < step < 0.8 * math.pi / 2 / 1000 + 1e-12 for step in steps)  # the steepest slope there is


def test_the_first_use_of_a_cached_choice_met_nothing() -> None:
    teacher = attent.Teacher(20, total_epochs=3, warmup=0)
    sampler = teacher.sampler()
    assert len(list(sampler)) == len(set(sampler)) == 10  # nothing recorded yet: unseen ones, at random
    assert torch.equal(attent.Teacher(20, total_epochs=3).weights(torch.arange(3)), torch.ones(3))
