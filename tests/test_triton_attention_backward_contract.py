"""What the Triton backward promises beside its numbers: padding, offsets, strides, what it launches and refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from attent import scored_attention
from attent.ops import torch_scored_attention
from attent.ops.scored_attention_op import Gradients, Problem, Saved, Scoring
from attent_kernels.attention import backward

from .scored_attention_problems import call
from .test_scored_attention import as_elsewhere
from .test_triton_attention_backward import backward_in_triton, budgets, largest, losses_of, qkv, trained


def test_the_same_call_gives_the_same_bits() -> None:
    options: dict[str, Any] = {"is_causal": True, "enable_gqa": True, "target": torch.randn(1, 2, 37, 32)}
    tensors = trained(qkv(options, torch.float32))
    with backward_in_triton():
        out = call(scored_attention, tensors, options)
        first, again = (
            torch.autograd.grad(out.losses.sum(), list(tensors.values()), retain_graph=True) for _ in range(2)
        )
    torch.testing.assert_close(first, again, rtol=0, atol=0)


@pytest.mark.parametrize("loss", ["target", "mean", "last"])
def test_padding_is_never_read_and_its_gradient_is_0(loss: str) -> None:
    lengths_q, lengths_k = torch.tensor([5, 0, 19]), torch.tensor([3, 18, 0])
    tensors = {"query": torch.randn(3, 1, 19, 4), "key": torch.randn(3, 1, 18, 4), "value": torch.randn(3, 1, 18, 4)}
    target, cotangent, readout = torch.randn(3, 1, 19, 4), torch.randn(3, 1, 19, 4), torch.randn(3, 4)
    results = []
    for filler in (0.0, torch.nan):
        padded = {name: x.clone() for name, x in (*tensors.items(), ("target", target), ("cotangent", cotangent))}
        for i in range(3):
            for name in ("query", "target", "cotangent"):
                padded[name][i, :, lengths_q[i] :] = filler
            for name in ("key", "value"):
                padded[name][i, :, lengths_k[i] :] = filler
        inputs = trained({name: padded[name] for name in tensors})
        options: dict[str, Any] = {"target": padded["target"]}
        if loss != "target":
            inputs["weight"] = readout.clone().requires_grad_()
            options = {"labels": torch.tensor([0, 2, 1]), "pool": loss}
        with backward_in_triton():
            out = call(scored_attention, inputs, {**options, "query_lengths": lengths_q, "key_lengths": lengths_k})
            cotangents = {"losses": torch.ones(3)}
            if loss != "last":  # which without it is a case of its own
                cotangents["output"] = padded["cotangent"]
            results.append(torch.autograd.grad(losses_of(out, cotangents), list(inputs.values())))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
    query, key, value, *_ = results[0]
    assert (query.transpose(1, 2)[torch.arange(19) >= lengths_q[:, None]] == 0).all()
    for gradient in (key, value):
        assert (gradient.transpose(1, 2)[torch.arange(18) >= lengths_k[:, None]] == 0).all()


@contextmanager
def counted() -> Iterator[list[str]]:
    """The kernels that are launched, in order."""
    launched: list[str] = []

    class Spy:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(backward, name)

        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            launched.append(self.name)
            launch: Callable[..., Any] = self.kernel[grid]
            return launch

    with ExitStack() as stack:
        for name in ("prepare", "key_value_gradients", "query_gradient"):
            stack.enter_context(mock.patch.object(backward, name, Spy(name)))
        yield launched


@pytest.mark.parametrize(
    ("names", "kernels"),
    [
        ("query key value", ["prepare", "key_value_gradients", "query_gradient"]),
        ("query", ["prepare", "query_gradient"]),
        ("key value", ["prepare", "key_value_gradients"]),
        ("key", ["prepare", "key_value_gradients"]),
        ("value", ["prepare", "key_value_gradients"]),
        ("weight", []),  # of frozen features: only the readout learns
    ],
)
def test_what_is_not_wanted_is_not_computed(names: str, kernels: list[str]) -> None:
    tensors = {"query": torch.randn(2, 2, 9, 8), "key": torch.randn(2, 1, 20, 8), "value": torch.randn(2, 1, 20, 8)}
    tensors["weight"] = torch.randn(3, 16)
    options = {"labels": torch.tensor([0, 2]), "pool": "mean", "enable_gqa": True}
    everything = trained(tensors)
    some = {name: t.clone().requires_grad_(name in names.split()) for name, t in tensors.items()}
    found = []
    for inputs in (everything, some):
        with backward_in_triton(), counted() as launched:
            losses = call(scored_attention, inputs, options).losses
            found.append(torch.autograd.grad(losses.sum(), [inputs[name] for name in names.split()]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert launched == kernels


@pytest.mark.parametrize("pool", ["first", "last"])
@pytest.mark.parametrize("return_output", [True, False])
def test_a_loss_of_the_pooled_row_alone_costs_one_row(pool: str, return_output: bool) -> None:
    tensors = trained({n: torch.randn(1, 1, 40, 8) for n in ("query", "key", "value")} | {"weight": torch.randn(3, 8)})
    options: dict[str, Any] = {"labels": torch.tensor([1]), "pool": pool}
    with backward_in_triton(), mock.patch.object(backward, "query_gradient", mock.MagicMock()) as kernel:
        out = call(scored_attention, tensors, options, return_output=return_output)
        torch.autograd.grad(out.losses.sum(), list(tensors.values()))
        out = call(scored_attention, tensors, {**options, "pool": "mean"})
        torch.autograd.grad(out.losses.sum(), list(tensors.values()))
    assert [launch.args[0] for launch in kernel.__getitem__.call_args_list] == [(1,), (3,)]  # tiles of 16 rows


def direct(problem: Problem, gradients: Gradients) -> tuple[list[Tensor], list[Tensor]]:
    """The Triton backend's and the torch backend's gradients of a problem whose lengths nobody has checked."""
    from attent.ops.triton_attention_backward import scored_attention_backward

    scoring = Scoring(None, "rms", None, 0.0, 0.0, None)
    with as_elsewhere():
        results = torch_scored_attention.scored_attention_forward(problem, scoring)
        saved = Saved(results.output, results.logsumexp, results.pooled, results.logit_gradient)
        wanted = [True] * 3 + [False] * 2
        theirs = torch_scored_attention.scored_attention_backward(problem, saved, gradients, wanted)
    # Whatever the kernels do not write is NaN.
    new_empty = torch.Tensor.new_empty

    def filled(tensor: Tensor, *shape: Any, **options: Any) -> Tensor:
        made = new_empty(tensor, *shape, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    with backward_in_triton(), mock.patch.object(torch.Tensor, "new_empty", filled):
        ours = scored_attention_backward(problem, saved, gradients, wanted)
    return list(ours[:3]), list(theirs[:3])


@pytest.mark.parametrize("only", ["all", "pooled"])
@pytest.mark.parametrize(
    ("offsets_q", "offsets_k"),
    [([2, 20, 20, 41], [3, 9, 30, 33]), ([0, 30, 12, 99], [-4, 50, 60, 20]), ([44, 44, 44, 44], [0, 0, 0, 0])],
)
def test_no_offsets_lead_outside_and_rows_of_nobody_have_gradient_0(
    only: str, offsets_q: list[int], offsets_k: list[int]
) -> None:
    query, key, value = torch.randn(44, 2, 8), torch.randn(40, 1, 8), torch.randn(40, 1, 8)
    cu_q, cu_k = torch.tensor(offsets_q).int(), torch.tensor(offsets_k).int()
    weight, labels = torch.randn(3, 16), torch.tensor([0, 1, 2])
    problem = Problem(
        query, key, value, None, weight, None, labels, None, None, cu_q, cu_k, True, 0.3, -1, -1, None,
        "mean" if only == "all" else "last", only, "torch",
    )  # fmt: skip
    ours, theirs = direct(problem, Gradients(None, torch.randn(3), None, None))
    for name, a, b in zip(("query", "key", "value"), ours, theirs, strict=True):
        # Both in float32, of numbers about 1: a few hundred roundings.
        torch.testing.assert_close(a, b, rtol=3e-5, atol=3e-5, msg=lambda m, n=name: f"{n}: {m}")
        starts = (cu_q if name == "query" else cu_k).clamp(0, len(a)).cummax(0).values
        assert (a[: starts[0]] == 0).all() and (a[starts[-1] :] == 0).all(), name


def test_lengths_outside_the_tensor_are_clamped() -> None:
    query, key, value = torch.randn(3, 1, 20, 8), torch.randn(3, 1, 33, 8), torch.randn(3, 1, 33, 8)
    lengths_q, lengths_k = torch.tensor([-1, 99, 7]), torch.tensor([99, 17, -5]).int()
    target = torch.randn(3, 1, 20, 8)
    problem = Problem(
        query, key, value, target, None, None, None, lengths_q, lengths_k, None, None, True, 0.3, -1, -1, None,
        "mean", "all", "torch",
    )  # fmt: skip
    ours, theirs = direct(problem, Gradients(None, torch.randn(3), None, None))
    torch.testing.assert_close(ours, theirs, rtol=3e-5, atol=3e-5)


def test_offsets_beyond_32_bits_are_right() -> None:
    # Two heads that lie 2^31 elements apart, in memory that is reserved and, but for a few pages, never touched.
    far = torch.empty(2**31 + 400, dtype=torch.float16).as_strided((1, 2, 20, 16), (0, 2**31, 16, 1))
    near = torch.randn(1, 2, 20, 16).half()
    far.copy_(near)
    target = torch.randn(1, 2, 20, 16).half()
    found = []
    for x in (near, far):
        inputs = {name: x.detach().requires_grad_() for name in ("query", "key", "value")}
        with backward_in_triton():
            out = call(scored_attention, inputs, {"target": target})
            found.append(torch.autograd.grad(out.losses.sum(), list(inputs.values())))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_gradients_come_in_the_strides_that_the_op_promises() -> None:
    inputs = trained({name: torch.randn(2, 3, 5, 8) for name in ("query", "key", "value")})
    with backward_in_triton():
        out = call(scored_attention, inputs, {"target": torch.randn(2, 3, 5, 8)})
        for gradient in torch.autograd.grad(out.losses.sum(), list(inputs.values())):
            assert gradient.transpose(1, 2).is_contiguous()


def test_a_call_by_name_runs_forward_and_backward_in_triton() -> None:
    inputs = trained({name: torch.randn(1, 2, 20, 16) for name in ("query", "key", "value")})
    options: dict[str, Any] = {"target": torch.randn(1, 2, 20, 16), "is_causal": True}
    found = call(scored_attention, inputs, options, backend="triton")
    with counted() as launched:
        ours = torch.autograd.grad(found.losses.sum(), list(inputs.values()))
    assert launched == ["prepare", "key_value_gradients", "query_gradient"]
    theirs = torch.autograd.grad(call(scored_attention, inputs, options).losses.sum(), list(inputs.values()))
    budget = budgets(inputs, options | {"scale": None}, {"losses": torch.ones(1)})
    for name, a, b in zip(inputs, ours, theirs, strict=True):
        assert largest(a - b) <= 2 * budget[name], name  # each may be off by it


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [((1, 1, 2, 4), torch.float64, "float64"), ((1, 1, 2, 257), torch.float32, "256, not 257")],
)
def test_what_the_kernels_do_not_take_is_refused_with_the_reason(
    shape: tuple[int, ...], dtype: torch.dtype, reason: str
) -> None:
    inputs = trained({name: torch.randn(shape, dtype=dtype) for name in ("query", "key", "value")})
    with backward_in_triton():
        losses = call(scored_attention, inputs, {"target": torch.randn(shape, dtype=dtype)}).losses
        with pytest.raises(ValueError, match=f"'triton' cannot: .*{reason}"):
            losses.sum().backward()
