"""What of attent is no kernel and works on GPU tensors all the same: teacher, one-pass, scores of predictions, and the
ops within ``torch.compile``. Rows of the suite's part "correct".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

import attent
from attent import reference
from attent.bench.contenders import Results

from .gpu_correct import Case, Named, normal

CPU = torch.device("cpu")


def cases(device: torch.device) -> Iterator[Named]:
    yield "teacher", partial(teacher, device)
    engines = ("eager", "two_pass", "compile") if device.type == "cuda" else ("eager", "two_pass")  # it takes a minute
    for engine in engines:
        yield f"one-pass, {engine}", partial(one_pass, engine, device)
    yield "example_scores and gradient_scores", partial(predictions, device)
    if device.type == "cuda":
        yield "torch.compile, fullgraph", partial(compiled, device)


def on(device: torch.device, results: Results) -> Results:
    return {name: value.to(device) for name, value in results.items()}


def teacher(device: torch.device) -> Case:
    return Case(torch.float32, lambda _: lessons(device), lambda _: on(device, lessons(CPU)), 1)


def lessons(device: torch.device) -> Results:
    """Epochs of a teacher whose scores are there: the same examples, wherever scores are."""
    teacher = attent.Teacher(500, total_epochs=8, ratio=0.4, seed=1)
    sampler = teacher.sampler(batch_size=10)
    scores = normal(device, 20)(500).exp()
    found = {}
    for epoch in range(4):
        sampler.set_epoch(epoch)
        ids = torch.tensor([example for batch in sampler for example in batch], device=device)
        teacher.record(ids, scores[ids] / (epoch + 1))
        found[f"epoch {epoch}"] = ids
    return found


def one_pass(engine: str, device: torch.device) -> Case:
    """Gradients of the chosen rows of a forward are those of a forward of the chosen rows."""
    draw = normal(device, 21)
    x, labels = draw(64, 40), torch.arange(64, device=device) % 10
    index = torch.arange(0, 64, 3, device=device)
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(40, 80), nn.LayerNorm(80), nn.GELU(), nn.Linear(80, 10)).state_dict()

    def model(dtype: torch.dtype) -> nn.Sequential:
        made = nn.Sequential(nn.Linear(40, 80), nn.LayerNorm(80), nn.GELU(), nn.Linear(80, 10))
        made.load_state_dict(start)
        return made.to(device, dtype)

    def losses_of(learner: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, labels: nn.functional.cross_entropy(learner(x), labels, reduction="none")

    def gradients(learner: nn.Module) -> Results:
        return {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}

    def plain(dtype: torch.dtype) -> Results:
        learner = model(dtype)
        losses_of(learner)(x[index].to(dtype), labels[index]).mean().backward()
        return gradients(learner)

    def run(backend: str) -> Results:
        if backend == "torch":
            return plain(torch.float32)
        learner = model(torch.float32)
        step = attent.OnePass(losses_of(learner), engine=engine)
        step.backward(step(x, labels), index)
        return gradients(learner)

    return Case(torch.float32, run, lambda _: plain(torch.float64), 64 * 80)


def predictions(device: torch.device) -> Case:
    draw = normal(device, 22)
    logits, features, weight = draw(6, 9, 31), draw(6, 9, 16), draw(31, 16)
    target = torch.arange(54, device=device).view(6, 9) % 31
    outputs, wanted = draw(6, 12), draw(6, 12)

    def scores(module: object, dtype: torch.dtype) -> Results:
        found = {
            name: module.example_scores(  # type: ignore[attr-defined]
                logits.to(dtype), target, score=name, features=features.to(dtype), linear_weight=weight.to(dtype)
            )
            for name in ("loss", "logit", "hidden", "head")
        }
        leaf = outputs.to(dtype).detach().requires_grad_()
        losses = (leaf - wanted.to(dtype)).abs().pow(1.5).sum(1)
        return found | {"gradient": module.gradient_scores(losses, leaf)}  # type: ignore[attr-defined]

    return Case(
        torch.float32,
        lambda _: scores(attent, torch.float32), lambda _: scores(reference, torch.float64), 9 * 31,
    )  # fmt: skip


def compiled(device: torch.device) -> Case:
    """Ops in one graph of ``torch.compile``: attention, then the loss on what it returns, with gradients."""
    draw = normal(device, 23)
    tensors = {name: draw(3, 4, 50, 32) for name in ("query", "key", "value")} | {"weight": draw(201, 128)}
    target = torch.arange(150, device=device).view(3, 50)
    like = draw(3, 4, 50, 32)

    def step(module: object, of: dict[str, Tensor], extra: dict[str, str]) -> Results:
        attended = module.scored_attention(  # type: ignore[attr-defined]
            of["query"], of["key"], of["value"], target=like.to(of["query"].dtype), score="residual", is_causal=True,
            **extra,
        )  # fmt: skip
        hidden = attended.output.transpose(1, 2).flatten(2)
        loss, scores = module.linear_cross_entropy(  # type: ignore[attr-defined]
            hidden, of["weight"], target, score="logit", **extra
        )
        return {"loss": loss, "scores": scores, "attention's scores": attended.scores}

    def whole(module: object, dtype: torch.dtype, extra: dict[str, str], is_compiled: bool) -> Results:
        leaves = {name: value.to(dtype).detach().requires_grad_() for name, value in tensors.items()}
        function = torch.compile(step, fullgraph=True, dynamic=False) if is_compiled else step
        found = function(module, leaves, extra)
        gradients = torch.autograd.grad(found["loss"], list(leaves.values()))
        named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
        return {name: value.detach() for name, value in (found | named).items()}

    return Case(
        torch.float32,
        lambda backend: whole(attent, torch.float32, {"backend": backend}, backend != "torch"),
        lambda _: whole(reference, torch.float64, {}, False), 150 * 128,
    )  # fmt: skip
