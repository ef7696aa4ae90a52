"""The scorer in CUDA C++ on the CPU: the kernels' own source, its threads as coroutines (csrc/cuda/emulate.h).

Within the budgets of the Triton form. Every launch draws the order in which threads and blocks of threads go on, when a
copy lands and when a product reads its operands, so that a missing barrier or wait shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import attent
from attent import reference
from attent_kernels import native, runtime
from attent_kernels.linear_cross_entropy import launch_scorer_cuda
from attent_kernels.linear_cross_entropy.configurations import Cut
from attent_kernels.linear_cross_entropy.scorer_workspace import ToScore
from tests import emulated

from .linear_cross_entropy_problems import PER_EXAMPLE, REDUCTIONS, Problem, problems
from .scorer_budgets import U, assert_is_reference, names_for

pytestmark = pytest.mark.slow  # the kernels' source is compiled first

NAN = float("nan")
KERNELS = ("portable", "hopper")


class Launch:
    """A ScorerLaunch whose starts are noted."""

    def __init__(self, launch: Any, ran: list[str]) -> None:
        self._launch, self._ran = launch, ran
        self.tickets, self.scratch_bytes = launch.tickets, launch.scratch_bytes

    def start(self, *addresses: int) -> None:
        self._ran.append(self._launch.kernel)
        self._launch.start(*addresses)


@contextmanager
def launched_by(kernel: str, seed: int = 0, group_tiles: int | None = None, sweep: int = 2) -> Iterator[list[str]]:
    """The emulated module in the real one's place, a kernel that must take what comes; yields which kernels ran."""
    module, ran = emulated.module(), []

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(module, name)

        def ScorerLaunch(self, *arguments: Any) -> Any:
            return Launch(module.ScorerLaunch(*arguments), ran)

    def parts(row_tiles: int, classes: int, *others: Any) -> Cut:
        tiles = -(-classes // others[-1].classes)
        return Cut(-(-tiles // group_tiles), group_tiles, sweep)

    module.set_schedule(seed)
    runtime.poison_workspaces()
    launch_scorer_cuda._launches.clear()  # they are of the kernel and the cut before
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(native, "module", Counted()))
        stack.enter_context(mock.patch.object(launch_scorer_cuda, "kernels_of", lambda _: (kernel,)))
        stack.enter_context(mock.patch.object(launch_scorer_cuda, "processors", lambda _: 3))
        if group_tiles is not None:
            stack.enter_context(mock.patch.object(launch_scorer_cuda, "cut", parts))
        for op in ("linear_cross_entropy", "score_and_select"):
            stack.enter_context(mock.patch(f"attent.ops.{op}.choose", lambda *_: "cuda"))
        yield ran
    assert runtime.open_tickets() == 0


def score(problem: Problem, **options: Any) -> Any:
    return attent.linear_cross_entropy(*problem[:3], **problem.options, **options, backend="cuda")


# ------------------------------------------------------------------------------------------------- the specification

HOW = st.fixed_dictionaries({"reduction": st.sampled_from(REDUCTIONS), "per_example": st.sampled_from(PER_EXAMPLE)})
DTYPE = st.sampled_from([torch.bfloat16, torch.float16])
SEED = st.integers(0, 2**31)


@settings(max_examples=40)
@given(problem=problems(), dtype=DTYPE, how=HOW, seed=SEED)
def test_the_portable_kernel_is_the_specification_at_any_strides(
    problem: Problem, dtype: torch.dtype, how: dict[str, Any], seed: int
) -> None:
    assume(not problem.target.is_floating_point())
    problem = problem.to(dtype)
    with launched_by("portable", seed) as ran:
        loss, scores = score(problem, score=names_for(problem), **how)
    assert ran == (["portable"] if problem.lengths else [])
    assert_is_reference(problem, loss, scores, **how)


@st.composite
def problems_of_several_tiles(draw: st.DrawFn) -> Problem:
    """Rows at multiples of 16 bytes, NaN between them; sizes around the tiles' of both kernels."""
    generator = torch.Generator().manual_seed(draw(SEED))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    def padded(values: Tensor) -> Tensor:
        width = values.shape[-1]
        stored = torch.full((*values.shape[:-1], -(-width // 8) * 8 + draw(st.sampled_from([0, 8]))), NAN).double()
        stored[..., :width] = values
        return stored[..., :width]

    width, classes = draw(st.sampled_from([8, 31, 100, 136, 328])), draw(st.sampled_from([3, 128, 130, 257, 300, 530]))
    layout = draw(st.sampled_from(["rows", "padded", "packed"]))
    options: dict[str, Any] = {"linear_bias": normal(classes) if draw(st.booleans()) else None}
    shape: tuple[int, ...] = {"rows": (150,), "padded": (3, 50), "packed": (140,)}[layout]
    if layout == "packed":
        options["cu_seqlens"] = torch.tensor([0, 1, 1, 90, 140], dtype=torch.int32)
    if layout != "rows":
        options["shift"] = draw(st.booleans())
    target = torch.randint(classes, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.4]))] = -100
    batch = {"rows": 150, "padded": 3, "packed": 4}[layout]
    options["weight"] = normal(classes).abs() if draw(st.booleans()) else None
    options["example_weight"] = (normal(batch) + 0.5).clamp(min=0) if draw(st.booleans()) else None
    options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1]))
    options["softcap"] = draw(st.sampled_from([None, 5.0]))
    return Problem(padded(normal(*shape, width)), padded(normal(classes, width) / 4), target, options)


