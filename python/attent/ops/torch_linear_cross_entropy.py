"""Linear cross-entropy and its scores in chunked PyTorch: what the backend ``"torch"`` runs.

A chunk is a run of tokens whose logits [C, V] fit in 64 MB: written by one GEMM, read for the loss and the scores, turned
in place into the gradient of the logits where that is needed, multiplied into the gradients of input and weight, and
overwritten by the next chunk. No [tokens, V] tensor exists. Smaller chunks would sit in cache between the passes, but each
GEMM reads the whole weight again: at D = 512, V = 32768 the GEMMs alone take 1.2 times as long with 16 MB, 1.9 with 4 MB.

With half-precision inputs all but the GEMMs is float32, and the weight's gradient is summed over chunks in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .head_scores import MAX_BYTES, head_features, head_square, long_head_square
from .logits_passes import Statistics, Targets, cap_, choose_passes, gradient_, logits, square_norms, token_masses
from .tokens import Tokens

class Problem(NamedTuple):
    """What is the same for every chunk."""

    linear_weight: Tensor | None  # [V, D]
    linear_bias: Tensor | None  # [V]
    prediction: Tensor | None  # [N, V] logits, or values, already in hand; None: hidden times linear_weight
    targets: Targets
    softcap: float | None
    score: tuple[str, ...]
    per_example: str
    input_gradient: bool
    weight_gradient: bool
    bias_gradient: bool

    def write(self, tokens: Tokens, a: int, b: int, v: int, w: int, out: Tensor) -> Tensor:
        """Logits (or values) [b − a, w − v] of tokens [a, b) and columns [v, w), written to ``out``."""
        if self.prediction is not None:
            return out.copy_(self.prediction[a:b, v:w])
        assert self.linear_weight is not None
        bias = None if self.linear_bias is None else self.linear_bias[v:w]
        return logits(tokens.part(a, b)[0], self.linear_weight[v:w], bias, out)


class Result(NamedTuple):
    losses: Tensor  # [N] −Σ_v m_v log p_v
    scores: Tensor  # [S, B]
    input_gradient: Tensor | None  # [N, D]
    weight_gradient: Tensor | None  # [V, D]
    bias_gradient: Tensor | None  # [V]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def run(tokens: Tokens, problem: Problem, upstream: Tensor | None) -> Result:
    """One pass over the chunks: losses, scores and, where asked for, gradients given the upstream gradient [N] of ℓ_t."""
    weight, bias, shard = problem.linear_weight, problem.linear_bias, problem.targets.shard
    n, batch = len(tokens.hidden), len(tokens.counts)
    classes = len(weight) if problem.prediction is None and weight is not None else shard.classes
    dtype, device = tokens.counts.dtype, tokens.hidden.device
    one_each = tokens.offsets is None
    wanted = set(problem.score)
    whole_examples = "head" in wanted and not one_each

    losses = torch.empty(n, dtype=dtype, device=device)
    of_logit = torch.empty_like(losses) if "logit" in wanted or ("head" in wanted and one_each) else None
    of_hidden = torch.empty_like(losses) if "hidden" in wanted else None
    of_head = torch.zeros(batch, dtype=dtype, device=device) if whole_examples else None
    kept = torch.empty(n, 2, dtype=dtype, device=device) if whole_examples else None  # logsumexp, own entry
    gradients = Gradients(tokens, problem, upstream)
    need_gradient = gradients.wanted or of_hidden is not None or whole_examples

    passes = choose_passes(problem.targets, problem.softcap, tokens.target)
    # Shards of a vocabulary must cut the tokens alike: the rows are counted for an even share of it.
    row_bytes = max(1, -(-shard.classes // shard.ranks)) * dtype.itemsize * (1 if problem.softcap is None else 2)
    rows = max(1, MAX_BYTES // row_bytes)
    starts = tokens.starts() if whole_examples else None
    buffer = torch.empty(min(rows, n), classes, dtype=dtype, device=device)

    for chunk in plan(n, rows, starts):
        a, b = chunk.first, chunk.last
        hidden, target, scale = tokens.part(a, b)
        z = problem.write(tokens, a, b, 0, classes, buffer[: b - a])
        statistics = passes.statistics_(z, target, gradient_follows=need_gradient or of_logit is not None)
        square = statistics.square
        losses[a:b] = scaled(statistics.losses, scale)
        if need_gradient or (of_logit is not None and square is None):
            passes.gradient_(z, target, statistics)
        if of_logit is not None:
            of_logit[a:b] = scaled(shard.sum_(square_norms(z)) if square is None else square, scale, power=2)
        if not need_gradient:
            continue
        product = None  # ∂ℓ_t/∂h_t before the token's scale, [C, D]
        if weight is not None and (problem.input_gradient or of_hidden is not None):
            product = shard.sum_((z.to(weight.dtype) @ weight).to(dtype))
        if of_hidden is not None and product is not None:
            of_hidden[a:b] = scaled(square_norms(product), scale, power=2)
        if of_head is not None and kept is not None and starts is not None:
            features = head_features(hidden, scale, bias is not None, dtype)
            for i in chunk.examples:
                of_example = slice(starts[i] - a, starts[i + 1] - a)
                of_head[i] = head_square(z[of_example], features[of_example])
            keep(kept[a:b], statistics)
        gradients.add(a, b, z, hidden, product, scale)

    if of_head is not None and kept is not None and starts is not None:
        for i in range(batch):
            if starts[i + 1] - starts[i] > rows:
                of_head[i] = long_example(tokens, problem, starts[i], starts[i + 1], kept)
        shard.sum_(of_head)
    elif "head" in wanted and of_logit is not None:  # one token: ‖g hᵀ‖ = ‖g‖ ‖h‖, and of_logit carries the scale
        hidden, _, _ = tokens.part(0, n)
        of_head = of_logit * (square_norms(hidden.to(dtype)) + (bias is not None))
    scores = combine(tokens, problem, losses, {"logit": of_logit, "hidden": of_hidden, "head": of_head})
    return Result(losses, scores, *gradients.finish())


def scaled(values: Tensor, scale: Tensor | None, power: int = 1) -> Tensor:
    """Token values times the token's scale, or its square."""
    if scale is None:
        return values
    return values * (scale if power == 1 else scale.square())


