"""select_top_k: what it refuses, and what it does with values it may not read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attent.ops import dispatch
from attent.ops.select_top_k import select_top_k

INF, NAN = math.inf, math.nan

SCORES = torch.rand(5)


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("scores", {"scores": [0.5, 1.0]}),
        ("scores", {"scores": torch.rand(2, 5)}),
        ("scores", {"scores": torch.tensor(1.0), "k": 1}),
        ("scores", {"scores": torch.arange(5)}),
        ("scores", {"scores": torch.rand(5, dtype=torch.complex64)}),
        ("scores", {"scores": torch.empty(2**31, device="meta")}),
        ("scores", {"scores": torch.tensor([1.0, -0.5, 2.0]), "temperature": 1.0}),
        ("scores", {"scores": torch.tensor([1.0, -INF, 2.0]), "temperature": 1.0}),
        ("k", {"k": 6}),
        ("k", {"k": -1}),
        ("k", {"k": 2.0}),
        ("k", {"k": True}),
        ("k", {"k": None}),
        ("k", {"scores": torch.empty(0), "k": 1}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": NAN}),
        ("temperature", {"temperature": INF}),
        ("temperature", {"temperature": "1"}),
        ("floor", {"floor": -0.01}),
        ("floor", {"floor": 1.01}),
        ("floor", {"floor": NAN}),
        ("floor", {"floor": None}),
        ("valid", {"valid": [True] * 5}),
        ("valid", {"valid": torch.ones(4, dtype=torch.bool)}),
        ("valid", {"valid": torch.ones(5, 1, dtype=torch.bool)}),
        ("valid", {"valid": torch.ones(5)}),
        ("valid", {"valid": torch.ones(5, dtype=torch.bool, device="meta")}),
        ("seed", {"seed": 1.0}),
        ("seed", {"seed": True}),
        ("seed", {"seed": "1"}),
        ("seed", {"seed": 2**63}),
        ("seed", {"seed": torch.tensor(1.0)}),
        ("seed", {"seed": torch.tensor([1, 2])}),
        ("seed", {"seed": torch.tensor(1, device="meta")}),
        ("sorted", {"sorted": 1}),
        ("backend", {"backend": "numpy"}),
        ("backend", {"backend": None}),
        ("backend", {"backend": "cuda"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused_by_name(argument: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: got .+; takes "):
        select_top_k(**{"scores": SCORES, "k": 2, **arguments})


def test_a_negative_score_of_an_invalid_example_does_not_matter() -> None:
    valid = torch.tensor([True, False, True])
    index = select_top_k(torch.tensor([1.0, -0.5, 2.0]), 2, temperature=1.0, valid=valid, seed=0).index
    assert sorted(index.tolist()) == [0, 2]


def test_unread_negative_scores_count_as_zero() -> None:
    """Where values are not read (CUDA, a compiler's trace) a negative score is the smallest, and nothing is NaN."""
    scores = torch.tensor([1.0, -0.5, -INF, 0.0])
    arguments = (3, 1.0, 0.0, None, torch.tensor([4]), False)
    select = dispatch.implementation("select_top_k", "torch")
    for actual, expected in zip(
        select(scores, *arguments)[::2], select(scores.clamp(min=0), *arguments)[::2], strict=True
    ):
        assert torch.equal(actual, expected)
