"""The scorer in one Triton launch against the specification: every option, tile, group and order of tickets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attent
from attent import reference
from attent.ops import triton_scorer
from attent.ops.linear_cross_entropy_op import Call
from attent_kernels import runtime
from attent_kernels.linear_cross_entropy.launch_scorer import score_tokens
from attent_kernels.linear_cross_entropy.scorer_workspace import Scored, ToScore, block_of_examples

from .launches import counted_launches
from .linear_cross_entropy_problems import PER_EXAMPLE, REDUCTIONS, Problem, problems
from .scorer_budgets import U, assert_is_reference, names_for
from .scorer_tiles import products, small_tiles

# What stands in lanes that are left out, the interpreter's NumPy complains about.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow|All-NaN slice):RuntimeWarning")

NAN = float("nan")


def score(problem: Problem, **options: Any) -> Any:
    return attent.linear_cross_entropy(*problem[:3], **problem.options, **options, backend="triton")


# ------------------------------------------------------------------------------------------------- the specification


def check_one(problem: Problem, how: dict[str, Any], tiles: dict[str, int]) -> None:
    with small_tiles(**tiles), counted_launches() as launched:
        loss, scores = score(problem, score=names_for(problem), **how)
    assert launched == (["score_kernel"] if problem.lengths else [])
    assert runtime.open_tickets() == 0
    assert_is_reference(problem, loss, scores, **how)


HOW = st.fixed_dictionaries({"reduction": st.sampled_from(REDUCTIONS), "per_example": st.sampled_from(PER_EXAMPLE)})
TILES = st.fixed_dictionaries(
    {"rows": st.sampled_from([4, 8]), "group_tiles": st.sampled_from([1, 2]), "sweep": st.sampled_from([2, 1, 9])}
)
DTYPE = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=15)
@given(problem=problems(), dtype=DTYPE, how=HOW, tiles=TILES)
def test_losses_and_scores_are_the_specifications(
    problem: Problem, dtype: torch.dtype, how: dict[str, Any], tiles: dict[str, int]
) -> None:
    check_one(problem.to(dtype), how, tiles)


@pytest.mark.slow
@settings(max_examples=60)
@given(problem=problems(), dtype=DTYPE, how=HOW, tiles=TILES)
def test_losses_and_scores_are_the_specifications_whatever_is_drawn(
    problem: Problem, dtype: torch.dtype, how: dict[str, Any], tiles: dict[str, int]
) -> None:
    check_one(problem.to(dtype), how, tiles)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.2},
    "smoothed over weights": {"label_smoothing": 0.2, "weight": torch.linspace(0.2, 2, 37)},
    "probabilities": {"weight": torch.linspace(0.2, 2, 37)},
    "capped": {"softcap": 4.0},
    "capped and smoothed": {"softcap": 4.0, "label_smoothing": 0.2},
    "capped probabilities": {"softcap": 4.0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_columns_tiles_and_groups_merge_to_the_whole_vocabulary(kind: str) -> None:
    hidden, bias = torch.randn(6, 9), torch.randn(37)
    target = torch.rand(6, 37) if "probabilities" in kind else torch.randint(37, (6,))
    problem = Problem(hidden, torch.randn(37, 9), target, {"linear_bias": bias, **KINDS[kind]})
    with small_tiles(rows=8, classes=8, width=16, group_tiles=3):  # 2 groups, of 3 and 2 tiles of 2 halves
        loss, scores = score(problem, score=names_for(problem), per_example="sum")
    assert_is_reference(problem, loss, scores, per_example="sum")


def test_targets_at_any_strides() -> None:
    hidden, weight = torch.randn(3, 5, 6).transpose(0, 1), torch.randn(9, 6)
    labels, q = torch.randint(9, (3, 5)).T, torch.rand(9, 5, 3).permute(1, 2, 0)
    for target in (labels, q):
        problem = Problem(hidden, weight, target, {"linear_bias": None})
        with small_tiles():
            loss, scores = score(problem, score=("logit", "loss"), per_example="sum")
        assert_is_reference(problem, loss, scores, per_example="sum")


def test_a_vector_of_weights_may_be_spread_out_too() -> None:
    every_second = torch.rand(9, 2)[:, 0]
    options = {"linear_bias": every_second, "weight": every_second + 1, "example_weight": torch.rand(3, 2)[:, 1]}
    problem = Problem(torch.randn(3, 2, 6), torch.randn(9, 6), torch.randint(9, (3, 2)), options)
    with small_tiles():
        loss, scores = score(problem, score=("logit", "loss"), per_example="sum")
    assert_is_reference(problem, loss, scores, per_example="sum")


# --------------------------------------------------------------------------------------------------- confident tokens


@pytest.mark.parametrize("miss", [1e-3, 1e-7, 1e-9])
def test_confident_tokens_keep_their_digits(miss: float) -> None:
    classes, rows = 60, 8
    target = torch.arange(rows) * 5 % classes
    logits = torch.randn(rows, classes)
    logits[torch.arange(rows), target] = -math.inf
    logits[torch.arange(rows), target] = logits.logsumexp(1) - math.log(miss)
    # Hidden states times this head are the logits, exactly. Exponentials are of arguments up to |log miss| + 10.
    problem = Problem(logits, torch.eye(classes), target, {})
    with small_tiles(rows=8, classes=16, width=64):
        loss, scores = score(problem, score=("loss", "logit", "head"), reduction="none")
    exact = problem.to(torch.float64)
    expected, right = reference.linear_cross_entropy(
        *exact[:3], score=("loss", "logit", "head"), reduction="none", linear_bias=None
    )
    # The specification's own logarithm of p_y is off by float64's rounding of logits below 32.
    allowed = 3 * (abs(math.log(miss)) + 10 + classes) * U + 32 * 2.0**-53 / miss
    torch.testing.assert_close(loss.double(), expected, rtol=allowed, atol=0)
    for name, values in scores.items():
        torch.testing.assert_close(values.double(), right[name], rtol=allowed, atol=0)


def test_a_smoothed_target_at_its_optimum_is_within_the_stated_bound() -> None:
    classes, smoothing, target = 60, 0.1, torch.arange(4)
    q = torch.full((4, classes), smoothing / classes, dtype=torch.float64)
    q[target, target] += 1 - smoothing
    with small_tiles(rows=4, classes=16, width=64):
        _, smoothed = attent.linear_cross_entropy(
            q.log().float(), torch.eye(classes), target, label_smoothing=smoothing, score="logit", backend="triton"
        )
        _, soft = attent.linear_cross_entropy(
            q.log().float(), torch.eye(classes), q.float(), score="logit", backend="triton"
        )
    assert float(smoothed.max()) < smoothing * math.sqrt(20 * U / classes) + 8 * U
    assert float(soft.max()) < math.sqrt(20 * U)


EXTREMES: dict[str, dict[str, Any]] = {
    "a target far behind": {"logits": [[-200.0, 1.0, 2.0, 0.5, 3.0]], "target": 0},
    "a target far ahead": {"logits": [[200.0, 1.0, 2.0, 0.5, 3.0]], "target": 0},
    "logits of ten thousand": {"logits": [[10000.5, 9999.0, 10002.0, 9990.25, 10001.0]], "target": 1},
    "classes ruled out": {"logits": [[1.0, -math.inf, 2.0, -math.inf, -math.inf]], "target": 0},
    "a target ruled out": {"logits": [[1.0, -math.inf, 2.0, 0.5, 0.25]], "target": 1},
    "one class left": {"logits": [[-math.inf, -math.inf, -math.inf, -math.inf, 3.0]], "target": 4},
    "capped classes ruled out": {"logits": [[1.0, -math.inf, 2.0, -math.inf, 7.0]], "target": 0, "softcap": 3.0},
    "ruled out without weight": {
        "logits": [[1.0, -math.inf, 2.0, 0.5, 0.25]],
        "target": 2,
        "weight": torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0]),
        "label_smoothing": 0.1,
    },
}


@pytest.mark.parametrize("case", EXTREMES)
def test_extreme_logits(case: str) -> None:
    arguments = dict(EXTREMES[case])
    logits, label = torch.tensor(arguments.pop("logits")), arguments.pop("target")
    call = (torch.ones(1, 1), torch.zeros(5, 1), torch.tensor([label]))
    with small_tiles(classes=2):
        loss, scores = attent.linear_cross_entropy(
            *call, linear_bias=logits[0], **arguments, score=("logit", "head"), backend="triton"
        )
    exact = {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    expected, right = reference.linear_cross_entropy(
        *(value.double() for value in call[:2]),
        call[2],
        linear_bias=logits[0].double(),
        **exact,
        score=("logit", "head"),
    )
    # Arguments of exponentials are below 16 where the exponential counts, and exact in float32.
    torch.testing.assert_close(loss.double(), expected, rtol=40 * U, atol=40 * U)
    for name, values in scores.items():
        torch.testing.assert_close(values.double(), right[name], rtol=40 * U, atol=1e-30)


def test_a_single_class_has_no_loss() -> None:
    with small_tiles():
        loss, scores = attent.linear_cross_entropy(
            torch.randn(5, 3), torch.randn(1, 3), torch.zeros(5).long(), score=("logit", "head"), backend="triton"
        )
    assert float(loss) == 0 and not bool(scores["logit"].any()) and not bool(scores["head"].any())


# ------------------------------------------------------------------------------------------- what counts, and what not


@pytest.mark.parametrize("shape", [(3, 4), (3, 0), (0, 4), (0,), (5,)])
def test_where_no_token_counts_all_is_zero(shape: tuple[int, ...]) -> None:
    hidden, target = torch.full((*shape, 6), NAN), torch.full(shape, -100)
    for reduction in REDUCTIONS:
        with small_tiles(), products() as multiplied:
            loss, scores = attent.linear_cross_entropy(
                hidden, torch.randn(9, 6), target, score="logit", reduction=reduction, backend="triton"
            )
        assert multiplied[0] == 0
        assert not bool(loss.any()) and torch.equal(scores, torch.zeros(shape[0]))


def test_tiles_without_a_computed_token_cost_no_product_and_read_nothing() -> None:
    hidden, weight, target = torch.randn(6, 4, 8), torch.randn(10, 8), torch.randint(10, (6, 4))
    example_weight = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 1.0])
    target[5] = -100
    hidden[[1, 3, 4, 5]] = NAN  # one tile each
    options: dict[str, Any] = {"score": "logit", "reduction": "example", "example_weight": example_weight}
    with small_tiles(rows=4, width=8), products() as multiplied:
        loss, scores = attent.linear_cross_entropy(hidden, weight, target, **options, backend="triton")
    assert multiplied[0] == 2 * 3  # two tiles of tokens by three of classes
    left = [0, 2]
    expected, right = attent.linear_cross_entropy(
        hidden[left], weight, target[left], score="logit", reduction="example"
    )
    torch.testing.assert_close(loss[left], expected * example_weight[left], rtol=1e-5, atol=0)
    torch.testing.assert_close(scores[left], right, rtol=1e-5, atol=0)
    assert not bool(loss[[1, 3, 4, 5]].any()) and not bool(scores[[1, 3, 4, 5]].any())


def test_a_token_that_does_not_count_does_no_harm_in_a_tile_that_does() -> None:
    hidden, weight, target = torch.randn(2, 4, 8), torch.randn(10, 8), torch.randint(10, (2, 4))
    target[0, 2], hidden[0, 2] = -100, NAN
    with small_tiles(rows=8, width=8):
        loss, scores = attent.linear_cross_entropy(hidden, weight, target, score="logit", backend="triton")
    expected, right = reference.linear_cross_entropy(
        hidden.nan_to_num().double(), weight.double(), target, score="logit"
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(scores.double(), right, rtol=1e-5, atol=0)


def test_a_label_that_is_no_class_makes_its_own_example_nan() -> None:
    hidden, weight, target = torch.randn(5, 2, 8), torch.randn(10, 8), torch.randint(10, (5, 2))
    target[1, 0], target[2, 1], target[3, 0] = 10, -7, 2**40
    example_weight = torch.tensor([1.0, 1.0, 1.0, 0.0, 2.0])
    with small_tiles():
        result = score_tokens(
            ToScore(hidden, weight, target, example_weight=example_weight, reduction="example", score=("logit", "loss"))
        )
    for values in (result.loss, *result.scores):
        assert values.isnan().tolist() == [False, True, True, False, False] and float(values[3]) == 0
    assert torch.equal(result.counts, torch.full((5,), 2.0))


@settings(max_examples=8)
@given(
    numbers=st.lists(st.sampled_from([0, 3, 9, 5, 14, 15, 40, -2, 2**31 - 1, -(2**31)]), min_size=2, max_size=9),
    rows=st.sampled_from([2, 4, 16]),
)
def test_offsets_that_nobody_checked_end_in_one_whole_result(numbers: list[int], rows: int) -> None:
    # On a GPU nobody reads them. Whatever they are, each token is in one example and every ticket is taken.
    tokens, weight = 15, torch.randn(5, 4)
    hidden, target = torch.randn(tokens, 4), torch.randint(5, (tokens,))
    cu_seqlens = torch.tensor(numbers, dtype=torch.int32)
    with small_tiles(rows=rows, classes=8):
        result = score_tokens(ToScore(hidden, weight, target, cu_seqlens=cu_seqlens, reduction="sum", score=("loss",)))
    assert runtime.open_tickets() == 0
    assert float(result.counts.sum()) == tokens
    expected = reference.linear_cross_entropy(hidden.double(), weight.double(), target, reduction="sum")
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-5, atol=0)
    # The examples are adjacent runs: their mean losses are those of the runs that the counts cut.
    losses = reference.linear_cross_entropy(hidden.double(), weight.double(), target, reduction="none")
    runs = losses.split(result.counts.int().tolist())
    means = torch.stack([run.mean() if len(run) else run.sum() for run in runs])
    torch.testing.assert_close(result.scores[0].double(), means, rtol=1e-5, atol=0)


def test_many_empty_examples_between_few_tokens() -> None:
    cu_seqlens = torch.tensor([0] * 40 + [3] * 25 + [4] * 15 + [9] * 35, dtype=torch.int32)
    problem = Problem(
        torch.randn(9, 4), torch.randn(5, 4), torch.randint(5, (9,)), {"cu_seqlens": cu_seqlens, "linear_bias": None}
    )
    with small_tiles():
        loss, scores = score(problem, score=("logit", "loss"), per_example="sum", reduction="sum")
    assert_is_reference(problem, loss, scores, per_example="sum", reduction="sum")


def test_blocks_hold_about_a_tile_of_tokens() -> None:
    assert block_of_examples(65536, 1, 65536, False, 128) == (128, 1)
    assert block_of_examples(8192, 512, 16, False, 128) == (1, 512)
    assert block_of_examples(8192, 8, 1024, False, 128) == (16, 8)
    assert block_of_examples(8192, 8192, 1, False, 128) == (1, 1024)
    examples, tokens = block_of_examples(8192, 1, 4000, True, 128)
    assert examples == 32 and examples * tokens <= 1024


# ------------------------------------------------------------------------------------------------------- the one launch


def some_problem(**options: Any) -> ToScore:
    torch.manual_seed(1)
    what = ToScore(torch.randn(3, 5, 6), torch.randn(7, 6), torch.randint(7, (3, 5)), score=("loss", "logit"))
    return what._replace(**options)


def test_results_are_the_same_to_the_bit_whatever_was_in_the_workspace() -> None:
    with small_tiles():
        first = score_tokens(some_problem())
        for _ in range(3):
            runtime.poison_workspaces()
            again: Scored = score_tokens(some_problem())
            assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
            assert runtime.open_tickets() == 0


def test_the_order_in_which_programs_come_changes_no_bit() -> None:
    # One after the other, the last first: every fold is then done by another program.
    for options in (some_problem(), some_problem(label_smoothing=0.1, reduction="example")):
        with small_tiles():
            first = score_tokens(options)
            with counted_launches(backwards=True):
                last = score_tokens(options)
        assert all(torch.equal(a, b) for a, b in zip(first[:3], last[:3], strict=True))
        assert runtime.open_tickets() == 0


def test_how_tiles_are_swept_changes_no_bit() -> None:
    results = []
    for sweep in (1, 2, 3, 100):
        with small_tiles(sweep=sweep):
            results.append(score_tokens(some_problem(reduction="none")))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:3], other[:3], strict=True))


def test_the_launch_takes_forwards_that_compute_no_gradient() -> None:
    hidden, weight, target = torch.randn(4, 3, 6), torch.randn(9, 6), torch.randint(9, (4, 3))

    def call(**options: Any) -> Call:
        fields: dict[str, Any] = dict.fromkeys(Call._fields)
        fields.update(input=hidden, linear_weight=weight, target=target, reduction="mean", score=["logit"])
        fields.update(input_gradient=False, weight_gradient=False, bias_gradient=False)
        return Call(**{**fields, **options})

    assert triton_scorer.takes(call())
    assert triton_scorer.takes(call(score=["loss", "logit"]))
    assert not triton_scorer.takes(call(score=["hidden"]))
    assert not triton_scorer.takes(call(score=["head"]))
    assert triton_scorer.takes(call(score=["head"], input=hidden[:, :1]))
    assert triton_scorer.takes(call(score=["head"], input=hidden[0]))
    assert not triton_scorer.takes(call(score=["head"], input=hidden[0], cu_seqlens=torch.tensor([0, 3])))
    assert not triton_scorer.takes(call(input_gradient=True))
    assert triton_scorer.takes(call(weight_gradient=True, reduction="none"))  # its backward computes the logits again
    assert not triton_scorer.takes(call(group="some"))


@pytest.mark.parametrize("reduction", ["none", "example"])
def test_gradients_of_a_loss_that_the_launch_computed(reduction: str) -> None:
    hidden, weight, target = torch.randn(3, 4, 6), torch.randn(9, 6), torch.randint(9, (3, 4))
    gradients = []
    for backend in ("triton", "torch"):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss, _ = attent.linear_cross_entropy(*leaves, target, reduction=reduction, score="logit", backend=backend)
        gradients.append(torch.autograd.grad(loss.square().sum(), leaves))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_it_compiles_to_one_graph() -> None:
    def scores(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            return attent.linear_cross_entropy(hidden.tanh(), weight, target, score="logit", backend="triton")[1] * 2

    arguments = torch.randn(4, 3, 6), torch.randn(9, 6), torch.randint(9, (4, 3))
    compiled = torch.compile(scores, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), scores(*arguments))


@pytest.mark.parametrize("classes", [1, 5])
def test_columns_behind_the_last_class_have_no_share_of_the_smoothing(classes: int) -> None:
    """Of a tile of 4 columns, looked at 2 at a time, the last 2 are nobody's."""
    hidden, weight, target = torch.randn(6, 8), torch.randn(classes, 8), torch.zeros(6, dtype=torch.int64)
    with small_tiles():
        loss = attent.linear_cross_entropy(hidden, weight, target, label_smoothing=0.3, backend="triton")
    right = torch.nn.functional.cross_entropy(hidden @ weight.T, target, label_smoothing=0.3)
    torch.testing.assert_close(loss, right, rtol=1e-5, atol=1e-6)  # float32 sums of numbers of order one
