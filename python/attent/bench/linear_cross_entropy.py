"""The loss that scores, beside every other way to compute the loss.

Forward (without gradients) and forward + backward, with scores off, "logit" and "head", against eager PyTorch, its
chunked ``F.linear_cross_entropy``, Liger, Cut Cross-Entropy, torch.compile, and the matrix products alone, of which a
forward has one and a training step three. Logits spread as a trained model's do (standard deviation 3), targets are
random; since the time of Cut Cross-Entropy's filtered backward depends on the data, one case has every second token
predicted confidently, as in training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attent

from .contenders import PORTABLE, Call, Contenders, Results, Workload, installed, on_gpu, on_hopper, running

SCORES = ("logit", "head")


class Problem(NamedTuple):
    input: Tensor  # [B, T, D]; [B, D] where every row is an example
    weight: Tensor  # [V, D]
    target: Tensor  # [B, T] or [B]
    train: bool  # with a backward

    @property
    def device(self) -> torch.device:
        return self.input.device

    @property
    def dtype(self) -> torch.dtype:
        return self.input.dtype

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Hidden states [N, D] and targets [N]."""
        return self.input.flatten(0, -2), self.target.flatten()


def make_problem(shape: dict[str, Any], dtype: torch.dtype, train: bool, device: torch.device) -> Problem:
    N, D, V, T = (shape[name] for name in ("tokens", "width", "vocabulary", "tokens each"))
    generator = torch.Generator(device).manual_seed(0)
    layout = (N,) if T == 1 else (N // T, T)
    hidden = torch.randn(*layout, D, generator=generator, device=device)
    weight = torch.randn(V, D, generator=generator, device=device) * (3 / D**0.5)
    target = torch.randint(V, layout, generator=generator, device=device)
    if shape["targets"] == "half confident":
        # Along its target's row of the weight, whose square norm is 9: a logit of 25 where others have deviation 25/√D.
        hidden.view(-1, D)[::2] = (weight[target] * (25 / 9)).view(-1, D)[::2]
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    return Problem(hidden.requires_grad_(train), weight.requires_grad_(train), target, train)


# ---------------------------------------------------------------------------------------------------------------- truth


def plain(problem: Problem, dtype: torch.dtype) -> Results:
    """Loss, and scores or gradients, in PyTorch's ops and one dtype, in chunks of examples where nothing is summed."""
    hidden, target = problem.rows
    hidden, weight = hidden.detach().to(dtype), problem.weight.detach().to(dtype)
    if problem.train:
        return _plain_step(hidden, weight, target, problem.input.shape)
    B, T = len(problem.input), problem.target.shape[1:].numel()
    each = max(1, (1 << 28) // (T * len(weight)))  # examples in a chunk: logits of 2^28 numbers
    losses, squares, heads = [], [], []
    for first in range(0, B, each):
        h, y = hidden[first * T : (first + each) * T], target[first * T : (first + each) * T]
        logits = F.linear(h, weight).to(torch.promote_types(dtype, torch.float32))  # [n T, V]
        losses.append(F.cross_entropy(logits, y, reduction="sum"))
        g = logits.softmax(-1)
        g[torch.arange(len(y), device=y.device), y] -= 1
        squares.append(g.square().sum(-1).view(-1, T).sum(-1))
        if T == 1:
            heads.append(squares[-1] * h.to(g.dtype).square().sum(-1))
        else:
            g, h = g.to(dtype).view(-1, T, len(weight)), h.view(-1, T, h.shape[-1])
            heads += [(gi.T @ hi).to(logits.dtype).square().sum()[None] for gi, hi in zip(g, h, strict=True)]
    scores = {"logit": torch.cat(squares), "head": torch.cat(heads)}
    results = {"loss": torch.stack(losses).sum() / len(target)} | {
        name: (square / T).sqrt() for name, square in scores.items()
    }
    return results | {"scores of the chosen": results["logit"].topk(B // 2).values}


def _plain_step(hidden: Tensor, weight: Tensor, target: Tensor, shape: torch.Size) -> Results:
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    logits = F.linear(h, w)
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target)
    of_input, of_weight = torch.autograd.grad(loss, (h, w))
    return {"loss": loss.detach(), "input gradient": of_input.view(shape), "weight gradient": of_weight}


def truth(problem: Problem) -> Results:
    return plain(problem, torch.float64 if problem.dtype == torch.float32 else torch.float32)


def peer(problem: Problem) -> Results:
    return plain(problem, problem.dtype)


# ----------------------------------------------------------------------------------------------------------- contenders

CONTENDERS = Contenders()


def step(problem: Problem, loss: Callable[[], Tensor | tuple[Tensor, Tensor]], score: str | None = None) -> Call:
    """What is timed: the forward without gradients, or the forward and its backward."""

    def run() -> Results:
        if not problem.train:
            with torch.no_grad():
                out = loss()
            return {"loss": out[0], str(score): out[1]} if isinstance(out, tuple) else {"loss": out}
        problem.input.grad = problem.weight.grad = None
        out = loss()
        value = out[0] if isinstance(out, tuple) else out
        value.backward()
        results = {"loss": value}
        for name, leaf in (("input gradient", problem.input), ("weight gradient", problem.weight)):
            if leaf.grad is None:
                raise RuntimeError(f"no {name}")
            results[name] = leaf.grad
        return results

    return run


@CONTENDERS.add("matrix products alone")
def matrix_products(problem: Problem) -> Call:
    hidden, _ = problem.rows
    hidden, weight = hidden.detach(), problem.weight.detach()
    logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    of_input, of_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> Results:
        torch.mm(hidden, weight.t(), out=logits)
        if problem.train:
            torch.mm(logits, weight, out=of_input)
            torch.mm(logits.t(), hidden, out=of_weight)
        return {}

    return run


def eager_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


@CONTENDERS.add("eager")
def eager(problem: Problem) -> Call:
    return step(problem, lambda: eager_loss(problem.rows[0], problem.weight, problem.rows[1]))


def worth_compiling(problem: Problem) -> str | None:
    return "compiling takes longer than all of the rest" if problem.input.numel() < 1 << 16 else None


@CONTENDERS.add("torch.compile", worth_compiling, compiles=True)
def compiled(problem: Problem) -> Call:
    loss = torch.compile(eager_loss, dynamic=False)
    return step(problem, lambda: loss(problem.rows[0], problem.weight, problem.rows[1]))


def has_chunks(problem: Problem) -> str | None:
    return None if hasattr(nn, "LinearCrossEntropyOptions") else f"torch {torch.__version__} has none in chunks"


@CONTENDERS.add("F.linear_cross_entropy, chunked", has_chunks)
def torch_chunked(problem: Problem) -> Call:
    options = nn.LinearCrossEntropyOptions()
    target = problem.rows[1]
    return step(problem, lambda: F.linear_cross_entropy(problem.rows[0], problem.weight, target, options=options))


@CONTENDERS.add("Liger", installed("liger_kernel", "liger-kernel"), on_gpu, compiles=True)
def liger(problem: Problem) -> Call:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

    return step(problem, lambda: loss(problem.rows[0], problem.weight, problem.rows[1]))


@CONTENDERS.add("Liger, scaled (per-token)", installed("liger_kernel", "liger-kernel"), on_gpu, compiles=True)
def liger_scaled(problem: Problem) -> Call:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as loss

    return step(problem, lambda: loss.apply(problem.rows[0], problem.weight, problem.rows[1]).mean())


def cut(filter_eps: str | None) -> Callable[[Problem], Call]:
    def make(problem: Problem) -> Call:
        from cut_cross_entropy import linear_cross_entropy as loss

        return step(problem, lambda: loss(problem.rows[0], problem.weight, problem.rows[1], filter_eps=filter_eps))

    return make


CUT = (installed("cut_cross_entropy", "cut-cross-entropy"), on_gpu)
CONTENDERS.add("Cut Cross-Entropy, filtered", *CUT, compiles=True)(cut("high"))
CONTENDERS.add("Cut Cross-Entropy, exact", *CUT, compiles=True)(cut(None))


def ours(form: str, score: str | None) -> Callable[[Problem], Call]:
    def make(problem: Problem) -> Call:
        def loss() -> Any:
            with running(form) as backend:
                return attent.linear_cross_entropy(
                    problem.input, problem.weight, problem.target, score=score, backend=backend
                )

        return step(problem, loss, score)

    return make


for backend in ("triton", "cuda", "torch"):
    for score in (None, *SCORES):
        of = {"compiles": backend == "triton"}
        CONTENDERS.add(f"attent {backend}" + (f", {score}" if score else ""), **of)(ours(backend, score))
CONTENDERS.add(f"attent {PORTABLE}, logit", on_hopper)(ours(PORTABLE, "logit"))


def forward_only(problem: Problem) -> str | None:
    return "it has no backward" if problem.train else None


def score_and_select(backend: str) -> Callable[[Problem], Call]:
    def make(problem: Problem) -> Call:
        def run() -> Results:
            selection = attent.score_and_select(
                problem.input, problem.weight, problem.target, len(problem.input) // 2, backend=backend
            )
            return {"scores of the chosen": selection.score}

        return run

    return make


for backend in ("triton", "cuda"):
    name = f"attent {backend}, logit and top-k in one launch"
    CONTENDERS.add(name, forward_only, compiles=backend == "triton")(score_and_select(backend))


# ------------------------------------------------------------------------------------------------------------- workload


def workload(shape: dict[str, Any], dtype: torch.dtype, train: bool) -> Workload:
    """``shape``: tokens, width, vocabulary, "tokens each" (of an example), targets ("random" or "half confident")."""
    N, D, V, T = (shape[part] for part in ("tokens", "width", "vocabulary", "tokens each"))
    products = 3 if train else 1
    return Workload(
        key=f"{N}×{D}×{V}, T {T}, {'forward + backward' if train else 'forward'}"
        + (f", {shape['targets']}" if shape["targets"] != "random" else ""),
        shape=shape,
        problem=lambda device: make_problem(shape, dtype, train, device),
        truth=truth,
        peer=peer,
        contenders=CONTENDERS,
        baseline="matrix products alone",
        flops=products * 2 * N * D * V,
        bytes=dtype.itemsize * (N * D + V * D) * (2 if train else 1),  # gradients are written too
        terms=max(N, V, D),
    )
