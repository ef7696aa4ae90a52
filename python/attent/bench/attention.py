"""Attention that scores and selects, beside attention alone and with eager scoring.

``attent.scored_attention`` returns the output, every example's loss and score, and the lesson. It is measured against
attention alone (SDPA with each of its backends pinned, FlexAttention), which is the least it can cost, and against the
same attention followed by scoring in eager PyTorch and ``torch.topk``, which is what it replaces. "ratios" holds
attent's medians over the fastest of either kind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import attent

from .contenders import PORTABLE, Call, Contenders, Results, Workload, on_gpu, on_hopper, running


class Problem(NamedTuple):
    query: Tensor  # [B, H, Tq, D]
    key: Tensor  # [B, KV, Tk, D]
    value: Tensor
    target: Tensor | None  # [B, H, Tq, D]: "residual"
    weight: Tensor | None  # [C, H D]: "logit" of the mean-pooled readout
    labels: Tensor | None  # [B]
    is_causal: bool

    @property
    def grouped(self) -> bool:
        """Several heads of the query share one of the key and the value."""
        return self.query.shape[1] != self.key.shape[1]

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def dtype(self) -> torch.dtype:
        return self.query.dtype

    @property
    def k(self) -> int:
        return max(1, len(self.query) // 2)


def make_problem(shape: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Problem:
    B, H, KV, Tq, Tk, D, C = (shape[name] for name in ("B", "H", "KV", "Tq", "Tk", "D", "classes"))
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    # As projections leave them.
    query, key, value = (normal(B, T, heads, D).transpose(1, 2) for T, heads in ((Tq, H), (Tk, KV), (Tk, KV)))
    if C:
        labels = torch.randint(C, (B,), generator=generator, device=device)
        return Problem(query, key, value, None, normal(C, H * D), labels, shape["causal"])
    return Problem(query, key, value, normal(B, Tq, H, D).transpose(1, 2), None, None, shape["causal"])


# ---------------------------------------------------------------------------------------------------------------- truth


def scores_of(problem: Problem, output: Tensor) -> Tensor:
    """Eager scoring of an attention output, as one would write it: [B]."""
    wide = torch.promote_types(output.dtype, torch.float32)
    if problem.target is not None:
        return (output - problem.target).to(wide).square().sum(dim=(1, 2, 3)).div(output.shape[2]).sqrt()
    assert problem.weight is not None and problem.labels is not None
    pooled = output.mean(2).flatten(1)  # [B, H D]
    gradient = F.linear(pooled, problem.weight).to(wide).softmax(-1)
    gradient[torch.arange(len(gradient), device=gradient.device), problem.labels] -= 1
    norm: Tensor = torch.linalg.vector_norm(gradient, dim=1)
    return norm


def plain(problem: Problem, dtype: torch.dtype) -> Results:
    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None or not tensor.is_floating_point() else tensor.to(dtype)

    query, key, value = (tensor.to(dtype) for tensor in (problem.query, problem.key, problem.value))
    if problem.grouped:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    # Both of these hold no [T, T] matrix in any dtype; cuDNN and FlashAttention take no float32.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH] if query.is_cuda else [SDPBackend.MATH]):
        output = F.scaled_dot_product_attention(query, key, value, is_causal=problem.is_causal)
    like = problem._replace(target=cast(problem.target), weight=cast(problem.weight))
    scores = scores_of(like, output)
    return {"output": output, "scores": scores, "scores of the chosen": scores.topk(problem.k).values}


def truth(problem: Problem) -> Results:
    return plain(problem, torch.float64 if problem.dtype == torch.float32 else torch.float32)


def peer(problem: Problem) -> Results:
    return plain(problem, problem.dtype)


# ----------------------------------------------------------------------------------------------------------- contenders

CONTENDERS = Contenders()


def sdpa(backend: SDPBackend) -> Callable[[Problem], Callable[[], Tensor]]:
    def make(problem: Problem) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(
                    problem.query,
                    problem.key,
                    problem.value,
                    is_causal=problem.is_causal,
                    enable_gqa=problem.grouped,
                )

        return run

    return make


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(problem: Problem) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask

    mask = None
    if problem.is_causal:
        lengths = problem.query.shape[2], problem.key.shape[2]
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, *lengths, device=problem.device)
    attention = _compiled_flex()
    return lambda: attention(problem.query, problem.key, problem.value, block_mask=mask, enable_gqa=problem.grouped)


def is_small(problem: Problem) -> str | None:
    B, H, Tq, _ = problem.query.shape
    scores = B * H * Tq * problem.key.shape[2]
    return None if scores <= 1 << 30 else f"its [Tq, Tk] matrices hold {scores:.1e} numbers"


ALONE: dict[str, tuple[Callable[[Problem], Callable[[], Tensor]], tuple[Callable[[Any], str | None], ...]]] = {
    "SDPA, cuDNN": (sdpa(SDPBackend.CUDNN_ATTENTION), (on_gpu,)),
    "SDPA, FlashAttention": (sdpa(SDPBackend.FLASH_ATTENTION), ()),
    "SDPA, efficient": (sdpa(SDPBackend.EFFICIENT_ATTENTION), (on_gpu,)),
    "SDPA, math": (sdpa(SDPBackend.MATH), (is_small,)),
    "FlexAttention": (flex, (on_gpu,)),
}
SCORED = " + eager scoring + topk"


def alone(make: Callable[[Problem], Callable[[], Tensor]]) -> Callable[[Problem], Call]:
    def contender(problem: Problem) -> Call:
        attend = make(problem)
        return lambda: {"output": attend()}

    return contender


def scored(make: Callable[[Problem], Callable[[], Tensor]]) -> Callable[[Problem], Call]:
    def contender(problem: Problem) -> Call:
        attend = make(problem)

        def run() -> Results:
            output = attend()
            scores = scores_of(problem, output)
            return {"output": output, "scores": scores, "scores of the chosen": scores.topk(problem.k).values}

        return run

    return contender


for name, (make, checks) in ALONE.items():
    CONTENDERS.add(name, *checks, compiles=make is flex)(alone(make))
for name, (make, checks) in ALONE.items():
    CONTENDERS.add(name + SCORED, *checks, compiles=make is flex)(scored(make))


def ours(form: str, select: bool, return_output: bool = True) -> Callable[[Problem], Call]:
    def make(problem: Problem) -> Call:
        options: dict[str, Any] = {"target": problem.target, "score": "residual"}
        if problem.weight is not None and problem.labels is not None:
            options = {"readout": attent.Readout(problem.weight, problem.labels), "score": "logit"}

        def run() -> Results:
            with running(form) as backend:
                result = attent.scored_attention(
                    problem.query, problem.key, problem.value, is_causal=problem.is_causal, backend=backend,
                    enable_gqa=problem.grouped, top_k=problem.k if select else None, return_output=return_output,
                    **options,
                )  # fmt: skip
            found = {"output": result.output, "scores": result.scores}
            if result.selection is not None:
                found["scores of the chosen"] = result.selection.score
            return {name: value for name, value in found.items() if value is not None}

        return run

    return make


for backend in ("triton", "cuda", "torch"):
    of = {"compiles": backend == "triton"}
    CONTENDERS.add(f"attent {backend}", **of)(ours(backend, select=False))
    CONTENDERS.add(f"attent {backend} + top-k", **of)(ours(backend, select=True))
    CONTENDERS.add(f"attent {backend} + top-k, no output", **of)(ours(backend, select=True, return_output=False))
CONTENDERS.add(f"attent {PORTABLE} + top-k", on_hopper)(ours(PORTABLE, select=True))


def ratios(row: dict[str, Any]) -> dict[str, Any]:
    """attent's medians over those of the fastest attention alone, and of the fastest with eager scoring and topk."""
    medians = {name: entry["seconds"]["median"] for name, entry in row["contenders"].items() if "seconds" in entry}
    rivals = {
        "the fastest attention alone": [name for name in medians if name in ALONE],
        "the fastest attention" + SCORED: [name for name in medians if name.endswith(SCORED)],
    }
    found: dict[str, Any] = {}
    for of, names in rivals.items():
        if names:
            best = min(names, key=lambda name: medians[name])
            ours = {name: medians[name] / medians[best] for name in medians if name.startswith("attent")}
            found[of] = {"which": best, **ours}
    return found