CUTS = st.fixed_dictionaries({"group_tiles": st.sampled_from([None, 1, 2]), "sweep": st.sampled_from([1, 2])})


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel_is_the_specification_over_several_tiles(kernel: str) -> None:
    @settings(max_examples=40)
    @given(problem=problems_of_several_tiles(), dtype=DTYPE, how=HOW, cut=CUTS, seed=SEED)
    def holds(problem: Problem, dtype: torch.dtype, how: dict[str, Any], cut: dict[str, Any], seed: int) -> None:
        stored = {name: as_stored(getattr(problem, name), dtype) for name in ("input", "linear_weight")}
        problem = problem.to(dtype)._replace(**stored)
        with launched_by(kernel, seed, **cut) as ran:
            loss, scores = score(problem, score=names_for(problem), **how)
        assert ran == [kernel]
        assert_is_reference(problem, loss, scores, **how)

    holds()


def as_stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """In another dtype, at the same strides."""
    whole = values.as_strided((*values.shape[:-1], values.stride(-2)), values.stride())
    return whole.to(dtype)[..., : values.shape[-1]]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("miss", [1e-3, 1e-7])
def test_confident_tokens_keep_their_digits(kernel: str, miss: float) -> None:
    classes, rows = 64, 8
    target = torch.arange(rows) * 5 % classes
    logits = torch.randn(rows, classes)
    logits[torch.arange(rows), target] = -math.inf
    logits[torch.arange(rows), target] = logits.logsumexp(1) - math.log(miss)
    # Hidden states times this head are the logits, exactly. Exponentials are of arguments up to |log miss| + 10.
    problem = Problem(logits.bfloat16(), torch.eye(classes).bfloat16(), target, {})
    with launched_by(kernel):
        loss, scores = score(problem, score=("loss", "logit", "head"), reduction="none")
    exact = problem.to(torch.float64)
    names = ("loss", "logit", "head")
    expected, right = reference.linear_cross_entropy(*exact[:3], score=names, reduction="none")
    # The specification's own logarithm of p_y is off by float64's rounding of logits below 32.
    allowed = 3 * (abs(math.log(miss)) + 10 + classes) * U + 32 * 2.0**-53 / miss
    torch.testing.assert_close(loss.double(), expected, rtol=allowed, atol=0)
    for name, values in scores.items():
        torch.testing.assert_close(values.double(), right[name], rtol=allowed, atol=0)


