"""The Hopper kernel of scored attention on the CPU: its own source, its threads as coroutines (csrc/cuda/emulate.h).

The promises of test_cuda_scored_attention.py, and its budgets. Drawn besides: when a bulk copy lands, at some time up
to the end of a wait for it. A product reads its operands when it is waited for, as late as it may.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from attent_kernels import runtime
from attent_kernels.attention import launch_cuda
from tests import emulated
from tests import test_cuda_scored_attention as portable
from tests.test_cuda_scored_attention import HALF, LOSSES, OPTIONS, hash_of, large_problem, on_the_cpu, prepared

__all__ = ["on_the_cpu"]  # a fixture, used by every test

pytestmark = pytest.mark.slow  # the kernels' source is compiled first

#: D, Dv: tiles 64 and 128 wide, some not filled.
WIDTHS = ((64, 64), (128, 128), (40, 64), (120, 104))


@pytest.fixture(autouse=True)
def on_hopper(on_the_cpu: Any) -> Iterator[None]:
    """As on compute capability 9.0, with 3 processors."""
    with (
        mock.patch.object(launch_cuda, "runs_hopper", lambda _: True),
        mock.patch.object(runtime, "processors", lambda _: 3),
    ):
        yield


def assert_hopper_ran() -> None:
    """Of all launches of this test."""
    assert {launch.kernel for launch in launch_cuda._launches.values()} == {"hopper"}


def attend(*arguments: Any, **more: Any) -> Any:
    out = portable.attend(*arguments, **more)
    assert_hopper_ran()
    return out


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


MASKS = st.fixed_dictionaries(
    {"is_causal": st.booleans(), "softcap": maybe(st.just(2.0)), "scale": maybe(st.sampled_from([-0.3, 0.2]))},
    optional={"window": st.tuples(st.integers(-1, 150), st.integers(-1, 150))},
)
LENGTHS = st.lists(st.integers(0, 200), min_size=3, max_size=3)


@settings(max_examples=20, phases=[Phase.explicit, Phase.generate], deadline=None)
@given(
    masks=MASKS, layout=st.sampled_from(["plain", "lengths", "packed"]), queries=st.integers(17, 140), lengths=LENGTHS,
    loss=st.sampled_from(sorted(LOSSES)), dtype=st.sampled_from(HALF), schedule=st.integers(0, 2**32),
)  # fmt: skip
def test_the_kernel_is_the_specification_within_its_budget(
    masks: dict[str, Any], layout: str, queries: int, lengths: list[int], loss: str, dtype: torch.dtype, schedule: int
) -> None:
    options = {name: value for name, value in masks.items() if value is not None}
    if layout == "lengths":
        options["query_lengths"] = torch.tensor([min(n, queries) for n in lengths])
        options["key_lengths"] = torch.tensor(lengths[::-1])
    if layout == "packed":
        ends = sorted(lengths[:2])
        options["cu_seqlens_q"] = torch.tensor([0, *(min(end, queries) for end in ends), queries], dtype=torch.int32)
        options["cu_seqlens_k"] = torch.tensor([0, *ends, portable.KEYS], dtype=torch.int32)
    emulated.module().set_schedule(schedule)
    portable.run_large(*large_problem(options, loss, 64, 48, queries=queries), dtype)
    assert_hopper_ran()


CASES = [(name, loss, WIDTHS[i % 4], HALF[i % 2]) for i, (name, loss) in enumerate(itertools.product(OPTIONS, LOSSES))]


@pytest.mark.parametrize(("name", "loss", "widths", "dtype"), CASES, ids=str)
def test_many_tiles_fold_into_one_score(name: str, loss: str, widths: tuple[int, int], dtype: torch.dtype) -> None:
    emulated.module().set_schedule(hash_of(name, loss, widths))
    portable.run_large(*large_problem(OPTIONS[name], loss, *widths), dtype)
    assert_hopper_ran()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["causal", "packed"])
def test_the_order_of_blocks_threads_and_copies_changes_no_bit(name: str, loss: str) -> None:
    low, options, *_ = prepared(*large_problem(OPTIONS[name], loss, 64, 64), torch.bfloat16)
    runs = []
    for seed in (0, 1, 2):
        emulated.module().set_schedule(seed)
        runtime.poison_workspaces()
        out = attend(low, options)
        runs.append([*out[:-1], *out.selection])
    for again in runs[1:]:
        for found, wanted in zip(again, runs[0], strict=True):
            assert found is wanted is None or torch.equal(found, wanted)


def test_rows_and_keys_that_are_padding_change_nothing() -> None:
    """They may be copied, and 0 times NaN is NaN: values behind an example's last key are zeroed."""
    portable.assert_padding_changes_nothing(attend)


