"""A lesson: what was chosen, by which score, and how probable that was."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Selection(NamedTuple):
    """The k chosen examples of a pool.

    ``index`` int64 ``[k]``: positions in the pool. ``score`` ``[k]``: their scores, in the pool's dtype. ``inclusion``
    ``[k]``: the probability with which each was chosen, the noise of the others given; in (0, 1], float32 (float64 for
    float64 scores). Where every valid example can be chosen (temperature > 0, or a floor above 0),
    ``sum(x[index] / inclusion)`` is an unbiased estimate of the sum of ``x`` over the pool's valid examples (Horvitz
    and Thompson 1952).

    >>> index, score, inclusion = attent.select_top_k(torch.tensor([0.5, 3.0, 2.0]), 2)
    >>> index, inclusion
    (tensor([1, 2]), tensor([1., 1.]))
    """

    index: Tensor  # type: ignore[assignment]  # takes the place of tuple.index, which no one looks for here
    score: Tensor
    inclusion: Tensor
