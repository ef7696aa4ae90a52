"""Whether a call may go past the dispatcher, straight to the backend: nobody who listens there wants to see it.

An op of 20 arguments costs 20 to 60 µs in the dispatcher, more than all else that a call does before its launch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain_eager(tensors: Iterable[Tensor | None]) -> bool:
    """No compiler, tracer, mode or transform is at work, and every tensor has plain data in memory."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for tensor in tensors:
        # A meta tensor has no data. A negated view (x.conj().imag) keeps its sign beside its memory, where a kernel
        # would not look; the dispatcher resolves it.
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_meta or tensor.is_neg()):
            return False
    return True


def nobody_listens(tensors: Iterable[Tensor | None]) -> bool:
    """So plain a call, and no profiler, which lists ops by their names: it may go past the dispatcher."""
    return is_plain_eager(tensors) and not torch._C._autograd._profiler_enabled()
