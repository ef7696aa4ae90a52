"""Scored attention's gradients by Triton kernels: the readout's in PyTorch, attention's in three launches.

PyTorch has backward kernels of its own, for CUDA: aten::_scaled_dot_product_{flash,efficient,cudnn}_attention_backward.
What they take of what this op knows, after PyTorch's sources (aten/src/ATen/native/transformers/cuda/
attention_backward.cu, …/mem_eff_attention/kernel_backward.h; read, not run)::

    a call has     | flash                       | efficient                   | cuDNN
    ---------------|-----------------------------|-----------------------------|----------------------------
    logsumexp      | natural, float32 [B, H, Tq] | natural, float32 [B, H, Tq],| natural, float32 [B, H, Tq],
                   | contiguous                  | strides of B and H multiples| read as [B, H, Tq, 1]
                   |                             | of 8: a copy, padded        |
    row, no key    | logsumexp must be +inf      | logsumexp must be +inf      | not certain
    is_causal      | from the bottom right, which| from the top left: exact    | from the top left: exact
                   | SDPA itself refuses unless  | where Tq = Tk               | where Tq = Tk
                   | Tq = Tk                     |                             |
    window         | not by this op              | no                          | no
    softcap        | no: 0 is written into it    | no                          | no
    lengths        | no                          | no                          | no
    packed         | by _flash_attention_backward| by _efficient_…, from the   | as nested tensors
                   | with max lengths, on host   | top left, max lengths       |
    Dv != D        | no                          | yes                         | not certain
    Hq != Hkv      | yes                         | no: repeat heads            | not certain
    float32        | no                          | yes                         | no
    last stride    | 1                           | 1                           | 1
    wanted         | computes all three          | computes all three          | computes all three
    the same bits  | only in deterministic mode  | only in deterministic mode  | "non-deterministic" by default

So in the plain case (no window, softcap, lengths or packing, D = Dv a multiple of 8, equal head counts, scale > 0,
half precision, every row with a key, and causal only where Tq = Tk) all three are exact in mathematics; flash and
cuDNN could be faster on a GPU. None is used: that they are faster here is not measured, and none promises the same bits
twice, as this op does.
"""

from __future__ import annotations

from . import dispatch
from .readout_gradients import readout_gradients
from .scored_attention_op import FiveTensors, Gradients, Problem, Saved, empty_gradients
from .triton_scored_attention import refuses


@dispatch.register("scored_attention_backward", "triton", refuses=refuses)
def scored_attention_backward(problem: Problem, saved: Saved, grads: Gradients, wanted: list[bool]) -> FiveTensors:
    """Gradients in query, key, value, readout weight and bias."""
    weight, bias, grad_pooled = readout_gradients(problem, saved, grads, wanted)
    query, key, value, _, _ = empty_gradients(problem, [*wanted[:3], False, False])
    if any(wanted[:3]):  # else features are frozen: only the readout learns
        from attent_kernels.attention.backward import Into, ToOutput, attention_backward
        from attent_kernels.attention.records import Attention

        attention = Attention(
            problem.query, problem.key, problem.value, problem.query_lengths, problem.key_lengths,
            problem.cu_seqlens_q, problem.cu_seqlens_k, problem.is_causal, problem.scale, problem.window_left,
            problem.window_right, problem.softcap,
        )  # fmt: skip
        losses = None if problem.target is None else grads.losses
        attention_backward(
            attention,
            saved.output,
            saved.logsumexp,
            ToOutput(grads.output, grad_pooled, losses, problem.target, problem.pool),
            Into(*(x if want else None for x, want in zip((query, key, value), wanted[:3], strict=True))),
            only_pooled_row=problem.rows == "pooled",
        )
    return query, key, value, weight, bias
