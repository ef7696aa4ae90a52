"""Linear cross-entropy's Triton backend as what a training loop needs: precision, memory, autograd, compilation."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import attent
from attent import reference
from attent.ops import triton_chunks, triton_head
from attent.ops.dispatch import implementation
from attent.ops.linear_cross_entropy_op import Call

from .fast_interpreter import fast_interpreter as fast_interpreter
from .linear_cross_entropy_problems import NAMES, REDUCTIONS, Problem, no_looking
from .test_linear_cross_entropy_accuracy import UNIT, confident_logits, error
from .test_linear_cross_entropy_memory import Allocations
from .test_triton_linear_cross_entropy import small

WITHOUT_LOGITS = ("loss", "logit", "head")


def everything(function: Any, problem: Problem, **arguments: Any) -> dict[str, Tensor]:
    """Loss, scores and gradients under a mean, and the "head" scores without gradients, by their own path."""
    leaves = {"d input": problem.input, "d weight": problem.linear_weight, "d bias": problem.options.get("linear_bias")}
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    hidden, weight = leaves["d input"], leaves["d weight"]
    options = {**problem.options, "linear_bias": leaves.get("d bias"), **arguments}
    loss, scores = function(hidden, weight, problem.target, **options, score=NAMES)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    with torch.no_grad():
        alone = function(hidden, weight, problem.target, **options, score=WITHOUT_LOGITS)[1]["head"]
    named = dict(zip(leaves, gradients, strict=True))
    return {"the loss": loss.detach(), **scores, **named, "head without logits": alone}


# ----------------------------------------------------------------------------------------------------------- precision

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "capped": {"softcap": 5.0},
    "shifted and weighted": {"shift": True, "weight": torch.linspace(0.5, 2, 90)},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_errors_stay_within_twice_those_of_pytorch_in_the_same_dtype(dtype: torch.dtype, options: str) -> None:
    # Logits with a standard deviation of 3, as a trained model's.
    hidden, weight = torch.randn(2, 6, 40), torch.randn(90, 40) * (3 / 40**0.5)
    problem = Problem(hidden, weight, torch.randint(90, (2, 6)), OPTIONS[options]).to(dtype)
    truth = everything(reference.linear_cross_entropy, problem.to(torch.float64))
    plain = everything(reference.linear_cross_entropy, problem)  # the same formulas in PyTorch operations of that dtype
    actual = everything(attent.linear_cross_entropy, problem, backend="triton")
    for name, right in truth.items():
        allowed = 2 * error(plain[name], right) + UNIT[dtype]  # one rounding, of the output
        assert error(actual[name], right) <= allowed, name
        assert actual[name].dtype == (dtype if name.startswith("d ") else torch.float32)


def test_logits_are_not_rounded_to_half_precision() -> None:
    hidden, weight, target = torch.randn(5, 40).bfloat16(), torch.randn(90, 40).bfloat16(), torch.randint(90, (5,))
    right, scores = reference.linear_cross_entropy(
        hidden.double(), weight.double(), target, score=("logit",), reduction="none"
    )
    loss, score = attent.linear_cross_entropy(hidden, weight, target, score="logit", reduction="none", backend="triton")
    # Float32 sums of 40 products of up to some 10: logits below 40, off by 1e-5 at most.
    torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(score.double(), scores["logit"], rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("miss", [1e-3, 1e-7])
def test_scores_and_gradients_of_confident_tokens_keep_their_digits(miss: float, dtype: torch.dtype) -> None:
    logits, target = confident_logits(miss, 7, 60)
    logits[0] += 1e-3  # examples of 1, 2 and 4 tokens, in two of which a target comes twice
    target[2], target[5] = target[1], target[4]
    logits[2], logits[5] = logits[1].flip(0).roll(int(target[1]) * 2 - 59), logits[4].roll(0) * 1.01
    cu_seqlens = torch.tensor([0, 1, 3, 7], dtype=torch.int32)
    # Hidden states times this head are the logits, exactly.
    problem = Problem(logits, torch.eye(60), target, {"cu_seqlens": cu_seqlens}).to(dtype)
    truth = everything(reference.linear_cross_entropy, problem.to(torch.float64))
    actual = everything(attent.linear_cross_entropy, problem, backend="triton")
    # Float32 exponentials of distances below 40. What is written in the GEMM's dtype is off by half a unit of itself,
    # and so are sums of it that do not cancel: all entries of g but the target's are positive, and as h is the logits,
    # whose inner products are positive here, so do none of the Gram form's terms. Two factors: one unit, halved by
    # the root; and float16's p̃ is bfloat16.
    exact = 100 * UNIT[torch.float32]
    for name in NAMES:
        rounded = name in ("hidden", "head") and dtype != torch.float32
        allowed = exact + (UNIT[dtype] if rounded else 0)
        torch.testing.assert_close(actual[name].double(), truth[name], rtol=allowed, atol=0, msg=f"{name}")
    allowed = exact + (UNIT[torch.bfloat16] if dtype != torch.float32 else 0)
    torch.testing.assert_close(actual["head without logits"].double(), truth["head"], rtol=allowed, atol=0)


def test_float16_gradients_are_scaled_before_they_are_rounded() -> None:
    # What a mean over 2¹⁸ tokens leaves of a gradient is below float16's 6e-8; a loss scaler's factor is to save it.
    tokens, scale = 32, 2.0**14
    hidden, weight, target = torch.randn(tokens, 4).half(), torch.randn(8, 4).half(), torch.randint(8, (tokens,))
    example_weight = torch.full((tokens,), tokens / 2.0**18)

    def gradients(function: Any, *leaves: Tensor, **options: Any) -> tuple[Tensor, ...]:
        leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
        weights = example_weight.to(leaves[0].dtype) if leaves[0].dtype == torch.float64 else example_weight
        return torch.autograd.grad(function(*leaves, target, example_weight=weights, **options) * scale, leaves)

    truth = gradients(reference.linear_cross_entropy, hidden.double(), weight.double())
    actual = gradients(attent.linear_cross_entropy, hidden, weight, backend="triton")
    for right, mine in zip(truth, actual, strict=True):
        # g is rounded once, and so is the result, whose smallest step is 6e-8.
        assert float((mine.double() - right).abs().max()) <= 2 * UNIT[torch.float16] * float(right.abs().max()) + 6e-8


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_values_at_any_stride_are_read_where_they_lie(reduction: str, kind: str) -> None:
    def spread(value: Tensor) -> Tensor:
        return torch.stack([value, torch.full_like(value, 99)], -1).flatten(-2)[..., ::2]

    hidden, weight, bias, class_weight = torch.randn(2, 3, 4), torch.randn(7, 4), torch.randn(7), torch.rand(7)
    target = torch.randint(7, (2, 3)) if kind == "indices" else torch.randn(2, 3, 7).softmax(-1)
    outcomes = []
    for by in (lambda value: value, spread):
        leaf = by(hidden).detach().requires_grad_()
        loss = attent.linear_cross_entropy(
            leaf,
            by(weight),
            by(target),
            linear_bias=by(bias),
            weight=by(class_weight),
            label_smoothing=0.1,
            reduction=reduction,
            backend="triton",
        )
        upstream = torch.tensor(2.0).expand(loss.shape)  # every token's at one address
        outcomes.append([loss, *torch.autograd.grad(loss, leaf, upstream)])
    for plain, strided in zip(*outcomes, strict=True):
        torch.testing.assert_close(strided, plain, rtol=1e-6, atol=1e-7)
    once = torch.autograd.grad(
        attent.linear_cross_entropy(
            leaf, weight, target, linear_bias=bias, weight=class_weight, label_smoothing=0.1, reduction=reduction
        ).sum(),
        leaf,
    )[0]
    torch.testing.assert_close(outcomes[0][1], 2 * once, rtol=1e-5, atol=1e-6)  # as the other backend has it


@pytest.mark.parametrize("bias", [False, True])
def test_each_score_is_the_norm_of_its_examples_own_gradient(bias: bool) -> None:
    hidden, target = torch.randn(3, 4, 5), torch.randint(7, (3, 4))
    target[1, 2:] = -100
    head = nn.Linear(5, 7, bias=bias)
    _, scores = attent.linear_cross_entropy(
        hidden, head.weight, target, linear_bias=head.bias, score=NAMES, per_example="mean", backend="triton"
    )
    head.double()
    for i in range(3):
        inputs = hidden[i].double().requires_grad_()
        logits = head(inputs)
        loss = F.cross_entropy(logits, target[i])
        of = {"loss": None, "logit": [logits], "hidden": [inputs], "head": list(head.parameters())}
        for name, score in scores.items():
            right = loss
            if of[name]:
                right = torch.cat([g.flatten() for g in torch.autograd.grad(loss, of[name], retain_graph=True)]).norm()
            torch.testing.assert_close(score[i].double(), right, rtol=1e-5, atol=1e-6, check_dtype=False)


# -------------------------------------------------------------------------------------------------------------- memory

TOKENS, CLASSES, WIDTH = 24, 1000, 1  # so wide that the weight's gradient in float32 is no eighth either


class OfTensors(Allocations):
    """Without what the interpreter makes: names for the memory that a kernel is given."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("aten::set_"):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def call(kind: str, layout: str, reduction: str, **changes: Any) -> Call:
    lengths = {"rows": None, "short": [3] * 8, "long": [14, 0, 10]}[layout]
    target = torch.randint(CLASSES, (TOKENS,))
    target[::7] = -100
    return Call(
        input=torch.randn(TOKENS, WIDTH),
        linear_weight=torch.randn(CLASSES, WIDTH),
        target=torch.randn(TOKENS, CLASSES).softmax(1) if kind == "probabilities" else target,
        linear_bias=torch.randn(CLASSES),
        weight=torch.rand(CLASSES) if kind == "weighted" else None,
        example_weight=None if lengths is None else torch.rand(len(lengths)).round(),
        cu_seqlens=None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int(),
        reduction=reduction,
        ignore_index=-100,
        label_smoothing=0.1 if kind in ("smoothed", "weighted") else 0.0,
        softcap=5.0 if kind == "capped" else None,
        shift=lengths is not None,
        score=list(NAMES),
        per_example="rms",
        group=None,
        backend="triton",
        input_gradient=True,
        weight_gradient=True,
        bias_gradient=True,
    )._replace(**changes)


