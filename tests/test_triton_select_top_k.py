"""The Triton backend of select_top_k against its torch backend, in the interpreter: one launch, and many passes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton.language as tl
from hypothesis import Phase, assume, given, settings
from torch import Tensor

from attent.ops import dispatch
from attent.ops.select_top_k import select_top_k
from attent_kernels import runtime, select, selection, selection_passes
from benchmarks.ahead_of_time import CAPABILITIES, compiled_for, unordered_tickets

from .selection_problems import CHUNK, DTYPES, INF, NAN, assert_same, is_close_call, problems

FEW = 8
#: The interpreter is slow: a failing problem is small as it is.
PHASES = [phase for phase in Phase if phase is not Phase.shrink and phase is not Phase.explain]


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    """Chunks of 16: pools of a few dozen have all the seams that pools of thousands have on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_CHUNK", tl.constexpr(CHUNK))
        patch.setattr(selection, "_FEW", tl.constexpr(FEW))
        patch.setattr(selection_passes, "_CHUNK", tl.constexpr(CHUNK))
        patch.setattr(selection_passes, "CHUNK", CHUNK)
        yield


@pytest.fixture
def in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pool is a large one: three programs, and few keys that the last one sorts."""
    monkeypatch.setattr(select, "ONE_LAUNCH", 0)
    monkeypatch.setattr(select, "ONE_PROGRAM_SORT", 20)
    monkeypatch.setattr(selection_passes, "PROGRAMS", 3)


def check(problem: dict[str, Any]) -> None:
    assume(not is_close_call(**problem))
    expected = select_top_k(**problem, backend="torch")
    actual = select_top_k(**problem, backend="triton")
    assert_same(actual, expected, problem)
    runtime.poison_workspaces()
    for one, other in zip(actual, select_top_k(**problem, backend="triton"), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))  # to the bit
    assert runtime.open_tickets() == 0


@given(problems())
@settings(max_examples=25, phases=PHASES)
def test_in_one_launch_it_is_the_torch_backend(problem: dict[str, Any]) -> None:
    check(problem)


@pytest.mark.usefixtures("in_passes")
def test_in_passes_it_is_the_torch_backend() -> None:
    @given(problems())
    @settings(max_examples=12, phases=PHASES)
    def holds(problem: dict[str, Any]) -> None:
        check(problem)

    holds()


@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("k", [0, 1, 49, 100])
def test_equal_scores_go_by_index(k: int, passes: bool, request: pytest.FixtureRequest) -> None:
    if passes:
        request.getfixturevalue("in_passes")
    equal = torch.full((100,), 0.25)
    assert torch.equal(select_top_k(equal, k, backend="triton").index, torch.arange(k))
    drawn = select_top_k(equal, k, temperature=1.0, floor=0.3, seed=1, backend="triton")
    assert bool((drawn.index.diff() > 0).all())


@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hard_choice_is_a_stable_sort(dtype: torch.dtype, passes: bool, request: pytest.FixtureRequest) -> None:
    if passes:
        request.getfixturevalue("in_passes")
    special = torch.tensor([0.0, -0.0, INF, -INF, NAN, -NAN, 1.0, 1.0, -1.0, 1e-40, -1e-40, 6e-8, 65504.0])
    # Scores within one binary order of magnitude differ in their low bits alone.
    scores = torch.cat([special, torch.randn(40).round(decimals=1), 1 + torch.rand(40), special.flip(0)]).to(dtype)
    order = torch.sort(scores, descending=True, stable=True).indices
    for k in (53, len(scores)):
        assert torch.equal(select_top_k(scores, k, backend="triton").index, order[:k])
        unsorted = select_top_k(scores, k, sorted=False, backend="triton").index
        assert torch.equal(unsorted, order[:k].sort().values)


@pytest.mark.parametrize("passes", [False, True])
def test_strides_do_not_matter(passes: bool, request: pytest.FixtureRequest) -> None:
    if passes:
        request.getfixturevalue("in_passes")
    scores, valid = torch.rand(60, 3)[:, 1], (torch.rand(60, 3) < 0.8)[:, 1]
    options: dict[str, Any] = {"temperature": 0.7, "floor": 0.2, "seed": 3}
    strided = select_top_k(scores, 20, valid=valid, backend="triton", **options)
    packed = select_top_k(scores.contiguous(), 20, valid=valid.contiguous(), backend="torch", **options)
    assert torch.equal(strided.index, packed.index)
    assert select_top_k(torch.ones(1).expand(50), 2, backend="triton").index.tolist() == [0, 1]


def test_a_real_chunk_has_no_other_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes that run on a GPU, hard and drawn, at one more than two chunks."""
    for module in (selection, selection_passes):
        monkeypatch.setattr(module, "_CHUNK", tl.constexpr(1024))
    monkeypatch.setattr(selection, "_FEW", tl.constexpr(512))
    monkeypatch.setattr(selection_passes, "CHUNK", 1024)
    scores = torch.rand(2049)
    for one_launch in (2049, 2048):
        monkeypatch.setattr(select, "ONE_LAUNCH", one_launch)
        for k, temperature in ((1025, 0.0), (700, 1.0)):
            problem = {"scores": scores, "k": k, "temperature": temperature, "floor": temperature / 5, "seed": 5}
            expected = select_top_k(**problem, backend="torch")
            assert_same(select_top_k(**problem, backend="triton"), expected, problem)


