"""What must not grow, counted rather than timed: modules imported, PyTorch operations, graphs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import attent
from attent_kernels import native
from benchmarks.launch import calls, without_launching


def test_importing_attent_brings_no_compiler_and_no_trainer() -> None:
    code = "import torch, sys; before = set(sys.modules); import attent; print(*sorted(set(sys.modules) - before))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"triton", "transformers", "lightning", "accelerate", "peft", "matplotlib", "torch._inductor"}
    assert heavy & {name.split(".")[0] for name in said} == set() and "torch._inductor" not in said
    assert [name for name in said if name.startswith(("attent.bench", "attent.demo", "attent.integrations"))] == []


@pytest.mark.skipif(native.module is None, reason=str(native.reason))
def test_the_cuda_launchers_bring_no_triton() -> None:
    """Each op's call is taken up to the launch, with the native module's stand-ins for it."""
    code = (
        "import sys; from benchmarks.launch import calls, without_launching\n"
        "with without_launching():\n"
        "    for call in calls().values(): call()\n"
        "assert 'triton' not in sys.modules, 'triton'"
    )
    root = Path(__file__).resolve().parent.parent
    said = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr


@pytest.mark.skipif(native.module is None, reason=str(native.reason))
@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("select_top_k, hard", 80),
        ("scored_attention, residual, top k", 180),
        ("linear_cross_entropy, logit", 140),
        ("score_and_select", 175),
    ],
)
def test_a_cuda_launch_takes_no_more_function_calls(name: str, most: int) -> None:
    """All Python and C functions between the public call and its launch, as counted by CPython 3.11, rounded up."""
    with without_launching():
        call = calls()[name]
        assert function_calls(call) <= most


def function_calls(call: Callable[[], object]) -> int:
    """How many functions a second call calls."""
    call()
    count = 0

    def count_one(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    usual = sys.getprofile()
    sys.setprofile(count_one)
    try:
        call()
    finally:
        sys.setprofile(usual)
    return count


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[], object]) -> int:
    call()
    with Counting() as counting:
        call()
    return counting.count


def test_recording_a_batch_takes_a_few_operations_whatever_its_size() -> None:
    def recorded(size: int) -> int:
        teacher = attent.Teacher(4096, total_epochs=4)
        ids, scores = torch.arange(size), torch.rand(size)
        return operations(lambda: teacher.record(ids, scores))

    assert recorded(8) == recorded(2048) <= 8


def test_a_score_adds_no_operations_that_grow_with_the_number_of_examples() -> None:
    weight = torch.randn(50, 8)

    def scored(examples: int, score: str | None) -> int:
        hidden, target = torch.randn(examples, 4, 8), torch.zeros(examples, 4, dtype=torch.long)
        return operations(lambda: attent.linear_cross_entropy(hidden, weight, target, score=score, backend="torch"))

    for score in (None, "logit", "head"):
        assert scored(2, score) == scored(16, score)


@pytest.mark.parametrize("score", ["logit", "head"])
def test_a_scored_training_step_is_one_graph(score: str) -> None:
    body = torch.nn.Linear(6, 8)
    head = attent.ScoringHead(torch.nn.Linear(8, 5), score=score)
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    @torch.compile(backend=backend)
    def step(x: torch.Tensor, y: torch.Tensor) -> Any:
        return head(body(x), y)

    torch._dynamo.reset()
    loss, scores = step(torch.randn(3, 4, 6), torch.zeros(3, 4, dtype=torch.long))
    loss.backward()
    assert len(graphs) == 1 and scores.shape == (3,)