NOTHING = {"score": list(WITHOUT_LOGITS), "input_gradient": False, "weight_gradient": False, "bias_gradient": False}


@pytest.mark.parametrize(
    ("kind", "layout", "changes"),
    [
        ("indices", "rows", {}),
        ("probabilities", "short", {}),
        pytest.param("weighted", "long", {}, marks=pytest.mark.slow),
        pytest.param("capped", "short", NOTHING, marks=pytest.mark.slow),
        pytest.param("indices", "long", NOTHING, marks=pytest.mark.slow),
    ],
)
def test_no_allocation_is_an_eighth_of_the_logits_in_half_precision(
    kind: str, layout: str, changes: dict[str, Any]
) -> None:
    eighth = TOKENS * CLASSES * 2 // 8
    arguments = call(kind, layout, "example" if changes else "mean", **changes)
    allocations = OfTensors()
    with no_looking(), small(eighth - 1024, tile=8), mock.patch.object(triton_head, "TILE_BYTES", 4096), allocations:
        loss, *_ = implementation("linear_cross_entropy", "triton")(arguments)
        if not changes:
            implementation("linear_cross_entropy_backward", "triton")(torch.ones_like(loss), arguments)
    assert 0 < allocations.largest < eighth


def test_the_largest_problems_chunks_are_an_eighth_of_their_logits_too() -> None:
    tokens, classes, width = 8192, 131072, 4096
    sizes = triton_chunks.sizes(tokens, max(classes, width), torch.bfloat16, False)
    assert sizes.chunk * classes * 2 < tokens * classes * 2 / 8 and sizes.part * classes * 4 < tokens * classes * 2 / 8
    assert sizes.chunk >= 900 and sizes.part >= 256  # from where on the GEMMs do not wait for memory
    with_head = triton_chunks.sizes(tokens, classes, torch.bfloat16, True)
    assert with_head.chunk == 1024  # two examples of 512