# --------------------------------------------------------------------------------------------------------- dispatch


def test_float64_is_refused_by_name_and_left_to_torch_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^backend: got 'triton'; .* it takes float16, bfloat16 and float32"):
        select_top_k(torch.rand(5, dtype=torch.float64), 2, backend="triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen = {
        dtype: dispatch.choose("select_top_k", "auto", torch.device("cuda"), torch.empty(5, dtype=dtype))
        for dtype in (*DTYPES, torch.float64)
    }
    assert chosen == {**dict.fromkeys(DTYPES, "triton"), torch.float64: "torch"}


def test_on_a_cpu_auto_is_torch() -> None:
    assert dispatch.choose("select_top_k", "auto", torch.device("cpu"), torch.empty(5)) == "torch"


# ----------------------------------------------------------------------------------------------------- ahead of time


def meta(n: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(n, dtype=dtype, device="meta")


def launches(capability: int, n: int, k: int, dtype: torch.dtype, temperature: float, k_floor: int) -> list[Any]:
    valid = meta(n, torch.bool) if k_floor else None
    with compiled_for(capability) as found:
        select.select_top_k(meta(n, dtype), k, temperature, k_floor, valid, meta(1, torch.int64), True)
    return found


@pytest.fixture
def real_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (selection, selection_passes):
        monkeypatch.setattr(module, "_CHUNK", tl.constexpr(1024))
    monkeypatch.setattr(selection, "_FEW", tl.constexpr(512))
    monkeypatch.setattr(selection_passes, "CHUNK", 1024)


@pytest.mark.aot
@pytest.mark.usefixtures("real_chunks")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_all_kernels_compile_fast_and_without_a_stack(capability: int) -> None:
    start = time.perf_counter()
    found = [
        *launches(capability, 3000, 1000, torch.float32, 0.0, 0),
        *launches(capability, 3000, 1000, torch.bfloat16, 1.0, 100),
        *launches(capability, 100_000, 1000, torch.float32, 1.0, 100),
        *launches(capability, 100_000, 50_000, torch.float32, 0.0, 0),
    ]
    assert time.perf_counter() - start < 60  # ten different kernels
    for kernel in found:
        assert kernel.stack == 0, kernel.kernel
        assert kernel.shared <= 16 << 10
        assert unordered_tickets(kernel.ptx) == []


@pytest.mark.aot
@pytest.mark.usefixtures("real_chunks")
def test_launches_are_as_many_as_the_launcher_says() -> None:
    f32, f16, bf16 = DTYPES
    count = {
        "one": len(launches(90, 16_384, 5000, f32, 0.0, 0)),
        "float32": len(launches(90, 100_000, 1000, f32, 0.0, 0)),
        "bfloat16": len(launches(90, 100_000, 1000, bf16, 0.0, 0)),
        "float16": len(launches(90, 100_000, 1000, f16, 0.0, 0)),
        "noise, floor": len(launches(90, 100_000, 1000, bf16, 1.0, 100)),
        "large k, beside torch.sort": len(launches(90, 100_000, 50_000, f32, 0.0, 0)),
    }
    expected = {"one": 1, "float32": 5, "bfloat16": 3, "float16": 4, "noise, floor": 9, "large k, beside torch.sort": 6}
    assert count == expected
