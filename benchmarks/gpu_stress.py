"""The suite's part "stress": what only a GPU can get wrong. Whatever happens, results are the same to the bit.

poisoned      workspaces are filled with NaN before each launch: nothing is read that was not written in that launch
delayed       every tile waits for a time of its own before it takes a ticket: no order of arrival changes anything
two streams   thousands of small launches alternate between two streams, each with its own workspace
graph         a captured launch is replayed a thousand times: tickets are back at 0 after each
one launch    the profiler counts the kernels of a call

``python -m benchmarks.gpu_stress --digest NAME``: the digest of an operation's results, for a child process whose
environment delays tiles.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import attent
from attent.bench.contenders import running, said
from attent_kernels import native

from .gpu_children import Refused
from .gpu_correct import TINY, Sizes, normal

Operation = Callable[[], list[Tensor]]

#: Launches of each kind: on a GPU, and where kernels are interpreted or absent, to see that this code runs.
LAUNCHES = {"poisoned": (200, 2), "two streams": (10_000, 4), "graph": (1_000, 1)}
#: Operations that promise one launch.
ONE_LAUNCH = (
    "attention, residual and top-k",
    "attention, readout and top-k",
    "attention, one query",
    "loss, logit",
    "scores and top-k",
    "selection, 3000",
)
#: Of these, those that on a Hopper GPU backend "cuda" has a kernel of its own for.
HOPPER = ("attention, residual and top-k", "attention, readout and top-k", "loss, logit", "scores and top-k")
#: Seconds for a delayed process: it starts, compiles and runs one operation once.
DELAYED_LIMIT = 60


def operations(device: torch.device, form: str, sizes: Sizes) -> dict[str, Operation]:
    """Small calls with several tiles, tickets and folds each; their results as tensors.

    ``form``: a backend, or ``contenders.PORTABLE``.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    draw = normal(device, 11)
    B, H, D, T = 6, 4, sizes.width, sizes.queries
    query, key, value, target = (draw(B, H, T, D).to(dtype) for _ in range(4))
    one, many = draw(B, H, 1, D).to(dtype), draw(B, H, sizes.many_keys, D).to(dtype)
    readout = attent.Readout(draw(33, H * D).to(dtype), torch.arange(B, device=device))
    hidden, head = draw(B, sizes.tokens, sizes.hidden).to(dtype), draw(sizes.classes, sizes.hidden).to(dtype)
    labels = torch.arange(B * sizes.tokens, device=device).view(B, -1) % sizes.classes
    scores = draw(100_000 if device.type == "cuda" else 3000).exp()

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Operation:
        def run() -> list[Tensor]:
            result = attent.scored_attention(query, key, value, backend=backend, **options)
            selection = [] if result.selection is None else [*result.selection]
            flat = [result.output, result.logsumexp, result.losses, result.logits, result.scores, *selection]
            return [tensor for tensor in flat if tensor is not None]

        return run

    def loss(score: str) -> Operation:
        def run() -> list[Tensor]:
            with torch.no_grad():
                return [*attent.linear_cross_entropy(hidden, head, labels, score=score, backend=backend)]

        return run

    # The seed is a tensor: a number would be copied to the device, which a graph cannot capture.
    drawn: dict[str, Any] = {"temperature": 1.0, "floor": 0.25, "seed": torch.tensor([1], device=device)}
    backend = form.split(",")[0]
    found = {
        "attention, residual and top-k": attention(
            query, key, value, target=target, is_causal=True, score="residual", top_k=3
        ),
        "attention, readout and top-k": attention(query, key, value, readout=readout, score="head", top_k=3, **drawn),
        "attention, one query": attention(one, many, many, readout=readout, score="logit", top_k=2),
        "loss, logit": loss("logit"),
        "loss, head": loss("head"),
        "scores and top-k": lambda: [
            *attent.score_and_select(hidden, head, labels, B // 2, backend=backend, **drawn),
        ],
        "selection, 3000": lambda: [*attent.select_top_k(scores[:3000], 1200, backend=backend, **drawn)],
        "selection, all": lambda: [*attent.select_top_k(scores, len(scores) // 2, backend=backend, **drawn)],
    }
    return {name: in_form(form, operation) for name, operation in found.items()}


def in_form(form: str, operation: Operation) -> Operation:
    def run() -> list[Tensor]:
        with running(form):
            return operation()

    return run


def digest(tensors: list[Tensor]) -> str:
    """Of the bytes of the results."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(bits(tensor.cpu()).numpy().tobytes())
    return found.hexdigest()


def rows(device: torch.device, form: str, sizes: Sizes) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """(key, what to run) for the suite, the most decisive first."""
    found = operations(device, form, sizes)
    for name in ONE_LAUNCH:
        hopper = form == "cuda" and name in HOPPER and native.runs_hopper(device)
        yield f"one launch: {name}", lambda of=(found[name], device, hopper): count_launches(*of)
    for name, operation in found.items():
        yield f"delayed: {name}", lambda of=(name, operation, device, form): delayed(*of)
    for kind, stress in {"poisoned": poisoned, "graph": replayed, "two streams": two_streams}.items():
        launches = LAUNCHES[kind][device.type != "cuda"]
        for name, operation in found.items():
            yield f"{kind}: {name}", lambda operation=operation, stress=stress, n=launches: stress(operation, device, n)


def first(operation: Operation) -> list[Tensor]:
    try:
        return operation()
    except ValueError as error:
        if "unavailable" in said(error):
            raise Refused(said(error)["unavailable"]) from None
        raise


def same(results: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Whether all bytes are equal, on the device: nothing is read back."""
    pairs = zip(results, wanted, strict=True)
    return torch.stack([(bits(result) == bits(like)).all() for result, like in pairs]).all()


def bits(tensor: Tensor) -> Tensor:
    """Its bytes: NaN equals itself there, and 0 is not −0."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def poisoned(operation: Operation, device: torch.device, launches: int) -> dict[str, Any]:
    from attent_kernels import runtime

    wanted = [tensor.clone() for tensor in first(operation)]
    different = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(launches):
        runtime.poison_workspaces()
        different += ~same(operation(), wanted)
    return _counted(launches, int(different), runtime.open_tickets())


def two_streams(operation: Operation, device: torch.device, launches: int) -> dict[str, Any]:
    if device.type != "cuda":
        return {"unavailable": "no CUDA device"}
    from attent_kernels import runtime

    wanted = [tensor.clone() for tensor in first(operation)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    different = [torch.zeros((), dtype=torch.int64, device=device) for _ in streams]
    torch.cuda.synchronize()
    for i in range(launches):
        with torch.cuda.stream(streams[i % 2]):
            different[i % 2] += ~same(operation(), wanted)
    torch.cuda.synchronize()
    return _counted(launches, sum(int(count) for count in different), runtime.open_tickets())


def replayed(operation: Operation, device: torch.device, launches: int) -> dict[str, Any]:
    if device.type != "cuda":
        return {"unavailable": "no CUDA device"}
    from attent_kernels import runtime

    wanted = [tensor.clone() for tensor in first(operation)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        operation()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = operation()
    different = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(launches):
        for tensor in results:
            tensor.zero_()
        graph.replay()
        different += ~same(results, wanted)
    return _counted(launches, int(different), runtime.open_tickets())


def _counted(launches: int, different: int, tickets: int) -> dict[str, Any]:
    result: dict[str, Any] = {"launches": launches, "different": different, "open tickets": tickets}
    if different or tickets:
        result["failed"] = f"{different} of {launches} differ, {tickets} tickets are open"
    return result


def count_launches(operation: Operation, device: torch.device, hopper: bool) -> dict[str, Any]:
    """``hopper``: whether it is a Hopper kernel that has to be launched."""
    first(operation)
    if device.type != "cuda":
        return {"unavailable": "no CUDA device"}
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        operation()
        torch.cuda.synchronize()
    kernels = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
    ]
    if not kernels:
        return {"unavailable": "the profiler saw no kernel at all"}
    result: dict[str, Any] = {"kernels": kernels}
    if len(kernels) != 1:
        return result | {"failed": f"{len(kernels)} kernels"}
    return result if not hopper or "hopper" in kernels[0] else result | {"failed": f"no Hopper kernel: {kernels[0]}"}


def delayed(name: str, operation: Operation, device: torch.device, form: str) -> dict[str, Any]:
    """The digest of a process whose tiles wait, beside this process's."""
    if os.environ.get("TRITON_INTERPRET") == "1" and form == "triton":
        return {"unavailable": "Triton's interpreter knows no inline assembly, which the delay is"}
    here = digest(first(operation))
    command = [sys.executable, "-m", "benchmarks.gpu_stress", "--digest", name, "--device", device.type, "--form", form]
    environment = os.environ | {"ATTENT_DELAY_TILES": "1"}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DELAYED_LIMIT)
    if child.returncode != 0:
        return {"failed": f"the delayed process ended with {child.returncode}: {child.stderr[-300:]}"}
    return same_digest(here, child.stdout.splitlines()[-1])


def same_digest(here: str, there: str) -> dict[str, Any]:
    """Without delay and with it."""
    return {"digest": here} | ({} if here == there else {"failed": f"different when delayed: {there}"})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_stress", description="The digest of an operation.")
    parser.add_argument("--digest", metavar="NAME", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--form", default="triton")
    asked = parser.parse_args(arguments)
    device = torch.device(asked.device)
    sizes = Sizes() if device.type == "cuda" else TINY
    print(digest(operations(device, asked.form, sizes)[asked.digest]()))


if __name__ == "__main__":
    main()
