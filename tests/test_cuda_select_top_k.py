"""The CUDA kernels of select_top_k, their code run on the host: equal to the torch backend, thread by thread."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attent.ops.select_top_k import floor_count, select_top_k
from attent.selection import Selection
from attent_kernels import native
from attent_kernels.cuda_select import address
from attent_kernels.native import DTYPES as CODES

from .selection_problems import DTYPES, INF, NAN, assert_same, is_close_call, problems

pytestmark = pytest.mark.skipif(native.module is None, reason=str(native.reason))

WAYS = ("block", "small block", "passes")


def on_host(
    scores: torch.Tensor, k: int, how: str, backwards: bool = False, *, temperature: float = 0.0, floor: float = 0.0,
    valid: torch.Tensor | None = None, seed: int = 0, sorted: bool = True,
) -> Selection:  # fmt: skip
    """As attent_kernels/cuda_select.py launches it, in memory full of nonsense; tickets are 0 again afterwards."""
    module: Any = native.module
    n, dtype, k_floor = len(scores), CODES[scores.dtype], floor_count(k, floor)
    call = n, k, k_floor, temperature, dtype
    plan = module.testing.plan_select_top_k(*call) if how == "passes" else module.plan_select_top_k(*call)
    outputs = torch.full((k,), -1), scores.new_full((k,), NAN), torch.full((k,), NAN)
    scratch, chosen = (torch.full((length,), -1) for length in (plan.scratch_length, plan.chosen_length))
    codes = torch.full((plan.code_length,), -1, dtype=torch.int32)
    kinds = torch.full((plan.kind_length,), -1, dtype=torch.int8)
    tickets, start = torch.zeros(plan.ticket_count, dtype=torch.int32), torch.tensor([seed])

    def arguments() -> Any:
        addresses = [address(tensor) for tensor in (*outputs, scratch, tickets, chosen, codes, kinds)]
        return module.SelectTopKArgs(
            scores.data_ptr(),
            dtype,
            address(valid),
            n,
            k,
            k_floor,
            temperature,
            address(start),
            sorted,
            *addresses,
            True,
        )

    module.testing.select_top_k(arguments(), how, backwards)
    if not plan.finished:
        chosen = chosen.sort().values if sorted else chosen
        module.testing.select_outputs(arguments())
    assert int(tickets.count_nonzero()) == 0
    return Selection(*outputs)


def check(problem: dict[str, Any], how: str) -> None:
    expected = select_top_k(**problem, backend="torch")
    actual = on_host(**problem, how=how)
    assert_same(actual, expected, problem)
    # What depends on the order of the threads or of the blocks is a race.
    for one, other in zip(actual, on_host(**problem, how=how, backwards=True), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("how", WAYS)
def test_it_is_the_torch_backend(how: str) -> None:
    @given(problems())
    @settings(max_examples=60)
    def holds(problem: dict[str, Any]) -> None:
        assume(not is_close_call(**problem))
        check(problem, how)

    holds()


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("n", [513, 2000])
def test_pools_that_take_several_rounds(n: int, how: str) -> None:
    valid = torch.rand(n) < 0.9
    for k in (1, 63, 65, n // 2, n - 1, n):
        for temperature, floor in ((0.0, 0.0), (1.0, 0.0), (0.5, 0.25), (0.0, 0.5)):
            scores = torch.rand(n).round(decimals=2)
            problem = {"scores": scores, "k": k, "temperature": temperature, "floor": floor, "valid": valid, "seed": k}
            if not is_close_call(**problem):
                check(problem, how)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hard_choice_is_a_stable_sort(dtype: torch.dtype, how: str) -> None:
    special = torch.tensor([0.0, -0.0, INF, -INF, NAN, -NAN, 1.0, 1.0, -1.0, 1e-40, -1e-40, 6e-8, 65504.0])
    scores = torch.cat([special, torch.randn(40).round(decimals=1), 1 + torch.rand(40), special.flip(0)]).to(dtype)
    order = torch.sort(scores, descending=True, stable=True).indices
    for k in (53, len(scores)):
        assert torch.equal(on_host(scores, k, how).index, order[:k])
        assert torch.equal(on_host(scores, k, how, sorted=False).index, order[:k].sort().values)


def test_every_half_precision_number_is_read_exactly() -> None:
    """All 2^16 of each format, by the order they come in: each number's value decides its place."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        order = torch.sort(every.float(), descending=True, stable=True).indices
        assert torch.equal(on_host(every, len(every), "passes").index, order)


