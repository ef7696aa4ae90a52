"""Scored attention's gradients by the Triton kernels: the readout's in PyTorch, attention's in three launches.

Why not PyTorch's own backward kernels where they would do: see :mod:`.pytorch_attention_backwards`.
"""

from __future__ import annotations

import torch

from . import dispatch
from .readout_gradients import readout_gradients
from .scored_attention_op import FiveTensors, Gradients, Problem, Saved, empty_gradients

#: Padded to a power of two, a key block of this width and its gradient are what registers and shared memory hold.
LARGEST_WIDTH = 256


def refuses(problem: Problem) -> str | None:
    """Why the kernels do not take a problem; None: they do."""
    if problem.query.dtype == torch.float64:
        return "it takes float16, bfloat16 and float32, query is float64"
    for name, width in (("D", problem.query.shape[-1]), ("Dv", problem.value.shape[-1])):
        if width > LARGEST_WIDTH:
            return f"it takes head dims up to {LARGEST_WIDTH}, {name} is {width}"
    return None


@dispatch.register("scored_attention_backward", "triton", refuses=refuses)
def scored_attention_backward(problem: Problem, saved: Saved, grads: Gradients, wanted: list[bool]) -> FiveTensors:
    """Gradients in query, key, value, readout weight and bias."""
    weight, bias, grad_pooled = readout_gradients(problem, saved, grads, wanted)
    attention_wanted = [*wanted[:3], False, False]
    query, key, value, _, _ = empty_gradients(problem, attention_wanted)
    if any(attention_wanted):  # else features are frozen: only the readout learns
        from attent_kernels.attention.backward import attention_backward

        attention_backward(
            problem.query,
            problem.key,
            problem.value,
            saved.output,
            saved.logsumexp,
            tuple(x if want else None for x, want in zip((query, key, value), wanted, strict=False)),
            grad_output=grads.output,
            grad_pooled=grad_pooled,
            pool=problem.pool,
            target=problem.target,
            grad_losses=grads.losses if problem.target is not None else None,
            is_pooled=problem.rows == "pooled",
            query_lengths=problem.query_lengths,
            key_lengths=problem.key_lengths,
            cu_seqlens_q=problem.cu_seqlens_q,
            cu_seqlens_k=problem.cu_seqlens_k,
            is_causal=problem.is_causal,
            scale=problem.scale,
            window_left=problem.window_left,
            window_right=problem.window_right,
            softcap=problem.softcap,
        )
    return query, key, value, weight, bias
