"""``python -m benchmarks.one_pass``: a one-pass step beside two-pass, masked loss and full training, one CPU thread.

Two learners, a vision transformer and a GPT. A step is forward, choice by loss and backward; the optimizer, the same
for all, is left out. Engines: eager; compiled operation by operation (``aot_eager``); compiled by Inductor.

Time is processor time of the process, contenders in turn round by round; each ratio is the median of the rounds' ratios
to a full step: of eager PyTorch, and for Inductor of ``torch.compile`` too. Memory is the peak of what PyTorch's
allocator holds above what it held when the step began, over that of the full step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attent
from attent.bench.timing import interleave, ratio

from .provenance import provenance, save

RATIOS = (0.25, 0.5, 0.75)
ENGINES = ("eager", "aot_eager", "inductor", "two_pass", "masked")
#: Inductor's baseline is a full step under torch.compile.
FULL, FULL_COMPILED = "full", "full, torch.compile"
#: engine -> most that its step may take at r = 0.5, over a full step.
TARGETS = {"eager": 0.75, "aot_eager": 0.72, "inductor": 0.72}
DEPTH = 4


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).reshape(B, T, D))
        return x + self.feed(self.norm2(x))


@dataclass
class Learner:
    """A model, its per-example loss, and a batch of B examples."""

    name: str
    shape: dict[str, int]
    model: nn.Module
    losses: Callable[..., Tensor]
    batch: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        return len(self.batch[0])

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)


def vision_transformer(batch: int = 64, tokens: int = 65, width: int = 192, depth: int = DEPTH) -> Learner:
    """Embedded patches [B, T, D], classified by the first."""
    torch.manual_seed(0)
    body = nn.Sequential(*(Block(width, 3, causal=False) for _ in range(depth)), nn.LayerNorm(width))
    model = nn.ModuleList([body, nn.Linear(width, 10)])

    def losses(x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model[1](model[0](x)[:, 0]), labels, reduction="none")

    shape = {"batch": batch, "tokens": tokens, "width": width, "depth": depth}
    return Learner("ViT", shape, model, losses, (torch.randn(batch, tokens, width), torch.randint(10, (batch,))))


def gpt(batch: int = 16, tokens: int = 128, width: int = 256, depth: int = DEPTH, vocabulary: int = 4096) -> Learner:
    """Tokens [B, T], each predicting the next."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
    body = nn.Sequential(*(Block(width, 4, causal=True) for _ in range(depth)), nn.LayerNorm(width))
    model = nn.ModuleList([embedding, body, head])

    def losses(text: Tensor) -> Tensor:
        logits = head(body(embedding(text))[:, :-1])
        per_token = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), reduction="none")
        return per_token.view(len(text), -1).mean(1)

    shape = {"batch": batch, "tokens": tokens, "width": width, "depth": depth, "vocabulary": vocabulary}
    return Learner("GPT", shape, model, losses, (torch.randint(vocabulary, (batch, tokens)),))


