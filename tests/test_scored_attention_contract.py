"""What attent.scored_attention promises beside its numbers: padding, memory, dtypes, compilers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from attent import Readout, reference, scored_attention
from attent.ops import scored_attention_op, torch_scored_attention
from attent.ops.scored_attention import POOLS
from attent.ops.scored_attention_op import Gradients, Problem, Saved, Scoring, empty_results
from attent_kernels import runtime

from .scored_attention_problems import FLOAT64, call, cu_seqlens, gradients, output_shape, randn
from .test_scored_attention import as_elsewhere


def test_plain_attention_is_pytorchs() -> None:
    query, key, value = (torch.randn(2, 7, 3, 8).transpose(1, 2) for _ in range(3))
    for is_causal in (False, True):
        out = scored_attention(query, key, value, target=torch.zeros(2, 3, 7, 8), is_causal=is_causal)
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
        torch.testing.assert_close(out.output, expected, rtol=1e-6, atol=1e-6)  # eps 1.2e-7, sums of 8 terms


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_causal_attention_takes_any_scale(scale: float) -> None:
    # PyTorch's own causal mask is -inf times the scale: NaN here.
    query, key, value, target = (randn(2, 2, 5, 4).requires_grad_() for _ in range(4))
    found, exact = (
        attend(query, key, value, target=target, is_causal=True, scale=scale)
        for attend in (scored_attention, reference.scored_attention)
    )
    torch.testing.assert_close(found, exact, **FLOAT64)
    torch.testing.assert_close(
        torch.autograd.grad(found.losses.sum(), (query, key, value)),
        torch.autograd.grad(exact.losses.sum(), (query, key, value)),
        **FLOAT64,
    )


@pytest.mark.parametrize("way", [nullcontext, as_elsewhere])
def test_padding_is_never_read(way: Callable[[], AbstractContextManager[None]]) -> None:
    lengths_q, lengths_k = torch.tensor([2, 0, 4]), torch.tensor([1, 3, 0])
    options: dict[str, Any] = {"query_lengths": lengths_q, "key_lengths": lengths_k, "score": "residual"}
    tensors = {"query": randn(3, 2, 4, 5), "key": randn(3, 2, 6, 5), "value": randn(3, 2, 6, 5)}
    target, cotangent = randn(3, 2, 4, 5), [randn(3, 2, 4, 5), randn(3)]
    results = []
    for filler in (0.0, torch.nan, torch.inf):
        padded = {name: x.clone() for name, x in (*tensors.items(), ("target", target))}
        for i in range(3):
            padded["query"][i, :, lengths_q[i] :] = padded["target"][i, :, lengths_q[i] :] = filler
            padded["key"][i, :, lengths_k[i] :] = padded["value"][i, :, lengths_k[i] :] = filler
        trained = {name: padded[name].requires_grad_() for name in tensors}
        with way():
            out = call(scored_attention, trained, options, target=padded["target"].detach())
            results.append((out, gradients(out, trained, cotangent)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
    padding = torch.arange(4) >= lengths_q[:, None]
    assert (results[0][0].output.transpose(1, 2)[padding] == 0).all()
    assert (results[0][0].logsumexp.transpose(1, 2)[padding] == -torch.inf).all()


@pytest.mark.parametrize("packed", [False, True])
def test_invalid_examples_score_0_and_are_chosen_last(packed: bool) -> None:
    options: dict[str, Any] = {"query_lengths": torch.tensor([0, 3, 0, 3])}
    query, key, value = randn(4, 1, 3, 4), randn(4, 1, 3, 4), torch.zeros(4, 1, 3, 4, dtype=torch.float64)
    if packed:
        options = {"cu_seqlens_q": cu_seqlens(0, 3, 0, 3), "cu_seqlens_k": cu_seqlens(3, 3, 3, 3)}
        query, key, value = query[:2].flatten(0, 2)[:, None], key.flatten(0, 2)[:, None], value.flatten(0, 2)[:, None]
    # A value of 0 and a target of 0: the valid examples score 0 too, and still come first.
    out = scored_attention(query, key, value, target=torch.zeros_like(query), score="residual", top_k=3, **options)
    assert out.losses.tolist() == out.scores.tolist() == [0.0] * 4
    assert out.selection.index.tolist() == [1, 3, 0]
    readout = Readout(randn(3, 4), torch.tensor([-100, 1, 99, 2]))  # the label of an invalid example is not looked at
    out = scored_attention(query, key, value, readout=readout, score="head", top_k=4, **options)
    assert (
        out.selection.index.tolist()[2:] == [0, 2]
        and (out.scores[[0, 2]] == 0).all()
        and (out.losses[[0, 2]] == 0).all()
    )


def test_a_sure_examples_score_does_not_cancel() -> None:
    # p_y = 1 - 4e-9: in float32, where 1 - p_y would be 0 and sum p^2 - 2 p_y + 1 noise, the score is still right.
    value = torch.ones(1, 1, 1, 1)
    weight = torch.tensor([[20.0], [0.0], [0.5]])
    out = scored_attention(value, value, value, readout=Readout(weight, torch.tensor([0])), score="logit")
    p = (weight.double()[:, 0] - 20).exp() / (1 + (weight.double()[1:, 0] - 20).exp().sum())
    expected = (p[1:].square().sum() + p[1:].sum().square()).sqrt()
    # Each p_v comes from exp(log p_v): |log p_v| roundings of 6e-8.
    torch.testing.assert_close(out.scores[0].double(), expected, rtol=20 * 2 * 6e-8, atol=0)


def test_a_label_out_of_range_where_labels_cannot_be_read_makes_its_example_nan() -> None:
    logits = randn(3, 4)
    losses, gradient = torch_scored_attention._cross_entropy(logits, torch.tensor([1, 4, -1]), None, bounded=False)
    assert losses.isnan().tolist() == [False, True, True] and gradient.isnan().any(1).tolist() == [False, True, True]
    torch.testing.assert_close(losses[0], F.cross_entropy(logits[0], torch.tensor(1)))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("loss", "rows"), [("target", "all"), *((pool, "all") for pool in POOLS), ("first", "pooled"), ("last", "pooled")]
)
def test_nothing_is_read_back_where_that_would_wait_for_a_device(packed: bool, loss: str, rows: str) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")  # a tensor without values: reading one is an error

    if packed:
        query, key, value = empty(9, 4, 8), empty(7, 2, 8), empty(7, 2, 6)
        lengths = [None, None, empty(4, dtype=torch.int32), empty(4, dtype=torch.int32)]
    else:
        query, key, value = empty(3, 4, 5, 8), empty(3, 2, 7, 8), empty(3, 2, 7, 6)
        lengths = [empty(3, dtype=torch.int32), empty(3, dtype=torch.int64), None, None]
    aim = [empty(*output_shape(query, value)), None, None, None]
    if loss != "target":
        aim = [None, empty(5, 24), empty(5), empty(3, dtype=torch.int64)]
    pool = "mean" if loss == "target" else loss
    problem = Problem(query, key, value, *aim, *lengths, True, 0.3, 2, -1, None, pool, rows, "torch")
    scoring = Scoring("residual" if loss == "target" else "head", "rms", 2, 1.0, 0.5, empty(1, dtype=torch.int64))
    results = torch_scored_attention.scored_attention_forward(problem, scoring)
    for name, result, promised in zip(
        results._fields, results, empty_results(problem, scoring, runtime.allocator(query.device)), strict=True
    ):
        assert (result.shape, result.dtype) == (promised.shape, promised.dtype), name
        assert strides_that_matter(result) == strides_that_matter(promised), name
    saved = Saved(results.output, results.logsumexp, results.pooled, results.logit_gradient)
    wanted = [True] * 3 + [loss != "target"] * 2
    torch_scored_attention.scored_attention_backward(
        problem, saved, Gradients(None, results.losses, None, None), wanted
    )


def strides_that_matter(tensor: Tensor) -> list[int]:
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes, those within the op included."""

    bytes = 0

    def __enter__(self) -> LargestTensor:
        # Called through the dispatcher, the op would be one operation to a mode.
        self.within = mock.patch.object(scored_attention_op, "nobody_listens", return_value=True)
        self.within.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.within.stop()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor) and not function.is_view:
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return made


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"softcap": 5.0},
        {"window": (100, 0)},
        {"key_lengths": torch.tensor([2048, 1500])},
        {"is_causal": True, "query_lengths": torch.tensor([2000, 2048])},
        {"cu_seqlens_q": cu_seqlens(2048, 2048), "cu_seqlens_k": cu_seqlens(2048, 2048), "softcap": 5.0},
    ],
    ids=["plain", "causal", "softcap", "window", "key_lengths", "query_lengths", "packed"],
)
def test_no_matrix_of_all_queries_and_keys_is_ever_made(options: dict[str, Any]) -> None:
    batch, heads, length, width = 2, 2, 2048, 8  # one [B, H, T, T]: 67 MB, one [T, T]: 17 MB; one output: 0.3 MB
    shape = (batch * length, heads, width) if "cu_seqlens_q" in options else (batch, heads, length, width)
    query, key, value = (torch.randn(shape).requires_grad_() for _ in range(3))
    with LargestTensor() as largest:
        out = scored_attention(query, key, value, target=torch.zeros(shape), score="residual", **options)
        out.losses.sum().backward()
    assert 0 < largest.bytes <= 16 * 2**20  # of which the backward keeps four: 64 MB


