"""The noise: Philox4x32-10 as published and as Triton computes it; Gumbel numbers with their tail intact."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attent import philox
from attent.philox import gumbel, philox_4x32, random_bits, seed_tensor, uniform

MASK = 0xFFFFFFFF
EULER_GAMMA = 0.5772156649015329

# Random123's known answers (kat_vectors, "philox4x32 10"): counter, key -> lanes.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """The published round, in Python's own integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high_0, low_0 = divmod(0xD2511F53 * c0, 2**32)
        high_2, low_2 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "lanes"), KNOWN_ANSWERS)
def test_known_answers(counter: list[int], key: list[int], lanes: list[int]) -> None:
    c0, c1, c2, c3 = (torch.tensor([c]) for c in counter)
    k0, k1 = (torch.tensor([k]) for k in key)
    assert [int(lane) for lane in philox_4x32((c0, c1, c2, c3), (k0, k1))] == lanes
    assert philox_in_python(counter, key) == lanes


@given(seed=st.integers(-(2**63), 2**63 - 1), offsets=st.lists(st.integers(0, 2**63 - 1), max_size=5))
@settings(max_examples=50)
def test_seed_and_offset_are_split_low_half_first(seed: int, offsets: list[int]) -> None:
    key = [seed & MASK, (seed >> 32) & MASK]
    expected = [philox_in_python([offset & MASK, offset >> 32, 0, 0], key)[:2] for offset in offsets]
    for seed_as in (seed, torch.tensor(seed), torch.tensor([seed])):
        lane_0, lane_1 = random_bits(seed_as, torch.tensor(offsets, dtype=torch.int64))
        assert [list(pair) for pair in zip(lane_0.tolist(), lane_1.tolist(), strict=True)] == expected


def test_bits_depend_on_nothing_but_seed_and_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    offset = torch.arange(1000)
    whole = random_bits(7, offset)
    order = torch.randperm(1000)
    shuffled = random_bits(7, order)
    strided = random_bits(7, torch.arange(2000)[::2])
    monkeypatch.setattr(philox, "_CPU_CHUNK", 64)  # 15 whole chunks and a part
    chunked = random_bits(7, offset)
    for lane in (0, 1):
        assert torch.equal(chunked[lane], whole[lane])
        assert torch.equal(shuffled[lane], whole[lane][order])
        assert torch.equal(strided[lane][:500], whole[lane][::2])


TRITON_PROGRAM = """
import json, sys
import torch, triton
import triton.language as tl

@triton.jit
def write_bits(lane_0, lane_1, seed):
    offset = tl.arange(0, 16)
    first, second, _, _ = tl.randint4x(tl.load(seed), offset)
    tl.store(lane_0 + offset, first.to(tl.int64) & 0xFFFFFFFF)
    tl.store(lane_1 + offset, second.to(tl.int64) & 0xFFFFFFFF)

lanes = torch.zeros(2, 16, dtype=torch.int64)
for seed in sys.argv[1:]:
    write_bits[(1,)](lanes[0], lanes[1], torch.tensor([int(seed)]))
    print(json.dumps(lanes.tolist()))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_computes_the_same_bits(tmp_path: Path) -> None:
    """Under its interpreter, in a process of its own: TRITON_INTERPRET must be set before Triton is imported."""
    program = tmp_path / "triton_bits.py"  # a file, since Triton reads the source of its functions
    program.write_text(TRITON_PROGRAM)
    seeds = [0, 1, -1, 2**40 + 3, -(2**63)]
    finished = subprocess.run(
        [sys.executable, str(program), *map(str, seeds)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    from_triton = [json.loads(line) for line in finished.stdout.splitlines()]
    assert from_triton == [[lane.tolist() for lane in random_bits(seed, torch.arange(16))] for seed in seeds]


def z_of_mean(sample: Tensor, mean: float, variance: float) -> float:
    return (float(sample.double().mean()) - mean) / math.sqrt(variance / sample.numel())


def test_uniform_numbers_are_uniform_and_lanes_independent() -> None:
    first, second = (uniform(bits, torch.float64) for bits in random_bits(3, torch.arange(200_000)))
    for lane in (first, second):
        for power in (1, 2, 3):  # E u^p = 1/(p+1), Var u^p = 1/(2p+1) - 1/(p+1)^2
            variance = 1 / (2 * power + 1) - 1 / (power + 1) ** 2
            assert abs(z_of_mean(lane**power, 1 / (power + 1), variance)) < 4.5
    assert abs(z_of_mean((first - 0.5) * (second - 0.5), 0.0, 1 / 144)) < 4.5
    assert abs(z_of_mean((first[1:] - 0.5) * (first[:-1] - 0.5), 0.0, 1 / 144)) < 4.5  # neighbouring examples


def test_gumbel_numbers_have_the_gumbel_distribution() -> None:
    sample = gumbel(random_bits(5, torch.arange(200_000))[0])
    variance = math.pi**2 / 6
    fourth_moment = variance**2 * (3 + 12 / 5)  # excess kurtosis 12/5
    assert abs(z_of_mean(sample, EULER_GAMMA, variance)) < 4.5
    squares = (sample.double() - EULER_GAMMA).square()
    assert abs(z_of_mean(squares, variance, fourth_moment - variance**2)) < 4.5
    for threshold in (2.0, 5.0, 8.0):
        tail = -math.expm1(-math.exp(-threshold))
        assert abs(z_of_mean((sample > threshold).double(), tail, tail * (1 - tail))) < 4.5


def test_gumbel_keeps_its_upper_tail_in_float32() -> None:
    """The integers next to 0 are the largest Gumbel numbers; each differs from the next, and none has lost a digit."""
    bits = torch.arange(4096)
    sample = gumbel(bits)
    assert bool((sample.diff() < 0).all())
    exact = gumbel(bits, torch.float64)
    expected = [-math.log(-math.log1p(-(b + 0.5) / 2**32)) for b in bits.tolist()]
    torch.testing.assert_close(exact, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    # u is exact here (b + 0.5 < 2^13); log1p and log round relative to E and to G: 4 ulp in all.
    torch.testing.assert_close(sample.double(), exact, rtol=4 * 2**-24, atol=4 * 2**-24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_bits_stay_finite(dtype: torch.dtype) -> None:
    extremes = torch.tensor([0, 1, MASK - 200, MASK - 1, MASK])
    assert bool((uniform(extremes, dtype) > 0).all()) and bool((uniform(extremes, dtype) < 1).all())
    assert bool(gumbel(extremes, dtype).isfinite().all())


def test_no_seed_means_torchs_generator() -> None:
    cpu = torch.device("cpu")
    torch.manual_seed(11)
    drawn = [int(seed_tensor(None, cpu)) for _ in range(3)]
    torch.manual_seed(11)
    assert [int(seed_tensor(None, cpu)) for _ in range(3)] == drawn
    assert len(set(drawn)) == 3
    assert max(drawn) >= 2**32  # the key's high half is used too
