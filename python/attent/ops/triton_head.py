"""Exact "head" scores on a GPU, ‖Σ_t g_t h_tᵀ‖_F: from gradients that are written out, or without logits in memory.

Of T tokens the logits' GEMM multiplies T·V·D times. Beside it, the Gram form (see
``attent_kernels.linear_cross_entropy.gram``) takes T²V/2, the lower triangle, and the direct form T·V·D and a norm:

* gradients written out (training): Gram up to T = 2D, direct beyond.
* nothing written (:func:`run`): the vocabulary in slabs, each by one GEMM, one row launch and one Gram launch in a
  workspace that stays in L2, sums and Gram matrix rescaled as the maxima rise. One pass: T/2D beside the GEMM. The
  direct form needs logsumexp first, so the logits twice: 2 T·V·D more, cheaper from T = 4D on; those take the chunks.

Either way the Gram form's tiles have to fit in TILE_BYTES. Examples longer than a chunk are computed slab by slab in a
second pass over the vocabulary, from the sums that the first one kept.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .head_scores import head_features
from .tokens import Tokens
from .torch_linear_cross_entropy import Chunk, Problem, Result, combine

if TYPE_CHECKING:
    from attent_kernels.linear_cross_entropy.gram import Gram

#: Bytes of Gram tiles, of a slab's workspace, and of a slab of the direct product.
TILE_BYTES = 64 << 20
#: Logits and p̃ of a slab, 2048 rows of 2048 columns: half of an H100's L2, beside the weight's slab of 17 MB.
SLAB_BYTES = 24 << 20
#: Tokens of a slab, where examples are that short, and columns at most (a row of them is read into registers at once):
#: the GEMM then has 128 tiles [128, 256], one for each of 132 processors.
SLAB_TOKENS, SLAB_COLUMNS = 2048, 4096


def gram_is_cheaper(longest: int, rows: int, width: int, factor: int) -> bool:
    """Whether examples of up to so many tokens take the Gram form, ``factor`` · D being the break-even."""
    from attent_kernels.linear_cross_entropy.gram import tile_bytes

    return longest <= factor * width and tile_bytes(rows, longest) <= TILE_BYTES


def first_tokens(tokens: Tokens) -> Tensor:
    """The first token of each token's example, int32 [N]."""
    assert tokens.offsets is not None
    return tokens.to_tokens(tokens.offsets[:-1]).int()


def host_starts(tokens: Tokens) -> list[int] | None:
    """Where examples start; None if nobody needs to know, since there are Gram tiles enough for examples of any length.

    Of packed examples that is a read of the device, which waits for it: up to TILE_BYTES, 3,968 tokens, there is none.
    """
    from attent_kernels.linear_cross_entropy.gram import tile_bytes

    n = tokens.length
    return None if tokens.tokens_each is None and tile_bytes(n, n) <= TILE_BYTES else tokens.starts()


def features_of(tokens: Tokens, a: int, b: int, factor: Tensor | None, with_bias: bool) -> Tensor:
    """What multiplies g_t in the weight's gradient, in the GEMMs' dtype: f_t (h_t, and 1 for a bias) [b − a, D(+8)]."""
    hidden = tokens.part(tokens.hidden, a, b)
    features = head_features(hidden, factor, with_bias, torch.float32).to(hidden.dtype)
    # A row of a GEMM's operand should start at a multiple of 16 bytes.
    return torch.nn.functional.pad(features, (0, 7)) if with_bias else features


# --------------------------------------------------------------------------------------------------- written out


