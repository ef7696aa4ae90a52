"""A vocabulary split over ranks gives what the whole one gives: loss, scores and gradients, in float64.

The fast tests let threads play the ranks; the slow ones run the same comparison on real processes over gloo.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attent
from attent.ops import torch_linear_cross_entropy
from attent.ops.vocabulary_shards import Shard, find_shard, whole

from .linear_cross_entropy_problems import NAMES, REDUCTIONS, Problem, problems, small_chunks

# The same sums of some tens of numbers of order one, in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
SIZES = [(3, 4), (6, 1), (2, 1, 4)]  # classes on each rank
LENGTHS = [6, 1, 0, 3, 4]
#: Reduction, bytes of a chunk (100: all examples are long, 300: some are, the last: none is) and options.
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("mean", 100, {}),
    ("none", 300, {"label_smoothing": 0.1}),
    ("example", 300, {"softcap": 2.0, "shift": True}),
    ("mean", 64 << 20, {"label_smoothing": 0.1, "softcap": 2.0}),
]


def results(problem: Problem, own: slice, reduction: str, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """What a rank that holds the classes ``own`` gets, its gradients among it."""
    hidden = problem.input.detach().clone().requires_grad_()
    weight = problem.linear_weight[own].detach().clone().requires_grad_()
    options = dict(problem.options)
    leaves = {"input": hidden, "linear_weight": weight}
    if options.get("linear_bias") is not None:
        leaves["linear_bias"] = options["linear_bias"] = options["linear_bias"][own].detach().clone().requires_grad_()
    loss, scores = attent.linear_cross_entropy(
        hidden, weight, problem.target, **options, score=NAMES, reduction=reduction, group=group
    )
    upstream = torch.randn(loss.shape, dtype=loss.dtype, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(loss, list(leaves.values()), upstream)
    return {"loss": loss.detach(), **scores} | dict(zip(leaves, gradients, strict=True))


def split(sizes: tuple[int, ...]) -> list[slice]:
    """Which classes each rank holds."""
    return [slice(sum(sizes[:rank]), sum(sizes[: rank + 1])) for rank in range(len(sizes))]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], own: slice) -> None:
    for name, value in expected.items():
        right = value[own] if name in ("linear_weight", "linear_bias") else value
        torch.testing.assert_close(actual[name], right, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


# ------------------------------------------------------------------------------------------------- threads play ranks


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    """A real group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = dist.group.WORLD
    assert world is not None
    yield world
    dist.destroy_process_group()


class ThreadShard:
    """A :class:`Shard` whose other ranks are threads."""

    def __init__(self, sizes: tuple[int, ...], rank: int, barrier: threading.Barrier, given: list[Tensor]) -> None:
        self.first, self.classes, self.ranks = sum(sizes[:rank]), sum(sizes), len(sizes)
        self.group = "threads"
        self.rank, self.barrier, self.given = rank, barrier, given

    def max_(self, values: Tensor) -> Tensor:
        return values.copy_(self.from_all(values).amax(0))

    def sum_(self, values: Tensor) -> Tensor:
        return values.copy_(self.from_all(values).sum(0))

    def from_all(self, values: Tensor) -> Tensor:
        self.given[self.rank] = values.clone()
        self.barrier.wait(timeout=20)
        stacked = torch.stack(self.given)
        self.barrier.wait(timeout=20)
        return stacked


def on_threads(
    problem: Problem, sizes: tuple[int, ...], reduction: str, group: dist.ProcessGroup
) -> list[dict[str, Tensor]]:
    barrier, given, local = threading.Barrier(len(sizes)), [torch.empty(0)] * len(sizes), threading.local()

    def rank(number: int, own: slice) -> dict[str, Tensor]:
        local.shard = ThreadShard(sizes, number, barrier, given)
        try:
            return results(problem, own, reduction, group)
        except BaseException:
            barrier.abort()
            raise

    with (
        mock.patch.object(torch_linear_cross_entropy, "find_shard", lambda *_: local.shard),
        ThreadPoolExecutor(len(sizes)) as pool,
    ):
        return list(pool.map(rank, range(len(sizes)), split(sizes)))


def without_what_shards_do_not_take(problem: Problem) -> Problem:
    """Class weights and probabilities are refused with group=: indices instead."""
    target, options = problem.target, {**problem.options, "weight": None}
    if target.is_floating_point():
        target = target.argmax(-1)
    return problem._replace(target=target, options=options)


