"""attent.scored_attention refuses what it cannot take, and names it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attent import Readout, scored_attention

from .test_scored_attention import cu_seqlens


def good_call() -> dict[str, Any]:
    return {
        "query": torch.randn(2, 4, 3, 8),
        "key": torch.randn(2, 4, 5, 8),
        "value": torch.randn(2, 4, 5, 6),
        "target": torch.randn(2, 4, 3, 6),
    }


def with_readout(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"weight": torch.randn(7, 24), "target": torch.tensor([0, 6]), "bias": torch.randn(7)}
    return {"target": None, "readout": Readout(**{**fields, **changes})}


def packed_call(**changes: Any) -> dict[str, Any]:
    arguments = {
        "query": torch.randn(6, 4, 8),
        "key": torch.randn(5, 4, 8),
        "value": torch.randn(5, 4, 6),
        "target": torch.randn(6, 4, 6),
        "cu_seqlens_q": cu_seqlens(2, 4),
        "cu_seqlens_k": cu_seqlens(5, 0),
    }
    return {**arguments, **changes}


BAD: list[tuple[str, dict[str, Any]]] = [
    ("query", {"query": [1.0]}),
    ("query", {"query": torch.randn(2, 3, 8)}),
    ("query", {"query": torch.zeros(2, 4, 3, 8, dtype=torch.int64)}),
    ("query", {"query": torch.randn(2, 4, 3, 0), "key": torch.randn(2, 4, 5, 0)}),
    ("query", {"query": torch.randn(2, 0, 3, 8)}),
    ("query", packed_call(query=torch.randn(1, 6, 4, 8))),
    ("key", {"key": None}),
    ("key", {"key": torch.randn(3, 4, 5, 8)}),
    ("key", {"key": torch.randn(2, 4, 5, 7)}),
    ("key", {"key": torch.randn(2, 4, 5, 8).double()}),
    ("key", {"key": torch.randn(2, 4, 5, 8, device="meta")}),
    ("key", {"key": torch.randn(2, 2, 5, 8), "value": torch.randn(2, 2, 5, 6)}),
    ("key", {"key": torch.randn(2, 3, 5, 8), "value": torch.randn(2, 3, 5, 6), "enable_gqa": True}),
    ("key", {"key": torch.randn(2, 0, 5, 8), "value": torch.randn(2, 0, 5, 6), "enable_gqa": True}),
    ("value", {"value": torch.randn(2, 4, 6, 6)}),
    ("value", {"value": torch.randn(2, 2, 5, 6)}),
    ("value", {"value": torch.randn(2, 4, 5, 0)}),
    ("value", {"value": torch.randn(2, 4, 5, 6).half()}),
    ("target", {"target": torch.randn(2, 4, 3, 8)}),
    ("target", {"target": torch.zeros(2, 4, 3, 6, dtype=torch.int64)}),
    ("target", {"target": None}),
    ("target", {**with_readout(), "target": torch.randn(2, 4, 3, 6)}),
    ("readout", {"target": None, "readout": (torch.randn(7, 24), torch.tensor([0, 6]))}),
    ("readout.weight", with_readout(weight=torch.randn(7, 23))),
    ("readout.weight", with_readout(weight=torch.randn(0, 24))),
    ("readout.weight", with_readout(weight=torch.zeros(7, 24, dtype=torch.int64))),
    ("readout.bias", with_readout(bias=torch.randn(6))),
    ("readout.target", with_readout(target=torch.tensor([0.0, 6.0]))),
    ("readout.target", with_readout(target=torch.tensor([0, 6, 1]))),
    ("readout.target", with_readout(target=torch.tensor([0, 7]))),
    ("readout.target", with_readout(target=torch.tensor([-1, 6], dtype=torch.int32))),
    ("readout.pool", with_readout(pool="max")),
    ("is_causal", {"is_causal": 1}),
    ("enable_gqa", {"enable_gqa": None}),
    ("return_output", {"return_output": "no"}),
    ("scale", {"scale": float("nan")}),
    ("scale", {"scale": torch.tensor(1.0)}),
    ("softcap", {"softcap": 0.0}),
    ("softcap", {"softcap": -1.0}),
    ("window", {"window": 3}),
    ("window", {"window": (1, 2, 3)}),
    ("window", {"window": (-2, 0)}),
    ("window", {"window": (1, 0.5)}),
    ("query_lengths", {"query_lengths": torch.tensor([4, 0])}),
    ("query_lengths", {"query_lengths": torch.tensor([3])}),
    ("query_lengths", {"query_lengths": [3, 3]}),
    ("key_lengths", {"key_lengths": torch.tensor([-1, 0])}),
    ("key_lengths", {"key_lengths": torch.tensor([1.0, 2.0])}),
    ("cu_seqlens_k", packed_call(cu_seqlens_k=None)),
    ("cu_seqlens_q", packed_call(cu_seqlens_q=None)),
    ("cu_seqlens_q", packed_call(cu_seqlens_q=cu_seqlens(2, 3))),
    ("cu_seqlens_q", packed_call(cu_seqlens_q=torch.tensor([0, 7, 6]).int())),
    ("cu_seqlens_q", packed_call(cu_seqlens_q=torch.tensor([0, 2, 6]))),
    ("cu_seqlens_k", packed_call(cu_seqlens_k=torch.tensor([1, 3, 5]).int())),
    ("cu_seqlens_k", packed_call(cu_seqlens_k=cu_seqlens(2, 2, 1))),
    ("query_lengths", packed_call(query_lengths=torch.tensor([2, 4]))),
    ("key_lengths", packed_call(key_lengths=torch.tensor([2, 3]))),
    ("score", {"score": "logit"}),
    ("score", {"score": ("residual", "loss")}),
    ("score", {**with_readout(), "score": "residual"}),
    ("per_example", {"per_example": "max"}),
    ("top_k", {"top_k": 1}),
    ("top_k", {"top_k": 3, "score": "residual"}),
    ("top_k", {"top_k": -1, "score": "residual"}),
    ("top_k", {"top_k": 1.0, "score": "residual"}),
    ("temperature", {"temperature": -1.0}),
    ("floor", {"floor": 1.5}),
    ("seed", {"seed": "x"}),
    ("seed", {"seed": torch.tensor([1, 2])}),
    ("backend", {"backend": "cuda"}),
    ("backend", {"backend": "numpy"}),
]


@pytest.mark.parametrize(("argument", "changes"), BAD, ids=[f"{i}-{name}" for i, (name, _) in enumerate(BAD)])
def test_bad_input_is_refused_by_name(argument: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"(?s)^{argument}: got .*; takes "):
        scored_attention(**{**good_call(), **changes})
