"""The Triton forward of scored attention, in Triton's interpreter: values within derived budgets, and one launch.

How far a result may be from the specification in float64, of the same inputs. u = 2^-24 is float32's rounding; exp2 and
log2 of a GPU err by 2^-22, which is 4 u (the interpreter's are better). A score s = scale q·k sums D products, and so
errs by (D + 4) u S at most, S = max scale Σ_d |q_d k_d|; softcap's slope is at most 1, its own error 8 u c. A
probability's relative error is then twice that, e = 2 (D + 4) u S + 16 u + (K + 4) u, where K keys are added up, and
the weighted mean of values V errs by e max|V| at most; with values in half precision probabilities are rounded first,
which adds their unit roundoff. Everything that follows from the output takes its error from there.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import attent
from attent import reference, scored_attention
from attent.ops.scored_attention_op import Problem, Results, Scoring
from attent.ops.triton_scored_attention import scored_attention_forward
from tests.launches import counted_launches
from tests.test_scored_attention import call, cu_seqlens, problems

U = 2.0**-24
KEYS = 40  # no problem here has more
DTYPES = {torch.float32: 0.0, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}  # and what rounding probabilities adds


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Any:
    """Scratch memory holds NaN before each test, and all tickets are 0 after it."""
    from attent_kernels import runtime

    runtime.poison_workspaces()
    yield
    assert runtime.open_tickets() == 0


def in_dtype(tensors: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """The problem rounded to ``dtype``, its options with the target in it, and those in float64."""
    low = {name: rounded(t, dtype) for name, t in tensors.items()}
    low_options, options64 = dict(options), dict(options)
    if "target" in options:
        low_options["target"] = rounded(options["target"], dtype)
        options64["target"] = low_options["target"].double()
    return low, low_options, options64


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In another dtype with the same strides, gaps and repetitions."""
    return (
        torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype).copy_(tensor)
        if 0 not in tensor.stride()
        else (tensor[:1].to(dtype).expand(tensor.shape))
    )


def output_budget(tensors: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype) -> float:
    query, key, value = (tensors[name].double() for name in ("query", "key", "value"))
    if 0 in query.shape or 0 in key.shape:
        return 0.0
    width = query.shape[-1]
    scale = abs(width**-0.5 if options.get("scale") is None else options["scale"])
    size = scale * width * float(query.abs().max()) * float(key.abs().max())
    relative = 2 * (width + 4) * U * size + 16 * U * (options.get("softcap") or 0) + 16 * U + (KEYS + 4) * U
    return (relative + 2 * DTYPES[dtype]) * float(value.abs().max())


