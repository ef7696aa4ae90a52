"""Scores, records and choices under any layout and value: what they say follows from the values alone.

Layouts, poison and draws as in ``test_robustness.py``; the slow tier draws many times more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import attent

from .test_robustness import DRAWS, LAYOUTS, POISON, TINY, assert_same, drawn, normal
from .test_robustness_objects import N, adversarial
from .threads import assert_threads_agree

B = 6


def viewed(data: Any, tensor: Tensor) -> Tensor:
    return LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](tensor)


# --------------------------------------------------------------------------------------------------------------- scores


@DRAWS
def test_gradient_scores_are_those_of_each_example_in_any_layout_and_poison_stays_in_its_own(draws: int) -> None:
    def body(data: Any) -> None:
        values = viewed(data, normal(B, 3, 2)).detach().clone(memory_format=torch.preserve_format)
        example, value = data.draw(st.integers(0, B - 1)), data.draw(st.sampled_from((*POISON, *TINY, 1.0)))
        values = values.contiguous()
        values[example, 1, 0] = value
        outputs = viewed(data, values) if data.draw(st.booleans()) else values
        outputs = outputs.detach().requires_grad_()
        plain = outputs.detach().clone(memory_format=torch.contiguous_format)
        scores = attent.gradient_scores(outputs.pow(3).flatten(1).sum(1), outputs)
        expected = (3 * plain.double().square()).flatten(1).norm(dim=1)
        # Squares above float32's largest number are infinite in float32, as are their roots.
        expected = torch.where(expected.square() > torch.finfo(torch.float32).max, torch.inf, expected)
        # Float32: six squares of gradients, three roundings each, and the root: 10 · 6e-8; squares of what is below
        # 1e-19 vanish.
        torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=1e-18, equal_nan=True)

    drawn(draws, body)


@DRAWS
@pytest.mark.parametrize("score", ["loss", "logit", "hidden", "head"])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_example_scores_depend_on_values_alone_and_poison_stays_in_its_example(
    draws: int, score: str, loss: str
) -> None:
    def scores(prediction: Tensor, target: Tensor, features: Tensor, weight: Tensor) -> dict[str, Tensor]:
        more = {"features": features} if score == "head" else {"linear_weight": weight} if score == "hidden" else {}
        return {"scores": attent.example_scores(prediction, target, loss=loss, score=score, **more)}

    def body(data: Any) -> None:
        target = normal(B, 4, 5, seed=3) if loss == "squared" else torch.arange(B * 4).view(B, 4) % 5
        tensors = [normal(B, 4, 5), target, normal(B, 4, 3, seed=1), normal(5, 3, seed=2)]
        views = [viewed(data, tensor) for tensor in tensors]
        plain = [view.clone(memory_format=torch.contiguous_format) for view in views]
        assert_same(scores(*views), scores(*plain))
        clean, example = scores(*tensors)["scores"], data.draw(st.integers(0, B - 1))
        value = data.draw(st.sampled_from(POISON))
        poisoned = tensors[0].clone()
        poisoned[example, data.draw(st.integers(0, 3)), data.draw(st.integers(0, 4))] = value
        found = scores(poisoned, *tensors[1:])["scores"]
        others = [i for i in range(B) if i != example]
        assert_same({"scores": found[others]}, {"scores": clean[others]})
        assert value == value or found[example].isnan()

    drawn(draws, body)


@DRAWS
@pytest.mark.parametrize("module", ["ScoringHead", "AttentiveClassifier"])
def test_modules_score_by_values_alone_and_poison_stays_in_its_example(draws: int, module: str) -> None:
    torch.manual_seed(0)
    target = torch.arange(B) % 5
    if module == "ScoringHead":
        head = attent.ScoringHead(torch.nn.Linear(8, 5), reduction="example", score="head", backend="torch")

        def run(tokens: Tensor) -> dict[str, Tensor]:
            losses, scores = head(tokens, target[:, None].expand(B, tokens.shape[1]))
            return {"losses": losses, "scores": scores, "logits": head(tokens)}
    else:
        classifier = attent.AttentiveClassifier(8, 2, 5)

        def run(tokens: Tensor) -> dict[str, Tensor]:
            found = classifier(tokens, target)
            return {"losses": found.losses, "scores": found.scores, "logits": classifier(tokens)}

    def body(data: Any) -> None:
        tokens = normal(B, 3, 8)
        view = viewed(data, tokens)
        assert_same(run(view), run(view.clone(memory_format=torch.contiguous_format)))
        clean, example = run(tokens), data.draw(st.integers(0, B - 1))
        value = data.draw(st.sampled_from((*POISON, *TINY)))
        tokens[example, data.draw(st.integers(0, 2)), data.draw(st.integers(0, 7))] = value
        found, others = run(tokens), [i for i in range(B) if i != example]
        for name in clean:
            assert_same({name: found[name][others]}, {name: clean[name][others]})
        assert value == value or found["scores"][example].isnan()
        assert value not in TINY or bool(found["scores"].isfinite().all())

    drawn(draws, body)


# -------------------------------------------------------------------------------------------------------------- records

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@DRAWS
def test_the_teacher_knows_what_a_dictionary_would_of_any_records(draws: int) -> None:
    def body(data: Any) -> None:
        teacher, known = attent.Teacher(B, total_epochs=4), {}
        visited, nonfinite = set(), 0
        for _ in range(data.draw(st.integers(0, 4))):
            size = data.draw(st.integers(0, 8))
            ids = torch.tensor(data.draw(st.lists(st.integers(0, B - 1), min_size=size, max_size=size)))
            values = st.sampled_from((0.0, -0.0, 0.5, 1e-42, 3e38, *POISON[:3]))
            scores = torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size)))
            ids, scores = ids.to(data.draw(st.sampled_from((torch.int32, torch.int64)))), scores.float()
            scores = scores.to(data.draw(st.sampled_from(DTYPES)))
            if size and data.draw(st.booleans()):
                ids, scores = viewed(data, ids), viewed(data, scores)
            teacher.record(ids, scores)
            for i, score in zip(ids.tolist(), scores.float().tolist(), strict=True):
                visited.add(i)
                if abs(score) < float("inf"):
                    known[i] = score
                else:
                    nonfinite += 1
            ids.zero_(), scores.zero_()  # loaders reuse their memory
        state = teacher.state_dict()["harvest"]
        expected = [known.get(i, float("nan")) for i in range(B)]
        torch.testing.assert_close(state["score"], torch.tensor(expected), rtol=0, atol=0, equal_nan=True)
        assert [bool(v) for v in state["visits"]] == [i in visited for i in range(B)]
        assert state["nonfinite"] == nonfinite

    drawn(draws, body)


@DRAWS
def test_choices_depend_on_values_alone_and_take_what_is_not_finite_last(draws: int) -> None:
    def body(data: Any) -> None:
        n = data.draw(st.integers(0, 12))
        values = st.sampled_from((0.0, -0.0, 0.5, 1.0, 1e-42, 3e38, -1.0, *POISON[:3]))
        scores = torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n)))
        scores = viewed(data, scores) if n else scores
        options = {
            "temperature": data.draw(st.sampled_from((0.0, 1.0, 3.0))),
            "floor": data.draw(st.sampled_from((0.0, 0.5))),
        }
        groups = torch.arange(n) % 3 if data.draw(st.booleans()) else None
        k = data.draw(st.none() | st.integers(0, n))
        teachers = [
            attent.Teacher(total_steps=4, warmup=0, anneal=0.0, reweight="inverse", **options) for _ in range(2)
        ]
        plain = scores.clone(memory_format=torch.contiguous_format)
        one, two = (t.choose(s, k, groups=groups) for t, s in zip(teachers, (scores, plain), strict=True))
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, two, strict=True))
        assert len(set(one.index.tolist())) == len(one.index) == ((n + 1) // 2 if k is None else k)
        assert torch.equal(one.score.nan_to_num(), plain[one.index].nan_to_num())
        assert bool(((one.inclusion > 0) & (one.inclusion <= 1 + 1e-6)).all())
        assert bool(teachers[0].weights(one).isfinite().all())
        if groups is None and not bool(plain[one.index].isfinite().all()):
            left = torch.ones(n, dtype=torch.bool)
            left[one.index] = False
            assert not bool(plain[left].isfinite().any())  # only once no finite one was left

    drawn(draws, body)


@DRAWS
def test_packed_batches_hold_each_id_once_and_no_more_than_they_may(draws: int) -> None:
    def body(data: Any) -> None:
        most = data.draw(st.integers(1, 9))
        lengths = data.draw(st.lists(st.integers(1, most), min_size=1, max_size=30))
        teacher = attent.Teacher(len(lengths), total_epochs=1)
        given_as = data.draw(
            st.sampled_from((list, tuple, torch.tensor, lambda x: torch.tensor(x).repeat(3, 1).T[:, 1]))
        )
        batches = list(teacher.sampler(shuffle=data.draw(st.booleans())).packed(given_as(lengths), most))
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in batch) <= most for batch in batches)

    drawn(draws, body)


@DRAWS
def test_the_loss_of_chosen_rows_is_the_masked_one_in_any_layout(draws: int) -> None:
    step = attent.OnePass(lambda x: x.square().sum(1), engine="eager")

    def body(data: Any) -> None:
        k = data.draw(st.integers(0, B))
        index = torch.tensor(data.draw(st.lists(st.integers(0, B - 1), min_size=k, max_size=k)), dtype=torch.int64)
        weights = viewed(data, normal(k, seed=4).abs()) if k else torch.empty(0)
        index = viewed(data, index) if k else index
        x = normal(B, 3).requires_grad_()
        step.backward(step(x), index, weights)
        factor = torch.zeros(B).index_add_(0, index.contiguous(), weights / max(k, 1))
        assert_same({"gradient": x.grad}, {"gradient": 2 * x.detach() * factor[:, None]})  # type: ignore[dict-item]

    drawn(draws, body)


# ------------------------------------------------------------------------------------------------------- ties, threads


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_million_tied_scores_make_a_lesson_that_is_whole(temperature: float) -> None:
    for name, scores in adversarial().items():
        teacher = attent.Teacher(
            N, total_epochs=8, ratio=0.25, temperature=temperature, floor=0.2 if temperature else 0
        )
        sampler = teacher.sampler(shuffle=False)
        sampler.set_epoch(0)
        next(iter(sampler))
        for ids, part in zip(torch.arange(N).split(200_000), scores.split(200_000), strict=True):
            teacher.record(ids, part)
        sampler.set_epoch(1)
        lesson = torch.tensor(list(sampler))
        assert len(lesson.unique()) == len(lesson) == N // 4, name
        if temperature == 0:
            # Without a finite score an example counts 0, as one below 0 does.
            known = torch.where(scores.isfinite(), scores, 0.0).clamp(min=0)
            expected = torch.sort(known, descending=True, stable=True).indices[: N // 4].sort().values
            assert torch.equal(lesson, expected), name


def test_teachers_in_many_threads_choose_as_one_alone_would() -> None:
    pool = torch.rand(200)

    def lessons() -> list[Tensor]:
        teacher = attent.Teacher(200, total_steps=20, warmup=0)
        return [teacher.choose(pool, example_ids=torch.arange(200)).index for _ in range(20)]

    assert_threads_agree(lessons)