def test_an_address_that_is_no_multiple_of_16_is_read_all_the_same() -> None:
    scores = torch.rand(300)
    for start in (1, 2, 3):
        part = scores[start:]
        assert torch.equal(on_host(part, 100, "passes").index, part.topk(100).indices)


# ------------------------------------------------------------------------------------------------------ launch shapes


def plan(n: int, k: int, k_floor: int = 0, temperature: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    module: Any = native.module
    return module.plan_select_top_k(n, k, k_floor, temperature, CODES[dtype])


def test_a_small_pool_takes_one_launch_of_one_block() -> None:
    for n in (1, 16_384):
        found = plan(n, n, 1, 1.0)
        assert (found.launches, found.blocks, found.finished) == (1, 1, True)
        assert found.scratch_length >= n + n
        assert found.ticket_count == found.code_length == found.kind_length == found.chosen_length == 0
    assert plan(5, 0).launches == 0


def test_launches_are_as_many_as_the_header_says() -> None:
    n = 100_000
    counts = {
        "float32": plan(n, 1000).launches,
        "bfloat16": plan(n, 1000, dtype=torch.bfloat16).launches,
        "float16": plan(n, 1000, dtype=torch.float16).launches,
        "noise, floor": plan(n, 1000, 100, 1.0, torch.bfloat16).launches,
        "floor alone": plan(n, 1000, 1000, 1.0).launches,
        "large k, beside a sort": plan(n, 50_000).launches,
    }
    assert counts == {
        "float32": 5, "bfloat16": 3, "float16": 4, "noise, floor": 9, "floor alone": 5, "large k, beside a sort": 6
    }  # fmt: skip


@given(st.integers(16_385, 2**31 - 1), st.data())
@settings(max_examples=100)
def test_blocks_cover_every_pool_and_none_is_empty(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    found = plan(n, k, k // 5, 1.0)
    assert 1 <= found.blocks <= 528 and found.span % (4 * found.threads) == 0
    assert (found.blocks - 1) * found.span < n <= found.blocks * found.span
    assert found.chosen_length >= k and found.code_length == n and found.kind_length == (n if k // 5 else 0)
    assert found.finished == (k <= 4096)


def test_wrong_arguments_are_refused_and_nothing_is_written() -> None:
    module: Any = native.module
    score, index = torch.rand(5), torch.full((5,), -7)
    s, o = score.data_ptr(), index.data_ptr()
    #       score, dtype, valid, n, k, k_floor, temperature, seed, sorted, index, chosen_score, inclusion, scratch, ...
    wrong = {
        r"n: got 2147483648": (s, 0, 0, 2**31, 5, 0, 0.0, 0, True, o, o, o, o, o, o, o, o),
        r"k, k_floor: got 6, 0; takes .* n = 5": (s, 0, 0, 5, 6, 0, 0.0, 0, True, o, o, o, o, o, o, o, o),
        r"k, k_floor: got 3, 4": (s, 0, 0, 5, 3, 4, 0.0, s, True, o, o, o, o, o, o, o, o),
        r"temperature: got nan": (s, 0, 0, 5, 3, 0, NAN, s, True, o, o, o, o, o, o, o, o),
        r"dtype: got 3": (s, 3, 0, 5, 3, 0, 0.0, 0, True, o, o, o, o, o, o, o, o),
        r"seed: got a null pointer": (s, 0, 0, 5, 3, 1, 0.0, 0, True, o, o, o, o, o, o, o, o),
        r"one of them is a null pointer": (s, 0, 0, 5, 3, 0, 0.0, 0, True, o, 0, o, o, o, o, o, o),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            module.testing.select_top_k(module.SelectTopKArgs(*arguments, False), "block", False)
    assert index.tolist() == [-7] * 5