def test_only_the_pooled_row_is_computed_where_nothing_else_is_asked_for() -> None:
    query, key, value = (torch.randn(2, 2, 2048, 8).requires_grad_() for _ in range(3))
    readout = Readout(torch.randn(3, 16), torch.tensor([0, 2]), pool="last")
    with LargestTensor() as largest:
        out = scored_attention(query, key, value, readout=readout, is_causal=True, softcap=5.0, return_output=False)
        out.losses.sum().backward()
    assert (
        0 < largest.bytes <= query.numel() * 4
    )  # nothing larger than the gradients, far below 2,048 rows of 2,048 keys


def test_a_frozen_body_trains_the_readout_alone() -> None:
    query, key, value = randn(3, 2, 4, 4), randn(3, 2, 5, 4), randn(3, 2, 5, 4)
    weight = randn(5, 8).requires_grad_()
    out = scored_attention(query, key, value, readout=Readout(weight, torch.tensor([0, 4, 2])), return_output=False)
    (gradient,) = torch.autograd.grad(out.losses.sum(), weight)
    expected = reference.scored_attention(query, key, value, readout=Readout(weight, torch.tensor([0, 4, 2])))
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.losses.sum(), weight)[0], **FLOAT64)


# -------------------------------------------------------------------------------------------------------------- dtypes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def attention_budget(
    query: Tensor, key: Tensor, value: Tensor, exact: Any, mask: Tensor | None, scale: float, softcap: float | None
) -> tuple[float, float]:
    """How far an entry of output, and of logsumexp, may be from the truth.

    Output: twice the error of PyTorch's own attention in the same dtype, one rounding of it, and what float32 cannot
    do better: the scores' own rounding, u |s|, and that of sums over K keys, u √K.
    """
    dtype, keys = query.dtype, key.shape[2]
    s = (query.double() @ key.double().mT) * scale
    largest = float(s.abs().max())
    float32 = torch.finfo(torch.float32).eps * (largest + keys**0.5)
    if softcap is None:
        theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).double()
        error = float((theirs - exact.output).abs().max())
    else:
        error = 0.0
    values = float(value.abs().max())
    output = 2 * error + torch.finfo(dtype).eps * float(exact.output.abs().max()) + 4 * float32 * values
    return output, 4 * float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 3.0}, {"window": (9, 0)}], ids=str)
