"""The CPU epilogue of linear cross-entropy: row statistics of a chunk of logits, and the gradient written over it.

Launcher of ``csrc/row_statistics.h``, which has the formulas, the costs and the error bounds. Call it on the chunk that
a matrix product has just written, while the chunk is in cache. Results carry no autograd history.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import native

_native, _reason = native.module, native.reason

_SUFFIX = {torch.float32: "float32", torch.float64: "float64"}


class RowStatistics(NamedTuple):
    """What one pass over the logits gives, each ``[rows]`` in the logits' dtype; 0 where the row is ignored."""

    loss: Tensor  #: -log p_y
    logsumexp: Tensor  #: natural log, the target included
    squared_norm: Tensor  #: squared norm of the loss's gradient in the logits


def unavailable() -> str | None:
    """Why the functions here cannot run in this installation; None if they can."""
    return _reason


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets this processor can use, best first: some of "avx512", "avx2", "portable"."""
    return tuple(_require_native().instruction_sets())


def row_statistics(
    logits: Tensor, target: Tensor, *, softcap: float | None = None, instruction_set: str | None = None
) -> RowStatistics:
    """Loss, logsumexp and squared gradient norm of every row of ``logits``, in one pass.

    With ``p = softmax(z)``, or of ``softcap * tanh(z / softcap)`` whose slope is ``d``::

        loss = -log p_y        squared_norm = d_y^2 (1 - p_y)^2 + sum_{v != y} d_v^2 p_v^2

    without a subtraction: both keep their relative accuracy as ``p_y`` approaches 1.

    Args:
        logits: ``[rows, V]`` float32 or float64 on CPU; the elements of a row adjacent, rows any distance apart.
        target: ``[rows]`` int64; outside ``[0, V)``: the row is ignored.
        softcap: cap of the logits; None for none.
        instruction_set: one of :func:`instruction_sets`; None for the best. For tests and measurements.

    Raises:
        ValueError: a tensor of another shape, dtype, layout or device; ``softcap`` not positive.
        RuntimeError: the native module is not there (see :func:`unavailable`).

    Rows with a NaN logit, or one of +inf without softcap, give NaN.
    """
    native = _require_native()
    suffix = _check_logits(logits)
    _check_rows("target", target, logits, torch.int64)
    rows, vocabulary = logits.shape
    result = RowStatistics(*torch.empty((3, rows), dtype=logits.dtype).unbind())
    getattr(native, "row_statistics_" + suffix)(
        logits.data_ptr(),
        rows,
        vocabulary,
        logits.stride(0),
        target.data_ptr(),
        _softcap_or_zero(softcap),
        result.loss.data_ptr(),
        result.logsumexp.data_ptr(),
        result.squared_norm.data_ptr(),
        torch.get_num_threads(),
        instruction_set,
    )
    return result


def logits_gradient_(
    logits: Tensor,
    target: Tensor,
    loss: Tensor,
    logsumexp: Tensor,
    factor: Tensor,
    *,
    softcap: float | None = None,
    instruction_set: str | None = None,
) -> Tensor:
    """Write ``factor * d * (p - onehot(target))`` over ``logits`` and return them, in one pass.

    The target's entry is ``-factor * d_y * (1 - p_y)`` with ``1 - p_y = -expm1(-loss)``, so it never cancels. Ignored
    rows, and rows whose factor is 0, become 0 whatever was in them.

    Args:
        logits: ``[rows, V]`` as :func:`row_statistics` took them; overwritten. Autograd does not see the write.
        target: ``[rows]`` int64, as there.
        loss: ``[rows]``, as :func:`row_statistics` gave it.
        logsumexp: ``[rows]``, as :func:`row_statistics` gave it.
        factor: ``[rows]`` in the logits' dtype: the gradient of the total in each row's loss.
        softcap: as there.
        instruction_set: as there.

    Raises:
        ValueError: a tensor of another shape, dtype, layout or device; ``softcap`` not positive.
        RuntimeError: the native module is not there (see :func:`unavailable`).
    """
    native = _require_native()
    suffix = _check_logits(logits)
    _check_rows("target", target, logits, torch.int64)
    _check_rows("loss", loss, logits, logits.dtype)
    _check_rows("logsumexp", logsumexp, logits, logits.dtype)
    _check_rows("factor", factor, logits, logits.dtype)
    rows, vocabulary = logits.shape
    getattr(native, "logits_gradient_" + suffix)(
        logits.data_ptr(),
        rows,
        vocabulary,
        logits.stride(0),
        target.data_ptr(),
        loss.data_ptr(),
        logsumexp.data_ptr(),
        factor.data_ptr(),
        _softcap_or_zero(softcap),
        torch.get_num_threads(),
        instruction_set,
    )
    return logits


def _require_native() -> ModuleType:
    if _native is None:
        raise RuntimeError(_reason)
    return _native


# The native side sees addresses only, so a wrong dtype or layout would read foreign memory: these checks cost about a
# microsecond and are not optional.


def _check_logits(logits: Tensor) -> str:
    suffix = _SUFFIX.get(logits.dtype)
    if suffix is None or logits.dim() != 2 or not logits.is_cpu or (logits.stride(1) != 1 and logits.shape[1] > 1):
        raise ValueError(
            f"logits: got {_describe(logits)}; takes float32 or float64 [rows, V] on cpu, each row's elements adjacent"
        )
    return suffix


def _check_rows(argument: str, value: Tensor, logits: Tensor, dtype: torch.dtype) -> None:
    if value.dtype != dtype or value.shape != logits.shape[:1] or not value.is_cpu or not value.is_contiguous():
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"{argument}: got {_describe(value)}; takes contiguous {name} [{logits.shape[0]}] on cpu")


def _softcap_or_zero(softcap: float | None) -> float:
    if softcap is None:
        return 0.0
    if not softcap > 0:
        raise ValueError(f"softcap: got {softcap!r}; takes a positive number or None")
    return float(softcap)


def _describe(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()} on {tensor.device}"
