"""What is compiled ahead of time: real calls of every op's Triton backend, with tensors that hold no data.

An op's cases are registered under its name and run by what the dispatcher would run, so they launch what users launch,
configuration table included. An op without a Triton backend has no cases to run; one that gains a backend must gain
cases (tested). ``decisive`` ones are what the tests compile, since a compilation takes seconds: those with the most
registers, shared memory and tickets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import attent  # noqa: F401 - registers the backends
from attent.ops import dispatch
from attent.ops.linear_cross_entropy_op import Call
from attent.ops.scored_attention_op import Gradients, Problem, Saved, Scoring


class Case(NamedTuple):
    op: str
    name: str
    launch: Callable[[], object]  # within ahead_of_time.compiled_for
    decisive: bool = False
    # Its kernels that multiply half-precision tiles of 64 rows or more: they have warpgroup products on sm_90.
    wgmma: tuple[str, ...] = ()


Cases = Callable[[], Iterator[Case]]
CASES: dict[str, Cases] = {}
WIDTHS = (16, 32, 64, 128, 256)  # the columns of the configuration tables
HALF, FULL = torch.bfloat16, torch.float32


def of(op: str) -> Callable[[Cases], Cases]:
    """Decorator: the cases of an op."""

    def note(cases: Cases) -> Cases:
        CASES[op] = cases
        return cases

    return note


def triton(op: str) -> Callable[..., Any]:
    """The op's Triton backend."""
    return dispatch.implementation(op, "triton")


def with_triton() -> list[str]:
    """All ops that have a Triton backend."""
    return [op for op, backends in dispatch._implementations.items() if "triton" in backends]


def cases() -> Iterator[Case]:
    """Of all ops that have a Triton backend."""
    for op in with_triton():
        yield from CASES[op]()


@contextmanager
def no_autocast() -> Iterator[None]:
    """``torch.autocast(device_type, enabled=False)`` knows no meta device: let it do what it is asked to, nothing."""
    with mock.patch.object(torch, "autocast", lambda *arguments, **options: nullcontext()):
        yield


def empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------------ attention

B, HEADS, TOKENS, CLASSES = 64, 12, 2048, 1000


def attention_problem(
    width: int, dtype: torch.dtype, *, readout: str | None = None, queries: int = TOKENS, packed: bool = False,
    **options: Any,
) -> Problem:  # fmt: skip
    def heads(tokens: int) -> Tensor:
        if packed:
            return empty(B * tokens, HEADS, width, dtype=dtype)
        return empty(B, tokens, HEADS, width, dtype=dtype).transpose(1, 2)

    starts = empty(B + 1, dtype=torch.int32) if packed else None
    query, key, value = heads(queries), heads(TOKENS), heads(TOKENS)
    fields: dict[str, Any] = {
        "target": query if readout is None else None,
        "readout_weight": None if readout is None else empty(CLASSES, HEADS * width, dtype=dtype),
        "readout_bias": None if readout is None else empty(CLASSES, dtype=dtype),
        "labels": None if readout is None else empty(B, dtype=torch.int64),
        "query_lengths": None, "key_lengths": None, "cu_seqlens_q": starts, "cu_seqlens_k": starts,
        "is_causal": readout is None, "scale": width**-0.5, "window_left": -1, "window_right": -1, "softcap": None,
        "pool": readout or "mean", "rows": "all", "backend": "triton",
    }  # fmt: skip
    return Problem(query, key, value, **(fields | options))


