"""``python -m benchmarks.launch``: what happens on the host between a public call and its CUDA launch, in microseconds.

No GPU is needed, and none is used: tensors are on the CPU, the dispatcher is told that they are on a GPU, and what
launches in the native module is replaced by its twin that takes the same arguments, checks them and starts nothing. So
a call does all that it does before a launch but three questions to CUDA (current device, current stream, is it
capturing), and it allocates from the CPU's allocator in place of CUDA's.

A part's cost is the call's, less that of the call with the part replaced by something that has its answer ready. All
variants run in turn, round by round; times are this process's processor seconds, which do not count what other
processes do, and the smallest is told beside the median, which still sees how they crowd the caches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import attent
from attent.ops import dispatch, kernel_scored_attention, linear_cross_entropy, select_top_k
from attent.ops import score_and_select as scored_selection
from attent_kernels import cuda_select, native, runtime
from attent_kernels.attention import launch_cuda
from attent_kernels.linear_cross_entropy import launch_scorer_cuda

from .provenance import provenance, save

CALLS = 200  # of a variant in a round: some tens of milliseconds, 1e5 of the clock's steps
#: What issue D asks for, in microseconds.
TARGET = 10.0

Call = Callable[[], Any]
Patch = tuple[Any, str, Any]  # object, attribute, what stands in its place


class Standing:
    """The native module, its launching functions replaced."""

    def __init__(self, module: Any) -> None:
        self.__dict__.update({name: getattr(module, name) for name in dir(module)})
        self.select_top_k = module.testing.not_select_top_k


@contextmanager
def without_launching() -> Iterator[None]:
    """CPU tensors take the way of CUDA tensors, to a launch that does not happen."""
    usual = dispatch.choose

    def choose(op: str, backend: str, device: torch.device, *call: Any) -> str:
        return usual(op, backend, torch.device("cuda", 0), *call)

    patches: list[Patch] = [
        (native, "module", Standing(native.module)),
        (native, "cuda_unavailable", lambda *_: None),
        (dispatch, "choose", choose),
        (linear_cross_entropy, "choose", choose),
        (scored_selection, "choose", choose),
        # On a GPU labels are not read.
        (linear_cross_entropy, "values_readable", lambda _: False),
        (select_top_k, "values_readable", lambda _: False),
    ]
    launches = native.module.ScorerLaunch, native.module.AttentionLaunch
    with patched(patches), torch.no_grad(), ExitStack() as stack:
        for launch in launches:  # a build without CUDA has no start
            stack.enter_context(mock.patch.object(launch, "start", launch.not_start, create=True))
        yield


@contextmanager
def patched(patches: list[Patch]) -> Iterator[None]:
    with ExitStack() as stack:
        for thing, name, value in patches:
            stack.enter_context(mock.patch.object(thing, name, value))
        yield


# ---------------------------------------------------------------------------------------------------------------- calls


def calls() -> dict[str, Call]:
    """Small ones: the host's work does not depend on sizes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    scores, seed = torch.rand(256, generator=generator), torch.tensor([1])
    query, key, value, target = (normal(4, 12, 64, 64) for _ in range(4))
    one = normal(4, 12, 1, 64)
    readout = attent.Readout(normal(10, 12 * 64), torch.arange(4), normal(10))
    hidden, head, labels = normal(8, 64, 128), normal(1000, 128), torch.arange(8 * 64).view(8, 64)
    rows, row_labels = hidden.view(512, 128), labels.view(512)
    drawn: dict[str, Any] = {"temperature": 1.0, "floor": 0.25, "seed": seed}
    return {
        "select_top_k, hard": lambda: attent.select_top_k(scores, 128, backend="cuda"),
        "select_top_k, drawn": lambda: attent.select_top_k(scores, 128, **drawn, backend="cuda"),
        "scored_attention, residual, top k": lambda: attent.scored_attention(
            query, key, value, target=target, is_causal=True, score="residual", top_k=2, backend="cuda"
        ),
        "scored_attention, one query, readout, nothing returned": lambda: attent.scored_attention(
            one, key, value, readout=readout, score="logit", return_output=False, backend="cuda"
        ),
        "linear_cross_entropy, logit": lambda: attent.linear_cross_entropy(
            hidden, head, labels, score="logit", backend="cuda"
        ),
        "score_and_select": lambda: attent.score_and_select(rows, head, row_labels, 64, backend="cuda"),
    }