def combine(
    tokens: Tokens, problem: Problem, losses: Tensor, squares: dict[str, Tensor | None]
) -> Tensor:
    """The named scores [S, B] from what was summed per token ("logit", "hidden") or per example ("head")."""
    if not problem.score:
        return losses.new_empty(0, len(tokens.counts))
    n = tokens.counts.clamp(min=1)
    scale = {"mean": n.reciprocal(), "sum": torch.ones_like(n), "rms": n.rsqrt()}[problem.per_example]
    scores = []
    for name in problem.score:
        if name == "loss":  # always the mean
            scores.append(tokens.by_example(losses) / n)
            continue
        square = squares[name]
        assert square is not None
        if name != "head":
            square = tokens.by_example(square)
        scores.append(square.sqrt() * scale)
    return torch.stack(scores)


# -------------------------------------------------------------------------------------------------- plan of the chunks


class Chunk(NamedTuple):
    first: int
    last: int
    examples: range  # the examples that lie whole in this chunk, where that was asked for


def plan(n: int, rows: int, starts: list[int] | None) -> list[Chunk]:
    """Cut n tokens into chunks of at most ``rows``; given the examples' starts, keep each example that fits in one."""
    if starts is None:
        return [Chunk(a, min(a + rows, n), range(0)) for a in range(0, n, rows)]
    chunks: list[Chunk] = []
    i, examples = 0, len(starts) - 1
    while i < examples:
        first = starts[i]
        if starts[i + 1] - first > rows:
            chunks += [Chunk(a, min(a + rows, starts[i + 1]), range(0)) for a in range(first, starts[i + 1], rows)]
            i += 1
            continue
        j = i + 1
        while j < examples and starts[j + 1] - first <= rows:
            j += 1
        if starts[j] > first:
            chunks.append(Chunk(first, starts[j], range(i, j)))
        i = j
    return chunks