class ChunkHead:
    """The squares of the "head" scores, from the gradients of one chunk after another."""

    def __init__(
        self, tokens: Tokens, problem: Problem, rows: int, lowered: Tensor | None, starts: list[int] | None
    ) -> None:
        """``rows`` of a chunk; ``lowered`` [N]: what a token's written gradient is to be multiplied by; None: 1."""
        self.tokens, self.problem, self.rows, self.lowered = tokens, problem, rows, lowered
        self.with_bias = problem.linear_bias is not None
        self.first = first_tokens(tokens)
        self.starts = tokens.starts() if starts is None and tokens.length > rows else starts
        #: Per token, to be summed up over examples: a direct form's square stands at its example's first token.
        self.squares = torch.zeros(tokens.length, dtype=torch.float32, device=tokens.hidden.device)
        starts = self.starts or []
        self.long = [i for i in range(len(starts) - 1) if starts[i + 1] - starts[i] > rows]
        self.sums = self.squares.new_empty(6, tokens.length) if self.long else None

    def keeps(self, a: int) -> bool:
        """Whether the sums of token a's row are to be kept for a second pass."""
        return any(self.starts[i] <= a < self.starts[i + 1] for i in self.long) if self.starts else False

    def keep(self, a: int, b: int, sums: Tensor | None) -> None:
        assert self.sums is not None and sums is not None
        self.sums[:, a:b] = sums

    def add(self, chunk: Chunk, gradient: Tensor) -> None:
        """The examples of a chunk whose gradient [C, V] is written out."""
        a, b = chunk.first, chunk.last
        starts = self.starts
        if starts is None:
            self._by_gram(a, b, b - a, gradient)
            return
        if not chunk.examples:
            return
        longest = max(starts[i + 1] - starts[i] for i in chunk.examples)
        width = self.tokens.hidden.shape[1]
        if gram_is_cheaper(longest, b - a, width, 2):
            self._by_gram(a, b, longest, gradient)
            return
        factor = None if self.lowered is None else self.lowered[a:b]
        features = features_of(self.tokens, a, b, factor, self.with_bias)
        if self.tokens.tokens_each is not None:
            each = self.tokens.tokens_each
            squares = direct_squares(gradient.unflatten(0, (-1, each)), features.unflatten(0, (-1, each)))
            self.squares[a:b:each] = squares
            return
        for i in chunk.examples:
            of_example = slice(starts[i] - a, starts[i + 1] - a)
            if starts[i + 1] > starts[i]:
                self.squares[starts[i]] = direct_squares(gradient[None, of_example], features[None, of_example])[0]

    def _by_gram(self, a: int, b: int, longest: int, gradient: Tensor) -> None:
        from attent_kernels.linear_cross_entropy.gram import Gram

        gram = Gram(self.first[a:b] - a, longest, gradient.shape[1])
        gram.add(gradient)
        hidden = self.tokens.part(self.tokens.hidden, a, b)
        factor = None if self.lowered is None else self.lowered[a:b]
        self.squares[a:b] = gram.squares(hidden, factor, self.with_bias)

    def finish(self) -> Tensor:
        """The squares [B]."""
        for i in self.long:
            self._long(self.starts[i], self.starts[i + 1])  # type: ignore[index]
        squares = self.tokens.by_example(self.squares)
        return self.problem.targets.shard.sum_(squares).clamp_(min=0)

    def _long(self, a: int, b: int) -> None:
        """An example longer than a chunk: the vocabulary once more, slab by slab."""
        from attent_kernels.linear_cross_entropy import rows
        from attent_kernels.linear_cross_entropy.gram import Gram

        from .triton_chunks import RowOptions, padded, product

        tokens, problem, weight = self.tokens, self.problem, self.problem.linear_weight
        assert weight is not None and self.sums is not None
        length, width = b - a, weight.shape[1]
        sums = self.sums[:, a:b].contiguous()
        hidden = tokens.part(tokens.hidden, a, b)
        columns = min(len(weight), max(1, SLAB_BYTES // ((4 + weight.itemsize) * length)))
        columns = columns // 64 * 64 or columns
        logits = padded(length, columns, torch.float32, weight.device)
        gradient = logits if weight.dtype == torch.float32 else padded(length, columns, weight.dtype, weight.device)
        # Written out here without upstream factors; of float16 lifted into its range.
        lift = torch.full_like(self.squares[a:b], 1024) if weight.dtype == torch.float16 else None
        lowered = None if lift is None else lift.reciprocal()
        gram: Gram | None = None
        features = None
        if gram_is_cheaper(length, length, width, 2):
            gram = Gram(self.first[a:b] - a, length, columns)
        else:
            features = features_of(tokens, a, b, lowered, self.with_bias)[None]
        square = self.squares.new_zeros(())
        for v in range(0, len(weight), columns):
            w = min(v + columns, len(weight))
            z = product(hidden, weight[v:w].t(), logits[:, : w - v])
            options = RowOptions.of(tokens, problem, a, b, problem.targets.shard.first + v, w - v, v)._asdict()
            g = gradient[:, : w - v]
            rows.row_pass(z, **options, sums=sums, upstream=lift, gradient=g)
            if gram is not None:
                gram.add(g)
            else:
                assert features is not None
                square += direct_squares(g[None], features)[0]
        if gram is not None:
            self.squares[a:b] = gram.squares(hidden, lowered, self.with_bias)
        else:
            self.squares[a] = square


def direct_squares(gradient: Tensor, features: Tensor) -> Tensor:
    """‖g ᵀ f‖² of E examples of the same length, g [E, T, V] and f [E, T, D]: [E], in slabs of the vocabulary."""
    examples, _, classes = gradient.shape
    width = features.shape[2]
    columns = max(1, TILE_BYTES // (4 * width * max(1, examples)))
    squares = torch.zeros(examples, dtype=torch.float32, device=gradient.device)
    for v in range(0, classes, columns):
        slab = batch_product(gradient[:, :, v : v + columns].transpose(1, 2), features)
        squares += torch.linalg.vector_norm(slab, dim=(1, 2)).square_()
    return squares


def batch_product(a: Tensor, b: Tensor) -> Tensor:
    """a b of a batch in float32."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())  # the interpreter's tensors


# ---------------------------------------------------------------------------------------- without logits in memory


def covers(tokens: Tokens, problem: Problem, starts: list[int] | None) -> bool:
    """Whether :func:`run` does: scores of index targets without smoothing, no gradients, not too long for Gram."""
    trains = problem.input_gradient or problem.weight_gradient or problem.bias_gradient
    targets = problem.targets
    plain = tokens.target.dim() == 1 and targets.label_smoothing == 0 and targets.shard.group is None
    if trains or not plain or "hidden" in problem.score:
        return False
    longest = tokens.length if starts is None else max(b - a for a, b in pairwise(starts))
    rows = tokens.length if starts is None else max(longest, min(tokens.length, SLAB_TOKENS))
    return gram_is_cheaper(longest, rows, tokens.hidden.shape[1], 4)


def run(tokens: Tokens, problem: Problem, starts: list[int] | None) -> Result:
    """Losses and scores of what it covers."""
    n = tokens.length
    losses = torch.empty(n, dtype=torch.float32, device=tokens.hidden.device)
    of_logit, of_head = torch.empty_like(losses), torch.empty_like(losses)
    first = first_tokens(tokens)
    for a, b, longest in _groups(n, starts):
        group = _group(tokens, problem, a, b, first[a:b] - a, longest)
        losses[a:b], of_logit[a:b], of_head[a:b] = group
    squares: dict[str, Tensor | None] = {"logit": of_logit, "head": tokens.by_example(of_head).clamp_(min=0)}
    return Result(losses, combine(tokens, problem, losses, squares), None, None, None)


def _groups(n: int, starts: list[int] | None) -> list[tuple[int, int, int]]:
    """Whole examples, SLAB_TOKENS together or one that has more: first token, last, length of the longest."""
    if starts is None:
        return [(0, n, n)]
    groups, i = [], 0
    while i < len(starts) - 1:
        j = i + 1
        while j < len(starts) - 1 and starts[j + 1] - starts[i] <= SLAB_TOKENS:
            j += 1
        if starts[j] > starts[i]:
            groups.append((starts[i], starts[j], max(starts[e + 1] - starts[e] for e in range(i, j))))
        i = j
    return groups


def _group(
    tokens: Tokens, problem: Problem, a: int, b: int, first: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, squares of g and of the "head" of tokens [a, b), the last to be summed over examples."""
    from attent_kernels.linear_cross_entropy import rows, slabs
    from attent_kernels.linear_cross_entropy.gram import Gram, Own

    from .triton_chunks import RowOptions, padded, product

    weight, bias, softcap = problem.linear_weight, problem.linear_bias, problem.softcap
    assert weight is not None
    device, length, classes = weight.device, b - a, len(weight)
    dtype = torch.float32 if weight.dtype == torch.float32 else torch.bfloat16
    columns = min(SLAB_COLUMNS, classes, max(64, SLAB_BYTES // ((4 + dtype.itemsize) * length)))
    columns = columns // 64 * 64 or columns
    logits = padded(length, columns, torch.float32, device)
    p = padded(length, columns, dtype, device)
    hidden, label, scale = tokens.part(tokens.hidden, a, b), tokens.target[a:b], tokens.scale_part(a, b)
    sums, gram = slabs.first_sums(length, device), Gram(first, longest, columns)
    for v in range(0, classes, columns):
        w = min(v + columns, classes)
        z = product(hidden, weight[v:w].t(), logits[:, : w - v])
        rescale = slabs.slab_pass(
            z,
            label,
            sums,
            p[:, : w - v],
            first=v,
            bias=None if bias is None else bias[v:w],
            softcap=softcap,
            scale=scale,
        )
        gram.add(p[:, : w - v], rescale)
    own, slope = sums[3], None
    if softcap is not None:
        own, slope = _capped(own, softcap)
    maximum = torch.maximum(sums[0], own)
    whole = rows.merged(sums, maximum)
    normaliser = whole[1] + (own - maximum).exp()
    missed = whole[1] / normaliser
    if slope is not None:
        missed = missed * slope
    of_own = Own(label, weight, bias, softcap, sums[0], maximum + normaliser.log(), missed)
    of_head = gram.squares(hidden, scale, bias is not None, of_own)
    options = RowOptions.of(tokens, problem, a, b, 0, classes)._asdict()
    result = rows.row_pass(logits, **options, sums=whole, want_squares=True)
    assert result.losses is not None and result.squares is not None
    return result.losses, result.squares, of_head


def _capped(z: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """c tanh(z/c) and its slope, without cancellation."""
    e = (z.abs() * (-2 / softcap)).exp()
    return softcap * (z / softcap).tanh(), 4 * e / (1 + e).square()
