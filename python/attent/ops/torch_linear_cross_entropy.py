"""Linear cross-entropy and its scores in chunked PyTorch: the backend ``"torch"``.

A chunk is a run of tokens whose logits [C, V] fit in 64 MB: written by one GEMM, read for the loss and the scores,
turned in place into the gradient of the logits where that is needed, multiplied into the gradients of input and weight,
and overwritten by the next chunk. No [tokens, V] tensor exists. Smaller chunks would sit in cache between the passes,
but each GEMM reads the whole weight again: at D = 512, V = 32768 the GEMMs alone take 1.2 times as long with 16 MB, 1.9
with 4 MB.

With half-precision inputs all but the GEMMs is float32, and the weight's gradient is summed over chunks in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import register
from .head_scores import MAX_BYTES, head_features, head_square, long_head_square
from .linear_cross_entropy_op import Call, SixTensors, ThreeTensors, statistics_dtype
from .logits_passes import Statistics, Targets, cap_, choose_passes, gradient_, logits, square_norms
from .tokens import Tokens, list_tokens
from .vocabulary_shards import Shard, find_shard

# ------------------------------------------------------------------------------------------------------------- backend


@register("linear_cross_entropy", "torch")
def linear_cross_entropy_forward(call: Call) -> SixTensors:
    """Loss, scores, counts and, up to the upstream factor, gradients."""
    return forward(call, run)


@register("linear_cross_entropy_backward", "torch")
def linear_cross_entropy_backward(d_loss: Tensor, call: Call) -> ThreeTensors:
    """Gradients, the logits computed again."""
    return backward(d_loss, call, run)


def forward(call: Call, run: Run) -> SixTensors:
    """All that is around the chunks, whatever runs them: the tokens, the upstream gradients, the reduction."""
    with torch.no_grad(), torch.autocast(call.input.device.type, enabled=False):
        shard = find_shard(call.linear_weight, call.group)
        tokens = _tokens(call, shard)
        problem = _problem(call, shard, gradients=call.gradients_in_forward)
        factor = None  # [N] what the example's weight multiplies its token losses by
        if call.example_weight is not None:
            factor = tokens.to_tokens(call.example_weight.to(tokens.counts.dtype))
        upstream = None
        if problem.input_gradient or problem.weight_gradient or problem.bias_gradient:
            upstream = tokens.counts.new_ones(tokens.length) if factor is None else factor
            if call.reduction == "mean":
                upstream = upstream / _mean_over(tokens.denominator)
        result = run(tokens, problem, upstream)
        losses = result.losses if factor is None else result.losses * factor
        if call.reduction == "none":
            loss = tokens.to_all(losses).view(call.input.shape[:-1])
        elif call.reduction == "example":
            loss = tokens.by_example(losses) / tokens.counts.clamp(min=1)
        else:
            loss = losses.sum()
            if call.reduction == "mean":
                loss = loss / _mean_over(tokens.denominator)
        return loss, result.scores, tokens.counts, *_gradients(call, result)


def backward(d_loss: Tensor, call: Call, run: Run) -> ThreeTensors:
    """The same around a backward that computes the logits again."""
    with torch.no_grad(), torch.autocast(call.input.device.type, enabled=False):
        shard = find_shard(call.linear_weight, call.group)
        tokens = _tokens(call, shard)
        if call.reduction == "none":
            upstream = tokens.of_all(d_loss.reshape(-1))
        elif call.reduction == "example":
            upstream = tokens.to_tokens(d_loss / tokens.counts.clamp(min=1))
        else:
            d_loss = d_loss / _mean_over(tokens.denominator) if call.reduction == "mean" else d_loss
            upstream = d_loss.expand(tokens.length)
        if call.example_weight is not None:
            upstream = upstream * tokens.to_tokens(call.example_weight.to(upstream.dtype))
        problem = _problem(call._replace(score=[]), shard, gradients=True)
        return _gradients(call, run(tokens, problem, upstream))


def _mean_over(denominator: Tensor) -> Tensor:
    """What a mean divides by: infinity where nothing is counted, so that it is 0 instead of torch's NaN."""
    return torch.where(denominator == 0, torch.inf, denominator)


def _tokens(call: Call, shard: Shard) -> Tokens:
    return list_tokens(
        call.input,
        call.target,
        class_weight=call.weight,
        example_weight=call.example_weight,
        cu_seqlens=call.cu_seqlens,
        classes=shard.classes,
        ignore_index=call.ignore_index,
        smoothed=call.label_smoothing > 0,
        shift=call.shift,
        dtype=statistics_dtype(call.input.dtype),
    )


