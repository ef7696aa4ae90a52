"""The Triton kernels of attention's backward, in Triton's interpreter, against autograd through the specification.

The forward is the torch backend's, so that what is tested is the backward alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attent import reference, scored_attention
from attent.ops import dispatch
from attent_kernels.attention import backward
from attent_kernels.attention.backward_configurations import Configuration

from .scored_attention_problems import call, cu_seqlens, output_shape, problems


@contextmanager
def backward_in_triton(rows: int = 16, keys: int = 16) -> Iterator[None]:
    """The forward in PyTorch, the backward in Triton, in tiles so small that there are several."""
    choose = dispatch.choose

    def by_op(op: str, backend: str, device: torch.device, *call: Any) -> str:
        return choose(op, "triton" if op == "scored_attention_backward" else "torch", device, *call)

    cut = mock.patch.object(backward, "choose", lambda kernel, case: Configuration(rows, keys, 4, 1))
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

    p is off by a share e: its logsumexp and s carry |s| roundings' worth, and every sum here has fewer than
    K + D + Dv + n terms, n the number of rows that a key sums over. With dO of at most g, dO · v and delta are at most
    Dv g v, each off by the same share at most; the sum over keys has Σ p = 1, that over rows Σ p <= n.
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


def check_against_specification(
    problem: tuple[dict[str, Tensor], dict[str, Any]], cut: tuple[int, int], used: set[str]
) -> None:
    tensors, options = trained(problem[0]), {**problem[1], "score": None, "top_k": None}
    used &= {"output", "losses"} if "target" in options else used
    with backward_in_triton(*cut):
        out = call(scored_attention, tensors, options, return_output="output" in used)
        cotangents = {name: torch.randn_like(getattr(out, name)) for name in sorted(used)}
        found = gradients_of(out, tensors, cotangents)
    exact = trained(tensors, torch.float64)
    wanted = gradients_of(call(reference.scored_attention, exact, as_double(options)), exact, cotangents)
    for name, budget in budgets(tensors, options, cotangents).items():
        assert found[name].shape == tensors[name].shape
        error = largest(found[name].double() - wanted[name])
        assert error <= budget, (name, error, budget)
    if "weight" in tensors:  # computed by the same operations as there
        plain = call(scored_attention, tensors, options, return_output="output" in used)
        expected = gradients_of(plain, tensors, cotangents)
        torch.testing.assert_close(found["weight"], expected["weight"], rtol=0, atol=0)


CUTS = st.sampled_from([(16, 16), (16, 32), (32, 16)])
USED = st.sets(st.sampled_from(["output", "losses", "logits", "pooled"]), min_size=1)


@settings(max_examples=16)
@given(problem=problems(examples=2, length=20, dtype=torch.float32), cut=CUTS, used=USED)
def test_gradients_are_those_of_the_specification(
    problem: tuple[dict[str, Tensor], dict[str, Any]], cut: tuple[int, int], used: set[str]
) -> None:
    check_against_specification(problem, cut, used)


@pytest.mark.slow
@settings(max_examples=50)
@given(problem=problems(examples=3, length=50, dtype=torch.float32), cut=CUTS, used=USED)
def test_gradients_of_more_tiles_are_those_of_the_specification(
    problem: tuple[dict[str, Tensor], dict[str, Any]], cut: tuple[int, int], used: set[str]
) -> None:
    check_against_specification(problem, cut, used)


# ------------------------------------------------------------------------------------ as exact as PyTorch in that dtype

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (20, 3)},
    "left window": {"window": (9, -1)},
    "softcap": {"softcap": 1.5},
    "negative scale": {"scale": -0.4, "is_causal": True},
    "lengths": {"query_lengths": torch.tensor([37, 18]), "key_lengths": torch.tensor([20, 50]), "is_causal": True},
    "packed": {"cu_seqlens_q": cu_seqlens(37, 0, 18), "cu_seqlens_k": cu_seqlens(20, 3, 50), "window": (30, 5)},
}


def eager_attention(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    """One example's attention as PyTorch operations in the tensors' own dtype: [H, R, D], [KV, K, D], [KV, K, DV]."""
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = (query @ key.mT) * options.get("scale", query.shape[-1] ** -0.5)
    if "softcap" in options:
        scores = (scores / options["softcap"]).tanh() * options["softcap"]
    rows, keys = scores.shape[-2:]
    position = torch.arange(rows)[:, None] + keys - rows
    left, right = options.get("window", (-1, -1))
    right = 0 if options.get("is_causal") else right
    looks = torch.ones(rows, keys, dtype=torch.bool)
    if left >= 0:
        looks &= torch.arange(keys) >= position - left
    if right >= 0:
        looks &= torch.arange(keys) <= position + right
    scores = scores.masked_fill(~looks, -torch.inf).where(looks.any(-1, keepdim=True), 0)
    return scores.softmax(-1).masked_fill(~looks, 0) @ value


def eager_gradients(tensors: dict[str, Tensor], options: dict[str, Any], cotangent: Tensor) -> dict[str, Tensor]:
    tensors = trained(tensors)
    parts = examples_of(tensors, options, cotangent)
    total = sum((eager_attention(q, k, v, options) * c).float().sum() for q, k, v, c in parts)
    found = torch.autograd.grad(total, list(tensors.values()))
    return dict(zip(tensors, found, strict=True))


def masses(tensors: dict[str, Tensor], options: dict[str, Any], cotangent: Tensor) -> dict[str, float]:
    """The largest entry of each gradient if all its terms had one sign: what a share of error in p is a share of.

    The terms are p dO, and ds k and ds q times the scale, with ds = p (dO · v - Σ p dO · v).
    """
    found = {"query": 0.0, "key": 0.0, "value": 0.0}
    double = {name: t.detach().double() for name, t in tensors.items()}
    scale = abs(options.get("scale", double["query"].shape[-1] ** -0.5))
    for q, k, v, c in examples_of(double, options, cotangent.double()):
        keys, group = k.shape[1], q.shape[0] // k.shape[0]
        p = eager_attention(q, k, torch.eye(keys, dtype=q.dtype).expand(k.shape[0], -1, -1), options)  # [H, R, K]
        grad_p = c @ v.repeat_interleave(group, 0).mT
        ds = p * (grad_p - (p * grad_p).sum(-1, keepdim=True)).abs() * scale
        by_key = (ds.mT @ q.abs()).unflatten(0, (-1, group)).sum(1)
        here = {
            "query": ds @ k.abs().repeat_interleave(group, 0),
            "key": by_key,
            "value": (p.mT @ c.abs()).unflatten(0, (-1, group)).sum(1),
        }
        found = {name: max(found[name], largest(here[name])) for name in found}
    return found


def examples_of(tensors: dict[str, Tensor], options: dict[str, Any], cotangent: Tensor) -> list[tuple[Tensor, ...]]:
    """Each example's own queries [H, R, D], keys, values and rows of the cotangent."""
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    if query.dim() == 3:
        edges_q, edges_k = options["cu_seqlens_q"].tolist(), options["cu_seqlens_k"].tolist()
        at = [(slice(*q), slice(*k)) for q, k in zip(pairwise(edges_q), pairwise(edges_k), strict=True)]
        parts = [tuple(x.transpose(0, 1) for x in (query[q], key[k], value[k], cotangent[q])) for q, k in at]
    else:
        lengths_q = options.get("query_lengths", torch.full((len(query),), query.shape[2])).tolist()
        lengths_k = options.get("key_lengths", torch.full((len(query),), key.shape[2])).tolist()
        parts = [
            (query[i, :, :q], key[i, :, :k], value[i, :, :k], cotangent[i, :, :q])
            for i, (q, k) in enumerate(zip(lengths_q, lengths_k, strict=True))
        ]
    return parts


