"""No tensor of tokens x V elements is ever made, none larger than a chunk, and on a GPU the host waits for no value."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attent import scores
from attent.ops.dispatch import implementation
from attent.ops.linear_cross_entropy_op import Call

from .linear_cross_entropy_problems import NAMES, no_looking, passes_of, small_chunks

TOKENS, CLASSES, WIDTH = 240, 1000, 3
CHUNK = 1 << 16  # bytes; all logits together are 15 times as large in float32
KINDS = ["indices", "smoothed", "capped", "weighted", "probabilities"]
LAYOUTS = {
    "rows": None,
    "short": [6] * 40,  # two in a chunk
    "long": [150, 0, 90],  # each longer than a chunk
}


class Allocations(TorchDispatchMode):
    """Notes the bytes of each tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, leaf.untyped_storage().nbytes())
        return result


def call(lengths: list[int] | None, dtype: torch.dtype, kind: str, reduction: str) -> Call:
    target = torch.randint(CLASSES, (TOKENS,))
    target[::7] = -100
    probabilities = kind == "probabilities"
    return Call(
        input=torch.randn(TOKENS, WIDTH, dtype=dtype),
        linear_weight=torch.randn(CLASSES, WIDTH, dtype=dtype),
        target=torch.randn(TOKENS, CLASSES).softmax(1).to(dtype) if probabilities else target,
        linear_bias=torch.randn(CLASSES, dtype=dtype),
        weight=torch.rand(CLASSES) if kind == "weighted" else None,
        example_weight=torch.rand(TOKENS if lengths is None else len(lengths)).round(),  # some are 0: they are left out
        cu_seqlens=None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int(),
        reduction=reduction,
        ignore_index=-100,
        label_smoothing=0.1 if kind in ("smoothed", "weighted") else 0.0,
        softcap=5.0 if kind == "capped" else None,
        shift=lengths is not None,
        score=list(NAMES),
        per_example="rms",
        group=None,
        backend="torch",
        input_gradient=True,
        weight_gradient=True,
        bias_gradient=True,
    )


WHERE = [
    *(("PyTorch", kind) for kind in KINDS),
    *(("native", kind) for kind in ("indices", "capped")),  # what the native module covers
    *(("no looking", kind) for kind in ("indices", "probabilities")),
]


@pytest.mark.parametrize(("where", "kind"), WHERE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_allocation_is_larger_than_a_chunk(where: str, layout: str, kind: str) -> None:
    for reduction, dtype in (("mean", torch.bfloat16), ("none", torch.float32)):
        arguments = call(LAYOUTS[layout], dtype, kind, reduction)
        allocations = Allocations()
        with no_looking() if where == "no looking" else passes_of(where), small_chunks(CHUNK), allocations:
            loss, *_ = implementation("linear_cross_entropy", "torch")(arguments)
            implementation("linear_cross_entropy_backward", "torch")(torch.ones_like(loss), arguments)
        assert 0 < allocations.largest <= CHUNK


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("squared", [False, True])
def test_scores_of_predictions_in_hand_copy_no_more_than_a_chunk(squared: bool, layout: str) -> None:
    lengths = LAYOUTS[layout]
    cu_seqlens = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int()
    target = torch.randn(TOKENS, CLASSES) if squared else torch.randint(CLASSES, (TOKENS,))
    if not squared:
        target[::7] = -100
    prediction, features = torch.randn(TOKENS, CLASSES), torch.randn(TOKENS, WIDTH)
    for looking in (True, False):
        allocations = Allocations()
        with passes_of("native") if looking else no_looking(), small_chunks(CHUNK), allocations:
            scores._example_scores(prediction, target, features, None, cu_seqlens, squared, "head", -100, "rms")
        assert 0 < allocations.largest <= CHUNK


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [*LAYOUTS, "padded"])
def test_the_path_that_gpus_take_reads_no_value_back(layout: str, kind: str) -> None:
    # Fake tensors have no values: reading one raises.
    with FakeTensorMode():
        arguments = call(LAYOUTS.get(layout), torch.float32, kind, "example")
        if layout == "padded":
            arguments = arguments._replace(
                input=arguments.input.view(10, 24, WIDTH),
                target=arguments.target.unflatten(0, (10, 24)),
                example_weight=torch.rand(10),
                shift=True,
            )
        elif layout != "rows":  # the "head" scores of packed examples read where each of them starts
            arguments = arguments._replace(score=["loss", "logit", "hidden"])
        with no_looking(), passes_of("PyTorch"), small_chunks(8 * CHUNK):  # some chunks
            loss, *_ = implementation("linear_cross_entropy", "torch")(arguments)
            implementation("linear_cross_entropy_backward", "torch")(torch.ones_like(loss), arguments)
        with passes_of("PyTorch"), pytest.raises(DataDependentOutputException):  # as on a CPU
            implementation("linear_cross_entropy", "torch")(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["None", "'logit'", "'head'"])
def test_a_training_step_takes_little_more_memory_than_one_chunk(score: str) -> None:
    code = f"""
        import resource, torch, attent
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        hidden = torch.randn(8, 512, 64, requires_grad=True)
        weight = torch.randn(32768, 64, requires_grad=True)
        target = torch.randint(32768, (8, 512))
        attent.linear_cross_entropy(hidden[:, :1], weight, target[:, :1]).backward()  # what the first call loads
        before = peak()
        result = attent.linear_cross_entropy(hidden, weight, target, score={score})
        (result if isinstance(result, torch.Tensor) else result[0]).backward()
        print(peak() - before)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, check=True, text=True)
    # MB: a chunk of 64, and as much again for gradients of 8 and 1, once more while they are scaled, the product of 8
    # that "head" takes the norm of, and what the matrix library and the allocator keep. All logits would be 512.
    assert float(result.stdout) < 2 * 64
