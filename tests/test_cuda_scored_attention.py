"""The CUDA C++ form of scored attention on the CPU: the kernel's own source, its threads as coroutines (emulate.h).

Within the same budgets as the Triton form (test_triton_scored_attention.py). Every run draws the order in which threads
and blocks go on and the moment at which each asynchronous copy happens, so that a missing barrier or wait shows.
"""

from __future__ import annotations

import itertools
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attent import reference
from attent.ops import cuda_scored_attention, scored_attention, scored_attention_op
from tests import emulated
from tests import test_triton_scored_attention as budgets
from tests.test_scored_attention import call, cu_seqlens, problems
from tests.test_triton_scored_attention import assert_lesson_is_of_its_own_scores, check

pytestmark = pytest.mark.slow  # the kernels' source is compiled first

NAN = float("nan")
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[Any]:
    """The emulated module in the launcher's place, scratch memory all NaN; all tickets are 0 afterwards."""
    from attent_kernels import native, runtime
    from attent_kernels.attention import launch_cuda

    module = emulated.module()
    runtime.poison_workspaces()
    chosen = mock.patch.object(scored_attention_op.dispatch, "choose", lambda op, *_: BACKENDS.get(op, "torch"))
    launch_cuda._launches.clear()
    with mock.patch.object(native, "module", module), chosen:
        yield module
    module.set_schedule(0)
    assert runtime.open_tickets() == 0


BACKENDS = {"scored_attention": "cuda"}


def attend(tensors: dict[str, Tensor], options: dict[str, Any], **more: Any) -> Any:
    """attent.scored_attention by the emulated kernel, of which the backend says that it takes the call."""
    refuses = cuda_scored_attention.refuses
    seen: list[str | None] = []
    run = scored_attention.run

    def look(problem: Any, scoring: Any) -> Any:
        seen.append(refuses(problem))
        return run(problem, scoring)

    with mock.patch.object(scored_attention, "run", look):
        out = call(scored_attention.scored_attention, tensors, options, **more)
    assert seen == [None]
    return out