def check(out: Any, exact: Any, tensors: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype) -> None:
    unit = torch.finfo(dtype).eps / 2
    budget = output_budget(tensors, options, dtype)
    heads, width = tensors["query"].shape[1], tensors["value"].shape[-1]

    def close(name: str, allowed: Tensor | float) -> None:
        found, wanted = getattr(out, name).double(), getattr(exact, name)
        assert found.shape == wanted.shape, name
        error = torch.where(found == wanted, 0.0, (found - wanted).abs())  # -inf is -inf
        assert bool((error <= allowed).all()), (name, float(error.max()), allowed)

    if out.output is not None:
        close("output", budget + unit * exact.output.abs())
        values = float(tensors["value"].double().abs().max()) if tensors["value"].numel() else 1.0
        finite = exact.logsumexp.where(exact.logsumexp.isfinite(), 0)
        close("logsumexp", budget / max(values, 1e-30) + 4 * U * finite.abs() + 16 * U)
    if "target" in options:
        rows = options["target"].shape[-2] if options["target"].dim() == 4 else options["target"].shape[0]
        # A norm over all rows and heads errs by the norm of the errors; with "mean" and "rms" it is divided again.
        norm = budget * max(1, rows * heads * width) ** 0.5
        plain = reference_norm(exact, options)
        close(
            "scores" if out.scores is not None and options["score"] == "residual" else "losses",
            norm + 64 * U * plain if options.get("score") == "residual" else plain * norm + norm**2 + 64 * U * plain**2,
        )
        close("losses", plain * norm + norm**2 + 64 * U * plain**2)
    else:
        features = exact.pooled.norm(dim=1) if exact.pooled.numel() else exact.pooled.new_zeros(len(exact.losses))
        pooled = budget + unit * exact.pooled.abs()
        close("pooled", pooled)
        weight = tensors["weight"].double()
        h_error = budget * (heads * width) ** 0.5 + unit * features  # [B], of the vector
        z_error = float(torch.linalg.matrix_norm(weight, ord=2)) * h_error + (heads * width + 4) * U * (
            exact.logits.abs().amax(1) + float(weight.norm()) * features
        )
        close("logits", z_error[:, None] + unit * exact.logits.abs())
        loss_error = 2 * z_error + 32 * U * (1 + exact.logits.abs().amax(1))
        close("losses", loss_error)
        if out.scores is not None and options["score"] != "loss":
            # ‖g‖ <= √2, softmax is 1/2-Lipschitz; "head" multiplies by √(‖h‖² + 1) at most.
            of_g = z_error + 32 * U * (1 + exact.logits.abs().amax(1))
            close("scores", of_g * (features + 1) + 2 * h_error if options["score"] == "head" else of_g)
        elif out.scores is not None:
            close("scores", loss_error)


def reference_norm(exact: Any, options: dict[str, Any]) -> Tensor:
    """√Σ‖f − y‖² of each example, an upper bound of what it is after division by n or √n."""
    target = options["target"].double()
    rows = target.shape[-2] if target.dim() == 4 else target.shape[0]
    return (2 * exact.losses * max(1, rows)).sqrt()


# Not shrunk when it fails: the interpreter is slow, and problems are small as they are.
@settings(max_examples=25, phases=[Phase.explicit, Phase.generate])
@given(problem=problems(), dtype=st.sampled_from(list(DTYPES)), return_output=st.booleans())
def test_triton_is_the_specification_within_its_budget(
    problem: tuple[dict[str, Tensor], dict[str, Any]], dtype: torch.dtype, return_output: bool
) -> None:
    tensors, options, options64 = in_dtype(*problem, dtype)
    exact = call(reference.scored_attention, {n: t.double() for n, t in tensors.items()}, options64)
    out = call(scored_attention, tensors, options, backend="triton", return_output=return_output)
    check(out, exact, tensors, options, dtype)
    if out.selection is not None:
        assert_lesson_is_of_its_own_scores(out, options, tensors["query"])


def assert_lesson_is_of_its_own_scores(out: Any, options: dict[str, Any], query: Tensor) -> None:
    counts = options["cu_seqlens_q"].diff() if "cu_seqlens_q" in options else options.get("query_lengths")
    if counts is None:
        counts = torch.full((len(out.losses),), query.shape[2])
    lesson = attent.select_top_k(
        out.scores, options["top_k"], temperature=options["temperature"], floor=options["floor"], valid=counts > 0,
        seed=3, backend="torch",
    )  # fmt: skip
    assert out.selection.index.tolist() == lesson.index.tolist()
    assert torch.equal(out.selection.score, lesson.score)
    torch.testing.assert_close(out.selection.inclusion, lesson.inclusion, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------- sizes that take several tiles

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window on both sides": {"window": (9, 4)},
    "causal window and softcap": {"window": (20, -1), "is_causal": True, "softcap": 3.0},
    "negative scale": {"scale": -0.3},
    "lengths": {
        "query_lengths": torch.tensor([34, 0, 17]),
        "key_lengths": torch.tensor([0, 20, 13]),
        "is_causal": True,
    },
    "packed": {"cu_seqlens_q": cu_seqlens(20, 0, 34), "cu_seqlens_k": cu_seqlens(3, 17, 20), "is_causal": True},
}