def _problem(call: Call, shard: Shard, *, gradients: bool) -> Problem:
    spread = call.label_smoothing > 0 or call.target.is_floating_point()
    return Problem(
        call.linear_weight,
        call.linear_bias,
        None,
        Targets(call.weight if spread else None, call.label_smoothing, shard),
        call.softcap,
        tuple(call.score),
        call.per_example,
        gradients and call.input_gradient,
        gradients and call.weight_gradient,
        gradients and call.bias_gradient,
    )


def _gradients(call: Call, result: Result) -> ThreeTensors:
    """The op's gradient outputs: in the inputs' shapes; [0] where none is wanted."""

    def output(gradient: Tensor | None) -> Tensor:
        return call.input.new_empty(0) if gradient is None else gradient

    d_input = None if result.input_gradient is None else result.input_gradient.view(call.input.shape)
    return output(d_input), output(result.weight_gradient), output(result.bias_gradient)


# ---------------------------------------------------------------------------------------------------------- the chunks


class Problem(NamedTuple):
    """What is the same for every chunk."""

    linear_weight: Tensor | None  # [V, D]
    linear_bias: Tensor | None  # [V]
    prediction: Tensor | None  # [total, V] logits, or values, already in hand; None: hidden times linear_weight
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
            return out.copy_(tokens.part(self.prediction[:, v:w], a, b))
        assert self.linear_weight is not None
        bias = None if self.linear_bias is None else self.linear_bias[v:w]
        return logits(tokens.part(tokens.hidden, a, b), self.linear_weight[v:w], bias, out)


class Result(NamedTuple):
    losses: Tensor  # [N] −Σ_v m_v log p_v
    scores: Tensor  # [S, B]
    input_gradient: Tensor | None  # [total, D]
    weight_gradient: Tensor | None  # [V, D]
    bias_gradient: Tensor | None  # [V]


Run = Callable[[Tokens, Problem, Tensor | None], Result]


