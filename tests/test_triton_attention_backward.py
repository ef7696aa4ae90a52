"""The Triton kernels of attention's backward, in Triton's interpreter, against autograd through the specification.

The forward is the torch backend's, so that what is tested is the backward alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attent import Readout, reference, scored_attention
from attent.ops import dispatch, torch_scored_attention
from attent.ops.scored_attention_op import Gradients, Problem, Saved, Scoring
from attent_kernels.attention import backward
from attent_kernels.attention.backward_configurations import Configuration

from .scored_attention_problems import call, cu_seqlens, output_shape, problems
from .test_scored_attention import as_elsewhere

pytestmark = pytest.mark.skipif(not backward.INTERPRETED, reason="kernels are compiled here: Triton was imported before")


@contextmanager
def backward_in_triton(rows: int = 16, keys: int = 16) -> Iterator[None]:
    """The forward in PyTorch, the backward in Triton, in tiles so small that there are several."""
    choose = dispatch.choose

    def by_op(op: str, backend: str, device: torch.device, *call: Any) -> str:
        return choose(op, "triton" if op == "scored_attention_backward" else "torch", device, *call)

    cut = mock.patch.object(backward, "configuration", lambda kernel, case: Configuration(rows, keys, 4, 1))
    with cut, mock.patch.object(dispatch, "choose", by_op):
        yield


def losses_of(out: Any, cotangents: dict[str, Tensor]) -> Tensor:
    return sum((getattr(out, name) * c.to(out.losses.dtype)).sum() for name, c in cotangents.items())


def gradients_of(out: Any, tensors: dict[str, Tensor], cotangents: dict[str, Tensor]) -> dict[str, Tensor]:
    total = losses_of(out, cotangents)
    if not isinstance(total, Tensor) or not total.requires_grad:  # the specification of an empty batch
        return {name: torch.zeros_like(t) for name, t in tensors.items()}
    found = torch.autograd.grad(total, list(tensors.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for g, (n, t) in zip(found, tensors.items(), strict=True)}


def trained(tensors: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in tensors.items()}


def as_double(options: dict[str, Any]) -> dict[str, Any]:
    is_real = {name: isinstance(x, Tensor) and x.is_floating_point() for name, x in options.items()}
    return {name: x.double() if is_real[name] else x for name, x in options.items()}


# ------------------------------------------------------------------------------------------- against the specification


def largest(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None or tensor.numel() == 0 else float(tensor.detach().abs().max())


def budgets(tensors: dict[str, Tensor], options: dict[str, Any], cotangents: dict[str, Tensor]) -> dict[str, float]:
    """How far an entry of each gradient may be from the truth in float32.

    p is off by a share e: its logsumexp and s carry |s| roundings' worth, and every sum here has fewer than K + D + Dv
    + n terms, n the number of rows that a key sums over. With dO of at most g, dO · v and delta are at most Dv g v, each
    off by the same share at most; the sum over keys has Σ p = 1, that over rows Σ p <= n.
    """
    query, key, value = tensors["query"], tensors["key"], tensors["value"]
    q, k, v = largest(query), largest(key), largest(value)
    width, value_width = query.shape[-1], value.shape[-1]
    scale = abs(options["scale"] if options["scale"] is not None else width**-0.5)
    rows, keys = (query.shape[-2], key.shape[-2]) if query.dim() == 4 else (len(query), len(key))
    n = rows * (query.shape[1] // key.shape[1])
    c = {name: largest(x) for name, x in cotangents.items()}
    g = c.get("output", 0.0) + c.get("pooled", 0.0) + c.get("losses", 0.0) * (v + largest(options.get("target")))
    if "weight" in tensors:  # |p - onehot| <= 1
        through = float(tensors["weight"].detach().abs().sum(0).max()) if tensors["weight"].numel() else 0.0
        g += through * (c.get("losses", 0.0) + c.get("logits", 0.0))
    e = 4 * torch.finfo(torch.float32).eps * (scale * width * q * k + keys + width + value_width + n + 16)
    return {
        "query": e * scale * 3 * value_width * g * v * k,
        "key": e * scale * 3 * value_width * g * v * q * n,
        "value": e * n * g,
    }


@settings(max_examples=60)
@given(
    problem=problems(examples=3, length=36, dtype=torch.float32),
    cut=st.sampled_from([(16, 16), (16, 32), (32, 16)]),
    used=st.sets(st.sampled_from(["output", "losses", "logits", "pooled"]), min_size=1),
)
def test_gradients_are_those_of_the_specification(
    problem: tuple[dict[str, Tensor], dict[str, Any]], cut: tuple[int, int], used: set[str]
) -> None:
    tensors, options = trained(problem[0]), {**problem[1], "score": None, "top_k": None}
    used &= {"output", "losses"} if "target" in options else used
    with backward_in_triton(*cut):
        out = call(scored_attention, tensors, options, return_output="output" in used)
        cotangents = {name: torch.randn_like(getattr(out, name)) for name in sorted(used)}
        found = gradients_of(out, tensors, cotangents)
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    wanted = gradients_of(call(reference.scored_attention, exact, as_double(options)), exact, cotangents)
    for name, budget in budgets(tensors, options, cotangents).items():
        assert found[name].shape == tensors[name].shape
        error = largest(found[name].double() - wanted[name])
        assert error <= budget, (name, error, budget)
    if "weight" in tensors:  # computed by the same operations as there
        plain = call(scored_attention, tensors, options, return_output="output" in used)
        expected = gradients_of(plain, tensors, cotangents)
        torch.testing.assert_close(found["weight"], expected["weight"], rtol=0, atol=0)
