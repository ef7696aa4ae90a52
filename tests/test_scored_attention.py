"""attent.scored_attention's numbers: the specification against autograd, the torch backend against the specification.

What the op promises beside its numbers is in test_scored_attention_contract.py, what it refuses in …_errors.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from attent import Readout, reference, scored_attention
from attent.ops import attention_batch, torch_attention, torch_scored_attention
from attent.ops.scored_attention import PER_EXAMPLE, POOLS

from .scored_attention_problems import FLOAT64, call, cu_seqlens, gradients, output_shape, problems, randn

# -------------------------------------------------------------------------------- the specification against autograd

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "lengths": {"query_lengths": torch.tensor([3, 0, 4]), "key_lengths": torch.tensor([5, 2, 1])},
    "causal with fewer keys than queries": {"is_causal": True, "key_lengths": torch.tensor([2, 0, 5])},
    "window": {"window": (1, 0)},
    "softcap": {"softcap": 0.7, "scale": 0.9},
    "gqa": {"enable_gqa": True},
    "packed": {"cu_seqlens_q": cu_seqlens(3, 0, 5), "cu_seqlens_k": cu_seqlens(1, 4, 0), "is_causal": True},
}


def inputs_for(options: dict[str, Any], value_width: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = 1 if options.get("enable_gqa") else 2
    if "cu_seqlens_q" in options:
        return randn(8, 2, 4), randn(5, kv_heads, 4), randn(5, kv_heads, value_width)
    return randn(3, 2, 4, 4), randn(3, kv_heads, 5, 4), randn(3, kv_heads, 5, value_width)


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("per_example", PER_EXAMPLE)
def test_residual_is_the_norm_of_the_gradient_of_the_examples_own_loss_in_its_output(
    options: dict[str, Any], per_example: str
) -> None:
    query, key, value = inputs_for(options)
    target = randn(*output_shape(query, value))
    out = reference.scored_attention(
        query, key, value, target=target, score="residual", per_example=per_example, **options
    )
    assert out.output is not None and out.scores is not None
    rows = rows_of_examples(query, options)
    for i, own in enumerate(rows):
        f = out.output.clone().requires_grad_()
        n = max(1, int(own.sum()))
        s = {"mean": 1 / n, "sum": 1.0, "rms": n**-0.5}[per_example]
        per_row = (0.5 * (f - target).square()).sum(-1)  # padded [B, H, T], packed [total, H]
        loss = (per_row.movedim(1, -1).sum(-1) * own).sum()
        (gradient,) = torch.autograd.grad(s * loss, f)
        torch.testing.assert_close(out.scores[i], gradient.norm(), **FLOAT64)
        torch.testing.assert_close(out.losses[i], loss.detach() / n, **FLOAT64)


def rows_of_examples(query: Tensor, options: dict[str, Any]) -> list[Tensor]:
    """For each example, 1 at its queries: padded [B, T], packed [total]."""
    if "cu_seqlens_q" in options:
        start = options["cu_seqlens_q"].tolist()
        position = torch.arange(len(query))
        return [((position >= a) & (position < b)).double() for a, b in pairwise(start)]
    batch, length = query.shape[0], query.shape[2]
    each = options.get("query_lengths", torch.full((batch,), length))
    inside = (torch.arange(length) < each[:, None]).double()
    return [inside * F.one_hot(torch.tensor(i), batch)[:, None] for i in range(batch)]


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("bias", [False, True])
def test_head_is_the_norm_of_the_gradient_of_the_examples_own_loss_in_the_readouts_parameters(
    options: dict[str, Any], pool: str, bias: bool
) -> None:
    query, key, value = inputs_for(options)
    weight, labels = randn(7, 6).requires_grad_(), torch.tensor([6, 0, 3])
    readout = Readout(weight, labels, randn(7).requires_grad_() if bias else None, pool)
    out = reference.scored_attention(query, key, value, readout=readout, score="head", **options)
    assert out.scores is not None and out.logits is not None
    parameters = [p for p in (weight, readout.bias) if p is not None]
    for i in range(3):
        gradients = torch.autograd.grad(out.losses[i], parameters, retain_graph=True)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        torch.testing.assert_close(out.scores[i], norm, **FLOAT64)


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("per_example", PER_EXAMPLE)
def test_logit_is_the_norm_of_the_gradient_of_the_examples_own_loss_in_its_logits(
    options: dict[str, Any], per_example: str
) -> None:
    query, key, value = inputs_for(options)
    readout = Readout(randn(7, 6), torch.tensor([6, 0, 3]))
    out = reference.scored_attention(
        query, key, value, readout=readout, score="logit", per_example=per_example, **options
    )
    assert out.scores is not None and out.logits is not None
    valid = torch.tensor([float(rows.sum() > 0) for rows in rows_of_examples(query, options)])
    logits = out.logits.detach().requires_grad_()
    losses = F.cross_entropy(logits, readout.target, reduction="none") * valid
    torch.testing.assert_close(out.losses, losses.detach(), **FLOAT64)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)  # one row an example: their gradients do not mix
    torch.testing.assert_close(out.scores, gradient.norm(dim=1), **FLOAT64)


@pytest.mark.parametrize("keys", [5, 3, 8])
@pytest.mark.parametrize("window", [None, (2, 1), (0, -1), (-1, 0)])
def test_reference_attention_is_pytorchs_under_the_same_mask(keys: int, window: tuple[int, int] | None) -> None:
    query, key, value = randn(2, 3, 5, 4), randn(2, 3, keys, 4), randn(2, 3, keys, 6)
    out = reference.scored_attention(query, key, value, target=randn(2, 3, 5, 6), is_causal=True, window=window)
    mask = torch.ones(5, keys, dtype=torch.bool).tril(keys - 5)
    if window is not None and window[0] >= 0:
        mask &= torch.ones(5, keys, dtype=torch.bool).triu(keys - 5 - window[0])
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(out.output, expected.where(mask.any(-1)[:, None], 0), **FLOAT64)


# ------------------------------------------------------------------------ the torch backend against the specification


@contextmanager
def as_elsewhere() -> Iterator[None]:
    """Compute as on a device whose values are not read back: matrix products, all keys under a mask."""
    with ExitStack() as stack:
        for module in (torch_attention, attention_batch, torch_scored_attention):
            stack.enter_context(mock.patch.object(module, "on_cpu", return_value=False))
        yield


@contextmanager
def in_tiny_tiles() -> Iterator[None]:
    """Cut the work as for large inputs: a few rows of a few keys at a time."""
    with mock.patch.object(torch_attention, "TILE_BYTES", 40), mock.patch.object(torch_attention, "CPU_TILE_ROWS", 2):
        yield


@settings(max_examples=250)
@given(problem=problems(), way=st.sampled_from([nullcontext, in_tiny_tiles, as_elsewhere]))
def test_torch_backend_is_the_specification_in_float64(
    problem: tuple[dict[str, Tensor], dict[str, Any]], way: Callable[[], AbstractContextManager[None]]
) -> None:
    tensors = {name: t.requires_grad_() for name, t in problem[0].items()}
    options = problem[1]
    expected = call(reference.scored_attention, tensors, options)
    with way():
        out = call(scored_attention, tensors, options)
        cotangents = [randn(*x.shape) for x in (out.output, out.losses, out.logits, out.pooled) if x is not None]
        found = gradients(out, tensors, cotangents)
    for name in ("output", "logsumexp", "losses", "logits", "pooled", "scores"):
        torch.testing.assert_close(
            getattr(out, name), getattr(expected, name), **FLOAT64, msg=lambda m, n=name: f"{n}: {m}"
        )
    for gradient, wanted, name in zip(found, gradients(expected, tensors, cotangents), tensors, strict=True):
        torch.testing.assert_close(gradient, wanted, **FLOAT64, msg=lambda m, n=name: f"gradient in {n}: {m}")
    if out.scores is not None:
        assert not out.scores.requires_grad and not out.logsumexp.requires_grad
        counts = options["cu_seqlens_q"].diff() if "cu_seqlens_q" in options else options.get("query_lengths")
        if counts is None:
            counts = torch.full((len(out.losses),), tensors["query"].shape[2])
        # Of the backend's own scores: where two are equal up to rounding, either order is right.
        lesson = reference.select_top_k(
            out.scores,
            options["top_k"],
            temperature=options["temperature"],
            floor=options["floor"],
            valid=counts > 0,
            seed=3,
        )
        torch.testing.assert_close(out.selection, lesson, **FLOAT64)


@settings(max_examples=100)
@given(problem=problems())
def test_leaving_the_output_out_changes_nothing_else(problem: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    tensors, options = problem
    whole = call(scored_attention, tensors, options)
    lean = call(scored_attention, tensors, options, return_output=False)
    trained = {name: t.requires_grad_() for name, t in tensors.items()}
    lean_with_gradient = call(scored_attention, trained, options, return_output=False)
    cotangent = [randn(len(whole.losses))]
    for out in (lean, lean_with_gradient):
        assert out.output is None and out.logsumexp is None
        for name in ("losses", "logits", "pooled", "scores", "selection"):
            torch.testing.assert_close(getattr(out, name), getattr(whole, name), **FLOAT64)
    losses_only = lean_with_gradient._replace(logits=None, pooled=None)
    expected = call(reference.scored_attention, trained, options)._replace(output=None, logits=None, pooled=None)
    for gradient, wanted in zip(
        gradients(losses_only, trained, cotangent), gradients(expected, trained, cotangent), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, **FLOAT64)


LARGE: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "causal, lengths": {
        "is_causal": True,
        "query_lengths": torch.tensor([600, 37]),
        "key_lengths": torch.tensor([580, 650]),
    },
    "window": {"window": (40, 3)},
    "softcap": {"softcap": 2.0, "is_causal": True},
    "packed": {
        "cu_seqlens_q": cu_seqlens(500, 0, 300, 400),
        "cu_seqlens_k": cu_seqlens(300, 400, 0, 600),
        "is_causal": True,
    },
}


@pytest.mark.parametrize("options", LARGE.values(), ids=LARGE.keys())
def test_many_blocks_of_keys_are_computed_as_one(options: dict[str, Any]) -> None:
    packed = "cu_seqlens_q" in options
    query = randn(1200, 1, 4) if packed else randn(2, 1, 600, 4)
    key, value = (randn(1300, 1, 4), randn(1300, 1, 6)) if packed else (randn(2, 1, 650, 4), randn(2, 1, 650, 6))
    tensors = {name: t.requires_grad_() for name, t in zip(("query", "key", "value"), (query, key, value), strict=True)}
    options = {**options, "target": randn(*output_shape(query, value))}
    out, expected = call(scored_attention, tensors, options), call(reference.scored_attention, tensors, options)
    torch.testing.assert_close(out, expected, **FLOAT64)
    cotangents = [randn(*out.output.shape), randn(*out.losses.shape)]
    for found, wanted in zip(
        gradients(out, tensors, cotangents), gradients(expected, tensors, cotangents), strict=True
    ):
        torch.testing.assert_close(found, wanted, **FLOAT64)


@pytest.mark.parametrize(
    "options", [*LAYOUTS.values(), {"window": (-1, 1), "softcap": 1.5}], ids=[*LAYOUTS.keys(), "both"]
)
@pytest.mark.parametrize("loss", ["target", *POOLS])
def test_gradients_are_those_of_finite_differences(options: dict[str, Any], loss: str) -> None:
    query, key, value = (x[:2] if x.dim() == 4 else x for x in inputs_for(options, value_width=2))
    options = {name: x[:2] if name.endswith("lengths") else x for name, x in options.items()}
    batch = 3 if "cu_seqlens_q" in options else 2
    target, labels = randn(*output_shape(query, value)), torch.tensor([1, 2, 0])[:batch]
    weight, bias = randn(3, 4), randn(3)

    def differentiable(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        aim = {"target": target} if loss == "target" else {"readout": Readout(weight, labels, bias, loss)}
        out = scored_attention(query, key, value, **aim, **options)
        return tuple(x for x in (out.output, out.losses, out.logits, out.pooled) if x is not None)

    inputs = tuple(x.requires_grad_() for x in (query, key, value, weight, bias))
    assert torch.autograd.gradcheck(differentiable, inputs, fast_mode=True)