# ------------------------------------------------------------------------------------------------------------- workload


def baseline(device: str, dtype: torch.dtype) -> str:
    """The attention alone that can run there, of those that are never slow: ratios are to it."""
    if device == "cpu":
        return "SDPA, FlashAttention"
    return "SDPA, cuDNN" if dtype.itemsize == 2 else "SDPA, efficient"


def workload(name: str, shape: dict[str, Any], dtype: torch.dtype, device: str) -> Workload:
    """``shape``: B, H, KV (heads of key and value), Tq, Tk, D, causal, classes (0: "residual" against a target)."""
    B, H, KV, Tq, Tk, D, causal, classes = (
        shape[part] for part in ("B", "H", "KV", "Tq", "Tk", "D", "causal", "classes")
    )
    pairs = Tq * (Tq + 1) // 2 if causal else Tq * Tk
    numbers = H * Tq + 2 * KV * Tk + (0 if classes else H * Tq) + H * Tq  # query, key, value, target; output
    return Workload(
        key=f"{name}: B {B}, H {H}, D {D}" + (f", {classes} classes" if classes else ""),
        shape=shape,
        problem=lambda device: make_problem(shape, dtype, device),
        truth=truth,
        peer=peer,
        contenders=CONTENDERS,
        baseline=baseline(device, dtype),
        flops=4 * B * H * pairs * D + 2 * B * classes * H * D,
        bytes=dtype.itemsize * (B * D * numbers + classes * H * D),
        terms=max(Tk, D, H * D * Tq),
        summary=ratios,
    )
