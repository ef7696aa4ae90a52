"""The Triton kernels of attention's backward, in Triton's interpreter, against autograd through the specification.

The forward is the torch backend's, so that what is tested is the backward alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attent import reference, scored_attention
from attent.ops import dispatch, torch_scored_attention
from attent.ops.scored_attention_op import Gradients, Problem, Saved, Scoring
from attent_kernels.attention import backward
from attent_kernels.attention.backward_configurations import Configuration

from .scored_attention_problems import call, cu_seqlens, output_shape, problems
from .test_scored_attention import as_elsewhere


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
@settings(max_examples=150)
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


# --------------------------------------------------------------------------------------------------- what is promised


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


# ------------------------------------------------------------------------------------------------------ ahead of time


def compiled(capability: int, dtype: torch.dtype, width: int, rows: int = 1024, **options: Any) -> list[Any]:
    """What a call with 8 query heads on 4 key heads, 1,024 keys, would launch; the preparation left out."""
    from attent_kernels.attention.launch import Attention
    from benchmarks.ahead_of_time import compiled_for

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query = empty(2, rows, 8, width).transpose(1, 2)
    key, value = empty(2, 1024, 4, width).transpose(1, 2), empty(2, 1024, 4, width).transpose(1, 2)
    plain: dict[str, Any] = dict.fromkeys(Attention._fields[3:7]) | {"is_causal": True, "scale": 0.1, "softcap": None}
    attention = Attention(query, key, value, **(plain | {"window_left": -1, "window_right": -1} | options))
    into = backward.Into(*(torch.empty_like(x) for x in (query, key, value)))
    to = backward.ToOutput(torch.empty_like(query), None, None, None, "mean")
    logsumexp = empty(2, 8, rows, dtype=torch.float32)
    with compiled_for(capability) as found:
        backward.attention_backward(attention, torch.empty_like(query), logsumexp, to, into, only_pooled_row=False)
    assert [kernel.kernel for kernel in found] == ["prepare", "key_value_gradients", "query_gradient"]
    return found


def check_resources(found: list[Any]) -> None:
    from benchmarks.ahead_of_time import SHARED_LIMIT

    for kernel in found:
        assert kernel.stack == 0, kernel._replace(ptx="")
        assert kernel.shared <= SHARED_LIMIT[kernel.capability], kernel._replace(ptx="")


@pytest.mark.aot
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("width", [64, 128])
def test_compiles_without_spills_to_tensor_core_products(capability: int, width: int) -> None:
    prepared, *found = compiled(capability, torch.bfloat16, width)
    check_resources([prepared, *found])
    assert all(kernel.has_wgmma if capability == 90 else kernel.has_mma for kernel in found)
    assert all("cp.async.cg.shared.global" in kernel.ptx for kernel in found)  # 16 bytes at a time, in flight


HARD = {"softcap": 5.0, "window_left": 100, "window_right": 7, "is_causal": False}


@pytest.mark.aot
@pytest.mark.parametrize(
    ("capability", "dtype", "width", "rows"),
    [
        (80, torch.bfloat16, 128, 1024),
        (80, torch.bfloat16, 96, 1024),
        (90, torch.bfloat16, 48, 1024),
        (90, torch.bfloat16, 96, 1024),
        (80, torch.float16, 256, 1024),
        (90, torch.bfloat16, 128, 1),
        (80, torch.float32, 64, 1024),
        (80, torch.float32, 256, 1024),
    ],
    ids=str,
)
def test_compiles_without_spills_with_every_option(capability: int, dtype: torch.dtype, width: int, rows: int) -> None:
    check_resources(compiled(capability, dtype, width, rows, **HARD))