FORWARD, BACKWARD = ("scored_attention_kernel",), ("key_value_gradients", "query_gradient")
HARD = Scoring("residual", "rms", B // 2, 0.0, 0.0, None)


def drawn(score: str) -> Scoring:
    return Scoring(score, "rms", B // 2, 1.0, 0.2, empty(1, dtype=torch.int64))


@of("scored_attention")
def attention_forward() -> Iterator[Case]:
    def case(name: str, problem: Problem, scoring: Scoring, **marks: Any) -> Case:
        launch = triton("scored_attention")
        return Case("scored_attention", name, lambda: launch(problem, scoring), **marks)

    for width in WIDTHS:
        for dtype in (HALF, FULL):
            half = dtype == HALF
            about = f"D {width}, {short(dtype)}"
            yield case(
                f"{about}, causal, residual, hard", attention_problem(width, dtype), HARD,
                decisive=width in (128, 256) and half, wgmma=FORWARD if half else (),
            )  # fmt: skip
            yield case(
                f"{about}, readout mean, head, drawn", attention_problem(width, dtype, readout="mean"), drawn("head"),
                decisive=width == 64 and half, wgmma=FORWARD if half else (),
            )  # fmt: skip
            yield case(
                f"{about}, one query, readout, drawn", attention_problem(width, dtype, readout="mean", queries=1),
                drawn("logit"), decisive=width == 64 and half,
            )  # fmt: skip
            yield case(
                f"{about}, packed, causal, hard", attention_problem(width, dtype, packed=True), HARD,
                decisive=width == 128 and half, wgmma=FORWARD if half else (),
            )  # fmt: skip
    everything = {"window_left": 100, "window_right": 7, "softcap": 30.0}
    yield case(
        "D 128, bfloat16, packed, window, softcap, drawn", attention_problem(128, HALF, packed=True, **everything),
        drawn("residual"), decisive=True, wgmma=FORWARD,
    )  # fmt: skip
    yield case(
        "D 64, bfloat16, last row alone", attention_problem(64, HALF, readout="last", rows="none"), drawn("head")
    )  # fmt: skip
    yield case(
        "D 64, bfloat16, window, softcap, drawn", attention_problem(64, HALF, **everything), drawn("residual"),
        wgmma=FORWARD,
    )  # fmt: skip
    # Packed examples take more registers, and so have lines of their own in the configuration table.
    for width, dtype in ((64, HALF), (256, FULL)):
        yield case(
            f"D {width}, {short(dtype)}, packed, last row alone",
            attention_problem(width, dtype, readout="last", rows="none", packed=True), drawn("head"),
        )  # fmt: skip
    for width, dtype, pool, options in (
        (64, HALF, "last", {}), (64, HALF, "mean", everything),
        (128, HALF, "mean", {}), (128, HALF, "last", everything),
        (64, FULL, "mean", everything), (128, FULL, "mean", everything), (256, FULL, "mean", everything),
    ):  # fmt: skip
        about = f"D {width}, {short(dtype)}, packed" + (", window, softcap" if options else "")
        yield case(
            f"{about}, readout {pool}, head, drawn",
            attention_problem(width, dtype, readout=pool, packed=True, **options), drawn("head"),
            wgmma=FORWARD if dtype == HALF else (),
        )  # fmt: skip


@of("scored_attention_backward")
def attention_backward() -> Iterator[Case]:
    def case(name: str, problem: Problem, **marks: Any) -> Case:
        output = torch.empty_like(problem.query)
        width = problem.query.shape[1] * problem.query.shape[-1]
        lse = empty(*problem.query.shape[:-1], dtype=FULL)
        if problem.cu_seqlens_q is not None:
            lse = lse.t().contiguous()
        saved = Saved(output, lse, empty(B, width, dtype=problem.query.dtype), empty(B, CLASSES, dtype=FULL))
        gradients = Gradients(output, empty(B, dtype=FULL), None, None)
        launch = triton("scored_attention_backward")
        return Case(
            "scored_attention_backward", name, lambda: launch(problem, saved, gradients, [True] * 5), **marks
        )  # fmt: skip

    def products(width: int, dtype: torch.dtype) -> tuple[str, ...]:
        """Which kernels have wgmma: at 256, gradients of 64 keys would spill, and fewer are no warpgroup's product."""
        return () if dtype != HALF else BACKWARD if width < 256 else ("query_gradient",)

    for width in WIDTHS:
        for dtype in (HALF, FULL):
            about = f"D {width}, {short(dtype)}"
            yield case(
                f"{about}, causal, residual", attention_problem(width, dtype),
                decisive=width in (64, 128) and dtype == HALF, wgmma=products(width, dtype),
            )  # fmt: skip
            yield case(
                f"{about}, readout mean",
                attention_problem(width, dtype, readout="mean"),
                wgmma=products(width, dtype),
            )
    everything = {"window_left": 100, "window_right": 7, "softcap": 30.0}
    yield case(
        "D 128, bfloat16, packed, window, softcap",
        attention_problem(128, HALF, packed=True, **everything),
        wgmma=BACKWARD,
    )


# ------------------------------------------------------------------------------------------------------------ selection


@of("select_top_k")
def selection() -> Iterator[Case]:
    def case(
        n: int, k: int, temperature: float, floor: float, has_valid: bool, dtype: torch.dtype, decisive: bool
    ) -> Case:
        scores = empty(n, dtype=dtype)
        valid = empty(n, dtype=torch.bool) if has_valid else None
        seed = empty(1, dtype=torch.int64) if temperature > 0 or floor > 0 else None
        launch = triton("select_top_k")
        name = f"n {n:,}, k {k:,}, {'drawn' if temperature else 'hard'}" + (", valid" if has_valid else "")
        return Case(
            "select_top_k", f"{name}, {short(dtype)}",
            lambda: launch(scores, k, temperature, floor, valid, seed, True), decisive,
        )  # fmt: skip

    for n in (4096, 1_000_000):
        yield case(n, n // 2, 0.0, 0.0, False, FULL, False)
        yield case(n, n // 2, 1.0, 0.2, True, FULL, True)
        yield case(n, n // 2, 1.0, 0.0, False, HALF, False)
    yield case(1_000_000, 1024, 1.0, 0.2, True, FULL, True)  # the last program sorts


# ------------------------------------------------------------------------------------------------- linear cross-entropy


def launch_loss(op: str, *arguments: Any) -> None:
    with no_autocast():
        triton(op)(*arguments)


def loss_call(score: list[str], tokens: int, dtype: torch.dtype, train: bool, classes: int, **options: Any) -> Call:
    fields: dict[str, Any] = {
        "input": empty(16, tokens, 1024, dtype=dtype) if tokens > 1 else empty(8192, 1024, dtype=dtype),
        "linear_weight": empty(classes, 1024, dtype=dtype),
        "target": empty(16, tokens, dtype=torch.int64) if tokens > 1 else empty(8192, dtype=torch.int64),
        "linear_bias": None, "weight": None, "example_weight": None, "cu_seqlens": None, "reduction": "mean",
        "ignore_index": -100, "label_smoothing": 0.0, "softcap": None, "shift": False, "score": score,
        "per_example": "rms", "group": None, "backend": "triton", "input_gradient": train, "weight_gradient": train,
        "bias_gradient": False,
    }  # fmt: skip
    return Call(**(fields | options))


VOCABULARY = 50257
#: Kernels with products of their own, without gradients and at 512 tokens an example; elsewhere the library multiplies.
PRODUCTS = {"logit": ("score_kernel",), "head": ("gram_kernel", "finish_kernel")}


def scorer_options(dtype: torch.dtype) -> Iterator[Case]:
    """What options add to the scorer's registers, most of them together."""
    from attent.ops.triton_scorer import score_and_select

    def case(name: str, decisive: bool, **options: Any) -> Case:
        call = loss_call(["logit"], 512, dtype, False, VOCABULARY, **options)
        return Case(
            "linear_cross_entropy", f"logit, {name}, {short(dtype)}",
            lambda: launch_loss("linear_cross_entropy", call), decisive, PRODUCTS["logit"] if half else (),
        )  # fmt: skip

    def choice(name: str, decisive: bool, score: str, temperature: float, **options: Any) -> Case:
        call = loss_call([score], 1, dtype, False, VOCABULARY, reduction="sum", **options)
        seed = empty(1, dtype=torch.int64)

        def launch() -> None:
            with no_autocast():
                score_and_select(call, 1024, temperature, 0.2 if temperature else 0.0, seed)

        return Case(
            "linear_cross_entropy", f"{name}, {short(dtype)}", launch, decisive, PRODUCTS["logit"] if half else ()
        )

    half = dtype == HALF
    bias, weight = empty(VOCABULARY, dtype=dtype), empty(VOCABULARY, dtype=FULL)
    capped = {"softcap": 30.0, "linear_bias": bias}
    everything = capped | {"label_smoothing": 0.1, "weight": weight, "example_weight": empty(16, dtype=FULL)}
    packed = {"input": empty(8192, 1024, dtype=dtype), "cu_seqlens": empty(17, dtype=torch.int32), "shift": True}
    soft = {"target": empty(16, 512, VOCABULARY, dtype=dtype)}
    yield case("softcap", False, softcap=30.0)
    yield case(
        "smoothing, softcap, bias, packed",
        half,
        **capped,
        **packed,
        label_smoothing=0.1,
        target=empty(8192, dtype=torch.int64),
    )
    yield case("all options of indices", half, **everything, shift=True)
    yield case("probabilities", False, **soft)
    yield case("all options of probabilities", True, **everything, **soft)
    yield case(
        "few tokens, all options",
        False,
        **(
            everything
            | {
                "input": empty(1, 64, 1024, dtype=dtype),
                "target": empty(1, 64, dtype=torch.int64),
                "example_weight": None,
            }
        ),
    )
    yield case("operands not aligned, softcap", False, **capped, input=empty(16, 512, 1025, dtype=dtype)[..., 1:])
    yield choice("logit, a choice", False, "logit", 0.0)
    yield choice("head, softcap, smoothing, bias, a choice drawn", True, "head", 1.0, **capped, label_smoothing=0.1)


@of("linear_cross_entropy")
def loss_forward() -> Iterator[Case]:
    for dtype in (HALF, FULL):
        for score in (["logit"], ["head"], ["hidden"]):
            for tokens in (512, 1):
                for train in (False, True):
                    call, plain = loss_call(score, tokens, dtype, train, VOCABULARY), dtype == HALF and tokens == 512
                    yield Case(
                        "linear_cross_entropy",
                        f"{score[0]}, T {tokens}, {short(dtype)}" + (", with gradients" if train else ""),
                        lambda call=call: launch_loss("linear_cross_entropy", call),
                        decisive=(plain and score == ["logit"]) or (tokens == 512 and score == ["head"] and not train),
                        wgmma=PRODUCTS.get(score[0], ()) if plain and not train else (),
                    )
        yield from scorer_options(dtype)
    everything = {
        "linear_bias": empty(1000), "weight": empty(1000), "label_smoothing": 0.1, "softcap": 30.0,
        "bias_gradient": True, "shift": True,
    }  # fmt: skip
    call = loss_call(["loss", "logit", "head"], 512, HALF, True, 1000, **everything)
    yield Case("linear_cross_entropy", "all options, bfloat16", lambda: launch_loss("linear_cross_entropy", call), True)


@of("linear_cross_entropy_backward")
def loss_backward() -> Iterator[Case]:
    call = loss_call([], 512, HALF, True, VOCABULARY, reduction="none")
    yield Case(
        "linear_cross_entropy_backward", "a loss for each token, bfloat16",
        lambda: launch_loss("linear_cross_entropy_backward", empty(16, 512, dtype=FULL), call),
    )  # fmt: skip
