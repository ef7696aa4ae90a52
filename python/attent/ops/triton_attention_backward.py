"""Scored attention's gradients by the Triton kernels: the readout's in PyTorch, attention's in three launches.

Why not PyTorch's own backward kernels where they would do: see :mod:`.pytorch_attention_backwards`.
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
        from attent_kernels.attention.launch import Attention

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