# ----------------------------------------------------------------------------------------------------------- gradients


class Gradients:
    """Gradients of input, weight and bias, summed up chunk by chunk."""

    def __init__(self, tokens: Tokens, problem: Problem, upstream: Tensor | None) -> None:
        weight, bias = problem.linear_weight, problem.linear_bias
        self.wanted = problem.input_gradient or problem.weight_gradient or problem.bias_gradient
        self.upstream = upstream
        self.dtype = tokens.hidden.dtype

        def zeros(like: Tensor | None) -> Tensor:
            assert like is not None
            return torch.zeros(like.shape, dtype=tokens.counts.dtype, device=like.device)

        self.input = torch.empty_like(tokens.hidden) if problem.input_gradient else None
        self.weight = zeros(weight) if problem.weight_gradient else None
        self.bias = zeros(bias) if problem.bias_gradient else None

    def add(self, a: int, b: int, z: Tensor, hidden: Tensor, product: Tensor | None, scale: Tensor | None) -> None:
        """Add tokens [a, b): logit gradients z [C, V], inputs [C, D] and z's product with the weight [C, D]."""
        if not self.wanted:
            return
        assert self.upstream is not None
        factor = scaled(self.upstream[a:b], scale)
        if self.input is not None and product is not None:
            self.input[a:b] = product * factor[:, None]
        if self.weight is not None:
            weighted = (hidden * factor[:, None]).to(self.dtype)
            if self.weight.dtype == self.dtype:
                self.weight.addmm_(z.t(), weighted)
            else:
                self.weight += torch.mm(z.to(self.dtype).t(), weighted)
        if self.bias is not None:
            self.bias.addmv_(z.t(), factor)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        weight = None if self.weight is None else self.weight.to(self.dtype)
        return self.input, weight, None if self.bias is None else self.bias.to(self.dtype)


# ------------------------------------------------------------------------------------- examples longer than one chunk


def keep(rows: Tensor, statistics: Statistics) -> None:
    """Keep what a second pass needs to write a token's gradient: logsumexp and the own column's entry [C, 2]."""
    rows[:, 0] = statistics.logsumexp
    rows[:, 1] = statistics.losses.neg().expm1_() if statistics.own is None else statistics.own


def long_example(tokens: Tokens, problem: Problem, first: int, last: int, kept: Tensor) -> Tensor:
    """‖Σ_t g_t h_tᵀ‖² of an example whose logits do not fit in a chunk: the vocabulary once more, in slabs."""
    targets = problem.targets
    hidden, target, scale = tokens.part(first, last)
    logsumexp, own = kept[first:last].unbind(1)
    features = head_features(hidden, scale, problem.linear_bias is not None, kept.dtype)
    mass = token_masses(target, targets, kept.dtype)
    length, classes = last - first, targets.shard.classes if problem.linear_weight is None else len(problem.linear_weight)
    row_bytes = max(length, features.shape[1]) * kept.dtype.itemsize * (1 if problem.softcap is None else 2)
    slab = min(classes, max(1, MAX_BYTES // row_bytes))
    buffer = kept.new_empty(length * slab)

    def write_gradient(v: int, w: int) -> Tensor:
        z = problem.write(tokens, first, last, v, w, buffer[: length * (w - v)].view(length, w - v))
        slope = cap_(z, problem.softcap, need_slope=True)
        if not targets.squared:
            z.sub_(logsumexp[:, None]).exp_()
        gradient_(z, target, mass, own, targets, targets.shard.first + v)
        return z if slope is None else z.mul_(slope)

    return long_head_square(write_gradient, classes, slab, features)