@pytest.mark.parametrize("width", [16, 64])
def test_errors_stay_within_those_of_pytorch_in_the_same_dtype(
    dtype: torch.dtype, options: dict[str, Any], width: int
) -> None:
    query, key, value = (torch.randn(4, 2, 48, width).to(dtype) for _ in range(3))
    target = torch.randn(4, 2, 48, width).to(dtype)
    exact = reference.scored_attention(
        query.double(), key.double(), value.double(), target=target.double(), score="residual", **options
    )
    mask = None
    if options.get("is_causal") or "window" in options:
        mask = torch.ones(48, 48, dtype=torch.bool).tril()
        if "window" in options:
            mask = mask.triu(-9)
    out = scored_attention(query, key, value, target=target, score="residual", **options)
    budget, logsumexp_budget = attention_budget(query, key, value, exact, mask, width**-0.5, options.get("softcap"))
    assert out.output.dtype == dtype
    assert out.logsumexp.dtype == out.losses.dtype == out.scores.dtype == torch.float32
    assert (out.output.double() - exact.output).abs().max() <= budget
    assert (out.logsumexp.double() - exact.logsumexp).abs().max() <= logsumexp_budget
    # The score is a norm of f - y over n = 48 rows of all heads, over √n: it errs at most by the norm of f's error.
    entries = (2 * width) ** 0.5
    float32 = 8 * torch.finfo(torch.float32).eps
    assert ((out.scores.double() - exact.scores).abs() <= budget * entries + float32 * exact.scores).all()
    # And losses are half its square.
    assert (
        (out.losses.double() - exact.losses).abs() <= exact.scores * budget * entries + float32 * exact.losses
    ).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_readout_errs_by_the_rounding_of_its_features(dtype: torch.dtype, bias: bool) -> None:
    query, key, value = (torch.randn(8, 2, 5, 16).to(dtype) for _ in range(3))
    weight, offset = torch.randn(10, 32).to(dtype), torch.randn(10).to(dtype) if bias else None
    labels = torch.randint(10, (8,))
    exact_readout = Readout(weight.double(), labels, None if offset is None else offset.double())
    exact = reference.scored_attention(
        query.double(), key.double(), value.double(), readout=exact_readout, score="head"
    )
    out = scored_attention(query, key, value, readout=Readout(weight, labels, offset), score="head")
    assert out.logits.dtype == out.pooled.dtype == dtype and out.scores.dtype == torch.float32
    u = torch.finfo(dtype).eps / 2  # of one rounding to nearest
    float32 = 64 * torch.finfo(torch.float32).eps  # attention in float32: |s| < 8, sums of at most 32 terms
    h_error = u * exact.pooled.norm(dim=1) + float32 * value.double().abs().max() * 32**0.5  # [B], of the vector's norm
    # z = W h + b, so |δz| <= ‖w_v‖ ‖δh‖; the loss moves by 2 max|δz| at most, g = p - onehot by ‖δz‖ / 2, as softmax is
    # 1/2-Lipschitz (Gao, Pavel 2017).
    z_norm = torch.linalg.matrix_norm(weight.double(), ord=2)
    z_error = z_norm * h_error + float32 * exact.logits.abs().amax(1)
    assert ((out.pooled.double() - exact.pooled).norm(dim=1) <= h_error).all()
    assert ((out.logits.double() - exact.logits).abs().amax(1) <= z_error + u * exact.logits.abs().amax(1)).all()
    assert ((out.losses.double() - exact.losses).abs() <= 2 * z_error + float32).all()
    g, h = exact.losses.neg().expm1().neg(), (exact.pooled.square().sum(1) + bias).sqrt()  # ‖g‖ <= √2 (1 - p_y)
    assert ((out.scores.double() - exact.scores).abs() <= h * z_error / 2 + 2**0.5 * g * h_error + float32 * h).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_stay_within_the_errors_of_pytorch_in_the_same_dtype(dtype: torch.dtype) -> None:
    tensors = [torch.randn(3, 2, 24, 16).to(dtype).requires_grad_() for _ in range(3)]
    target = torch.randn(3, 2, 24, 16).to(dtype)
    double = [t.detach().double().requires_grad_() for t in tensors]
    exact = reference.scored_attention(*double, target=target.double(), is_causal=True)
    wanted = torch.autograd.grad(exact.losses.sum(), double)
    out = scored_attention(*tensors, target=target, is_causal=True)
    found = torch.autograd.grad(out.losses.sum(), tensors)
    theirs = F.scaled_dot_product_attention(*tensors, is_causal=True)
    their_loss = 0.5 * (theirs.float() - target.float()).square().sum() / 24
    for ours, their, truth in zip(found, torch.autograd.grad(their_loss, tensors), wanted, strict=True):
        assert ours.dtype == dtype
        rounding = torch.finfo(dtype).eps * float(truth.abs().max())
        budget = 2 * float((their.double() - truth).abs().max()) + rounding
        assert (ours.double() - truth).abs().max() <= budget