def parts(call: Call) -> dict[str, list[Patch]]:
    """What is replaced, by name. Ready answers are those of one call that does everything."""
    seen: dict[str, Any] = {}

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            seen[name] = function(*arguments, **options)
            return seen[name]

        return run

    launchers = {
        "select": (cuda_select, "select_top_k"),
        "attention": (launch_cuda, "scored_attention"),
        "scorer": (launch_scorer_cuda, "score_tokens"),
    }
    with patched([(module, name, noted(key, getattr(module, name))) for key, (module, name) in launchers.items()]):
        call()
    launcher: list[Patch] = [
        (*launchers[key], lambda *_, ready=ready, **options: ready) for key, ready in seen.items() if key in launchers
    ]
    return {
        "launcher": launcher,
        "workspace": lent_at_once(call),
        "outputs": allocated_at_once(call),
    }


def lent_at_once(call: Call) -> list[Patch]:
    """Workspaces that are there already."""
    ready: list[Any] = []
    usual = runtime.lend

    def noted(*arguments: Any) -> Any:
        ready.append(usual(*arguments))
        return ready[-1]

    places = (runtime, cuda_select, launch_scorer_cuda)
    with patched([(place, "lend", noted) for place in places]):
        call()
    return [(place, "lend", lambda *_: ready[0]) for place in places]


def allocated_at_once(call: Call) -> list[Patch]:
    """Outputs that are there already: each time a call asks for its i-th, it gets the same one."""
    made: list[Tensor] = []
    usual = runtime.allocator

    def noted(device: torch.device) -> Any:
        def empty(*of: Any) -> Tensor:
            made.append(usual(device)(*of))
            return made[-1]

        return empty

    places = (runtime, cuda_select, launch_scorer_cuda, kernel_scored_attention)
    with patched([(place, "allocator", noted) for place in places]):
        call()
    again = itertools.cycle(made)
    return [(place, "allocator", lambda _: lambda *_: next(again)) for place in places] if made else []


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(call: Call, rounds: int) -> dict[str, Any]:
    """Of the call and, part by part, of what it costs."""
    with without_launching():
        variants = {"call": [], **parts(call)}
        times: dict[str, list[float]] = {name: [] for name in variants}
        for i in range(rounds + 1):
            for name, patches in variants.items():
                with patched(patches):
                    seconds = seconds_each(call)
                if i > 0:  # the first warms up
                    times[name].append(seconds * 1e6)
    found: dict[str, Any] = {"call": summary(times.pop("call"))}
    for name, without in times.items():
        found[name] = {key: found["call"][key] - value for key, value in summary(without).items()}
    return found


def seconds_each(call: Call) -> float:
    started = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - started) / CALLS


def summary(times: list[float]) -> dict[str, float]:
    return {"least": min(times), "median": median(times)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launch", description="From Python to a CUDA launch.")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/launch/")
    parser.add_argument("--json", type=Path, help="write the result there")
    asked = parser.parse_args(arguments)
    scale = {"a Python call": lambda: None, "torch.empty(128)": lambda: torch.empty(128)}
    result: dict[str, Any] = {
        "provenance": provenance(),
        "unit": "microseconds",
        "scale": {
            name: summary([seconds_each(call) * 1e6 for _ in range(asked.rounds)]) for name, call in scale.items()
        },
        "calls": {},
    }
    print(f"scale: {result['scale']}")
    for name, call in calls().items():
        row = result["calls"][name] = measure(call, asked.rounds)
        said = ", ".join(f"{part} {of['least']:.1f} ({of['median']:.1f})" for part, of in row.items())
        print(f"{name}: {said}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")
    if asked.save:
        print(f"saved to {save('launch', result)}")


if __name__ == "__main__":
    main()
