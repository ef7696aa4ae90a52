"""Mutants of the Hopper kernel of scored attention: each wait, release and rescale that is left out is noticed.

All are in one build of the kernel's source: where a mutant differs, the code asks which one is wanted. The tests'
own judgement decides, test_cuda_hopper_attention.py's: a result beyond its budget, a ticket left open, or what the
emulator finds, a race or a wait without an end.

One that is not noticed, and so not here: without the __syncwarp before values are said to be there, a lane's zeros may
come after that. The emulator's products read their operands as late as they may, when all lanes have stored.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from attent import reference
from attent_kernels import native, runtime
from attent_kernels.attention import launch_cuda
from tests import emulated
from tests import test_cuda_scored_attention as portable
from tests import test_triton_scored_attention as budgets
from tests.test_cuda_hopper_attention import assert_hopper_ran
from tests.test_cuda_scored_attention import HALF, NAN, OPTIONS, call, large_problem, prepared

pytestmark = pytest.mark.slow  # the kernel's source is compiled

COPIES, PRODUCTS, KERNEL, TILE = (
    f"csrc/cuda/{name}.cuh"
    for name in ("scored_attention_sm90_copies", "scored_attention_sm90_products", "scored_attention_sm90",
                 "attention_tile")
)  # fmt: skip

#: Where the source is, what stands there, and which occurrence of it.
Site = tuple[str, str, int]

KEYS_ARE_THERE = "hopper::wait(memory.keys_are_there(keys.slot), keys.round);"
VALUES_ARE_THERE = "hopper::wait(memory.values_are_there(values.slot), values.round);"
ALL_PRODUCTS = "hopper::wait_for_products<T, 0>();"
ROUND = "round_probabilities<C>(p, s);"
RELEASE_KEYS = "release(memory.keys_are_read(keys.slot), at);"
RELEASE_VALUES = "release(memory.values_are_read(values.slot), at);"
FENCE_VALUES = "hopper::fence_products(flat(found.output[0]), p);"
SHRINK = "shrink_output<C>(found, 0, shrink);"
QUERIES_FREE = "hopper::wait(memory.queries_are_read(), (number & 1) ^ 1);"
KEYS_FREE = "hopper::wait(memory.keys_are_read(keys.slot), keys.round ^ 1);"
VALUES_FREE = "hopper::wait(memory.values_are_read(values.slot), values.round ^ 1);"

#: By name: the problem that shows it, and what stands at some sites instead.
MUTANTS: dict[str, tuple[str, dict[Site, str]]] = {
    "the first keys are not waited for": ("plain", {(PRODUCTS, KEYS_ARE_THERE, 0): ""}),
    "the next keys are not waited for": ("plain", {(PRODUCTS, KEYS_ARE_THERE, 1): ""}),
    "values are not waited for": ("plain", {(PRODUCTS, VALUES_ARE_THERE, 0): ""}),
    "the last values are not waited for": ("plain", {(PRODUCTS, VALUES_ARE_THERE, 1): ""}),
    "the first keys are not released": ("plain", {(PRODUCTS, RELEASE_KEYS, 0): ""}),
    "the next keys are not released": ("plain", {(PRODUCTS, RELEASE_KEYS, 1): ""}),
    "values are not released": ("plain", {(PRODUCTS, RELEASE_VALUES, 0): ""}),
    "the last values are not released": ("plain", {(PRODUCTS, RELEASE_VALUES, 1): ""}),
    "keys are released before they are multiplied": (
        "long",
        {
            (PRODUCTS, RELEASE_KEYS, 1): "",
            (PRODUCTS, "hopper::wait_for_products<T, 1>();", 0): f"{RELEASE_KEYS} hopper::wait_for_products<T, 1>();",
        },
    ),
    "values are released before they are multiplied": (
        "long",
        {(PRODUCTS, RELEASE_VALUES, 0): "", (PRODUCTS, ALL_PRODUCTS, 1): f"{RELEASE_VALUES} {ALL_PRODUCTS}"},
    ),
    "keys are copied over what is not released": ("long", {(COPIES, KEYS_FREE, 0): ""}),
    "values are copied over what is not released": ("long", {(COPIES, VALUES_FREE, 0): ""}),
    "queries are copied over what is not released": ("plain", {(COPIES, QUERIES_FREE, 0): ""}),
    "the unit is not waited for": ("plain", {(KERNEL, "hopper::wait(memory.unit_is_there(), number & 1);", 0): ""}),
    "a unit is described where the one before is": (
        "plain",
        {(COPIES, "described[number & 1]", 0): "described[0]", (KERNEL, "described[number & 1]", 0): "described[0]"},
    ),
    "lanes leave a unit without keys one by one": ("lengths", {(PRODUCTS, "__syncwarp();", 0): ""}),
    "values behind the last key are not zeroed": (
        "lengths",
        {(COPIES, "store_shared_16(start + at, make_uint4(0, 0, 0, 0));", 0): ""},
    ),
    "zeros begin a row late": ("lengths", {(COPIES, "own * hopper::ROW_BYTES", 0): "(own + 1) * hopper::ROW_BYTES"}),
    "zeros begin a row early": ("lengths", {(COPIES, "own * hopper::ROW_BYTES", 0): "(own - 1) * hopper::ROW_BYTES"}),
    "zeros are stored before the copy lands": ("lengths", {(COPIES, "hopper::wait(landing, landed);", 0): ""}),
    "zeros are not published": ("lengths", {(COPIES, "hopper::publish_stores();", 0): ""}),
    "probabilities are overwritten before they are multiplied": (
        "plain",
        {(PRODUCTS, ALL_PRODUCTS, 1): "", (PRODUCTS, ROUND, 1): f"{ROUND} {ALL_PRODUCTS}"},
    ),
    "the output shrinks before the product is added": (
        "plain",
        {(PRODUCTS, ALL_PRODUCTS, 1): f"{SHRINK} {ALL_PRODUCTS}", (PRODUCTS, SHRINK, 0): ""},
    ),
    "scores are read before they are whole": ("plain", {(PRODUCTS, "hopper::wait_for_products<T, 1>();", 0): ""}),
    "the output does not shrink": ("plain", {(PRODUCTS, SHRINK, 0): ""}),
    "products start without a fence": ("plain", {(PRODUCTS, FENCE_VALUES, 0): ""}),
    "accumulators are not fenced": ("plain", {(PRODUCTS, FENCE_VALUES, 0): "hopper::fence_products(p);"}),
    "probabilities are not fenced": (
        "plain",
        {(PRODUCTS, FENCE_VALUES, 0): "hopper::fence_products(flat(found.output[0]));"},
    ),
    "the last key tile of a causal unit is skipped": (
        "causal",
        {(TILE, "max(high - tiles.low, 0) + C::BLOCK_N - 1", 1): "max(high - tiles.low, 0) - 1"},
    ),
    "the causal bound is a key early": ("causal", {(TILE, "last.last", 0): "last.last - 1"}),
    "the diagonal's tile is not masked": ("causal", {(TILE, "first.last", 0): "last.last"}),
    "the choice begins before padding is stored": ("lengths", {(KERNEL, "C::block().wait();", 0): ""}),
    "the ticket of units stays open": ("plain", {(COPIES, "*ticket = 0;", 0): ""}),
}


def spans() -> tuple[emulated.Span, ...]:
    """At each site: the mutants' code when they are wanted, otherwise the kernel's own."""
    wanted: dict[Site, list[tuple[int, str]]] = {}
    for number, (_, sites) in enumerate(MUTANTS.values()):
        for site, code in sites.items():
            wanted.setdefault(site, []).append((number, code))
    asks = "#include <cstdlib>\nnamespace attent { inline bool mutant(int number) { const char* wanted = "
    asks += 'std::getenv("ATTENT_MUTANT"); return wanted != nullptr && std::atoi(wanted) == number; } }\n'
    found = [emulated.Span("csrc/cuda/scored_attention_sm90.cu", 0, 0, asks)]
    for (path, own, occurrence), codes in wanted.items():
        text = (emulated.ROOT / path).read_text()
        start = -1
        for _ in range(occurrence + 1):
            start = text.index(own, start + 1)
        new = own
        for number, code in codes:
            if own.endswith(";"):
                new = f"{{ if (attent::mutant({number})) {{ {code} }} else {{ {new} }} }}"
            else:
                new = f"(attent::mutant({number}) ? ({code}) : ({new}))"
        found.append(emulated.Span(path, start, start + len(own), new))
    return tuple(found)


@pytest.fixture(autouse=True)
def on_hopper() -> Iterator[None]:
    """The build with mutants, as on compute capability 9.0, on one processor: its block runs through all the slots."""
    module = emulated.mutated("csrc/cuda/scored_attention_sm90.cu", spans())
    runtime.poison_workspaces()
    launch_cuda._launches.clear()
    backends = {"scored_attention": "cuda"}
    choose = mock.patch.object(
        portable.scored_attention_op.dispatch, "choose", lambda op, *_: backends.get(op, "torch")
    )
    with (
        choose,
        mock.patch.object(emulated, "module", lambda: module),
        mock.patch.object(native, "module", module),
        mock.patch.object(launch_cuda, "runs_hopper", lambda _: True),
        mock.patch.object(runtime, "processors", lambda _: 1),
    ):
        yield
    launch_cuda._launches.clear()
    for lent in runtime._workspaces.values():
        lent.counters.zero_()


@functools.cache
def problem(name: str) -> tuple[Any, ...]:
    """As the kernel takes it, keys and values that are padding being NaN; and the truth."""
    torch.manual_seed(0)
    options, queries, keys = PROBLEMS[name]
    with mock.patch.object(portable, "KEYS", keys):
        tensors, arguments = large_problem(options, "target", 64, 64, queries=queries)
    if name == "long":  # one unit of more tiles of keys than slots
        tensors = {name: t[:1, :1] for name, t in tensors.items()}
        arguments |= {"target": arguments["target"][:1, :1], "enable_gqa": False, "top_k": 1}
    low, options, exact_tensors, exact_options = prepared(tensors, arguments, HALF[1])
    exact = call(reference.scored_attention, exact_tensors, exact_options)
    given = {name: t.clone() for name, t in low.items()}
    for example, length in enumerate(options.get("key_lengths", ())):
        given["key"][example, :, length:] = NAN
        given["value"][example, :, length:] = NAN
    return low, given, options, exact


#: Options, queries, keys. "causal": of the first tile's rows the last one alone looks at the second tile of keys.
PROBLEMS: dict[str, tuple[dict[str, Any], int, int]] = {
    "plain": ({}, 150, 200),
    "causal": (OPTIONS["causal"], 199, 200),
    "lengths": ({"query_lengths": torch.tensor([150, 150, 40]), "key_lengths": torch.tensor([0, 190, 130])}, 150, 200),
    "long": ({}, 70, 1400),
}


def run(name: str, seed: int) -> None:
    low, given, options, exact = problem(name)
    emulated.module().set_schedule(seed)
    out = portable.attend(given, options)
    assert_hopper_ran()
    with mock.patch.object(budgets, "KEYS", PROBLEMS[name][2]):
        budgets.check(out, exact, low, options, HALF[1])
    assert runtime.open_tickets() == 0


#: Until one shows the mutant: of keys that are released before they are multiplied it is the sixth, 1 in 3 do.
SCHEDULES = 8


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_kernel_itself_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTENT_MUTANT", raising=False)
    for seed in (1, 2, 3):
        run(name, seed)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTENT_MUTANT", str(list(MUTANTS).index(name)))
    with pytest.raises((AssertionError, RuntimeError)):
        for seed in range(1, SCHEDULES + 1):
            run(MUTANTS[name][0], seed)
