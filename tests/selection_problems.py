"""Pools to choose from, drawn by hypothesis, and when two backends' choices are the same: for every backend's tests."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from attent.ops.select_top_k import floor_count, log_weight
from attent.philox import gumbel, random_bits
from attent.selection import Selection

INF, NAN = math.inf, math.nan
UNIT = 2.0**-24
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Kernels in tests look at so many examples at a time: pools have all the seams there.
CHUNK = 16

numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1e-45, 1e-38, 1.0, 2.0, 65504.0, 3e38, INF, NAN]),
    st.integers(0, 5).map(float),
    st.floats(0, 100, width=32),
)
signed = st.one_of(numbers, st.sampled_from([-INF, -1.0, -1e-45]), st.floats(width=32))


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    temperature = draw(st.sampled_from([0.0, 0.0, 1e-40, 0.3, 1.0, 1e30]))
    n = draw(st.sampled_from([0, 1, 2, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 3 * CHUNK + 1, 100]))
    few = draw(st.lists(signed if temperature == 0 else numbers, min_size=1, max_size=40))
    order = torch.randint(len(few), (n,), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    density = draw(st.sampled_from([None, None, 0.1, 0.8]))
    return {
        "scores": torch.tensor(few, dtype=torch.float32)[order].to(draw(st.sampled_from(DTYPES))),
        "k": draw(st.one_of(st.integers(0, n), st.sampled_from(sorted({0, min(1, n), n // 2, max(0, n - 1), n})))),
        "temperature": temperature,
        "floor": draw(st.sampled_from([0.0, 0.0, 0.2, 0.5, 1.0])),
        "valid": None if density is None else torch.rand(n, generator=torch.Generator().manual_seed(n)) < density,
        "seed": draw(st.integers(-(2**63), 2**63 - 1)),
        "sorted": draw(st.booleans()),
    }


def is_close_call(
    scores: Tensor, k: int, temperature: float, floor: float, valid: Tensor | None, seed: int, **_: Any
) -> bool:
    """Whether the keys next to the threshold lie so close that one rounding of a logarithm could exchange them.

    Keys come from two logarithms, a division and a sum, each within 2 units of float32 of its size.
    """
    k_first = k - floor_count(k, floor)
    if temperature == 0 or not 0 < k_first < len(scores):
        return False
    values = scores.float().double() if valid is None else scores.float().double()[valid]
    index = torch.arange(len(scores)) if valid is None else valid.nonzero()[:, 0]
    if k_first >= len(values):
        return False
    finite = torch.finfo(torch.float32)
    positive = values.nan_to_num(nan=finite.max, posinf=finite.max).clamp(finite.tiny, finite.max)
    phi = positive.log() / max(temperature, 1e-30)
    key = phi + gumbel(random_bits(seed, index)[0], torch.float64)
    top = key.topk(k_first + 1)
    last, runner_up = top.indices[-2:].tolist()
    gap, size = float(top.values[-2] - top.values[-1]), max(abs(float(phi[last])), abs(float(phi[runner_up]))) + 25
    swallowed = bool(phi[last] == phi[runner_up]) and size > 1e12  # both round to φ: a tie on either backend
    return gap <= 16 * UNIT * size and not swallowed


def assert_same(actual: Selection, expected: Selection, problem: dict[str, Any]) -> None:
    assert torch.equal(actual.index, expected.index)
    assert actual.score.dtype == expected.score.dtype
    assert torch.equal(actual.score.view(torch.uint8), expected.score.view(torch.uint8))
    # exp, its complement and the floor's share: 40 units. φ and the threshold are rounded on both backends, each within
    # 4 units of their size, and y = exp(φ - κ) is as far off, relatively, as its exponent is absolutely.
    size = 0.0
    if 1e-30 <= problem["temperature"] <= 1e3:  # below, exponents are 0 or beyond all sizes; above, φ is nothing
        size = (
            float(log_weight(problem["scores"].float(), problem["temperature"]).abs().max()) + 25
            if actual.index.numel()
            else 0
        )
    torch.testing.assert_close(actual.inclusion, expected.inclusion, rtol=(40 + 8 * size) * UNIT, atol=0)