def aligned(tensor: Tensor, dtype: torch.dtype, order: int = 0) -> Tensor:
    """In another dtype, its rows at multiples of 16 bytes with NaN between them; heads, or rows, outermost."""
    width = tensor.shape[-1]
    outer = [tensor.shape[:-1], tuple(reversed(tensor.shape[:-1]))][order]
    stored = torch.full((*outer, -(-width // 8) * 8 + 8), NAN, dtype=dtype)[..., :width]
    if order:
        stored = stored.permute(*reversed(range(len(outer))), len(outer))
    return stored.copy_(tensor)


def prepared(
    tensors: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype, order: int = 0
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """The problem as the kernel takes it, and in float64."""
    low = {
        name: aligned(t, dtype, order) if name in ("query", "key", "value") else t.to(dtype)
        for name, t in tensors.items()
    }
    low_options = dict(options)
    if "target" in options:
        low_options["target"] = aligned(options["target"], dtype, order)
    exact = {name: t.double() for name, t in low.items()}
    exact_options = {n: x.double() if n == "target" else x for n, x in low_options.items()}
    return low, low_options, exact, exact_options


@settings(max_examples=60, phases=[Phase.explicit, Phase.generate])
@given(
    problem=problems(),
    dtype=st.sampled_from(HALF),
    return_output=st.booleans(),
    order=st.integers(0, 1),
    schedule=st.integers(0, 2**32),
)
def test_the_kernel_is_the_specification_within_its_budget(
    problem: tuple[dict[str, Tensor], dict[str, Any]],
    dtype: torch.dtype,
    return_output: bool,
    order: int,
    schedule: int,
) -> None:
    low, options, exact_tensors, exact_options = prepared(*problem, dtype, order)
    exact = call(reference.scored_attention, exact_tensors, exact_options)
    emulated.module().set_schedule(schedule)
    out = attend(low, options, return_output=return_output)
    check(out, exact, low, options, dtype)
    if out.selection is not None:
        assert_lesson_is_of_its_own_scores(out, options, low["query"])


# ------------------------------------------------------------------------------------- sizes that take several tiles

QUERIES, KEYS = 150, 200  # two tiles of queries, four or seven of keys

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window on both sides": {"window": (70, 30)},
    "causal window and softcap": {"window": (100, -1), "is_causal": True, "softcap": 3.0},
    "negative scale": {"scale": -0.3},
    "lengths": {
        "query_lengths": torch.tensor([QUERIES, 0, 40]),
        "key_lengths": torch.tensor([0, KEYS, 130]),
        "is_causal": True,
    },
    "packed": {"cu_seqlens_q": cu_seqlens(130, 0, 20), "cu_seqlens_k": cu_seqlens(60, 37, 103), "is_causal": True},
}
LOSSES: dict[str, dict[str, Any]] = {
    "target": {"score": "residual", "per_example": "mean"},
    "mean": {"score": "head", "labels": torch.tensor([6, 0, 170])},
    "last": {"score": "logit", "labels": torch.tensor([6, 0, 170])},
}
#: D, Dv: the widest decides over the tile, 64, 96, 128, 192 or 256 wide; some are not whole chunks of 8.
WIDTHS = ((64, 40), (24, 91), (128, 128), (160, 192), (256, 200))


def large_problem(
    options: dict[str, Any], loss: str, width: int, value_width: int, queries: int = QUERIES, weight_dtype: Any = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Three examples of two heads that share keys; 171 classes: two rounds of a block's warps."""
    lead_q, lead_k = (3, 2, queries), (3, 1, KEYS)
    if "cu_seqlens_q" in options:
        lead_q, lead_k = (queries, 2), (KEYS, 1)
    tensors = {
        "query": torch.randn(*lead_q, width),
        "key": torch.randn(*lead_k, width),
        "value": torch.randn(*lead_k, value_width),
    }
    arguments = {**options, **LOSSES[loss], "enable_gqa": True}
    arguments |= {"top_k": 2, "temperature": 1.0, "floor": 0.5, "seed": 3}
    if loss == "target":
        arguments["target"] = torch.randn(*lead_q, value_width)
    else:
        tensors |= {"weight": torch.randn(171, 2 * value_width) / 16, "bias": torch.randn(171)}
        arguments["pool"] = loss
    return tensors, arguments


def run_large(tensors: dict[str, Tensor], arguments: dict[str, Any], dtype: torch.dtype, **more: Any) -> Any:
    low, options, exact_tensors, exact_options = prepared(tensors, arguments, dtype)
    exact = call(reference.scored_attention, exact_tensors, exact_options)
    before = emulated.module().launches()
    out = attend(low, options, **more)
    assert emulated.module().launches() == before + 1
    with mock.patch.object(budgets, "KEYS", KEYS):
        check(out, exact, low, options, dtype)
    assert_lesson_is_of_its_own_scores(out, options, low["query"])
    return out


CASES = [
    *((name, loss, WIDTHS[i % 5], HALF[i % 2]) for i, (name, loss) in enumerate(itertools.product(OPTIONS, LOSSES))),
    *(("causal", "target", widths, torch.bfloat16) for widths in WIDTHS),
]


@pytest.mark.parametrize(("name", "loss", "widths", "dtype"), CASES, ids=str)
def test_many_tiles_fold_into_one_score(name: str, loss: str, widths: tuple[int, int], dtype: torch.dtype) -> None:
    emulated.module().set_schedule(hash_of(name, loss, widths))
    run_large(*large_problem(OPTIONS[name], loss, *widths), dtype)


def hash_of(*what: object) -> int:
    """A schedule that a test keeps from run to run."""
    return zlib.crc32(repr(what).encode())


@pytest.mark.parametrize(
    ("queries", "loss", "widths"),
    [(1, "mean", (64, 40)), (1, "target", (128, 128)), (3, "last", (200, 256)), (16, "mean", (96, 96))],
)
def test_the_keys_of_few_queries_are_split_across_blocks(queries: int, loss: str, widths: tuple[int, int]) -> None:
    from attent_kernels import runtime

    options = {"key_lengths": torch.tensor([KEYS, 0, 130]), "is_causal": True}
    with (
        mock.patch.object(runtime, "processors", return_value=1000),
        mock.patch.object(sys.modules[__name__], "KEYS", 1100),
    ):
        tensors, arguments = large_problem(options, loss, *widths, queries=queries)
        emulated.module().set_schedule(hash_of(queries, loss))
        run_large(tensors, arguments, torch.bfloat16)


@pytest.mark.parametrize("loss", ["mean", "last"])
@pytest.mark.parametrize(("weight_dtype", "width"), [(torch.float32, 64), (torch.bfloat16, 33), (torch.float16, 24)])
def test_a_weight_of_another_dtype_or_an_odd_width_is_read_as_it_is(
    loss: str, weight_dtype: torch.dtype, width: int
) -> None:
    tensors, arguments = large_problem({}, loss, 64, width)
    low, options, exact_tensors, exact_options = prepared(tensors, arguments, torch.bfloat16)
    low |= {"weight": tensors["weight"].to(weight_dtype), "bias": tensors["bias"]}
    exact_tensors |= {"weight": low["weight"].double(), "bias": tensors["bias"].double()}
    exact = call(reference.scored_attention, exact_tensors, exact_options)
    out = attend(low, options)
    with mock.patch.object(budgets, "KEYS", KEYS):
        check(out, exact, low, options, torch.bfloat16)


# ------------------------------------------------------------------------------------------------------ the protocol


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["causal", "packed"])
def test_the_order_of_blocks_threads_and_copies_changes_no_bit(name: str, loss: str) -> None:
    from attent_kernels import runtime

    tensors, arguments = large_problem(OPTIONS[name], loss, 64, 64)
    low, options, *_ = prepared(tensors, arguments, torch.bfloat16)
    runs = []
    for seed in (0, 1, 2):
        emulated.module().set_schedule(seed)
        runtime.poison_workspaces()
        out = attend(low, options)
        runs.append([*out[:-1], *out.selection])
    for again in runs[1:]:
        for name_, found, wanted in zip((*out._fields[:-1], *out.selection._fields), again, runs[0], strict=True):
            assert found is wanted is None or torch.equal(found, wanted), name_


def assert_padding_changes_nothing(attend: Callable[..., Any]) -> None:
    options = OPTIONS["lengths"]
    low, low_options, *_ = prepared(*large_problem(options, "mean", 64, 64), torch.bfloat16)
    wanted = attend(low, low_options)
    for example in range(3):
        low["query"][example, :, options["query_lengths"][example] :] = NAN
        low["key"][example, :, options["key_lengths"][example] :] = NAN
        low["value"][example, :, options["key_lengths"][example] :] = NAN
    found = attend(low, low_options)
    assert all(torch.equal(x, y) for x, y in zip(found[:-1], wanted[:-1], strict=True))


def test_rows_and_keys_that_are_padding_are_not_read() -> None:
    assert_padding_changes_nothing(attend)


def test_lengths_and_cu_seqlens_outside_of_the_tensors_are_clamped() -> None:
    """Not read on the host, so checked in the kernel: as the nearest that are inside."""
    tensors, arguments = large_problem(OPTIONS["packed"], "target", 64, 64)
    low, options, *_ = prepared(tensors, arguments, torch.bfloat16)
    wrong, right = [30, 90, 60, 2**31 - 1], [30, 90, 90, QUERIES]
    outs = []
    for cu in (right, wrong):
        options["cu_seqlens_q"] = torch.tensor(cu, dtype=torch.int32)
        with mock.patch.object(scored_attention, "check_cu_seqlens", lambda *_: None):
            outs.append(attend(low, options))
    assert torch.equal(outs[0].output[30:], outs[1].output[30:])
    assert torch.equal(outs[0].scores, outs[1].scores)


def test_a_label_that_does_not_exist_makes_its_example_nan() -> None:
    tensors, arguments = large_problem({}, "mean", 64, 64)
    low, options, *_ = prepared(tensors, arguments, torch.bfloat16)
    options["labels"] = torch.tensor([6, 171, -1])
    with mock.patch.object(scored_attention, "values_readable", lambda *_: False):
        out = attend(low, options)
    assert out.losses.isnan().tolist() == out.scores.isnan().tolist() == [False, True, True]
    assert not out.logits.isnan().any()


# ------------------------------------------------------------------------------------------------- plan, and refusals


@settings(max_examples=200)
@given(
    rows=st.integers(0, 5000),
    examples=st.integers(1, 300),
    heads=st.integers(1, 40),
    widths=st.tuples(st.integers(1, 256), st.integers(1, 256)),
    keys=st.integers(0, 40000),
    packed=st.booleans(),
    only=st.booleans(),
    target=st.booleans(),
)
def test_the_plan_cuts_work_as_the_triton_launcher_does(
    rows: int, examples: int, heads: int, widths: tuple[int, int], keys: int, packed: bool, only: bool, target: bool
) -> None:
    from attent_kernels.attention.configurations import FEW_QUERIES, splits
    from attent_kernels.attention.layout import packed_tiles

    only = only and not target
    plan = emulated.module().plan_scored_attention(
        (examples, heads, 1, rows, keys, *widths, packed, only, target, 1 if only else 0, 132, False)
    )
    if only:
        tiles = examples if packed else 1
    else:
        tiles = packed_tiles(rows, examples, plan.block_m) if packed else max(1, -(-rows // plan.block_m))
    units = heads * tiles * (1 if packed else examples)
    few = only or rows <= FEW_QUERIES
    assert plan.tiles == tiles and (plan.block_m == 16) == few
    parts = splits(units, keys // examples if packed else keys, plan.block_n, 132) if few else 1
    assert plan.splits == parts and plan.blocks == units * parts
    assert plan.width >= max(widths) and plan.shared_bytes <= 99 << 10
    assert plan.tickets == 1 + -(-examples // 16) + examples + (units if parts > 1 else 0)
    assert plan.slots == (units if target else 0 if only else units * plan.width)


def refused(**changes: Any) -> str | None:
    tensors, arguments = large_problem({}, "target", 64, 64)
    low, options, *_ = prepared(tensors, arguments, torch.bfloat16)
    problem = scored_attention_op.Problem(
        low["query"], low["key"], low["value"], options["target"], None, None, None, None, None, None, None, False,
        0.125, -1, -1, None, "mean", "all", "cuda",
    )  # fmt: skip
    return cuda_scored_attention.refuses(problem._replace(**changes))


def test_what_the_kernel_does_not_take_is_refused_with_the_reason() -> None:
    assert refused() is None
    assert refused(query=torch.zeros(3, 2, 5, 64)) == "it takes float16 and bfloat16, not float32"
    wide = torch.zeros(3, 2, 5, 264, dtype=torch.bfloat16)
    assert refused(query=wide, key=wide) == "it takes head dimensions up to 256, not 264"
    assert "a target in query's bfloat16, not float32" in (refused(target=torch.zeros(3, 2, QUERIES, 64)) or "")
    odd = torch.zeros(3, 1, KEYS, 65, dtype=torch.bfloat16)[..., 1:]
    assert "of key, its rows do not all start at multiples of 16 bytes" in (refused(key=odd) or "")
    columns = torch.zeros(3, 1, 64, KEYS, dtype=torch.bfloat16).mT
    assert "of value, its columns are 200 numbers apart" in (refused(value=columns) or "")
    weight = torch.zeros(5, 128, dtype=torch.float64)
    assert "a readout weight in float16, bfloat16 or float32" in (refused(target=None, readout_weight=weight) or "")