def contenders(learner: Learner, ratios: tuple[float, ...], engines: tuple[str, ...]) -> dict[str, Callable[[], None]]:
    """Full steps, and a step of each engine for each keep ratio, named "engine at ratio"."""

    def full(losses: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            learner.clear()
            torch.autograd.backward(losses(*learner.batch).mean())

        return run

    def masked(chosen: int) -> Callable[[], None]:
        def run() -> None:
            learner.clear()
            losses = learner.losses(*learner.batch)
            torch.autograd.backward(losses[losses.detach().topk(chosen).indices].mean())

        return run

    def taught(step: attent.OnePass, chosen: int) -> Callable[[], None]:
        def run() -> None:
            learner.clear()
            losses = step(*learner.batch)
            step.backward(losses, losses.detach().topk(chosen).indices)

        return run

    steps = {FULL: full(learner.losses)}
    if "inductor" in engines:
        steps[FULL_COMPILED] = full(torch.compile(learner.losses))
    for engine in engines:
        one_pass = None
        if engine in ("eager", "two_pass"):
            one_pass = attent.OnePass(learner.losses, engine=engine)
        elif engine != "masked":
            one_pass = attent.OnePass(learner.losses, engine="compile", compile_backend=engine)
        for keep in ratios:
            chosen = int(keep * learner.size + 0.5)
            steps[_name(engine, keep)] = masked(chosen) if one_pass is None else taught(one_pass, chosen)
    return steps


def _name(engine: str, keep: float) -> str:
    return f"{engine} at {keep:g}"


def allocated_peak(step: Callable[[], object]) -> int:
    """Bytes that PyTorch's CPU allocator holds at most while a step runs, above what it held before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    results = profiler.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = most = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        most = max(most, held)
    return most


def measure(learner: Learner, rounds: int, ratios: tuple[float, ...], engines: tuple[str, ...]) -> dict[str, Any]:
    """Every engine's step over a full one, time and memory."""
    steps = contenders(learner, ratios, engines)
    timings = interleave(steps, rounds, warmup=2)
    allocated_peak(steps[FULL])  # the first profile of a process counts what the profiler itself begins with
    peaks = {name: allocated_peak(step) for name, step in steps.items()}
    rows = []
    for engine in engines:
        for keep in ratios:
            name = _name(engine, keep)
            row: dict[str, Any] = {
                "engine": engine,
                "r": keep,
                "step / full": ratio(timings[name], timings[FULL], "cpu"),
            }
            if engine == "inductor":
                row["step / full, torch.compile"] = ratio(timings[name], timings[FULL_COMPILED], "cpu")
            row["peak / full"] = peaks[name] / peaks[FULL]
            rows.append(row)
    return {
        "shape": learner.shape,
        "full step, seconds": timings[FULL].spread("cpu"),
        "full step, peak MiB": peaks[FULL] / 2**20,
        "counting forward 1, backward 2": {
            "one-pass": {f"{keep:g}": (1 + 2 * keep) / 3 for keep in ratios},
            "two-pass": {f"{keep:g}": (1 + 3 * keep) / 3 for keep in ratios},
        },
        "rows": rows,
    }


LEARNERS: dict[str, Callable[[], Learner]] = {"ViT": vision_transformer, "GPT": gpt}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one_pass", description="What a one-pass step costs.")
    parser.add_argument("--learners", nargs="+", choices=list(LEARNERS), default=list(LEARNERS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds of each contender (default 7)")
    parser.add_argument("--save", action="store_true", help="keep the result under benchmarks/results/one_pass/")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"provenance": provenance(), "clock": "processor time of the process", "learners": {}}
    for name in asked.learners:
        found = measure(LEARNERS[name](), asked.rounds, tuple(asked.ratios), tuple(asked.engines))
        result["learners"][name] = found
        seconds = found["full step, seconds"]["median"]
        print(f"\n{name} {found['shape']}: full step {seconds:.2f} s, peak {found['full step, peak MiB']:.0f} MiB")
        for row in found["rows"]:
            print(_line(row), flush=True)
    if asked.save:
        print(f"\nsaved to {save('one_pass', result)}")
    else:
        print(json.dumps(result["provenance"]))


def _line(row: dict[str, Any]) -> str:
    text = f"  {row['engine']:<10} r = {row['r']:<5g}"
    for key in ("step / full", "step / full, torch.compile"):
        if key in row:
            found = row[key]
            text += f" {key} {found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}] "
    text += f" peak / full {row['peak / full']:.2f}"
    target = TARGETS.get(row["engine"]) if row["r"] == 0.5 else None
    if target is not None:
        value = row.get("step / full, torch.compile", row["step / full"])["median"]
        text += f"   target <= {target:g} {'met' if value <= target else 'MISSED'}"
    return text


if __name__ == "__main__":
    main()