EXTREMES: dict[str, tuple[list[float], int]] = {
    "a target far behind": ([-200.0, 1.0, 2.0, 0.5, 3.0], 0),
    "a target far ahead": ([200.0, 1.0, 2.0, 0.5, 3.0], 0),
    "logits of ten thousand": ([9984.0, 9920.0, 10048.0, 9984.0, 10048.0], 4),
    "classes ruled out": ([1.0, -math.inf, 2.0, -math.inf, -math.inf], 0),
    "a target ruled out": ([1.0, -math.inf, 2.0, 0.5, 0.25], 1),
    "one class left": ([-math.inf, -math.inf, -math.inf, -math.inf, 3.0], 4),
}


@pytest.mark.parametrize("case", EXTREMES)
def test_extreme_logits(case: str) -> None:
    bias, label = torch.tensor(EXTREMES[case][0]).bfloat16(), torch.tensor([EXTREMES[case][1]])
    hidden, weight = torch.ones(1, 8).bfloat16(), torch.zeros(5, 8).bfloat16()
    names = ("logit", "head")
    exact = hidden.double(), weight.double(), label
    expected, right = reference.linear_cross_entropy(*exact, linear_bias=bias.double(), score=names)
    for kernel in KERNELS:
        with launched_by(kernel):
            loss, scores = score(Problem(hidden, weight, label, {"linear_bias": bias}), score=names)
        # Differences of logits that count are below 70, and exact; 2 u of them and of what an exponential is off by.
        torch.testing.assert_close(loss.double(), expected, rtol=200 * U, atol=0)
        for name, values in scores.items():
            torch.testing.assert_close(values.double(), right[name], rtol=200 * U, atol=1e-30)


# ------------------------------------------------------------------------------------------- what counts, and what not