def qkv(options: dict[str, Any], dtype: torch.dtype, width: int = 24, value_width: int = 32) -> dict[str, Tensor]:
    """Two query heads that read one key head; the columns of the keys and the rows of the values lie apart."""
    batch = 2 if "query_lengths" in options else 1
    lead_q, lead_k = ((batch, 2, 37), (batch, 1, 50)) if "cu_seqlens_q" not in options else ((55, 2), (73, 1))
    query = torch.randn(*lead_q, width)
    key = torch.randn(width, *lead_k).movedim(0, -1)
    value = torch.randn(*lead_k, 2 * value_width)[..., :value_width]
    return {"query": query.to(dtype), "key": key.to(dtype), "value": value.to(dtype)}


HALF = [
    (torch.bfloat16, "plain"),
    (torch.bfloat16, "window"),
    (torch.bfloat16, "softcap"),
    (torch.bfloat16, "lengths"),
    (torch.float16, "causal"),
    (torch.float16, "packed"),
]


SINGLE = [(torch.float32, name) for name in ("left window", "softcap", "negative scale", "packed")]


@pytest.mark.parametrize(("dtype", "name"), [*SINGLE, *HALF], ids=str)
def test_errors_stay_within_those_of_pytorch_in_the_same_dtype(dtype: torch.dtype, name: str) -> None:
    """Twice its error, one rounding, and what float32 cannot do better: scores round by u |s|, sums over K by u √K."""
    options = OPTIONS[name]
    tensors = trained(qkv(options, dtype))
    target = torch.zeros(output_shape(tensors["query"], tensors["value"]), dtype=dtype)
    options = {**options, "target": target, "enable_gqa": True}
    with backward_in_triton():
        out = call(scored_attention, tensors, options)
        cotangents = {"output": torch.randn_like(out.output)}
        found = gradients_of(out, tensors, cotangents)
    exact = trained(tensors, torch.float64)
    wanted = gradients_of(call(reference.scored_attention, exact, as_double(options)), exact, cotangents)
    theirs = eager_gradients(tensors, options, cotangents["output"])
    mass = masses(tensors, options, cotangents["output"])
    query, key = tensors["query"], tensors["key"]
    s = largest(query.norm(dim=-1)) * largest(key.norm(dim=-1)) * abs(options.get("scale", query.shape[-1] ** -0.5))
    float32 = 4 * torch.finfo(torch.float32).eps * (s + 50**0.5)
    for name, truth in wanted.items():
        assert found[name].dtype == dtype
        rounding = torch.finfo(dtype).eps * largest(truth)
        budget = 2 * largest(theirs[name].double() - truth) + rounding + float32 * mass[name]
        assert largest(found[name].double() - truth) <= budget, name


@pytest.mark.parametrize("widths", [(1, 1), (8, 40), (64, 64), (128, 96), (200, 256)], ids=str)
def test_any_head_dim_up_to_256(widths: tuple[int, int]) -> None:
    width, value_width = widths
    tensors = {"query": torch.randn(1, 1, 19, width), "key": torch.randn(1, 1, 21, width)}
    tensors["value"] = torch.randn(1, 1, 21, value_width)
    options = {"target": torch.randn(1, 1, 19, value_width), "is_causal": True, "scale": width**-0.5}
    check_against_specification((tensors, options), (16, 16), {"output", "losses"})