def test_readout_may_be_kept_in_another_dtype() -> None:
    query, key, value = (torch.randn(4, 2, 3, 8).bfloat16() for _ in range(3))
    weight, bias = torch.randn(5, 16).requires_grad_(), torch.randn(5).requires_grad_()
    out = scored_attention(query, key, value, readout=Readout(weight, torch.arange(4), bias))
    out.losses.sum().backward()
    assert out.logits.dtype == torch.bfloat16 and weight.grad.dtype == bias.grad.dtype == torch.float32


def test_autocast_casts_as_for_pytorchs_attention() -> None:
    query, key, value = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = scored_attention(query, key, value, target=torch.randn(2, 2, 3, 8), score="residual")
        assert out.output.dtype == F.scaled_dot_product_attention(query, key, value.float()).dtype == torch.bfloat16
    assert out.scores.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------- torch's compilers


def op_arguments(packed: bool, loss: str, rows: str, requires_grad: bool = True) -> tuple[Any, ...]:
    lengths: tuple[Tensor | None, ...]
    if packed:
        query, key, value = torch.randn(9, 4, 8), torch.randn(11, 2, 8), torch.randn(11, 2, 6)
        lengths = (None, None, cu_seqlens(3, 0, 6), cu_seqlens(5, 3, 3))
    else:
        query, key, value = torch.randn(3, 5, 4, 8).transpose(1, 2), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 6)
        lengths = (torch.tensor([5, 0, 3]), torch.tensor([7, 2, 0], dtype=torch.int32), None, None)
    aim: tuple[Tensor | None, ...] = (torch.randn(output_shape(query, value)), None, None, None)
    if loss != "target":
        weight, bias = torch.randn(5, 24), torch.randn(5)
        aim = (None, weight.requires_grad_(requires_grad), bias.requires_grad_(requires_grad), torch.tensor([0, 4, 2]))
    query, key, value = (x.requires_grad_(requires_grad) for x in (query, key, value))
    pool, score = ("mean", "residual") if loss == "target" else (loss, "head")
    seed = torch.tensor([5])
    scoring = (score, "rms", 2, 1.0, 0.5, seed)
    return (query, key, value, *aim, *lengths, True, 0.3, 2, 1, None, pool, rows, "auto", *scoring)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("loss", "rows", "requires_grad"), [("target", "all", True), ("first", "pooled", True), ("mean", "none", False)]
)
def test_op_passes_torchs_own_checks(packed: bool, loss: str, rows: str, requires_grad: bool) -> None:
    op = torch.ops.attent.scored_attention.default
    torch.library.opcheck(op, op_arguments(packed, loss, rows, requires_grad))


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_to_one_graph_forward_and_backward(packed: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")  # inductor calls the same op, and takes seconds to do so
    query, key, value, _, weight, bias, labels, lengths_q, lengths_k, cu_q, cu_k, *_ = op_arguments(
        packed, "mean", "all"
    )

    def step(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out = scored_attention(
            query, key, value, readout=Readout(weight, labels, bias), is_causal=True, enable_gqa=True, window=(3, 0),
            softcap=4.0, query_lengths=lengths_q, key_lengths=lengths_k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
            score="head", top_k=2, temperature=1.0, floor=0.5, seed=7, return_output=False,
        )  # fmt: skip
        return out.losses.sum() + out.logits.sin().sum(), out.scores, out.selection.index

    inputs = (query, key, value, weight, bias)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    loss, *rest = step(*inputs)
    compiled_loss, *compiled_rest = compiled(*inputs)
    torch.testing.assert_close(compiled_rest, rest, rtol=0, atol=0)
    found = torch.autograd.grad(compiled_loss, inputs)
    torch.testing.assert_close(found, torch.autograd.grad(loss, inputs), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_a_seed_decides_the_lesson() -> None:
    query, key, value, target = (torch.randn(64, 1, 2, 4) for _ in range(4))

    def lesson(seed: int | Tensor | None) -> list[int]:
        out = scored_attention(query, key, value, target=target, score="residual", top_k=16, temperature=1.0, seed=seed)
        index: list[int] = out.selection.index.tolist()
        return index

    assert lesson(3) == lesson(3) == lesson(torch.tensor([3])) != lesson(4)
    torch.manual_seed(1)
    first, second = lesson(None), lesson(None)
    torch.manual_seed(1)
    assert lesson(None) == first != second


def test_a_second_derivative_is_refused_rather_than_0() -> None:
    query, key, value = torch.randn(3, 2, 2, 4, 8).unbind(0)
    out = scored_attention(query.requires_grad_(), key, value, target=torch.zeros(2, 2, 4, 8))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(out.losses.sum(), query, create_graph=True)
