"""Calls go past the dispatcher when nobody listens there, and through it as soon as somebody does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import attent
from attent.ops.plain_eager import is_plain_eager, nobody_listens

Call = Callable[[Tensor], Any]


def select(x: Tensor) -> Tensor:
    return attent.select_top_k(x[0, :, 0].abs(), 2, temperature=1.0, seed=3).index


def loss(x: Tensor) -> Tensor:
    result: Tensor = attent.linear_cross_entropy(x[0], x[1], torch.arange(4), score="logit")[1]
    return result


def attention(x: Tensor) -> Tensor:
    scores = attent.scored_attention(x[:, None], x[:, None], x[:, None], target=x[:, None], score="residual").scores
    assert scores is not None
    return scores


OPS: dict[str, Call] = {"select_top_k": select, "linear_cross_entropy": loss, "scored_attention": attention}
each_op = pytest.mark.parametrize("name", OPS)


def x() -> Tensor:
    return torch.randn(2, 4, 8)


def test_nobody_listens_to_a_plain_call() -> None:
    assert nobody_listens([x(), None, torch.nn.Parameter(x())])
    with torch.no_grad(), torch.inference_mode():
        assert nobody_listens([x()])


@each_op
def test_the_profiler_lists_the_op(name: str) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        OPS[name](x())
    assert f"attent::{name}" in {event.key for event in profile.key_averages()}


@each_op
@pytest.mark.parametrize(
    ("mode", "hook"), [(TorchDispatchMode, "__torch_dispatch__"), (TorchFunctionMode, "__torch_function__")]
)
def test_a_mode_sees_the_op(name: str, mode: type, hook: str) -> None:
    def see(self: Any, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(function)
        return function(*args, **(kwargs or {}))

    seen: list[Any] = []
    with type("Seeing", (mode,), {hook: see})():
        OPS[name](x())
    op = getattr(torch.ops.attent, name)
    assert op in seen or op.default in seen


@each_op
def test_tracers_put_the_op_into_their_graphs(name: str) -> None:
    by_fx = make_fx(OPS[name], tracing_mode="fake")(x())
    assert getattr(torch.ops.attent, name).default in {node.target for node in by_fx.graph.nodes}


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated, and warns of every check of a value
def test_jit_trace_records_the_op_or_says_that_it_cannot() -> None:
    """Past the dispatcher it would take what a kernel wrote for a constant, without a word."""
    for name in ("select_top_k", "scored_attention"):
        traced = torch.jit.trace(OPS[name], x(), check_trace=False)
        assert f"attent::{name}" in {node.kind() for node in traced.graph.nodes()}
    with pytest.raises(RuntimeError, match="unsupported input list type: str"):  # the names of the scores
        torch.jit.trace(OPS["linear_cross_entropy"], x(), check_trace=False)


def test_tensors_without_plain_data_go_through_the_dispatcher() -> None:
    with FakeTensorMode():
        fake = torch.empty(2)
    negated = torch.randn(2, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    for tensor in (fake, torch.empty(2, device="meta"), negated):
        assert not is_plain_eager([x(), tensor])


def test_transforms_go_through_the_dispatcher() -> None:
    seen: list[bool] = []

    def looks(row: Tensor) -> Tensor:
        seen.append(is_plain_eager([torch.ones(1)]))
        return row

    torch.func.vmap(looks)(x())
    torch.func.grad(lambda row: looks(row).sum())(x())
    assert seen == [False, False]


@each_op
def test_both_ways_give_the_same(name: str) -> None:
    given = x()
    directly = OPS[name](given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        dispatched = OPS[name](given)
    assert torch.equal(directly, dispatched)