@pytest.mark.parametrize("kernel", KERNELS)
def test_tiles_without_a_computed_token_read_nothing(kernel: str) -> None:
    hidden, weight, target = torch.randn(4, 128, 8), torch.randn(10, 8), torch.randint(10, (4, 128))
    example_weight = torch.tensor([1.0, 0.0, 2.0, 1.0])
    target[3] = -100
    hidden[[1, 3]] = NAN  # one tile each
    problem = Problem(hidden, weight, target, {"example_weight": example_weight}).to(torch.bfloat16)
    with launched_by(kernel):
        loss, scores = score(problem, score="logit", reduction="example")
    left = [0, 2]
    exact = problem.input[left].double(), problem.linear_weight.double(), target[left]
    expected, right = reference.linear_cross_entropy(*exact, score="logit", reduction="example")
    torch.testing.assert_close(loss[left].double(), expected * example_weight[left].double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(scores[left].double(), right, rtol=1e-5, atol=0)
    assert not bool(loss[[1, 3]].any()) and not bool(scores[[1, 3]].any())


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_label_that_is_no_class_makes_its_own_example_nan(kernel: str) -> None:
    hidden, weight, target = torch.randn(5, 2, 8).half(), torch.randn(10, 8).half(), torch.randint(10, (5, 2))
    target[1, 0], target[2, 1], target[3, 0] = 10, -7, 2**40
    options: dict[str, Any] = {"example_weight": torch.tensor([1.0, 1.0, 1.0, 0.0, 2.0]), "score": ("logit", "loss")}
    with launched_by(kernel):
        result = launch_scorer_cuda.score_tokens(ToScore(hidden, weight, target, reduction="example", **options))
    for values in (result.loss, *result.scores):
        assert values.isnan().tolist() == [False, True, True, False, False] and float(values[3]) == 0
    assert torch.equal(result.counts, torch.full((5,), 2.0))


@settings(max_examples=20)
@given(
    numbers=st.lists(st.sampled_from([0, 3, 9, 200, 140, 150, 400, -2, 2**31 - 1, -(2**31)]), min_size=2, max_size=9),
    kernel=st.sampled_from(KERNELS),
)
def test_offsets_that_nobody_checked_end_in_one_whole_result(numbers: list[int], kernel: str) -> None:
    tokens, weight = 150, torch.randn(5, 8).bfloat16()
    hidden, target = torch.randn(tokens, 8).bfloat16(), torch.randint(5, (tokens,))
    cu_seqlens = torch.tensor(numbers, dtype=torch.int32)
    with launched_by(kernel):
        result = launch_scorer_cuda.score_tokens(
            ToScore(hidden, weight, target, cu_seqlens=cu_seqlens, reduction="sum", score=("loss",))
        )
    assert float(result.counts.sum()) == tokens
    losses = reference.linear_cross_entropy(hidden.double(), weight.double(), target, reduction="none")
    torch.testing.assert_close(result.loss.double(), losses.sum(), rtol=1e-5, atol=0)
    # The examples are adjacent runs: their mean losses are those of the runs that the counts cut.
    means = torch.stack([run.mean() if len(run) else run.sum() for run in losses.split(result.counts.int().tolist())])
    torch.testing.assert_close(result.scores[0].double(), means, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_where_there_is_no_token_all_is_zero(kernel: str) -> None:
    for shape in ((3, 0), (0, 4), (0,)):
        hidden, target = torch.zeros(*shape, 8).bfloat16(), torch.zeros(shape).long()
        with launched_by("portable"):
            loss, scores = score(Problem(hidden, torch.randn(9, 8).bfloat16(), target, {}), score="logit")
        assert float(loss) == 0 and torch.equal(scores, torch.zeros(shape[0]))


# ------------------------------------------------------------------------------------------------------ the one launch


@pytest.mark.parametrize("kernel", KERNELS)
def test_results_are_the_same_to_the_bit_in_whatever_order_threads_run(kernel: str) -> None:
    hidden, weight = (
        torch.randn(3, 90, 328).bfloat16(),
        torch.randn(300, 328).bfloat16(),
    )  # rounds of the ring of stages
    problem = Problem(hidden, weight, torch.randint(300, (3, 90)), {"label_smoothing": 0.1})
    found = []
    for seed in range(4):
        with launched_by(kernel, seed, group_tiles=1):
            loss, scores = score(problem, score=("logit", "loss"))
        found.append((loss, *scores.values()))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "floor": 0.4, "seed": 5}], ids=["hard", "drawn"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pool", [50, 700])
def test_the_lesson_is_the_choice_by_the_launchs_own_scores(kernel: str, pool: int, how: dict[str, Any]) -> None:
    hidden, weight, target = torch.randn(pool, 8).bfloat16(), torch.randn(9, 8).bfloat16(), torch.randint(9, (pool,))
    target[::7] = -100
    for k in (pool // 4, pool - 3):  # some that are chosen are invalid
        with launched_by(kernel, seed=k) as ran:
            lesson = attent.score_and_select(hidden, weight, target, k, score="head", **how, backend="cuda")
            assert ran == [kernel]
            _, scores = score(Problem(hidden, weight, target, {}), score="head")
        expected = attent.select_top_k(scores, k, valid=target != -100, **how, backend="torch")
        assert torch.equal(lesson.index, expected.index) and torch.equal(lesson.score, expected.score)
        # Exponentials and logarithms of two libraries, each right to a unit or two, of numbers below a hundred.
        torch.testing.assert_close(lesson.inclusion, expected.inclusion, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"label_smoothing": 0.1, "weight": torch.rand(300)}])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_launcher_lends_what_the_plan_says(kernel: str, options: dict[str, Any]) -> None:
    planned: list[tuple[Any, Any]] = []
    module = emulated.module()

    class Planned:
        def __getattr__(self, name: str) -> Any:
            return getattr(module, name)

        def ScorerLaunch(self, name: str, arguments: Any, processors: int) -> Any:
            launch = module.ScorerLaunch(name, arguments, processors)
            planned.append((launch, module.plan_scorer(name, arguments, processors)))
            return launch

    hidden, weight, target = torch.randn(150, 8).half(), torch.randn(300, 8).half(), torch.randint(300, (150,))
    with launched_by(kernel), mock.patch.object(native, "module", Planned()):
        launch_scorer_cuda.score_tokens(ToScore(hidden, weight, target, score=("head",), **options))
    launch, plan = planned[0]
    assert launch.tickets == plan["tickets"]
    # Each of up to 10 arrays starts at a multiple of 256 bytes.
    needed = 4 * plan["scratch_floats"]
    assert needed <= launch.scratch_bytes < needed + 10 * 256
    assert plan["grid"] > 0 and plan["shared_bytes"] <= {"portable": 163, "hopper": 227}[kernel] << 10


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_byte_beside_what_is_lent_is_written(kernel: str) -> None:
    lend, guarded = runtime.lend, []

    def with_guards(device: torch.device, tickets: int, size: int) -> Any:
        memory = torch.full((512 + size,), 0xAB, dtype=torch.uint8)
        start = -memory.data_ptr() % 256
        guarded.append((memory, start, size))
        lent = lend(device, tickets, size)
        return runtime.Workspace(lent.counters, memory[start : start + size], 0)

    problem = torch.randn(150, 8).half(), torch.randn(300, 8).half(), torch.randint(300, (150,))
    with launched_by(kernel), mock.patch.object(launch_scorer_cuda, "lend", with_guards):
        attent.score_and_select(*problem, 40, score="head", weight=torch.rand(300), backend="cuda")
    memory, start, size = guarded[0]
    assert bool((memory[:start] == 0xAB).all()) and bool((memory[start + size :] == 0xAB).all())


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kind_of_call_is_planned_once_and_launched_at_each_calls_addresses(kernel: str) -> None:
    weight, target = torch.randn(30, 8).half(), torch.randint(30, (50,))
    with launched_by(kernel) as ran:
        for _ in range(3):
            hidden = torch.randn(50, 8).half()
            _, scores = score(Problem(hidden, weight, target, {}), score=("logit", "head"))
            exact = hidden.double(), weight.double(), target
            right = reference.linear_cross_entropy(*exact, score=("logit", "head"))[1]
            for name, values in scores.items():
                torch.testing.assert_close(values.double(), right[name], rtol=1e-4, atol=0)
        assert ran == [kernel] * 3 and len(launch_scorer_cuda._launches) == 1


