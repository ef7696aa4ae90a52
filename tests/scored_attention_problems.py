"""Calls that attent.scored_attention takes, drawn at random, and how to make and to differentiate one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from attent import Readout
from attent.ops.scored_attention import PER_EXAMPLE, POOLS

# Sums of fewer than 1,000 terms of size about 1, each rounded at 1.1e-16, through two matrix products and a softmax.
FLOAT64 = {"rtol": 1e-10, "atol": 1e-12}


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def cu_seqlens(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def output_shape(query: Tensor, value: Tensor) -> tuple[int, ...]:
    return (*query.shape[:-1], value.shape[-1])


def in_strides(draw: st.DrawFn, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers in some memory order, perhaps with gaps, perhaps repeated along a dimension."""
    order = draw(st.permutations(range(len(shape))))
    step = draw(st.sampled_from([1, 1, 2]))
    stored = randn(*(shape[i] for i in order[:-1]), shape[order[-1]] * step, dtype=dtype)[..., ::step]
    tensor = stored.permute([order.index(i) for i in range(len(shape))])
    if draw(st.integers(0, 5)) == 0:
        tensor = tensor[:1].expand(shape) if shape[0] > 0 else tensor
    assert tensor.shape == shape
    return tensor


@st.composite
def problems(
    draw: st.DrawFn, examples: int = 4, length: int = 7, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Differentiable tensors, and the other arguments, of any call that attent.scored_attention takes.

    ``examples``: the most; ``length``: the most queries, or keys, of one.
    """
    batch, kv_heads, group = draw(st.integers(0, examples)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    heads, width, value_width = kv_heads * group, draw(st.integers(1, 5)), draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 999)))
    options: dict[str, Any] = {
        "is_causal": draw(st.booleans()),
        "enable_gqa": group > 1 or draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.7, -1.1])),
        "softcap": draw(st.sampled_from([None, None, 0.8])),
        "window": draw(st.sampled_from([None, None, (0, 0), (2, 1), (-1, 2), (1, -1), (17, 5)])),
    }
    each = st.lists(st.integers(0, length), min_size=batch, max_size=batch)
    integer = draw(st.sampled_from([torch.int32, torch.int64]))
    if draw(st.booleans()):
        lengths_q, lengths_k = draw(each), draw(each)
        options["cu_seqlens_q"], options["cu_seqlens_k"] = cu_seqlens(*lengths_q), cu_seqlens(*lengths_k)
        lead_q, lead_k = (sum(lengths_q), heads), (sum(lengths_k), kv_heads)
    else:
        queries, keys = draw(st.integers(0, length)), draw(st.integers(0, length))
        if draw(st.booleans()):
            keys = queries
        for name, most in (("query_lengths", queries), ("key_lengths", keys)):
            if draw(st.booleans()):
                options[name] = torch.tensor([min(x, most) for x in draw(each)], dtype=integer)
        lead_q, lead_k = (batch, heads, queries), (batch, kv_heads, keys)
    tensors = {
        "query": in_strides(draw, *lead_q, width, dtype=dtype),
        "key": in_strides(draw, *lead_k, width, dtype=dtype),
        "value": in_strides(draw, *lead_k, value_width, dtype=dtype),
    }
    if draw(st.booleans()):
        options["target"] = in_strides(draw, *lead_q, value_width, dtype=dtype)
        options["score"] = draw(st.sampled_from([None, "residual", "loss"]))
    else:
        classes = draw(st.integers(1, 6))
        tensors["weight"] = in_strides(draw, classes, heads * value_width, dtype=dtype)
        if draw(st.booleans()):
            tensors["bias"] = randn(classes, dtype=dtype)
        options["labels"] = torch.randint(classes, (batch,), dtype=integer)
        options["pool"] = draw(st.sampled_from(POOLS))
        options["score"] = draw(st.sampled_from([None, "logit", "head", "loss"]))
    options["per_example"] = draw(st.sampled_from(PER_EXAMPLE))
    if options["score"] is not None:
        options["top_k"] = draw(st.integers(0, batch))
        options["temperature"] = draw(st.sampled_from([0.0, 0.0, 1.0]))
        options["floor"] = draw(st.sampled_from([0.0, 0.5]))
        options["seed"] = 3
    return tensors, options


def call(function: Callable[..., Any], tensors: dict[str, Tensor], options: dict[str, Any], **more: Any) -> Any:
    options = {**options, **more}
    labels, pool = options.pop("labels", None), options.pop("pool", None)
    if labels is not None:
        options["readout"] = Readout(tensors["weight"], labels, tensors.get("bias"), pool)
    return function(tensors["query"], tensors["key"], tensors["value"], **options)


def gradients(out: Any, tensors: dict[str, Tensor], cotangents: list[Tensor]) -> list[Tensor]:
    outputs = [x for x in (out.output, out.losses, out.logits, out.pooled) if x is not None]
    total = sum((x * c).sum() for x, c in zip(outputs, cotangents, strict=True))
    if not total.requires_grad:  # the specification of an empty batch
        return [torch.zeros_like(t) for t in tensors.values()]
    found = torch.autograd.grad(total, list(tensors.values()), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors.values(), strict=True)]