def test_padding_behind_the_last_row_is_stored_before_the_choice() -> None:
    """One block, whose last unit is padding: where that is staged, the choice's memory is."""
    lengths = {"query_lengths": torch.tensor([portable.QUERIES, 0, 40])}
    with mock.patch.object(runtime, "processors", lambda _: 1):
        for schedule in (1, 2):
            emulated.module().set_schedule(schedule)
            out = portable.run_large(*large_problem(lengths, "target", 64, 64), torch.bfloat16)
            assert not out.output[2, :, 40:].any()
    assert_hopper_ran()


@pytest.mark.parametrize(("widths", "keys"), [((64, 64), 900), ((128, 128), 600)])
def test_a_unit_has_more_tiles_of_keys_than_slots(widths: tuple[int, int], keys: int) -> None:
    with mock.patch.object(portable, "KEYS", keys):
        for schedule in (1, 2):
            emulated.module().set_schedule(schedule)
            portable.run_large(*large_problem({}, "target", *widths, queries=20), torch.bfloat16)
    assert_hopper_ran()


def test_an_example_is_not_touched_by_the_next_ones_values() -> None:
    low, options, *_ = prepared(*large_problem(OPTIONS["packed"], "target", 128, 128), torch.bfloat16)
    wanted = attend(low, options)
    low["value"][60:] = float("inf")
    found = attend(low, options)
    assert torch.equal(found.output[:130], wanted.output[:130]) and found.scores[0] == wanted.scores[0]


# -------------------------------------------------------------------------------------------------- which kernel runs


def refuses(
    rows: int = 512, keys: int = 512, widths: tuple[int, int] = (64, 64), only: bool = False, hopper: bool = True
) -> str | None:
    sizes = (4, 8, 1, rows, keys, *widths, False, only, not only, 2, 132, hopper)
    reason = emulated.module().hopper_attention_refuses(sizes)
    assert emulated.module().plan_scored_attention(sizes).kernel == ("hopper" if reason is None else "portable")
    return reason


def test_the_portable_kernel_runs_by_this_rule_alone() -> None:
    assert refuses() is refuses(widths=(128, 128)) is refuses(widths=(97, 8)) is refuses(rows=17) is None
    assert refuses(rows=16) == refuses(only=True) == "few queries"
    assert refuses(keys=0) == "no keys: a tensor map has one at least"
    assert refuses(widths=(64, 96)) == refuses(widths=(65, 64)) == "head dimensions from 65 to 96"
    assert refuses(widths=(129, 64)) == "head dimensions above 128"
    assert refuses(hopper=False) == "no Hopper GPU, or rows that no tensor map finds"


def test_tensor_maps_find_rows_in_any_order_that_do_not_overlap() -> None:
    tensor = torch.zeros(2, 3, 50, 64, dtype=torch.bfloat16)
    qkv = torch.zeros(2, 50, 3, 4, 64, dtype=torch.bfloat16)
    assert launch_cuda.has_map(tensor) and launch_cuda.has_map(qkv[:, :, 1].transpose(1, 2))
    assert launch_cuda.has_map(tensor[:1].expand(1, 3, 50, 64)) and launch_cuda.has_map(tensor[0].transpose(0, 1))
    assert not launch_cuda.has_map(tensor[:, :1].expand(2, 3, 50, 64))
    assert not launch_cuda.has_map(torch.zeros(1000, dtype=torch.bfloat16).as_strided((2, 1, 50, 64), (400, 0, 8, 1)))


@settings(max_examples=200)
@given(
    rows=st.integers(17, 5000), examples=st.integers(1, 300), heads=st.integers(1, 40), packed=st.booleans(),
    width=st.sampled_from([64, 128]), processors=st.integers(1, 200), target=st.booleans(),
)  # fmt: skip
def test_the_plan_is_of_persistent_blocks(
    rows: int, examples: int, heads: int, packed: bool, width: int, processors: int, target: bool
) -> None:
    sizes = (examples, heads, 1, rows, 700, width, width, packed, False, target, 0, processors)
    plan = emulated.module().plan_scored_attention((*sizes, True))
    tiles = rows // 128 + 1 + examples if packed else -(-rows // 128) * examples
    assert plan.kernel == "hopper" and plan.blocks == min(heads * tiles, processors) and plan.splits == 1
    assert plan.tickets == 1 + -(-examples // 16) + examples + 1
    assert plan.slots == heads * tiles * (1 if target else width) and plan.shared_bytes <= 227 << 10