def run(tokens: Tokens, problem: Problem, upstream: Tensor | None) -> Result:
    """One pass over the chunks: losses, scores and, given the upstream gradient [N] of each ℓ_t, gradients."""
    weight, bias, shard = problem.linear_weight, problem.linear_bias, problem.targets.shard
    n, batch, width = tokens.length, len(tokens.counts), tokens.hidden.shape[1]
    classes = shard.classes if weight is None or problem.prediction is not None else len(weight)
    dtype, device = tokens.counts.dtype, tokens.hidden.device
    wanted = set(problem.score)
    whole_examples = "head" in wanted and not tokens.single

    def per_token() -> Tensor:
        return torch.empty(n, dtype=dtype, device=device)

    losses = per_token()
    of_logit = per_token() if "logit" in wanted or ("head" in wanted and tokens.single) else None
    of_hidden = per_token() if "hidden" in wanted else None
    of_head = None
    if "head" in wanted:
        of_head = per_token() if tokens.single else torch.zeros(batch, dtype=dtype, device=device)
    kept = torch.empty(n, 3, dtype=dtype, device=device) if whole_examples else None
    gradients = Gradients(tokens, problem, upstream)
    need_gradient = gradients.wanted or of_hidden is not None or whole_examples

    passes = choose_passes(problem.targets, problem.softcap, tokens.target)
    # Shards of a vocabulary must cut the tokens alike: the rows are counted for an even share of it.
    share = max(1, -(-shard.classes // shard.ranks), width)
    rows = max(1, MAX_BYTES // (share * dtype.itemsize * (1 if problem.softcap is None else 2)))
    starts = tokens.starts() if whole_examples else None
    buffer = torch.empty(min(rows, n), classes, dtype=dtype, device=device)

    for chunk in plan(n, rows, starts):
        a, b = chunk.first, chunk.last
        target, scale = tokens.target_part(a, b, 0, classes), tokens.scale_part(a, b)
        z = problem.write(tokens, a, b, 0, classes, buffer[: b - a])
        statistics = passes.statistics_(z, target, gradient_follows=need_gradient or of_logit is not None)
        square = statistics.square
        losses[a:b] = scaled(statistics.losses, scale)
        if need_gradient or (of_logit is not None and square is None):
            passes.gradient_(z, target, statistics)
        if of_logit is not None:
            of_logit[a:b] = scaled(shard.sum_(square_norms(z)) if square is None else square, scale, power=2)
            if of_head is not None and tokens.single:  # one token: ‖g hᵀ‖ = ‖g‖ ‖h‖
                hidden = tokens.part(tokens.hidden, a, b)
                of_head[a:b] = of_logit[a:b] * (square_norms(hidden.to(dtype)) + (bias is not None))
        if not need_gradient:
            continue
        product = None  # ∂ℓ_t/∂h_t before the token's scale, [C, D]
        if weight is not None and (problem.input_gradient or of_hidden is not None):
            product = shard.sum_((z.to(weight.dtype) @ weight).to(dtype))
        if of_hidden is not None and product is not None:
            of_hidden[a:b] = scaled(square_norms(product), scale, power=2)
        if of_head is not None and kept is not None and starts is not None:
            features = head_features(tokens.part(tokens.hidden, a, b), scale, bias is not None, dtype)
            for i in chunk.examples:
                of_example = slice(starts[i] - a, starts[i + 1] - a)
                of_head[i] = head_square(z[of_example], features[of_example])
            keep(kept[a:b], statistics)
        gradients.add(a, b, z, product, scale)

    if of_head is not None and kept is not None and starts is not None:
        for i in range(batch):
            if starts[i + 1] - starts[i] > rows:
                of_head[i] = long_example(tokens, problem, starts[i], starts[i + 1], kept)
        shard.sum_(of_head)
    scores = combine(tokens, problem, losses, {"logit": of_logit, "hidden": of_hidden, "head": of_head})
    return Result(losses, scores, *gradients.finish())


def scaled(values: Tensor, scale: Tensor | None, power: int = 1) -> Tensor:
    """Token values times the token's scale, or its square; 0 times infinity, of a token that does not count, is 0."""
    if scale is None:
        return values
    return torch.where(scale == 0, 0, values * (scale if power == 1 else scale.square()))


def combine(tokens: Tokens, problem: Problem, losses: Tensor, squares: dict[str, Tensor | None]) -> Tensor:
    """The named scores [S, B] from squares per token; of "head", per example unless each has one token at most."""
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
        if name != "head" or tokens.single:
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
        self.tokens = tokens
        self.upstream = upstream
        self.dtype = tokens.hidden.dtype

        def zeros(like: Tensor | None) -> Tensor:
            assert like is not None
            return torch.zeros(like.shape, dtype=tokens.counts.dtype, device=like.device)

        self.input = None
        if problem.input_gradient:  # 0 where a token is left out
            new = tokens.hidden.new_empty if tokens.rows is None else tokens.hidden.new_zeros
            self.input = new(tokens.hidden.shape)
        self.weight = zeros(weight) if problem.weight_gradient else None
        self.bias = zeros(bias) if problem.bias_gradient else None

    def add(self, a: int, b: int, z: Tensor, product: Tensor | None, scale: Tensor | None) -> None:
        """Add tokens [a, b): logit gradients z [C, V] and their product with the weight [C, D]."""
        if not self.wanted:
            return
        assert self.upstream is not None
        factor = scaled(self.upstream[a:b], scale)
        if self.input is not None and product is not None:
            through = (product * factor[:, None]).to(self.dtype)
            if self.tokens.rows is None:
                self.input[a:b] = through
            else:
                self.input.index_copy_(0, self.tokens.rows[a:b], through)
        if self.weight is not None:
            weighted = (self.tokens.part(self.tokens.hidden, a, b) * factor[:, None]).to(self.dtype)
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
    """Keep what a second pass needs to write a token's gradient: logsumexp, the own column's entry and M [C, 3]."""
    rows[:, 0] = statistics.logsumexp
    rows[:, 1] = statistics.losses.neg().expm1_() if statistics.own is None else statistics.own
    rows[:, 2] = 1 if statistics.mass is None else statistics.mass


def long_example(tokens: Tokens, problem: Problem, first: int, last: int, kept: Tensor) -> Tensor:
    """‖Σ_t g_t h_tᵀ‖² of an example whose logits do not fit in a chunk: the vocabulary once more, in slabs."""
    targets, weight = problem.targets, problem.linear_weight
    logsumexp, own, mass = kept[first:last].unbind(1)
    scale, with_bias = tokens.scale_part(first, last), problem.linear_bias is not None
    features = head_features(tokens.part(tokens.hidden, first, last), scale, with_bias, kept.dtype)
    length = last - first
    classes = targets.shard.classes if weight is None else len(weight)
    row_bytes = max(length, features.shape[1]) * kept.dtype.itemsize * (1 if problem.softcap is None else 2)
    slab = min(classes, max(1, MAX_BYTES // row_bytes))
    buffer = kept.new_empty(length * slab)
    factor = mass if targets.label_smoothing > 0 or tokens.target.is_floating_point() else None

    def write_gradient(v: int, w: int) -> Tensor:
        z = problem.write(tokens, first, last, v, w, buffer[: length * (w - v)].view(length, w - v))
        target = tokens.target_part(first, last, v, w)
        if targets.squared:
            return z.sub_(target)
        slope = cap_(z, problem.softcap, need_slope=True)
        z.sub_(logsumexp[:, None]).exp_()
        gradient_(z, target, factor, own, targets, targets.shard.first + v)
        return z if slope is None else z.mul_(slope)

    return long_head_square(write_gradient, classes, slab, features)
