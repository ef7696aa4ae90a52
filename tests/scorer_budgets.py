"""By how much the Triton scorer's results may be off the specification's: derived, from the problem, in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attent import reference

from .linear_cross_entropy_problems import Problem

U = 2.0**-24


def is_single(problem: Problem) -> bool:
    return "cu_seqlens" not in problem.options and problem.input.shape[1:-1].numel() == 1


def names_for(problem: Problem) -> tuple[str, ...]:
    return ("loss", "logit", "head") if is_single(problem) else ("logit", "loss")


class Budget:
    """By how much losses and squared norms may be off, derived from the problem in float64.

    A logit is a float32 sum of D products and a bias: off by (D + 1) u Σ|h_d w_d|. Its exponential is off by the
    rounding of z̃ − m and of its product with log2(e), 3 u |z̃ − m|, as much as if z̃ were off by that; |z̃ − m| is at
    most twice the largest |z̃|. A cap's series and quotient are off by 7 u c. In all a logit is off by ``e``.

    A token's loss changes with its logits by ‖g‖₁ <= 2 M at most, so by 2 M e; its sums have V terms and some twenty
    operations of numbers up to M (2 max|z̃| + log V).
    g = d (M p − μ) changes by M/2 |Δp| + 2 M |Δd|, |Δd| <= 2/c: by e √V M (1 + 4/c) in norm. ‖g‖² is then off by twice
    ‖g‖ times that and its square; its own sums by (V + 30) u, of ‖g‖² for index targets without smoothing, else of
    what is added and subtracted there, at most 4 M² (see the header of ``online.py``).
    """

    def __init__(self, problem: Problem) -> None:
        options, (classes, width) = problem.options, problem.linear_weight.shape
        bias, weight, softcap = (options.get(name) for name in ("linear_bias", "weight", "softcap"))
        hidden = problem.input.reshape(-1, width)
        size = (hidden.abs() @ problem.linear_weight.abs().T + (0 if bias is None else bias.abs())).amax(1)  # [N]
        cap = 0.0 if softcap is None else softcap
        largest = size if softcap is None else size.clamp(max=softcap)
        error = U * ((width + 1) * size + 6 * largest + 7 * cap)
        mass = 1.0 if weight is None else float(weight.max())
        terms = (classes + 20) * U
        loss = mass * (2 * error + terms * (2 * largest + math.log(classes) + 1))
        self.loss = float(loss.max()) if len(loss) else 0.0
        change = error * math.sqrt(classes) * mass * (1 + (4 / cap if cap else 0))
        self.change = float(change.max()) if len(change) else 0.0
        self.terms = (classes + 30) * U
        self.mass = mass
        self.is_spread = problem.target.is_floating_point() or options.get("label_smoothing", 0) > 0

    def square(self, tokens: Tensor, square: Tensor) -> Tensor:
        """Of Σ_t ‖g_t‖² of so many tokens; Σ‖g_t‖ <= √T √Σ‖g_t‖²."""
        kept = 4 * self.mass**2 * tokens if self.is_spread else square
        return 2 * (tokens * square).sqrt() * self.change + tokens * self.change**2 + (self.terms + tokens * U) * kept


def assert_is_reference(problem: Problem, loss: Tensor, scores: dict[str, Tensor], **how: Any) -> None:
    exact = problem.to(torch.float64)
    options: dict[str, Any] = {**exact.options, **how}
    expected, right = reference.linear_cross_entropy(*exact[:3], **options, score=names_for(problem))
    budget = Budget(exact)
    assert loss.dtype == torch.float32 and loss.shape == expected.shape
    lengths = torch.tensor(problem.lengths, dtype=torch.float64)
    n = torch.tensor([int(problem.valid(i).sum()) for i in range(len(lengths))], dtype=torch.float64)

    # What is added up: (1 + T) roundings of numbers that are at most the largest token loss, and that loss's error.
    token_losses = reference.linear_cross_entropy(*exact[:3], **{**options, "reduction": "none"}).abs()
    most = float(token_losses.max()) if token_losses.numel() else 0.0
    factor = options.get("example_weight")
    factor = 1.0 if factor is None or not len(factor) else float(factor.max())
    per_token = budget.loss * factor + 4 * U * most
    tokens = float(n.sum())
    of_sum = tokens * (per_token + (tokens + 4) * U * most)
    reduction = how.get("reduction", "mean")
    if reduction == "mean":
        whole = reference.linear_cross_entropy(*exact[:3], **{**options, "reduction": "sum"})
        denominator = abs(float(whole) / float(expected)) if float(expected) else 1.0
        of_sum = of_sum / denominator + 8 * U * abs(float(expected))
    allowed = {"none": per_token, "example": per_token + (float(lengths.max()) if len(lengths) else 0) * U * most}
    error = (loss - expected).abs()
    assert bool((error <= allowed.get(reduction, of_sum)).all()), (loss, expected)

    square_of_scale = {"mean": n.clamp(min=1) ** -2, "sum": n**0, "rms": 1 / n.clamp(min=1)}[how["per_example"]]
    for name, values in scores.items():
        truth = right[name]
        if name == "loss":
            bound = budget.loss + (lengths + 8) * U * truth.abs().clamp(min=budget.loss)
            difference = (values - truth).abs()
        else:
            features = torch.ones(())
            if name == "head":  # of one token, ‖g‖ times the length of [h 1]
                features = exact.input.reshape(len(n), exact.input.shape[-1]).square().sum(1) + (
                    exact.options["linear_bias"] is not None
                )
            whole = truth.square() / square_of_scale  # Σ_t ‖g_t‖² ‖features‖²
            bound = features * budget.square(n, whole / features.clamp(min=1e-300)) + 16 * U * whole
            bound = square_of_scale * (bound + exact.input.shape[-1] * U * whole)
            difference = (values.double().square() - truth.square()).abs()
        assert values.dtype == torch.float32 and bool((difference <= bound).all()), (name, values, truth, bound)
