"""Linear cross-entropy's Triton backend makes no tensor of tokens x V, reads no value back, repeats bit by bit."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attent.ops import triton_chunks, triton_head
from attent.ops.dispatch import implementation
from attent.ops.linear_cross_entropy_op import Call

from .linear_cross_entropy_problems import NAMES, no_looking
from .test_linear_cross_entropy_memory import Allocations
from .test_triton_linear_cross_entropy import small

WITHOUT_LOGITS = ("loss", "logit", "head")

TOKENS, CLASSES, WIDTH = 24, 1000, 1  # so wide that the weight's gradient in float32 is no eighth either


class OfTensors(Allocations):
    """Without what the interpreter makes: names for the memory that a kernel is given."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("aten::set_"):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def call(kind: str, layout: str, reduction: str, classes: int = CLASSES, **changes: Any) -> Call:
    lengths = {"rows": None, "short": [3] * 8, "long": [14, 0, 10]}[layout]
    target = torch.randint(classes, (TOKENS,))
    target[::7] = -100
    return Call(
        input=torch.randn(TOKENS, WIDTH),
        linear_weight=torch.randn(classes, WIDTH),
        target=torch.randn(TOKENS, classes).softmax(1) if kind == "probabilities" else target,
        linear_bias=torch.randn(classes),
        weight=torch.rand(classes) if kind == "weighted" else None,
        example_weight=None if lengths is None else torch.rand(len(lengths)).round(),
        cu_seqlens=None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int(),
        reduction=reduction,
        ignore_index=-100,
        label_smoothing=0.1 if kind in ("smoothed", "weighted") else 0.0,
        softcap=5.0 if kind == "capped" else None,
        shift=lengths is not None,
        score=list(NAMES),
        per_example="rms",
        group=None,
        backend="triton",
        input_gradient=True,
        weight_gradient=True,
        bias_gradient=True,
    )._replace(**changes)


NOTHING = {"score": list(WITHOUT_LOGITS), "input_gradient": False, "weight_gradient": False, "bias_gradient": False}


@pytest.mark.parametrize(
    ("kind", "layout", "changes"),
    [
        ("probabilities", "short", {}),
        pytest.param("indices", "rows", {}, marks=pytest.mark.slow),
        pytest.param("weighted", "long", {}, marks=pytest.mark.slow),
        pytest.param("capped", "short", NOTHING, marks=pytest.mark.slow),
        pytest.param("indices", "long", NOTHING, marks=pytest.mark.slow),
    ],
)
def test_no_allocation_is_an_eighth_of_the_logits_in_half_precision(
    kind: str, layout: str, changes: dict[str, Any]
) -> None:
    eighth = TOKENS * CLASSES * 2 // 8
    arguments = call(kind, layout, "example" if changes else "mean", **changes)
    allocations = OfTensors()
    with no_looking(), small(eighth - 1024, tile=8), mock.patch.object(triton_head, "TILE_BYTES", 4096), allocations:
        loss, *_ = implementation("linear_cross_entropy", "triton")(arguments)
        if not changes:
            implementation("linear_cross_entropy_backward", "triton")(torch.ones_like(loss), arguments)
    assert 0 < allocations.largest < eighth


def test_the_largest_problems_chunks_are_an_eighth_of_their_logits_too() -> None:
    tokens, classes, width = 8192, 131072, 4096
    sizes = triton_chunks.sizes(tokens, max(classes, width), torch.bfloat16, False)
    assert sizes.chunk * classes * 2 < tokens * classes * 2 / 8 and sizes.part * classes * 4 < tokens * classes * 2 / 8
    assert sizes.chunk >= 900 and sizes.part >= 256  # from where on the GEMMs do not wait for memory
    with_head = triton_chunks.sizes(tokens, classes, torch.bfloat16, True)
    assert with_head.chunk == 1024  # two examples of 512


@pytest.mark.parametrize("n", [1, 63, 64, 1000, 1024, 8192, 100_000])
def test_rows_are_shared_out_evenly_over_the_fewest_chunks(n: int) -> None:
    sizes = triton_chunks.sizes(n, 131072, torch.bfloat16, False)
    chunks = -(-n // sizes.chunk)
    assert chunks == n // 1024 + 1
    assert n <= chunks * sizes.chunk < n + 64 * chunks + 1024
    assert sizes.part <= 384 and sizes.part <= sizes.chunk


class Reads(TorchDispatchMode):
    """Raises where a value is read back, as on a GPU that would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
        ), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, NOTHING])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_the_path_that_gpus_take_reads_no_value_back(kind: str, changes: dict[str, Any]) -> None:
    arguments = call(kind, "short", "mean", classes=50, **changes)
    with no_looking(), Reads():
        loss, *_ = implementation("linear_cross_entropy", "triton")(arguments)
        if not changes:
            implementation("linear_cross_entropy_backward", "triton")(torch.ones_like(loss), arguments)


@pytest.mark.parametrize("changes", [{}, NOTHING])
def test_the_same_call_twice_is_bit_identical_whatever_memory_holds(changes: dict[str, Any]) -> None:
    arguments = call("capped", "long", "mean", classes=50, **changes)
    poison = torch.utils.deterministic.fill_uninitialized_memory
    results = []
    for deterministic in (False, True):  # then every torch.empty is full of NaN
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = deterministic
        try:
            with small(2000, tile=8):  # chunks of ten rows
                results.append(implementation("linear_cross_entropy", "triton")(arguments))
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = poison
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second) and bool(second.isfinite().all())