def large_problem(options: dict[str, Any], dtype: torch.dtype, queries: int = 34) -> Any:
    """Three tiles of queries by two of keys in the interpreter's configuration; two heads that share keys."""
    if "cu_seqlens_q" in options:
        shapes = (54, 2, 24), (40, 1, 24), (40, 1, 40)
    else:
        shapes = (3, 2, queries, 24), (3, 1, 20, 24), (3, 1, 20, 40)
    return {n: torch.randn(s).to(dtype) for n, s in zip(("query", "key", "value"), shapes, strict=True)}


LOSSES: dict[str, dict[str, Any]] = {
    "target": {"score": "residual", "per_example": "mean"},
    "mean": {"score": "head", "labels": torch.tensor([6, 0, 70])},
    "last": {"score": "logit", "labels": torch.tensor([6, 0, 70])},
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in OPTIONS), ("plain", torch.bfloat16), ("packed", torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("loss", LOSSES)
def test_many_tiles_fold_into_one_score(name: str, loss: str, dtype: torch.dtype) -> None:
    options = OPTIONS[name]
    tensors = large_problem(options, dtype)
    arguments = {**options, **LOSSES[loss], "enable_gqa": True}
    arguments |= {"top_k": 2, "temperature": 1.0, "floor": 0.5, "seed": 3}
    if loss == "target":
        arguments["target"] = torch.randn(*tensors["query"].shape[:-1], 40).to(dtype)
    else:  # 71 classes: more than one tile of them
        tensors |= {"weight": torch.randn(71, 80).to(dtype) / 8, "bias": torch.randn(71).to(dtype)}
        arguments["pool"] = loss
    arguments64 = {n: x.double() if n == "target" else x for n, x in arguments.items()}
    exact = call(reference.scored_attention, {n: t.double() for n, t in tensors.items()}, arguments64)
    with counted_launches() as launches:
        out = call(scored_attention, tensors, arguments, backend="triton")
    assert launches == ["scored_attention_kernel"]
    check(out, exact, tensors, arguments, dtype)
    assert_lesson_is_of_its_own_scores(out, arguments, tensors["query"])


@pytest.mark.parametrize(("queries", "loss"), [(1, "mean"), (1, "target"), (3, "last"), (16, "mean")])
def test_the_keys_of_few_queries_are_split_across_programs(queries: int, loss: str) -> None:
    from attent_kernels.attention import configurations

    options = {"key_lengths": torch.tensor([20, 0, 13]), "is_causal": True}
    tensors = large_problem(options, torch.float32, queries)
    arguments = {**options, **LOSSES[loss], "enable_gqa": True, "top_k": 1, "temperature": 0.0, "floor": 0.0, "seed": 3}
    if loss == "target":
        arguments["target"] = torch.randn(3, 2, queries, 40)
    else:
        tensors |= {"weight": torch.randn(71, 80) / 8}
        arguments["pool"] = loss
    arguments64 = {n: x.double() if n == "target" else x for n, x in arguments.items()}
    exact = call(reference.scored_attention, {n: t.double() for n, t in tensors.items()}, arguments64)
    with mock.patch.object(configurations, "splits", return_value=3), counted_launches() as launches:
        out = call(scored_attention, tensors, arguments, backend="triton")
    assert launches == ["scored_attention_kernel"]
    check(out, exact, tensors, arguments, torch.float32)


def test_a_split_has_work_for_its_costs_and_processors_have_work() -> None:
    from attent_kernels.attention.configurations import splits

    assert splits(programs=3072, keys=1024, block_n=64, processors=132) == 1  # enough programs as they are
    assert splits(programs=12, keys=16384, block_n=64, processors=132) == 22
    assert splits(programs=12, keys=1024, block_n=64, processors=132) == 4  # four tiles of keys each
    assert splits(programs=1, keys=0, block_n=64, processors=132) == 1


# ------------------------------------------------------------------------------------------------------ the protocol


def test_repeats_agree_to_the_bit_whatever_scratch_memory_holds() -> None:
    from attent_kernels import runtime

    tensors = large_problem({}, torch.float32) | {"weight": torch.randn(5, 80)}
    options = {"enable_gqa": True, "labels": torch.tensor([4, 0, 2]), "score": "head", "pool": "mean"}
    first = call(scored_attention, tensors, options, backend="triton", top_k=2, temperature=1.0, seed=1)
    runtime.poison_workspaces()
    again = call(scored_attention, tensors, options, backend="triton", top_k=2, temperature=1.0, seed=1)
    for name, found, wanted in zip(first._fields[:-1], first, again, strict=False):
        assert torch.equal(found, wanted), name
    assert all(torch.equal(a, b) for a, b in zip(first.selection, again.selection, strict=True))


def test_the_order_in_which_tiles_finish_changes_nothing() -> None:
    """The interpreter runs programs in the order of the grid: run them backwards, as a GPU might."""
    tensors = large_problem({}, torch.float32)
    options = {"enable_gqa": True, "target": torch.randn(3, 2, 34, 40), "score": "residual", "is_causal": True}
    forwards = call(scored_attention, tensors, options, backend="triton", top_k=2)
    with counted_launches(backwards=True):
        backwards = call(scored_attention, tensors, options, backend="triton", top_k=2)
    for name in ("output", "logsumexp", "losses", "scores"):
        assert torch.equal(getattr(forwards, name), getattr(backwards, name)), name
    assert torch.equal(forwards.selection.index, backwards.selection.index)


def test_a_failed_launch_leaves_no_tickets() -> None:
    from attent_kernels import runtime
    from attent_kernels.attention import launch

    tensors = large_problem({}, torch.float32)
    options = {"enable_gqa": True, "target": torch.randn(3, 2, 34, 40), "score": "residual"}
    with mock.patch.object(launch, "window_of", side_effect=RuntimeError("broken")), pytest.raises(RuntimeError):
        call(scored_attention, tensors, options, backend="triton")
    assert runtime.open_tickets() == 0
    call(scored_attention, tensors, options, backend="triton")


def test_a_pool_too_large_for_the_launch_is_chosen_from_by_the_next() -> None:
    from attent_kernels import pools

    tensors = large_problem({}, torch.float32)
    options = {"enable_gqa": True, "target": torch.randn(3, 2, 34, 40), "score": "residual", "top_k": 2}
    options |= {"temperature": 0.0, "floor": 0.0, "query_lengths": torch.tensor([34, 0, 17])}
    with mock.patch.object(pools, "MAX_IN_LAUNCH", 2):
        out = call(scored_attention, tensors, options, backend="triton")
    assert_lesson_is_of_its_own_scores(out, options, tensors["query"])


# ------------------------------------------------------------------------- what a device's values may be, unread


def unchecked(packed: bool = False, **changes: Any) -> Results:
    """The backend itself, past the checks that read values on a CPU, as values on a GPU are not read."""
    shape = (57, 1, 16) if packed else (3, 1, 19, 16)
    query, key, value, target = (torch.randn(shape) for _ in range(4))
    problem = Problem(
        query, key, value, target, None, None, None, None, None, None, None, True, 0.25, -1, -1, None, "mean", "all",
        "triton",
    )._replace(**changes)  # fmt: skip
    score = "residual" if problem.target is not None else "logit"
    return scored_attention_forward(problem, Scoring(score, "rms", 2, 0.0, 0.0, None))


@pytest.mark.parametrize("lengths", [[100, -3, 5], [2**30, -(2**30), 0]])
def test_lengths_are_clamped(lengths: list[int]) -> None:
    torch.manual_seed(1)
    wild = unchecked(query_lengths=torch.tensor(lengths), key_lengths=torch.tensor(lengths))
    torch.manual_seed(1)
    clamped = torch.tensor(lengths).clamp(0, 19)
    tame = unchecked(query_lengths=clamped, key_lengths=clamped)
    assert all(torch.equal(a, b) for a, b in zip(wild, tame, strict=True))


@pytest.mark.parametrize("cu", [[0, 100, 50, 57], [5, 3, 60, 2], [-9, -1, 2**31 - 1, 57], [0, 0, 0, 0]])
def test_cu_seqlens_are_clamped_and_made_to_rise(cu: list[int]) -> None:
    cu_wild = torch.tensor(cu, dtype=torch.int32)
    cu_tame = cu_wild.clamp(0, 57).cummax(0).values
    results = []
    for these in (cu_wild, cu_tame):
        torch.manual_seed(1)
        results.append(unchecked(packed=True, cu_seqlens_q=these, cu_seqlens_k=these))
    wild, tame = results
    for name in ("losses", "scores", "chosen"):
        assert torch.equal(getattr(wild, name), getattr(tame, name)), name


def test_a_label_outside_makes_its_example_nan_and_no_other() -> None:
    labels = torch.tensor([0, 99, 4])
    found = unchecked(target=None, readout_weight=torch.randn(5, 16), labels=labels)
    assert found.losses.isnan().tolist() == found.scores.isnan().tolist() == [False, True, False]
    assert found.logit_gradient.isnan().all(1).tolist() == [False, True, False] and found.logits.isfinite().all()
    assert found.chosen.tolist()[0] == 1  # NaN ranks highest


def test_offsets_beyond_32_bits() -> None:
    """Examples and rows 2^31 elements apart; memory that nobody touches costs none."""
    far = 2**31 + 16
    memory = torch.empty(far + 3 * 16 * 20, dtype=torch.float16)
    query = memory.as_strided((2, 1, 18, 16), (far, 16, 16, 1))
    query.copy_(torch.randn(2, 1, 18, 16))
    target = torch.zeros(2, 1, 18, 16).half()
    out = scored_attention(query, query, query, target=target, score="residual", backend="triton")
    near = query.contiguous()
    expected = scored_attention(near, near, near, target=target, score="residual", backend="triton")
    assert torch.equal(out.output, expected.output) and torch.equal(out.scores, expected.scores)


def test_what_it_does_not_take_is_refused_by_name_with_the_reason() -> None:
    query = torch.randn(2, 1, 3, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"backend: got 'triton'.* float16, bfloat16 and float32, not float64"):
        scored_attention(query, query, query, target=query, backend="triton")
    query = torch.randn(2, 1, 3, 257)
    with pytest.raises(ValueError, match=r"backend: got 'triton'.* head dimensions up to 256, not 257"):
        scored_attention(query, query, query, target=query, backend="triton")


def test_attentive_classifier_is_one_launch_after_its_projections() -> None:
    classifier = attent.AttentiveClassifier(32, 4, 10)
    tokens, labels = torch.randn(8, 37, 32), torch.arange(8)
    with torch.no_grad(), counted_launches() as launches:
        out = classifier(tokens, labels, top_k=4, backend="triton")
    assert launches == ["scored_attention_kernel"]
    expected = classifier(tokens, labels, top_k=4, backend="torch")
    torch.testing.assert_close(out.losses, expected.losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.scores, expected.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_view_whose_sign_is_kept_beside_its_memory_is_read_with_its_sign(backend: str) -> None:
    """Of ``x.conj().imag`` PyTorch negates on reading; kernels that are handed the address read what is stored."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(1, 2, 5, 8, dtype=torch.complex64, generator=generator)
    query, key, target = stored.conj().imag, torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    assert query.is_neg()
    options = {"target": target, "score": "residual", "backend": backend}
    with torch.no_grad():
        found = scored_attention(query, key, key, **options)
        expected = scored_attention(query.clone().resolve_neg(), key, key, **options)
    torch.testing.assert_close(found.output, expected.output, rtol=0, atol=0)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=0)