# ------------------------------------------------------------------------------------------------------ what it takes

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "hidden": ({"score": "hidden"}, "of examples of one token, 'head'; score asks for 'hidden'"),
    "head of sequences": ({"score": "head"}, "score asks for 'head' of examples of several tokens"),
    "probabilities": ({"target": torch.ones(2, 3, 9, dtype=torch.bfloat16) / 9}, "target holds probabilities"),
    "gradients": ({"input": torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)}, "computes no gradients"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_refuses_it_names(case: str) -> None:
    options, message = REFUSED[case]
    call = {
        "input": torch.randn(2, 3, 8).bfloat16(),
        "linear_weight": torch.randn(9, 8).bfloat16(),
        "target": torch.zeros(2, 3).long(),
        **options,
    }
    with launched_by("portable") as ran, pytest.raises(ValueError, match=f"^backend: got 'cuda'.*{message}"):
        attent.linear_cross_entropy(**call, backend="cuda")
    assert ran == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_numbers_that_do_not_fit_are_refused_before_a_launch(kernel: str) -> None:
    hidden, weight, target = torch.randn(5, 8).bfloat16(), torch.randn(9, 8).bfloat16(), torch.randint(9, (5,))
    with (
        launched_by(kernel),
        mock.patch.object(launch_scorer_cuda, "cut", lambda *_: Cut(1, 0, 1)),
        pytest.raises(ValueError, match=r"^cut: got 1 row tiles, 1 groups of 0 vocabulary tiles"),
    ):
        launch_scorer_cuda.score_tokens(ToScore(hidden, weight, target))
    weight = torch.randn(9, 9).bfloat16()[:, 1:]  # not at a multiple of 16 bytes
    # The launcher goes to the next kernel, of which there is none here.
    with launched_by("hopper") as ran, pytest.raises(RuntimeError, match=r"no scorer kernel .* multiple of 16 bytes"):
        launch_scorer_cuda.score_tokens(ToScore(hidden, weight, target))
    assert ran == []
