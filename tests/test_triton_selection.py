"""Selection within a launch: the pieces against float64, the whole as the last program of a kernel runs it."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from attent.ops.select_top_k import _descending_code, _rank, select_top_k
from attent.philox import random_bits as random_bits_of_torch
from attent.philox import uniform
from attent_kernels import block_sort, runtime
from attent_kernels.ranks import (
    code_of_rank,
    descending_code,
    gumbel,
    index_of_rank,
    probability_above,
    random_bits,
    rank_of,
    value_of_code,
)
from attent_kernels.selection import MAX_IN_LAUNCH, scratch_length, select_in_block
from attent_kernels.tickets import take_ticket
from benchmarks.ahead_of_time import CAPABILITIES, compiled_for, unordered_tickets

UNIT = 2.0**-24  # of float32
INF, NAN = math.inf, math.nan


# ----------------------------------------------------------------------------------------------------------- pieces


@triton.jit
def _pieces(
    value_ptr,
    bits_ptr,
    phi_ptr,
    seed,
    code_ptr,
    back_ptr,
    rank_ptr,
    from_rank_ptr,
    noise_ptr,
    lanes_ptr,
    q_ptr,
    N: tl.constexpr,
):
    i = tl.arange(0, N)
    value = tl.load(value_ptr + i)
    code = descending_code(value)
    tl.store(code_ptr + i, code)
    tl.store(back_ptr + i, value_of_code(code))
    rank = rank_of(code, i % 3 > 0, i)
    tl.store(rank_ptr + i, rank)
    tl.store(from_rank_ptr + i, code_of_rank(rank))
    tl.store(from_rank_ptr + N + i, index_of_rank(rank).to(tl.int32))
    tl.store(noise_ptr + i, gumbel(tl.load(bits_ptr + i).to(tl.uint32)))
    key_bits, floor_bits = random_bits(seed, i)
    tl.store(lanes_ptr + i, key_bits.to(tl.int64))
    tl.store(lanes_ptr + N + i, floor_bits.to(tl.int64))
    tl.store(q_ptr + i, probability_above(tl.load(phi_ptr + i), 0.0))


def pieces(value: Tensor, bits: Tensor, seed: int = 0, phi: Tensor | None = None) -> dict[str, Tensor]:
    n = len(value)
    out = {
        "code": torch.empty(n, dtype=torch.int32),
        "back": torch.empty(n),
        "rank": torch.empty(n, dtype=torch.int64),
        "from_rank": torch.empty(2, n, dtype=torch.int32),
        "noise": torch.empty(n),
        "lanes": torch.empty(2, n, dtype=torch.int64),
        "q": torch.empty(n),
    }
    _pieces[(1,)](value, bits, torch.zeros(n) if phi is None else phi, seed, *out.values(), n)
    return out


def test_ranks_are_those_of_the_torch_backend() -> None:
    payloads = torch.tensor([0x7F800001, -1, 0x7FC00001, 0xFFC00000 - 2**32], dtype=torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, INF, -INF, NAN, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0, -1.0, 2.0**-126])
    value = torch.cat([special, payloads, torch.randn(48) * 10.0 ** torch.randint(-38, 38, (48,))])
    out = pieces(value, torch.zeros(64, dtype=torch.int64))
    expected = _descending_code(value)
    assert torch.equal(out["code"], expected)
    assert torch.equal(out["back"].nan_to_num(nan=7.0), value.nan_to_num(nan=7.0))
    assert torch.equal(out["rank"], _rank(expected, torch.arange(64) % 3 > 0))
    assert torch.equal(out["from_rank"], torch.stack([expected, torch.arange(64, dtype=torch.int32)]))


@pytest.mark.parametrize("seed", [0, -1, 2**40 + 17, -(2**63)])
def test_noise_comes_from_the_same_bits_as_on_any_backend(seed: int) -> None:
    lanes = pieces(torch.zeros(64), torch.zeros(64, dtype=torch.int64), seed)["lanes"]
    assert torch.equal(lanes, torch.stack(random_bits_of_torch(seed, torch.arange(64))))


def test_gumbel_noise_is_as_accurate_as_derived() -> None:
    edges = torch.tensor([0, 1, 2, 255, 2**24, 2**31 - 129, 2**31 - 1, 2**31, 2**31 + 128, 2**32 - 256, 2**32 - 1])
    spread = (2.0 ** torch.linspace(1, 32, 1013, dtype=torch.float64)).long() - 1
    bits = torch.cat([edges, spread])
    u = uniform(bits).double()
    exponential = -torch.log1p(-u)
    # Four units in E, from the series or from a logarithm within one unit, are as much in log E; one in the result.
    error = (pieces(torch.zeros(1024), bits)["noise"].double() + exponential.log()).abs()
    assert bool((error <= (4 + exponential.log().abs()) * UNIT * 1.01).all())


def test_probabilities_are_as_accurate_as_derived() -> None:
    phi = torch.linspace(-60, 8, 1024)
    q = pieces(torch.zeros(1024), torch.zeros(1024, dtype=torch.int64), phi=phi)["q"].double()
    exact = -torch.expm1(-torch.exp(phi.double()))
    # exp of an argument given exactly: 2 units. The series and its two last operations: 2. From y = ½ on exp(-y) is off
    # by its own 2 and by y's 2 y: (2 + 2 y) exp(-y) / (1 - exp(-y)) <= 4.7 units, and the subtraction by 1.
    assert bool(((q - exact).abs() <= 6 * UNIT * exact).all())


# ------------------------------------------------------------------------------------------------------------- sort


@triton.jit
def _sort(key_ptr, count, WIDTH: tl.constexpr):
    block_sort.sort_in_memory(key_ptr, count, WIDTH)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 64, 65, 250])
def test_any_length_is_sorted(count: int) -> None:
    padded = 1 << (count - 1).bit_length()
    memory = torch.full((padded + 1,), -7, dtype=torch.int64)
    memory[:count] = torch.randint(-(2**63), 2**63 - 1, (count,))
    expected = memory[:count].sort().values
    _sort[(1,)](memory, count, 16)
    assert torch.equal(memory[:count], expected)
    assert int(memory[padded]) == -7  # nothing is written beyond the power of two


# ------------------------------------------------------------------------------------------------------ in a launch


@triton.jit(do_not_specialize=["n", "k", "k_floor"])
def score_and_select(
    input_ptr, valid_ptr, n, k, k_floor, temperature, seed_ptr, score_ptr, index_ptr, chosen_ptr, inclusion_ptr,
    scratch_ptr, ticket_ptr, HAS_VALID: tl.constexpr, GUMBEL: tl.constexpr, FLOOR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The smallest kernel of the kind: each program scores a tile, the last one selects."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(score_ptr + i, tl.abs(tl.load(input_ptr + i, mask=i < n)), mask=i < n)
    if take_ticket(ticket_ptr, tl.num_programs(0)):
        select_in_block(
            score_ptr, valid_ptr, n, k, k_floor, temperature, seed_ptr, index_ptr, chosen_ptr, inclusion_ptr,
            scratch_ptr, HAS_VALID, GUMBEL, FLOOR,
        )  # fmt: skip


def launch(
    input: Tensor, k: int, temperature: float, k_floor: int, valid: Tensor | None, seed: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    n, device = len(input), input.device
    index = torch.empty(k, dtype=torch.int64, device=device)
    chosen, inclusion = torch.empty(k, device=device), torch.empty(k, device=device)
    needs = [(n, torch.float32), (scratch_length(n), torch.int64)]
    with runtime.workspace(device, 1, needs) as (ticket, scores, scratch):
        score_and_select[(max(1, triton.cdiv(n, 64)),)](
            input, input if valid is None else valid.view(torch.int8), n, k, k_floor, temperature,
            index if seed is None else seed, scores, index, chosen, inclusion, scratch, ticket,
            HAS_VALID=valid is not None, GUMBEL=temperature > 0, FLOOR=k_floor > 0, TILE=64, **options,
        )  # fmt: skip
    return index, chosen, inclusion


POLICIES = [(0.0, 0.0), (1.0, 0.0), (0.5, 0.25), (0.0, 0.5)]


@pytest.mark.parametrize(
    ("n", "temperature", "floor"),
    [(0, 0.5, 0.25), (1, 0.5, 0.25), *((700, *policy) for policy in POLICIES), (1025, 0.0, 0.0), (1025, 0.5, 0.25)],
)
def test_the_last_program_of_a_launch_selects(n: int, temperature: float, floor: float) -> None:
    input, seed = torch.randn(n), torch.tensor([7])
    valid = torch.rand(n) < 0.9 if n == 700 else None
    for k in sorted({0, n // 3}):
        k_floor = math.floor(floor * k + 0.5)
        expected = select_top_k(
            input.abs(), k, temperature=temperature, floor=floor, valid=valid, seed=seed, backend="torch"
        )
        first = launch(input, k, temperature, k_floor, valid, seed)
        assert torch.equal(first[0], expected.index) and torch.equal(first[1], expected.score)
        # As in the tests of select_top_k: here |φ| <= 20, and both backends round it and the thresholds.
        torch.testing.assert_close(first[2], expected.inclusion, rtol=(40 + 8 * 20) * 2 * UNIT, atol=0)
        runtime.poison_workspaces()
        for one, other in zip(first, launch(input, k, temperature, k_floor, valid, seed), strict=True):
            assert torch.equal(one, other)
    assert runtime.open_tickets() == 0


def test_small_temperatures_and_noise_leave_keys_finite() -> None:
    input, seed = torch.tensor([0.0, INF, NAN, 1e-45, 3e38]), torch.tensor([1])
    expected = select_top_k(input, 3, temperature=1e-40, seed=seed, backend="torch")
    assert torch.equal(launch(input, 3, 1e-40, 0, None, seed)[0], expected.index)


@pytest.mark.slow
def test_the_largest_pool_of_a_launch() -> None:
    input, seed = torch.randn(MAX_IN_LAUNCH), torch.tensor([3])
    for k in (1, MAX_IN_LAUNCH // 2, MAX_IN_LAUNCH - 1, MAX_IN_LAUNCH):
        k_floor = k // 5
        expected = select_top_k(input.abs(), k, temperature=1.0, floor=k_floor / k, seed=seed, backend="torch")
        assert torch.equal(launch(input, k, 1.0, k_floor, None, seed)[0], expected.index)


def meta(n: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(n, dtype=dtype, device="meta")


@pytest.mark.aot
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("warps", [4, 8])
def test_it_compiles_fast_and_without_a_stack(capability: int, warps: int) -> None:
    """In a kernel with registers to spare, as one with a matrix product is: alone, the compiler would choose to spill a
    word or two so as to fit more programs on a processor."""
    start = time.perf_counter()
    with compiled_for(capability) as found:
        for temperature, k_floor, valid in ((0.0, 0, None), (1.0, 9, meta(3000, torch.bool))):
            seed = meta(1, torch.int64)
            launch(meta(3000, torch.float32), 100, temperature, k_floor, valid, seed, num_warps=warps, maxnreg=168)
    assert time.perf_counter() - start < 30
    assert len(found) == 2
    for kernel in found:
        assert kernel.stack == 0
        assert kernel.shared <= 16 << 10  # what one sort takes; nothing is kept there
        assert unordered_tickets(kernel.ptx) == []


@pytest.mark.aot
def test_what_other_programs_stored_is_read_past_the_nearest_cache() -> None:
    """Each load of scores, validity and scratch memory: all but the kernel's own input and the seed."""
    with compiled_for(90) as found:
        launch(meta(3000, torch.float32), 9, 1.0, 3, meta(3000, torch.bool), meta(1, torch.int64), num_warps=4)
    loads = [line for line in found[0].ptx.splitlines() if "ld.global" in line]
    plain = [line for line in loads if "ld.global.cg" not in line]
    assert len(plain) <= 2 < len(loads)