@settings(max_examples=100)
@given(data=st.data(), reduction=st.sampled_from(REDUCTIONS), max_bytes=st.sampled_from([1, 300, 64 << 20]))
def test_shards_give_what_the_whole_vocabulary_gives(
    group: dist.ProcessGroup, data: st.DataObject, reduction: str, max_bytes: int
) -> None:
    problem = without_what_shards_do_not_take(data.draw(problems().filter(lambda p: len(p.linear_weight) > 1)))
    classes = len(problem.linear_weight)
    first = data.draw(st.integers(1, classes - 1))
    second = data.draw(st.integers(0, classes - first - 1))
    sizes = tuple(size for size in (first, second, classes - first - second) if size)
    expected = results(problem, slice(None), reduction)
    with small_chunks(max_bytes):
        for own, actual in zip(split(sizes), on_threads(problem, sizes, reduction, group), strict=True):
            assert_same(actual, expected, own)


def test_a_label_beyond_the_vocabulary_of_all_ranks_makes_its_example_nan(group: dist.ProcessGroup) -> None:
    problem = fixed_problem()
    expected = results(problem, slice(None), "example")
    target = problem.target.clone()
    target[2] = 7  # of the first example
    for actual in on_threads(problem._replace(target=target), (3, 4), "example", group):
        for name in ("loss", *NAMES):
            assert bool(actual[name][0].isnan())
            torch.testing.assert_close(actual[name][1:], expected[name][1:], **CLOSE)


def fixed_problem(**options: Any) -> Problem:
    """Packed examples of 7 classes, some tokens ignored: the same on each rank."""
    generator = torch.Generator().manual_seed(3)
    total = sum(LENGTHS)
    hidden, weight, bias = (torch.randn(n, 5, dtype=torch.float64, generator=generator) for n in (total, 7, 7))
    target = torch.randint(7, (total,), generator=generator)
    target[torch.rand(total, generator=generator) < 0.2] = -100
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return Problem(hidden, weight, target, {"cu_seqlens": cu_seqlens, "linear_bias": bias[:, 0], **options})


# ------------------------------------------------------------------------------------------------------- a real group


def test_a_group_of_one_rank_holds_the_whole_vocabulary(group: dist.ProcessGroup) -> None:
    weight = torch.randn(7, 3)
    assert find_shard(weight, None) == whole(7) == Shard(0, 7, None)
    shard = find_shard(weight, group.group_name)
    assert (shard.first, shard.classes, shard.ranks) == (0, 7, 1)
    problem = fixed_problem()
    for reduction in REDUCTIONS:
        assert_same(
            results(problem, slice(None), reduction, group), results(problem, slice(None), reduction), slice(None)
        )


@pytest.mark.parametrize("rank", range(3))
def test_a_rank_finds_out_where_its_classes_begin(group: dist.ProcessGroup, rank: int) -> None:
    sizes = [2, 1, 4]

    def all_reduce(values: Tensor, group: dist.ProcessGroup) -> None:
        assert values.tolist() == [size if i == rank else 0 for i, size in enumerate(sizes)]
        values.copy_(torch.tensor(sizes))

    with mock.patch.multiple(dist, get_world_size=lambda _: 3, get_rank=lambda _: rank, all_reduce=all_reduce):
        shard = find_shard(torch.empty(sizes[rank], 5), group.group_name)
        assert (shard.first, shard.classes, shard.ranks) == (sum(sizes[:rank]), 7, 3)


def run_rank(rank: int, sizes: tuple[int, ...], file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=len(sizes))
    try:
        world = dist.group.WORLD
        own = split(sizes)[rank]
        assert find_shard(torch.empty(sizes[rank], 2), world.group_name)[:2] == (own.start, 7)
        for reduction, max_bytes, options in CASES:
            problem = fixed_problem(**options)
            expected = results(problem, slice(None), reduction)
            with small_chunks(max_bytes):
                assert_same(results(problem, own, reduction, world), expected, own)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES)
def test_processes_that_share_a_vocabulary_agree_with_one_that_has_it_all(
    sizes: tuple[int, ...], tmp_path: Path
) -> None:
    torch.multiprocessing.spawn(run_rank, (sizes, str(tmp_path / "rendezvous")), nprocs=len(sizes))
