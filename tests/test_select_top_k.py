"""select_top_k: the order, the sample, its inclusion probabilities, and that compilers take it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

import attent.ops.select_top_k as module
from attent import reference
from attent.ops import dispatch
from attent.ops.select_top_k import floor_count, select_top_k
from attent.philox import seed_tensor
from attent.selection import Selection

INF, NAN = math.inf, math.nan
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def order_of(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """All indices in the contract's order, by two stable sorts of PyTorch."""
    order = torch.sort(scores, descending=True, stable=True).indices
    if valid is not None:
        order = order[torch.sort(valid[order].int(), descending=True, stable=True).indices]
    return order


def assert_same(actual: Selection, expected: Selection) -> None:
    assert torch.equal(actual.index, expected.index)
    assert torch.equal(actual.score.nan_to_num(nan=-1.0), expected.score.nan_to_num(nan=-1.0))
    # Both start from the same keys. The difference φ - κ, exp, expm1 and the sum with the floor's share each round once
    # or twice, exp's argument within ±25 where q is not 1: 25 + 15 units. The reference's own rounding is float64's.
    unit = torch.finfo(actual.inclusion.dtype).eps
    torch.testing.assert_close(actual.inclusion, expected.inclusion, rtol=40 * unit, atol=0)


# ------------------------------------------------------------------------------------------------------------ order


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_valid", [False, True])
def test_hard_choice_is_a_stable_sort(dtype: torch.dtype, with_valid: bool) -> None:
    special = torch.tensor([0.0, -0.0, INF, -INF, NAN, -NAN, 1.0, 1.0, -1.0, 5e-324, 1e-40, -1e-40, 6e-8, 65504.0])
    scores = torch.cat([special, torch.randn(50).round(decimals=1), special.flip(0)]).to(dtype)
    valid = torch.rand(len(scores)) < 0.6 if with_valid else None
    order = order_of(scores, valid)
    for k in range(len(scores) + 1):
        index, score, inclusion = select_top_k(scores, k, valid=valid)
        assert torch.equal(index, order[:k])
        assert torch.equal(score.view(torch.uint8), scores[order[:k]].view(torch.uint8))  # NaN and -0 as they were
        assert torch.equal(inclusion, torch.ones(k, dtype=inclusion.dtype))
        assert torch.equal(select_top_k(scores, k, valid=valid, sorted=False).index, order[:k].sort().values)


def test_zeros_of_both_signs_and_all_nans_tie() -> None:
    assert select_top_k(torch.tensor([0.0, -0.0, 0.0, -0.0]), 4).index.tolist() == [0, 1, 2, 3]
    payload = torch.tensor([0x7FC00000, 0x7F800001, -1, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert select_top_k(torch.cat([torch.tensor([INF]), payload]), 5).index.tolist() == [1, 2, 3, 4, 0]


@pytest.mark.parametrize("k", [1000, 500_000, 999_999])
def test_a_million_equal_scores_go_by_index(k: int) -> None:
    equal = torch.full((1_000_000,), 0.25)
    assert torch.equal(select_top_k(equal, k).index, torch.arange(k))
    chosen = select_top_k(equal, k, temperature=1.0, floor=0.3, seed=1)
    assert bool((chosen.index.diff() > 0).all())  # equal scores: lower index first
    # The pool's size as the sample estimates it: one threshold for all, whose relative variance is 1/k at most.
    assert abs(float((1 / chosen.inclusion.double()).sum()) / 1_000_000 - 1) < 4.5 / math.sqrt(k)


def test_a_million_scores_are_sorted_as_by_torch() -> None:
    scores = torch.randn(1_000_000).half().float()  # many ties
    assert torch.equal(select_top_k(scores, 500_000).index, order_of(scores)[:500_000])
    falling = torch.arange(1_000_000, 0, -1.0)
    assert torch.equal(select_top_k(falling, 1024).index, torch.arange(1024))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_strides_do_not_matter(temperature: float) -> None:
    wide = torch.rand(300, 3)
    validity = torch.rand(300, 3) < 0.8
    scores, valid = wide[:, 1], validity[:, 1]
    actual = select_top_k(scores, 100, temperature=temperature, floor=0.2, valid=valid, seed=3)
    packed = select_top_k(
        scores.contiguous(), 100, temperature=temperature, floor=0.2, valid=valid.contiguous(), seed=3
    )
    for one, other in zip(actual, packed, strict=True):
        assert torch.equal(one, other)
    assert select_top_k(torch.ones(1).expand(5), 2).index.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_comes_back(dtype: torch.dtype) -> None:
    scores = torch.rand(10, dtype=torch.float64).to(dtype).requires_grad_()
    selection = select_top_k(scores, 4, temperature=1.0, floor=0.25, seed=0)
    assert isinstance(selection, Selection)
    assert selection.index.dtype == torch.int64 and selection.score.dtype == dtype
    assert selection.inclusion.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(part.shape == (4,) and not part.requires_grad for part in selection)
    assert torch.equal(selection.score, scores.detach()[selection.index])


# ---------------------------------------------------------------------------------------------------- specification

numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1e-45, 1e-38, 1.0, 2.0, 3e38, INF, NAN]),
    st.floats(0, 100, width=32),
)


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    temperature = draw(st.sampled_from([0.0, 1e-40, 0.05, 0.5, 1.0, 4.0, 1e30]))
    values = draw(st.lists(numbers if temperature > 0 else st.one_of(numbers, st.floats(width=32)), max_size=12))
    n = len(values)
    validity = draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=n, max_size=n)))
    return {
        "scores": torch.tensor(values, dtype=torch.float32).to(draw(st.sampled_from(DTYPES))),
        "k": draw(st.integers(0, n)),
        "temperature": temperature,
        "floor": draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])),
        "valid": None if validity is None else torch.tensor(validity, dtype=torch.bool),
        "seed": draw(st.integers(0, 2**40)),
        "sorted": draw(st.booleans()),
    }


