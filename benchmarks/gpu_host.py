"""The suite's part "host": microseconds of a public call on tiny inputs, where Python takes longer than the GPU.

Calls follow one another and are not waited for, as in training; the last one's end is. So a call's time is the host's,
or the GPU's where that is slower. torch's own calls stand beside, timed in turn: ``scaled_dot_product_attention``
computes no score and ``topk`` chooses without inclusion probabilities, so they are the least a call could cost.
``benchmarks.launch`` says, part by part, where the host's time goes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import attent
from attent.bench.contenders import said
from attent.bench.timing import interleave

#: Calls in a round and rounds: on a GPU some milliseconds and tens of them; on a CPU to see that it runs.
CALLS, ROUNDS = {"cuda": 200, "cpu": 2}, {"cuda": 15, "cpu": 2}

Calls = dict[str, Callable[[], object]]


def calls(device: torch.device) -> dict[str, Calls]:
    """What is called on the same inputs: attent by backend, and torch."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    scores, seed = torch.rand(256, generator=generator).to(device), torch.tensor([1], device=device)
    query, key, value, target = (normal(4, 12, 64, 64) for _ in range(4))
    one, labels = normal(4, 12, 1, 64), torch.arange(4, device=device)
    readout = attent.Readout(normal(10, 12 * 64), labels, normal(10))
    hidden, head = normal(512, 128), normal(1000, 128)
    targets = torch.arange(512, device=device)

    def by_backend(function: Callable[..., object], *tensors: Any, **options: Any) -> Calls:
        def call(backend: str) -> Callable[[], object]:
            return lambda: function(*tensors, **options, backend=backend)

        return {f"attent {backend}": call(backend) for backend in ("cuda", "triton", "torch")}

    attention = F.scaled_dot_product_attention
    return {
        "select_top_k, 128 of 256": by_backend(attent.select_top_k, scores, 128)
        | {"torch.topk": lambda: scores.topk(128)},
        "select_top_k, 128 of 256, drawn": by_backend(
            attent.select_top_k, scores, 128, temperature=1.0, floor=0.25, seed=seed
        ),
        "scored_attention, residual, top-k": by_backend(
            attent.scored_attention, query, key, value, target=target, is_causal=True, score="residual", top_k=2
        )
        | {"SDPA": lambda: attention(query, key, value, is_causal=True)},
        "scored_attention, one query, readout": by_backend(
            attent.scored_attention, one, key, value, readout=readout, score="logit", return_output=False
        )
        | {"SDPA": lambda: attention(one, key, value)},
        "linear_cross_entropy, logit": by_backend(attent.linear_cross_entropy, hidden, head, targets, score="logit")
        | {"F.linear and F.cross_entropy": lambda: F.cross_entropy(F.linear(hidden, head), targets)},
        "score_and_select": by_backend(attent.score_and_select, hidden, head, targets, 64),
    }


def rows(device: torch.device) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """(key, what to run) for the suite."""
    for key, contenders in calls(device).items():
        yield f"host: {key}", lambda contenders=contenders: measure(contenders, device)


@torch.no_grad()
def measure(contenders: Calls, device: torch.device) -> dict[str, Any]:
    """Microseconds a call of all that can be called; why not, of the others."""
    refused, ready = {}, {}
    for name, call in contenders.items():
        try:
            call()
            ready[name] = call
        except Exception as error:  # the others are still to be seen
            refused[name] = dict(said(error))
    times = interleave(ready, ROUNDS[device.type], 1, lambda call: seconds_each(call, device))
    found = {
        name: {"median": 1e6 * statistics.median(of.wall), "min": 1e6 * min(of.wall), "max": 1e6 * max(of.wall)}
        for name, of in times.items()
    }
    failed = {name: entry["failed"] for name, entry in refused.items() if "failed" in entry}
    return {"microseconds a call": found, "refused": refused} | ({"failed": str(failed)} if failed else {})


def seconds_each(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(wall, processor) seconds of one of many calls in a row."""
    calls = CALLS[device.type]
    if device.type == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls
