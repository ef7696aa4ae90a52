"""The two-pass engine: a forward without gradient for losses and scores, then training on the chosen rows alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .batch import Batch
from .probe import losses_of


class TwoPassForward:
    """A batch that waits for its choice."""

    name = "two_pass"

    def __init__(self, function: Callable[..., Any], batch: Batch, modules: list[nn.Module]) -> None:
        self._function, self._batch, self._modules = function, batch, modules
        kind = batch.device.type
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def run(self) -> Any:
        """The whole batch's forward, without gradient. Running statistics of norms are left to the chosen rows."""
        norms = [m for root in self._modules for m in root.modules() if isinstance(m, _NormBase) and m.training]
        before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
        args, kwargs = self._batch.map(lambda rows: rows)
        kind, dtype, enabled = self._autocast
        # Without autocast's cache: it would keep casts of weights made here, without gradient, for the second pass.
        with torch.no_grad(), torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False):
            result = self._function(*args, **kwargs)
            for buffer, value in before:
                buffer.copy_(value)
        return result

    def loss(self, losses: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Σ weights · losses of the chosen rows, from a forward of their own."""
        if len(index) == 0:
            return losses.new_zeros((), requires_grad=True)
        args, kwargs = self._batch.take(index)
        kind, dtype, enabled = self._autocast
        with torch.autocast(kind, dtype, enabled=enabled):
            chosen, _ = losses_of(self._function(*args, **kwargs))
        return (chosen * weights).sum()