@pytest.mark.parametrize("n", [1, 63, 64, 1000, 1024, 8192, 100_000])
def test_rows_are_shared_out_evenly_over_the_fewest_chunks(n: int) -> None:
    sizes = triton_chunks.sizes(n, 131072, torch.bfloat16, False)
    chunks = -(-n // sizes.chunk)
    assert chunks == n // 1024 + 1
    assert n <= chunks * sizes.chunk < n + 64 * chunks + 1024
    assert sizes.part <= 384 and sizes.part <= sizes.chunk


class Reads(TorchDispatchMode):
    """Raises where a value is read back, as on a GPU that would wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
        ), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, NOTHING])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_the_path_that_gpus_take_reads_no_value_back(kind: str, changes: dict[str, Any]) -> None:
    arguments = call(kind, "short", "mean", **changes)
    with no_looking(), Reads():
        loss, *_ = implementation("linear_cross_entropy", "triton")(arguments)
        if not changes:
            implementation("linear_cross_entropy_backward", "triton")(torch.ones_like(loss), arguments)


@pytest.mark.parametrize("changes", [{}, NOTHING])
def test_the_same_call_twice_is_bit_identical_whatever_memory_holds(changes: dict[str, Any]) -> None:
    arguments = call("capped", "long", "mean", **changes)
    poison = torch.utils.deterministic.fill_uninitialized_memory
    results = []
    for deterministic in (False, True):  # then every torch.empty is full of NaN
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = deterministic
        try:
            with small(4000, tile=8):
                results.append(implementation("linear_cross_entropy", "triton")(arguments))
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = poison
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second) and bool(second.isfinite().all())


# ------------------------------------------------------------------------------------------------- bad labels, nothing


@pytest.mark.parametrize("label", [7, -1, 10**9])
def test_a_label_that_is_no_class_makes_its_example_nan_and_no_other(label: int) -> None:
    hidden, weight, target = torch.randn(3, 2, 4), torch.randn(7, 4), torch.randint(7, (3, 2))
    target[1, 0] = label
    arguments = call("indices", "rows", "example")._replace(
        input=hidden, linear_weight=weight, target=target, linear_bias=None, score=list(WITHOUT_LOGITS)
    )
    for wanted in (False, True):
        changed = arguments._replace(input_gradient=wanted, weight_gradient=False, bias_gradient=False)
        with no_looking():
            loss, scores, *_ = implementation("linear_cross_entropy", "triton")(changed)
        for values in (loss, *scores):
            assert values.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("looking", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_when_all_tokens_are_ignored_loss_scores_and_gradients_are_zero(reduction: str, looking: bool) -> None:
    arguments = call("indices", "short", reduction)._replace(target=torch.full((TOKENS,), -100))
    arguments = arguments._replace(input=torch.full((TOKENS, WIDTH), torch.nan))
    with mock.patch.object(triton_chunks, "LOGITS_BYTES", 1 << 15) if looking else no_looking():
        loss, scores, _, *gradients = implementation("linear_cross_entropy", "triton")(arguments)
        gradients += implementation("linear_cross_entropy_backward", "triton")(torch.ones_like(loss), arguments)
    for values in (loss, scores, *gradients):
        assert not values.count_nonzero()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_no_tokens_give_zero_losses_and_gradients(shape: tuple[int, ...]) -> None:
    hidden, weight = torch.randn(shape, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    target = torch.zeros(shape[:-1], dtype=torch.int64)
    for reduction in REDUCTIONS:
        loss, scores = attent.linear_cross_entropy(
            hidden, weight, target, score=NAMES, reduction=reduction, backend="triton"
        )
        gradients = torch.autograd.grad(loss.sum(), (hidden, weight))
        for values in (loss, *scores.values(), *gradients):
            assert not values.count_nonzero()


def test_float64_is_refused() -> None:
    arguments = torch.randn(2, 3).double(), torch.randn(5, 3).double(), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="it takes float16, bfloat16 and float32"):
        attent.linear_cross_entropy(*arguments, backend="triton")


# --------------------------------------------------------------------------------------------------- autograd, compile


def leaves(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states of 2 x 3 tokens, weight, bias and targets, one of them ignored."""
    hidden, weight, bias = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, 3, 4), (7, 4), (7,)))
    target = torch.randint(7, (2, 3))
    target[1, 0] = -100
    return hidden, weight, bias, target


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_gradient_is_computed_that_nobody_wants(reduction: str, wanted: tuple[bool, ...]) -> None:
    hidden, weight, bias, target = leaves()
    for leaf, want in zip((hidden, weight, bias), wanted, strict=True):
        leaf.requires_grad_(want)
    with mock.patch.object(triton_chunks, "product", wraps=triton_chunks.product) as product:
        loss = attent.linear_cross_entropy(
            hidden, weight, target, linear_bias=bias, reduction=reduction, backend="triton"
        )
        loss.sum().backward()
    logits = 1 if reduction == "mean" else 2
    assert product.call_count == logits + wanted[0] + wanted[1]  # a frozen head costs no GEMM for its gradient
    assert [leaf.grad is not None for leaf in (hidden, weight, bias)] == list(wanted)