@given(problems())
@settings(max_examples=250)
def test_the_torch_backend_is_the_reference(problem: dict[str, Any]) -> None:
    actual, expected = select_top_k(**problem), reference.select_top_k(**problem)
    assert_same(actual, expected)
    assert bool(((actual.inclusion > 0) & (actual.inclusion <= 1)).all())
    assert len(set(actual.index.tolist())) == problem["k"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("floor", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n_valid", range(8))
def test_every_edge_of_k_and_of_the_valid_count(temperature: float, floor: float, n_valid: int) -> None:
    """k from 0 to n, fewer valid ones than k1, than k, none: no NaN, valid ones first, certain where all are taken."""
    scores = torch.tensor([0.5, 3.0, 0.0, 1.0, 1.0, 0.25, 2.0])
    valid = torch.zeros(7, dtype=torch.bool)
    valid[torch.tensor([3, 1, 6, 0, 5, 2, 4])[:n_valid]] = True
    for k in range(8):
        problem = {"scores": scores, "k": k, "temperature": temperature, "floor": floor, "valid": valid, "seed": k}
        actual = select_top_k(**problem)
        assert_same(actual, reference.select_top_k(**problem))
        assert int(valid[actual.index].sum()) == min(k, n_valid)
        assert bool(((actual.inclusion > 0) & (actual.inclusion <= 1)).all())
        if k >= n_valid:
            assert bool((actual.inclusion == 1).all())


def test_empty_pools() -> None:
    for dtype in DTYPES:
        for temperature in (0.0, 1.0):
            index, score, inclusion = select_top_k(torch.empty(0, dtype=dtype), 0, temperature=temperature, floor=0.5)
            assert index.shape == score.shape == inclusion.shape == (0,)


def test_floor_count_rounds_half_up() -> None:
    assert [floor_count(k, 0.5) for k in range(6)] == [0, 1, 1, 2, 2, 3]
    assert [floor_count(10, f) for f in (0.0, 0.04, 0.05, 0.2, 0.96, 1.0)] == [0, 0, 1, 2, 10, 10]


# ----------------------------------------------------------------------------------------------------------- sample


DRAWS = 700  # the z of the means below has a standard deviation of 1; 4.5 is passed by chance once in 150,000


def frequencies(n: int, draw: Callable[[int], Selection], draws: int) -> Tensor:
    count = torch.zeros(n, dtype=torch.float64)
    for seed in range(draws):
        count[draw(seed).index] += 1
    return count / draws


def z_of_frequency(frequency: Tensor, probability: Tensor, draws: int) -> Tensor:
    return (frequency - probability) / (probability * (1 - probability) / draws).sqrt()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_first_choice_is_proportional_to_score_to_the_inverse_temperature(temperature: float) -> None:
    """Dividing the noise as well, as in the paper's released code, would give temperature 1's probabilities at any."""
    scores, draws = torch.tensor([0.3, 1.0, 2.0, 0.7]), 1000
    frequency = frequencies(4, lambda seed: select_top_k(scores, 1, temperature=temperature, seed=seed), draws)

    def distance(assumed: float) -> float:
        weights = scores.double() ** (1 / assumed)
        return float(z_of_frequency(frequency, weights / weights.sum(), draws).abs().max())

    assert distance(temperature) < 4.5
    if temperature != 1:
        assert distance(1.0) > 6


def plackett_luce_inclusion(weights: list[float], k: int) -> list[float]:
    """The probability of being among the first k drawn without replacement, by summing over all ordered draws."""
    inclusion = [0.0] * len(weights)
    for draw in itertools.permutations(range(len(weights)), k):
        probability, left = 1.0, sum(weights)
        for i in draw:
            probability *= weights[i] / left
            left -= weights[i]
        for i in draw:
            inclusion[i] += probability
    return inclusion


@pytest.mark.parametrize(("k", "floor", "masked"), [(3, 0.0, False), (3, 1 / 3, True), (2, 1.0, False)])
def test_examples_are_included_as_often_as_they_should_be(k: int, floor: float, masked: bool) -> None:
    scores, draws, temperature = torch.tensor([0.2, 1.5, 0.1, 1.0, 3.0, 0.6, 1.0]), 1000, 0.8
    valid = torch.tensor([True] * 4 + [False] + [True] * 2) if masked else torch.ones(7, dtype=torch.bool)
    k_floor = floor_count(k, floor)
    first = torch.zeros(7, dtype=torch.float64)
    weights = (scores[valid].double() ** (1 / temperature)).tolist()
    first[valid] = torch.tensor(plackett_luce_inclusion(weights, k - k_floor), dtype=torch.float64)
    probability = first + (1 - first) * k_floor / (int(valid.sum()) - (k - k_floor))
    frequency = frequencies(
        7, lambda seed: select_top_k(scores, k, temperature=temperature, floor=floor, valid=valid, seed=seed), draws
    )
    assert bool((frequency[~valid] == 0).all())
    assert float(z_of_frequency(frequency, probability, draws)[valid].abs().max()) < 4.5


def horvitz_thompson_z(draws: int, **problem: Any) -> float:
    """How many standard errors the mean of ``sum(x[index] / inclusion)`` lies from the sum over the valid pool."""
    valid = problem.get("valid")
    x = torch.linspace(3.0, 1.0, len(problem["scores"]), dtype=torch.float64)
    estimates = torch.empty(draws, dtype=torch.float64)
    for seed in range(draws):
        index, _, inclusion = select_top_k(seed=seed, **problem)
        estimates[seed] = (x[index] / inclusion.double()).sum()
    total = x.sum() if valid is None else x[valid].sum()
    return float((estimates.mean() - total) / (estimates.std() / math.sqrt(draws)))


POOL = torch.tensor([0.5, 1.0, 2.0, 0.8, 3.0, 0.4, 1.2, 2.5])
VALID = torch.tensor([True, True, False, True, True, True, False, True])
UNBIASED = [
    {"k": 4, "temperature": 1.0},
    {"k": 3, "temperature": 2.0},
    {"k": 4, "temperature": 0.6, "floor": 0.25},
    {"k": 5, "temperature": 1.0, "floor": 0.6},
    {"k": 3, "temperature": 1.0, "floor": 1.0},
    {"k": 4, "temperature": 0.0, "floor": 0.5},
    {"k": 4, "temperature": 1.0, "floor": 0.25, "valid": VALID},
    {"k": 5, "temperature": 1.0, "floor": 0.2, "valid": VALID},
]


@pytest.mark.parametrize("problem", UNBIASED, ids=str)
def test_horvitz_thompson_means_are_unbiased(problem: dict[str, Any]) -> None:
    assert abs(horvitz_thompson_z(DRAWS, scores=POOL, **problem)) < 4.5


original = module._probability_above
MUTANTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the k1-th key for all": lambda phi, kappa: original(phi, kappa.max().expand_as(kappa)),
    "the (k1+1)-th key for all": lambda phi, kappa: original(phi, kappa.min().expand_as(kappa)),
    "q = exp(phi - kappa)": lambda phi, kappa: (phi - kappa).exp().clamp(max=1.0),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_test_of_unbiasedness_fails_for_wrong_inclusions(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_probability_above", MUTANTS[mutant])
    assert abs(horvitz_thompson_z(DRAWS, scores=POOL, k=5, temperature=1.0, floor=0.2, valid=VALID)) > 4.5


# ------------------------------------------------------------------------------------------------------------ seeds


def choose(**arguments: Any) -> list[int]:
    return select_top_k(torch.ones(1000), 100, **{"temperature": 1.0, "floor": 0.2, **arguments}).index.tolist()


def test_a_seed_decides() -> None:
    assert choose(seed=5) == choose(seed=5) == choose(seed=torch.tensor(5)) == choose(seed=torch.tensor([5]))
    assert len({tuple(choose(seed=seed)) for seed in (0, 1, 2, -1, 2**32, 2**40)}) == 6
    before = torch.get_rng_state()
    choose(seed=5)
    choose(temperature=0.0, floor=0.0)  # nothing to draw
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_torchs_generator_decides() -> None:
    torch.manual_seed(3)
    first, second = choose(), choose()
    torch.manual_seed(3)
    assert [choose(), choose()] == [first, second]
    assert first != second


def test_the_floor_has_noise_of_its_own() -> None:
    """Were the floor drawn by the key's noise, it would take the runners-up, whose keys come next."""
    scores = torch.ones(1000)
    first = select_top_k(scores, 50, temperature=1.0, seed=9).index
    with_floor = select_top_k(scores, 100, temperature=1.0, floor=0.5, seed=9).index
    assert bool(torch.isin(first, with_floor).all())
    by_key = select_top_k(scores, 100, temperature=1.0, seed=9).index
    # 50 of the other 950 are drawn. Hypergeometric: 2.6 of them among the next 50 keys; more than 12 once in 10^6.
    assert int(torch.isin(with_floor, by_key).sum()) - 50 <= 12


# ---------------------------------------------------------------------------------------------------------- tracing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sample", [False, True])
def test_opcheck(dtype: torch.dtype, sample: bool) -> None:
    scores = torch.rand(20).to(dtype)
    valid, seed = (torch.rand(20) < 0.7, torch.tensor([3])) if sample else (None, None)
    options = (0.5, 0.3, valid, seed) if sample else (0.0, 0.0, None, None)
    torch.library.opcheck(torch.ops.attent.select_top_k.default, (scores, 6, *options, True, "auto"))


def compiled(**options: Any) -> Callable[..., Selection]:
    def step(scores: Tensor, k: int, valid: Tensor | None, seed: int | Tensor | None, temperature: float) -> Selection:
        chosen = select_top_k(scores + 1, k, temperature=temperature, floor=0.25, valid=valid, seed=seed)
        return Selection(chosen.index + 0, chosen.score * 2, chosen.inclusion * 1)

    traced: Callable[..., Selection] = torch.compile(step, fullgraph=True, **options)
    return traced


def test_one_graph_serves_every_size_k_and_seed() -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    step = compiled(backend=count, dynamic=True)
    for n, k, seed in ((40, 10, 3), (50, 12, 4), (71, 70, 5)):
        scores, valid = torch.rand(n), torch.rand(n) < 0.8
        expected = select_top_k(scores + 1, k, temperature=0.7, floor=0.25, valid=valid, seed=seed)
        for actual in (step(scores, k, valid, seed, 0.7), step(scores, k, valid, torch.tensor(seed), 0.7)):
            assert torch.equal(actual.index, expected.index)
            assert torch.equal(actual.inclusion, expected.inclusion)
    assert graphs == 2  # one for a number as the seed, one for a tensor
    with pytest.raises(ValueError, match=r"^k: got 99"):
        step(scores, 99, valid, 0, 0.7)
    for temperature in (0.0, 0.3, 1.0):  # a schedule of temperatures compiles again, and stays right
        expected = select_top_k(scores + 1, 5, temperature=temperature, floor=0.25, seed=1)
        assert torch.equal(step(scores, 5, None, 1, temperature).index, expected.index)


@pytest.mark.slow
def test_inductor_runs_it_and_draws_its_own_seed() -> None:
    step = compiled()
    scores = torch.rand(40)
    expected = select_top_k(scores + 1, 10, temperature=0.7, floor=0.25, seed=2)
    assert torch.equal(step(scores, 10, None, 2, 0.7).index, expected.index)
    torch.manual_seed(1)
    drawn = [step(scores, 10, None, None, 0.7).index.tolist() for _ in range(4)]
    assert len({tuple(index) for index in drawn}) > 1


def test_meta_and_fake_tensors_have_shapes() -> None:
    on_meta = select_top_k(torch.empty(9, device="meta"), 4, temperature=1.0)
    assert [part.shape for part in on_meta] == [(4,)] * 3 and on_meta.index.is_meta
    with FakeTensorMode():
        fake = select_top_k(torch.empty(9, dtype=torch.float16), 4, temperature=1.0, floor=0.5)
        assert [part.dtype for part in fake] == [torch.int64, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("temperature", "floor"), [(0.0, 0.0), (0.0, 0.3), (1.0, 0.0), (1.0, 0.3), (1.0, 1.0)])
def test_the_backend_reads_nothing_back(dtype: torch.dtype, temperature: float, floor: float) -> None:
    """Fake tensors refuse every operation that needs their values: on a GPU each would be a synchronisation."""
    select = dispatch.implementation("select_top_k", "torch")
    with FakeTensorMode():
        scores, valid = torch.empty(50, dtype=dtype), torch.empty(50, dtype=torch.bool)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            scores[scores.argmax()]  # the kind of slip this test is for
        outputs = select(scores, 10, temperature, floor, valid, seed_tensor(None, scores.device), True)
        assert [part.shape for part in outputs] == [(10,)] * 3
