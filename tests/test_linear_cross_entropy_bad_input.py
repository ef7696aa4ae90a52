"""What does not fit is refused by name: a ValueError that says which argument, what came and what is taken."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import attent
from attent import _checks

NAN, INF = float("nan"), float("inf")


def randn(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*shape, **options)


def labels(*shape: int, high: int = 7, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(high, shape, dtype=dtype)


def offsets(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


class FakeDTensor(Tensor):
    """A tensor with placements, as a DTensor has them."""

    placements = ()


def dtensor(*shape: int) -> Tensor:
    return randn(*shape).as_subclass(FakeDTensor)


#: What is right, and what replaces it: padded [2, 3, 4], seven classes.
PADDED = {"input": randn(2, 3, 4), "linear_weight": randn(7, 4), "target": labels(2, 3)}
PACKED = {"input": randn(6, 4), "linear_weight": randn(7, 4), "target": labels(6), "cu_seqlens": offsets(0, 2, 6)}
ROWS = {"input": randn(6, 4), "linear_weight": randn(7, 4), "target": labels(6)}

WRONG: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # argument to be named, right arguments, what is put in their place
    ("input", PADDED, {"input": [[1.0]]}),
    ("input", PADDED, {"input": None}),
    ("input", PADDED, {"input": randn(4)}),
    ("input", PADDED, {"input": randn(2, 3, 4, 5)}),
    ("input", PADDED, {"input": labels(2, 3, 4)}),
    ("input", PADDED, {"input": randn(2, 3, 4, dtype=torch.complex64)}),
    ("input", ROWS, {"input": randn(6, 0), "linear_weight": randn(7, 0)}),
    ("input", PACKED, {"input": randn(2, 3, 4)}),
    ("input", PADDED, {"input": dtensor(2, 3, 4)}),
    ("linear_weight", PADDED, {"linear_weight": None}),
    ("linear_weight", PADDED, {"linear_weight": torch.nn.Linear(4, 7)}),
    ("linear_weight", PADDED, {"linear_weight": randn(4, 7)}),
    ("linear_weight", PADDED, {"linear_weight": randn(7)}),
    ("linear_weight", PADDED, {"linear_weight": randn(0, 4)}),
    ("linear_weight", PADDED, {"linear_weight": randn(7, 4, dtype=torch.float64)}),
    ("linear_weight", PADDED, {"linear_weight": randn(7, 4, dtype=torch.bfloat16)}),
    ("linear_weight", PADDED, {"linear_weight": randn(7, 4, device="meta")}),
    ("linear_weight", PADDED, {"linear_weight": dtensor(7, 4)}),
    ("linear_bias", PADDED, {"linear_bias": randn(6)}),
    ("linear_bias", PADDED, {"linear_bias": randn(7, 1)}),
    ("linear_bias", PADDED, {"linear_bias": randn(7).half()}),
    ("linear_bias", PADDED, {"linear_bias": 0.0}),
    ("linear_bias", PADDED, {"linear_bias": randn(7, device="meta")}),
    ("linear_bias", PADDED, {"linear_bias": dtensor(7)}),
    ("target", PADDED, {"target": None}),
    ("target", PADDED, {"target": [[0, 1, 2], [0, 1, 2]]}),
    ("target", PADDED, {"target": labels(2, 4)}),
    ("target", PADDED, {"target": labels(6)}),
    ("target", PADDED, {"target": labels(2, 3, 7)}),
    ("target", PADDED, {"target": randn(2, 3)}),
    ("target", PADDED, {"target": randn(2, 3, 6)}),
    ("target", PADDED, {"target": labels(2, 3, dtype=torch.int16)}),
    ("target", PADDED, {"target": labels(2, 3) > 3}),
    ("target", PADDED, {"target": torch.full((2, 3), 7)}),
    ("target", PADDED, {"target": torch.full((2, 3), -1)}),
    ("target", PADDED, {"target": torch.full((2, 3), -100), "ignore_index": -1}),
    ("target", PADDED, {"target": torch.full((2, 3), 2**40)}),
    ("target", PADDED, {"target": labels(2, 3).to("meta")}),
    ("target", PADDED, {"target": randn(2, 3, 7, requires_grad=True)}),
    ("target", PADDED, {"target": dtensor(2, 3, 7)}),
    ("weight", PADDED, {"weight": randn(6)}),
    ("weight", PADDED, {"weight": labels(7)}),
    ("weight", PADDED, {"weight": [1.0] * 7}),
    ("weight", PADDED, {"weight": randn(7, requires_grad=True)}),
    ("weight", PADDED, {"weight": randn(7, device="meta")}),
    ("ignore_index", PADDED, {"ignore_index": "pad"}),
    ("ignore_index", PADDED, {"ignore_index": -100.0}),
    ("ignore_index", PADDED, {"ignore_index": None}),
    ("label_smoothing", PADDED, {"label_smoothing": 1.5}),
    ("label_smoothing", PADDED, {"label_smoothing": -0.1}),
    ("label_smoothing", PADDED, {"label_smoothing": NAN}),
    ("label_smoothing", PADDED, {"label_smoothing": "a little"}),
    ("label_smoothing", PADDED, {"label_smoothing": None}),
    ("softcap", PADDED, {"softcap": 0.0}),
    ("softcap", PADDED, {"softcap": -30.0}),
    ("softcap", PADDED, {"softcap": NAN}),
    ("softcap", PADDED, {"softcap": INF}),
    ("softcap", PADDED, {"softcap": True}),
    ("shift", ROWS, {"shift": True}),
    ("shift", PADDED, {"shift": 1}),
    ("example_weight", PADDED, {"example_weight": randn(3)}),
    ("example_weight", PADDED, {"example_weight": randn(2, 3)}),
    ("example_weight", PADDED, {"example_weight": labels(2)}),
    ("example_weight", PACKED, {"example_weight": randn(6)}),
    ("example_weight", PADDED, {"example_weight": randn(2, requires_grad=True)}),
    ("example_weight", PADDED, {"example_weight": randn(2, device="meta")}),
    ("per_example", PADDED, {"per_example": "max"}),
    ("per_example", PADDED, {"per_example": None}),
    ("cu_seqlens", PACKED, {"cu_seqlens": offsets(0, 2, 6, dtype=torch.int64)}),
    ("cu_seqlens", PACKED, {"cu_seqlens": offsets(1, 2, 6)}),
    ("cu_seqlens", PACKED, {"cu_seqlens": offsets(0, 4, 2, 6)}),
    ("cu_seqlens", PACKED, {"cu_seqlens": offsets(0, 2, 5)}),
    ("cu_seqlens", PACKED, {"cu_seqlens": offsets(0, 2, 7)}),
    ("cu_seqlens", PACKED, {"cu_seqlens": offsets()}),
    ("cu_seqlens", PACKED, {"cu_seqlens": offsets(0, 6)[None]}),
    ("cu_seqlens", PACKED, {"cu_seqlens": [0, 2, 6]}),
    ("cu_seqlens", PACKED, {"cu_seqlens": offsets(0, 2, 6).to("meta")}),
    ("group", PADDED, {"group": "ranks"}),
    ("backend", PADDED, {"backend": "fastest"}),
    ("backend", PADDED, {"backend": None}),
    ("backend", PADDED, {"backend": "cuda"}),
]
WRONG_FOR_THE_LOSS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("reduction", PADDED, {"reduction": "average"}),
    ("reduction", PADDED, {"reduction": None}),
    ("score", PADDED, {"score": "gradient"}),
    ("score", PADDED, {"score": ("logit", "grad")}),
    ("score", PADDED, {"score": ("logit", "logit")}),
    ("score", PADDED, {"score": ()}),
    ("score", PADDED, {"score": 3}),
]
WRONG_FOR_THE_CHOICE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("score", PADDED, {"score": ("logit",)}),
    ("score", PADDED, {"score": None}),
    ("score", PADDED, {"score": "gradient"}),
    ("k", PADDED, {"k": 3}),
    ("k", PADDED, {"k": -1}),
    ("k", PADDED, {"k": 1.0}),
    ("temperature", PADDED, {"temperature": -1.0}),
    ("floor", PADDED, {"floor": 1.5}),
    ("seed", PADDED, {"seed": "now"}),
]


def names(cases: list[Any]) -> list[str]:
    return [f"{i} {case[0]}" for i, case in enumerate(cases)]


def assert_refused(argument: str, call: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(ValueError) as error:
        call(*arguments, **options)
    assert re.match(rf"{argument}: got .+; takes .+", str(error.value), re.DOTALL), str(error.value)


@pytest.mark.parametrize(
    ("argument", "right", "wrong"), WRONG + WRONG_FOR_THE_LOSS, ids=names(WRONG + WRONG_FOR_THE_LOSS)
)
def test_linear_cross_entropy_refuses(argument: str, right: dict[str, Any], wrong: dict[str, Any]) -> None:
    attent.linear_cross_entropy(**right)
    assert_refused(argument, attent.linear_cross_entropy, **{**right, **wrong})


def requires_grad(options: dict[str, Any]) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in options.values())


# A choice is made without gradient: there, what requires one is as good as what does not.
WRONG_FOR_THE_CHOICE += [case for case in WRONG if not requires_grad(case[2])]


@pytest.mark.parametrize(("argument", "right", "wrong"), WRONG_FOR_THE_CHOICE, ids=names(WRONG_FOR_THE_CHOICE))
def test_score_and_select_refuses(argument: str, right: dict[str, Any], wrong: dict[str, Any]) -> None:
    attent.score_and_select(**right, k=1)
    assert_refused(argument, attent.score_and_select, **{**right, "k": 1, **wrong})


def test_constants_may_require_grad_where_no_gradient_is_recorded() -> None:
    weight = randn(7).abs().requires_grad_()
    with torch.no_grad():
        assert attent.linear_cross_entropy(**PADDED, weight=weight).isfinite()


def test_what_is_said_names_what_came_and_the_way_out() -> None:
    def said(**wrong: Any) -> str:
        with pytest.raises(ValueError) as error:
            attent.linear_cross_entropy(**{**PADDED, **wrong})
        return str(error.value)

    assert said(linear_weight=randn(7, 5)) == (
        "linear_weight: got a float32 tensor of shape (7, 5) on cpu; takes [V, 4] torch.float32"
    )
    assert "the label 9; takes [2, 3] int64 or int32 indices in [0, 7) or -100" in said(target=torch.full((2, 3), 9))
    assert "attent.ScoringHead" in said(linear_weight=dtensor(7, 4))
    assert "'cuda' cannot: " in said(backend="cuda")
    assert "whose hooks gather" in said(linear_weight=dtensor(7, 4))


# ------------------------------------------------------------------------------------------ predictions and gradients

LOGITS = {"prediction": randn(2, 3, 7), "target": labels(2, 3)}
VALUES = {"prediction": randn(2, 3, 7), "target": randn(2, 3, 7), "loss": "squared"}
NUMBERS = {"prediction": randn(4), "target": randn(4), "loss": "squared"}
PACKED_LOGITS = {"prediction": randn(6, 7), "target": labels(6), "cu_seqlens": offsets(0, 2, 6)}
HEAD = {**LOGITS, "score": "head", "features": randn(2, 3, 4)}
HIDDEN = {**LOGITS, "score": "hidden", "linear_weight": randn(7, 4)}

WRONG_PREDICTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("prediction", LOGITS, {"prediction": None}),
    ("prediction", LOGITS, {"prediction": labels(2, 3, 7)}),
    ("prediction", LOGITS, {"prediction": randn(7)}),
    ("prediction", LOGITS, {"prediction": randn(2, 3, 4, 7)}),
    ("prediction", LOGITS, {"prediction": randn(2, 3, 0)}),
    ("prediction", LOGITS, {"prediction": dtensor(2, 3, 7)}),
    ("prediction", VALUES, {"prediction": torch.tensor(1.0)}),
    ("prediction", PACKED_LOGITS, {"prediction": randn(2, 3, 7)}),
    ("prediction", NUMBERS, {"cu_seqlens": offsets(0, 4)}),
    ("target", LOGITS, {"target": labels(2, 4)}),
    ("target", LOGITS, {"target": torch.full((2, 3), 7)}),
    ("target", LOGITS, {"target": None}),
    ("target", LOGITS, {"target": labels(2, 3).to("meta")}),
    ("target", VALUES, {"target": labels(2, 3)}),
    ("target", VALUES, {"target": randn(2, 3, 6)}),
    ("target", VALUES, {"target": randn(2, 3, 7, device="meta")}),
    ("target", NUMBERS, {"target": randn(3)}),
    ("target", NUMBERS, {"target": randn(4, device="meta")}),
    ("loss", LOGITS, {"loss": "hinge"}),
    ("loss", LOGITS, {"loss": None}),
    ("score", LOGITS, {"score": "residual"}),
    ("score", LOGITS, {"score": None}),
    ("score", LOGITS, {"score": ("logit",)}),
    ("per_example", LOGITS, {"per_example": "max"}),
    ("ignore_index", LOGITS, {"ignore_index": 0.5}),
    ("cu_seqlens", PACKED_LOGITS, {"cu_seqlens": offsets(0, 2, 5)}),
    ("cu_seqlens", PACKED_LOGITS, {"cu_seqlens": offsets(0, 2, 6, dtype=torch.int64)}),
    ("features", HEAD, {"features": None}),
    ("features", HEAD, {"features": randn(2, 4)}),
    ("features", HEAD, {"features": randn(2, 3, 4).half()}),
    ("features", HEAD, {"features": randn(2, 3, 4, device="meta")}),
    ("linear_weight", HIDDEN, {"linear_weight": None}),
    ("linear_weight", HIDDEN, {"linear_weight": randn(4, 7)}),
    ("linear_weight", HIDDEN, {"linear_weight": randn(7, 4, dtype=torch.float64)}),
    ("linear_weight", HIDDEN, {"linear_weight": randn(7, 4, device="meta")}),
]


@pytest.mark.parametrize(("argument", "right", "wrong"), WRONG_PREDICTIONS, ids=names(WRONG_PREDICTIONS))
def test_example_scores_refuses(argument: str, right: dict[str, Any], wrong: dict[str, Any]) -> None:
    attent.example_scores(**right)
    assert_refused(argument, attent.example_scores, **{**right, **wrong})


OUTPUTS = randn(4, 3, requires_grad=True)
LOSSES = OUTPUTS.square().sum(1)
INDEX = torch.tensor([0, 1, 0, 1])

WRONG_LOSSES: list[tuple[str, tuple[Any, ...]]] = [
    ("losses", (None, OUTPUTS)),
    ("losses", (LOSSES.sum(), OUTPUTS)),
    ("losses", (LOSSES[:, None], OUTPUTS)),
    ("losses", (LOSSES.detach(), OUTPUTS)),
    ("losses", (INDEX, OUTPUTS)),
    ("outputs", (LOSSES, None)),
    ("outputs", (LOSSES, 3)),
    ("outputs", (LOSSES, ())),
    ("outputs", (LOSSES, [OUTPUTS, None])),
    ("outputs", (LOSSES, OUTPUTS[:3])),
    ("outputs", (LOSSES, OUTPUTS.sum())),
    ("outputs", (LOSSES, OUTPUTS.detach())),
    ("outputs", (LOSSES, randn(4, 3, requires_grad=True))),
    ("outputs", (LOSSES, (OUTPUTS, randn(4, 3, requires_grad=True)))),
    ("outputs", (LOSSES, randn(4, 3, device="meta", requires_grad=True))),
    ("outputs", (LOSSES[:2], OUTPUTS)),
    ("outputs", (LOSSES[:2], OUTPUTS, INDEX[:3])),
    ("example_index", (LOSSES[:2], OUTPUTS, [0, 1, 0, 1])),
    ("example_index", (LOSSES[:2], OUTPUTS, 2)),
    ("example_index", (LOSSES[:2], OUTPUTS, INDEX.int())),
    ("example_index", (LOSSES[:2], OUTPUTS, INDEX[None])),
    ("example_index", (LOSSES[:2], OUTPUTS, INDEX + 1)),
    ("example_index", (LOSSES[:2], OUTPUTS, INDEX - 1)),
    ("example_index", (LOSSES[:2], OUTPUTS, INDEX.to("meta"))),
]


@pytest.mark.parametrize(("argument", "arguments"), WRONG_LOSSES, ids=names(WRONG_LOSSES))
def test_gradient_scores_refuses(argument: str, arguments: tuple[Any, ...]) -> None:
    assert_refused(argument, attent.gradient_scores, *arguments)


# ----------------------------------------------------------------------------------------------------- who reads values


class OnGpu:
    """As much of a tensor on a GPU as the question below looks at."""

    device, is_meta = torch.device("cuda"), False


def test_values_are_read_on_cpu_and_elsewhere_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTENT_CHECK", raising=False)
    somewhere_else: Any = OnGpu()
    assert _checks.values_readable(torch.zeros(1)) and not _checks.values_readable(somewhere_else)
    assert not _checks.values_readable(torch.zeros(1, device="meta"))
    monkeypatch.setenv("ATTENT_CHECK", "1")
    assert _checks.values_readable(somewhere_else)
    assert not _checks.values_readable(torch.zeros(1, device="meta"))  # there is nothing to read


def test_a_compiled_call_reads_no_values_and_still_checks_shapes() -> None:
    compiled = torch.compile(attent.linear_cross_entropy, backend="eager", fullgraph=True)
    assert compiled(**{**PADDED, "target": torch.full((2, 3), 9)}).isnan()
    # Dynamo tells the error in words of its own; PyTorch 2.9's shows the pieces of its text, unformatted.
    with pytest.raises(Exception, match=r"target.*: got .*; takes "):
        compiled(**{**PADDED, "target": labels(2, 4)})
