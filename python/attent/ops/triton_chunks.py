"""Linear cross-entropy on a GPU by chunks of tokens: GEMMs by the platform's library, one Triton launch between them.

A chunk's logits [·, V] are written by one GEMM, in float32; one launch (``attent_kernels.linear_cross_entropy.rows``)
turns each row into its loss, its norm and the gradient of its raw logits in the GEMMs' dtype, times all that multiplies
it; two more GEMMs multiply that into the gradients of input and weight. Everything after the launch is a plain GEMM.

Chunks, not a second computation of the logits in the backward. For 8192 tokens, D = 4096, V = 131072 on an H200
(4.8 TB/s, some 700 TFLOP/s in bfloat16), derived, not measured:

* chunks: 3 GEMMs of 12.6 ms; rows, 10 bytes a logit, 2.2 ms; the weight's gradient summed in float32 over 9 chunks, 8
  bytes V·D for each after the first, 7.2 ms where a GEMM's last phase does not overlap its arithmetic (1.4 ms a chunk
  beside 0.9) and none where it does: 40 to 47 ms.
* computed again: 4 GEMMs, 50.4 ms, and 1.3 ms to write and read the gradient's slabs: 51.7 ms.

The sizes follow. A GEMM of C rows reads the whole weight, 0.22 ms, in the time of its arithmetic, 1.54 µs a row: from
some 200 rows on it hides, 384 leave room on an H100 (3.35 TB/s): LOGITS_BYTES. The float32 sum over chunks hides from
some 600 rows on: GRADIENT_BYTES is 1024 rows of bfloat16, an eighth of all logits in that dtype. So the gradient's
chunk is larger than the logits', which fill it part by part. The logits are float32 since bfloat16 would round each by
2⁻⁹ of itself, a logit of 20 by 0.04 and its probability by 4 %; it costs 4 bytes a logit of the rows' ten.

Rows of both buffers start at multiples of 128 bytes, whatever V is: tensor cores need 16 (V = 50257 would have 2).

float16 has 5 bits of exponent: there the upstream gradients are multiplied by a power of two that brings the largest to
2¹⁰ before the gradient is rounded, and everything computed from it is divided by it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .linear_cross_entropy_op import Call, SixTensors, ThreeTensors
from .logits_passes import square_norms
from .tokens import Tokens
from .torch_linear_cross_entropy import Chunk, Problem, Result, backward, combine, forward, plan

#: Bytes of float32 logits that one GEMM writes: 384 rows at V = 131072.
LOGITS_BYTES = 192 << 20
#: Bytes of the logits' gradient that the other GEMMs read; of float32 inputs it is written over the logits.
GRADIENT_BYTES = 256 << 20
#: A row is padded to a multiple of this many bytes; chunks to so many rows, where they have as many.
_LINE, _ROWS = 128, 64


def by_chunks(call: Call) -> SixTensors:
    """Loss, scores, counts and gradients up to the upstream factor."""
    return forward(call, run)


def backward_by_chunks(d_loss: Tensor, call: Call) -> ThreeTensors:
    """Gradients, the logits computed again."""
    return backward(d_loss, call, run)


def run(tokens: Tokens, problem: Problem, upstream: Tensor | None) -> Result:
    """Losses, scores and, given the upstream gradient [N] of each ℓ_t, gradients."""
    from . import triton_head

    # Kernels read vectors from one address on.
    bias, weight = problem.linear_bias, problem.targets.class_weight
    problem = problem._replace(
        linear_bias=None if bias is None else bias.contiguous(),
        targets=problem.targets._replace(class_weight=None if weight is None else weight.float().contiguous()),
    )
    starts = None
    if "head" in problem.score and not tokens.single and tokens.length:
        starts = triton_head.host_starts(tokens)
        if triton_head.covers(tokens, problem, starts):
            return triton_head.run(tokens, problem, starts)
    return _Run(tokens, problem, upstream, starts).result()


# ------------------------------------------------------------------------------------------------------------- sizes


class Sizes(NamedTuple):
    """Rows of a chunk and of the parts that its logits are computed in."""

    chunk: int
    part: int


def sizes(n: int, columns: int, gradient: torch.dtype | None, whole_examples: bool) -> Sizes:
    """For n tokens and rows of so many columns; ``gradient``: what it is written in, None where it is not."""
    most = max(1, LOGITS_BYTES // (columns * 4))
    if gradient is None:
        return Sizes(_even(n, most), _even(n, most))
    chunk = max(1, GRADIENT_BYTES // (columns * gradient.itemsize))
    if not whole_examples:  # examples that fill a chunk to the brim should find the room
        chunk = _even(n, chunk)
    if gradient.itemsize == 4:
        return Sizes(chunk, chunk)
    return Sizes(chunk, _even(min(n, chunk), most))


def _even(n: int, most: int) -> int:
    """Rows of the fewest chunks that n rows make if each has less than ``most``, all alike."""
    if n < most:
        return max(1, n)
    rows = -(-n // (n // most + 1))
    rounded = -(-rows // _ROWS) * _ROWS
    return rounded if rounded <= most else rows


def padded(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised [rows, columns] whose rows start at whole lines."""
    line = _LINE // dtype.itemsize
    return torch.empty(rows, -(-columns // line) * line, dtype=dtype, device=device)[:, :columns]


# ------------------------------------------------------------------------------------------------------------- GEMMs


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b written to ``out``, accumulated in float32 and rounded once, to its dtype."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)  # the interpreter's tensors


def add_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b added to ``out`` in its dtype."""
    if a.is_cuda and a.dtype != out.dtype:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return out.addmm_(a.to(out.dtype), b.to(out.dtype))


# ------------------------------------------------------------------------------------------------------------ the run


class _Run:
    """One pass over the chunks: what it reads, and what it fills."""

    def __init__(self, tokens: Tokens, problem: Problem, upstream: Tensor | None, starts: list[int] | None) -> None:
        """``starts``: where examples start, as far as somebody needs to know (:func:`.triton_head.host_starts`)."""
        assert problem.linear_weight is not None
        self.tokens, self.problem, self.weight = tokens, problem, problem.linear_weight
        self.shard, self.wanted = problem.targets.shard, set(problem.score)
        self.dtype, self.device, self.n = self.weight.dtype, self.weight.device, tokens.length
        self.whole_examples = "head" in self.wanted and not tokens.single
        self.trains = problem.input_gradient or problem.weight_gradient or problem.bias_gradient
        self.writes = self.trains or "hidden" in self.wanted or self.whole_examples
        scored = bool(self.wanted & {"hidden", "head"})
        #: What everything computed from the written gradients is divided by; None: 1.
        self.lift: Tensor | None = None
        self.upstream = None if upstream is None or not self.trains else upstream.contiguous()
        if self.upstream is not None and scored and problem.targets.class_weight is not None:
            # Smoothing may leave gradients to score where the targets' class weights, a mean's denominator, sum to 0.
            nothing = (self.upstream == 0).all()
            self.lift = torch.where(nothing, torch.inf, 1.0)
            self.upstream = torch.where(nothing, 1.0, self.upstream)
        if self.writes and self.dtype == torch.float16:
            self.upstream, power = _lifted(self.upstream, tokens, problem)
            self.lift = power if self.lift is None else power * self.lift
        #: What a token's written gradient is to be multiplied by for a score; None: 1.
        self.lowered = None
        if self.upstream is not None and scored:
            self.lowered = torch.where(self.upstream == 0, 0, self.upstream.reciprocal())

        # Shards must cut the tokens alike: the rows are counted for an even share of the vocabulary.
        share = max(-(-self.shard.classes // self.shard.ranks), self.weight.shape[1], 1)
        self.sizes = sizes(self.n, share, self.dtype if self.writes else None, self.whole_examples)
        self.logits = padded(min(self.n, self.sizes.part), len(self.weight), torch.float32, self.device)
        self.gradient: Tensor | None = None
        if self.writes:
            in_place = self.dtype == torch.float32
            self.gradient = (
                self.logits
                if in_place
                else padded(min(self.n, self.sizes.chunk), len(self.weight), self.dtype, self.device)
            )

        self.losses = self._per_token()
        self.of_logit = None
        if "logit" in self.wanted or ("head" in self.wanted and tokens.single):
            self.of_logit = self._per_token()
        self.of_hidden = self._per_token() if "hidden" in self.wanted else None
        self.of_one = self._per_token() if "head" in self.wanted and tokens.single else None
        self.head = None
        if self.whole_examples:
            from .triton_head import ChunkHead

            self.head = ChunkHead(tokens, problem, self.sizes.chunk, self.lowered, starts)
        self.d_input: Tensor | None = None
        if problem.input_gradient:  # 0 where a token is left out
            new = tokens.hidden.new_empty if tokens.rows is None else tokens.hidden.new_zeros
            self.d_input = new(tokens.hidden.shape)
        self.d_weight: Tensor | None = None
        self.d_bias: Tensor | None = None

    def _per_token(self) -> Tensor:
        return torch.empty(self.n, dtype=torch.float32, device=self.device)

    def result(self) -> Result:
        starts = None if self.head is None else self.head.starts
        if self.head is not None and starts is None:  # all examples fit in one chunk, wherever they start
            chunks = [Chunk(0, self.n, range(0))] if self.n else []
        else:
            chunks = plan(self.n, self.sizes.chunk, starts)
        for chunk in chunks:
            self._chunk(chunk, len(chunks) == 1)
        of_head = None
        if self.head is not None:
            of_head = self.head.finish()
        squares = {
            "logit": self.of_logit,
            "hidden": self.of_hidden,
            "head": self.of_one if of_head is None else of_head,
        }
        scores = combine(self.tokens, self.problem, self.losses, squares)
        return Result(self.losses, scores, *self._gradients())

    # --------------------------------------------------------------------------------------------------- one chunk

    def _chunk(self, chunk: Chunk, only: bool) -> None:
        for a in range(chunk.first, chunk.last, self.sizes.part):
            b = min(a + self.sizes.part, chunk.last)
            self._rows(a, b, None if self.gradient is None else self.gradient[a - chunk.first : b - chunk.first])
        if self.gradient is None:
            return
        a, b = chunk.first, chunk.last
        g, tokens = self.gradient[: b - a], self.tokens
        if self.d_input is not None or self.of_hidden is not None:
            self._through_the_weight(a, b, g)
        if self.head is not None:
            self.head.add(chunk, g)
        if self.problem.weight_gradient:
            hidden = tokens.part(tokens.hidden, a, b)
            if self.d_weight is None:
                # One chunk: rounded once, by the GEMM. (Lifted gradients would overflow float16.)
                direct = only and self.lift is None
                dtype = self.dtype if direct else torch.float32
                self.d_weight = product(g.t(), hidden, torch.empty(self.weight.shape, dtype=dtype, device=self.device))
            else:
                add_product(g.t(), hidden, self.d_weight)
        if self.problem.bias_gradient:
            summed = g.sum(0, dtype=torch.float32)
            self.d_bias = summed if self.d_bias is None else self.d_bias.add_(summed)

    def _rows(self, a: int, b: int, gradient: Tensor | None) -> None:
        """Logits of tokens [a, b), and all that is computed from them row by row."""
        from attent_kernels.linear_cross_entropy import rows

        tokens, problem, shard = self.tokens, self.problem, self.shard
        targets = problem.targets
        hidden = tokens.part(tokens.hidden, a, b)
        z = product(hidden, self.weight.t(), self.logits[: b - a])
        options = RowOptions.of(tokens, problem, a, b, shard.first, len(self.weight))._asdict()
        upstream = None if self.upstream is None else self.upstream[a:b]
        want_squares = self.of_logit is not None
        keeps = self.head is not None and self.head.keeps(a)
        sums = None
        if shard.group is not None:  # the sums over all ranks' columns first
            own = rows.row_pass(z, **options, want_sums=True, conclude=False).sums
            assert own is not None
            sums = rows.merged(own, shard.max_(own[0].clone()))
            sums[3] = shard.max_(sums[3].clone())
            for i in (1, 2, 4, 5):
                shard.sum_(sums[i])
        result = rows.row_pass(
            z, **options, upstream=upstream, sums=sums, want_sums=keeps, want_squares=want_squares, gradient=gradient
        )
        assert result.losses is not None
        self.losses[a:b] = result.losses
        if self.of_logit is not None:
            assert result.squares is not None
            self.of_logit[a:b] = result.squares
            if shard.group is not None and targets.label_smoothing > 0:  # else it is from sums over all columns
                self.of_logit[a:b] = shard.sum_(result.squares)
            if self.of_one is not None:  # one token: ‖g hᵀ‖ = ‖g‖ ‖h‖
                features = torch.linalg.vector_norm(hidden, dim=1, dtype=torch.float32).square_()
                self.of_one[a:b] = self.of_logit[a:b] * (features + (problem.linear_bias is not None))
        if keeps and self.head is not None:
            self.head.keep(a, b, result.sums)

    def _through_the_weight(self, a: int, b: int, g: Tensor) -> None:
        """∂/∂h of tokens [a, b): written to the input's gradient, its norms taken."""
        d_input, rows = self.d_input, self.tokens.rows
        plain = self.lift is None and self.shard.group is None and self.of_hidden is None
        if d_input is not None and rows is None and plain:
            product(g, self.weight, d_input[a:b])
            return
        through = torch.empty(b - a, self.weight.shape[1], dtype=torch.float32, device=self.device)
        self.shard.sum_(product(g, self.weight, through))
        if self.of_hidden is not None:
            squares = square_norms(through)
            self.of_hidden[a:b] = squares if self.lowered is None else squares * self.lowered[a:b].square()
        if d_input is not None:
            if self.lift is not None:
                through /= self.lift
            if rows is None:
                d_input[a:b] = through
            else:
                d_input.index_copy_(0, rows[a:b], through.to(self.dtype))

    def _gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        weight, bias = self.d_weight, self.d_bias
        if self.problem.weight_gradient and weight is None:  # no token
            weight = torch.zeros(self.weight.shape, dtype=self.dtype, device=self.device)
        if self.problem.bias_gradient and bias is None:
            bias = torch.zeros(len(self.weight), dtype=self.dtype, device=self.device)
        return self.d_input, self._lowered(weight), self._lowered(bias)

    def _lowered(self, gradient: Tensor | None) -> Tensor | None:
        """A gradient divided by ``lift``, in the inputs' dtype: one pass over it."""
        if gradient is None or self.lift is None:
            return None if gradient is None else gradient.to(self.dtype)
        return torch.div(gradient, self.lift, out=gradient.new_empty(gradient.shape, dtype=self.dtype))


class RowOptions(NamedTuple):
    """What the rows' launches are told of tokens [a, b) and a range of columns, by the names of their arguments."""

    target: Tensor
    target_rows: Tensor | None
    bias: Tensor | None
    class_weight: Tensor | None
    label_smoothing: float
    softcap: float | None
    classes: int
    first: int
    scale: Tensor | None

    @staticmethod
    def of(tokens: Tokens, problem: Problem, a: int, b: int, first: int, columns: int, local: int = 0) -> RowOptions:
        """``first`` is the first column's class, ``local`` its row in this rank's weight."""
        targets, bias = problem.targets, problem.linear_bias
        soft = tokens.target.dim() == 2
        rows = tokens.target_rows if soft else None
        target = tokens.target
        if soft:
            target = target[:, local : local + columns]
        return RowOptions(
            target if rows is not None else target[a:b],
            None if rows is None else rows[a:b],
            None if bias is None else bias[local : local + columns],
            targets.class_weight,
            targets.label_smoothing,
            problem.softcap,
            targets.shard.classes,
            first,
            tokens.scale_part(a, b),
        )


def _lifted(upstream: Tensor | None, tokens: Tokens, problem: Problem) -> tuple[Tensor, Tensor]:
    """Upstream gradients [N] times a power of two, that brings the largest gradient to some 2¹⁰, and that power."""
    if upstream is None:
        upstream = torch.ones(tokens.length, dtype=torch.float32, device=tokens.hidden.device)
    largest = upstream if tokens.scale is None else upstream * tokens.scale
    largest = largest.abs().nan_to_num(0, posinf=0).amax() if len(largest) else upstream.new_ones(())
    if problem.targets.class_weight is not None:
        largest = largest * problem.targets.class_weight.amax()
    power = torch.where(largest > 0, 10 - largest.log2().ceil(), 0).clamp(-60, 60).exp2()
    return upstream * power, power