def test_a_head_tied_to_the_embedding_gets_the_sum_of_both_gradients() -> None:
    table, tokens, target = torch.randn(7, 4, requires_grad=True), torch.randint(7, (2, 3)), torch.randint(7, (2, 3))
    loss = attent.linear_cross_entropy(F.embedding(tokens, table).tanh(), table, target, backend="triton")
    right = F.cross_entropy((F.embedding(tokens, table).tanh() @ table.T).flatten(0, 1), target.flatten())
    gradients = [torch.autograd.grad(of, table)[0] for of in (loss, right)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)  # float32 sums of numbers of order one


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_several_backward_calls_add_up(reduction: str) -> None:
    hidden, weight, bias, target = leaves()
    options = {"linear_bias": bias, "reduction": reduction, "backend": "triton"}
    loss = attent.linear_cross_entropy(hidden, weight, target, **options).sum()
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in (hidden, weight, bias)]
    (2 * loss).backward()
    attent.linear_cross_entropy(hidden, weight, target, **options).sum().backward()
    for leaf, gradient in zip((hidden, weight, bias), once, strict=True):
        torch.testing.assert_close(leaf.grad, 4 * gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_computes_what_casting_by_hand_does(reduction: str) -> None:
    hidden, weight, bias, target = leaves()
    options = {"reduction": reduction, "score": "head", "backend": "triton"}

    def outcome(loss: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        return loss, scores, *torch.autograd.grad(loss.sum(), (hidden, weight, bias))

    with torch.autocast("cpu", torch.bfloat16):
        inside = outcome(*attent.linear_cross_entropy(hidden, weight, target, linear_bias=bias, **options))
    halves = [leaf.bfloat16() for leaf in (hidden, weight, bias)]
    by_hand = outcome(*attent.linear_cross_entropy(*halves[:2], target, linear_bias=halves[2], **options))
    assert all(torch.equal(a, b) for a, b in zip(inside, by_hand, strict=True))


def test_a_checkpointed_loss_has_the_same_gradients_and_scores() -> None:
    hidden, weight, _, target = leaves()

    def loss(hidden: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = attent.linear_cross_entropy(
            torch.tanh(hidden), weight, target, score="head", backend="triton"
        )
        return result

    expected, right = loss(hidden)
    actual, scores = checkpoint(loss, hidden, use_reentrant=False)
    assert torch.equal(actual, expected) and torch.equal(scores, right)
    gradients = [torch.autograd.grad(of, (hidden, weight)) for of in (expected, actual)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_training_step_compiles_to_one_graph(reduction: str) -> None:
    def step(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        loss, scores = attent.linear_cross_entropy(
            torch.tanh(hidden), weight, target, linear_bias=bias, reduction=reduction, score="head", backend="triton"
        )
        return loss.sum(), scores

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    hidden, weight, bias, target = leaves()
    outcomes = []
    for function in (step, compiled):
        loss, score = function(hidden, weight, bias, target)
        outcomes.append([loss, score, *torch.autograd.grad(loss, (hidden, weight, bias))])
    for eager, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(other, eager)


@pytest.mark.parametrize("reduction", ["mean", "example"])
def test_the_op_keeps_the_rules_of_torch_library(reduction: str) -> None:
    hidden, weight, bias, target = leaves(torch.bfloat16)
    arguments = (
        hidden, weight, target, bias, torch.rand(7), torch.rand(2), None, reduction, -100, 0.1, 3.0, True,
        list(NAMES), "rms", None, "triton", True, True, True,
    )  # fmt: skip
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.attent.linear_cross_entropy, arguments, test_utils=checks)


def test_head_scores_of_long_examples_have_another_form() -> None:
    assert triton_head.gram_is_cheaper(512, 1024, 4096, 2)
    assert not triton_head.gram_is_cheaper(512, 1024, 128, 2)  # T > 2D
    assert triton_head.gram_is_cheaper(512, 1024, 128, 4)  # but not 4D, where the other form needs the logits twice
    assert not triton_head.gram_is_cheaper(8192, 8192, 8192, 2)  # 64 tiles square: beyond TILE_BYTES
    assert math.isclose(triton_head.TILE_BYTES, 64 * 2**20)
