"""Choose k of n examples by their scores: the k largest, or a Gumbel top-k sample, part of it drawn uniformly."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import FLOATING, check_choice, check_int, check_number, check_tensor, describe, refuse, values_readable
from ..philox import gumbel, random_bits, seed_tensor
from ..selection import Selection
from . import dispatch
from .plain_eager import nobody_listens

_INDEX_BITS = 31
_INDEX_MASK = 2**_INDEX_BITS - 1

#: Smaller temperatures count as this one: even ``log(tiny) / 1e-30`` is finite, so no key is infinite and none is NaN.
SMALLEST_TEMPERATURE = 1e-30


def select_top_k(
    scores: Tensor,
    k: int,
    *,
    temperature: float = 0.0,
    floor: float = 0.0,
    valid: Tensor | None = None,
    seed: int | Tensor | None = None,
    sorted: bool = True,
    backend: str = "auto",
) -> Selection:
    """Choose ``k`` of ``n`` examples by their scores.

    ``temperature`` 0 takes the k largest scores. Above 0, examples are drawn without replacement, each next one with
    probability proportional to ``score ** (1 / temperature)`` among those left: Gumbel top-k on the keys ``φ + G``,
    ``φ = log(score) / temperature``. The noise ``G`` is not scaled: dividing it as well would leave the order of the
    keys, and so the choice, as it is at temperature 1. Of the k, ``k_f = floor(floor · k + ½)`` are drawn uniformly
    from what the first ``k1 = k - k_f`` leave.

    Inclusion probabilities, with κ_i the k1-th largest key among the valid examples other than i::

        q_i = 1 - exp(-exp(φ_i - κ_i))        π_i = q_i + (1 - q_i) · k_f / (n - k1)

    and their limit at temperature 0: 1 for the k1 largest, ``k_f / (n - k1)`` for the rest. n counts valid examples;
    where they number k or fewer, all of them are chosen, everything has inclusion 1, and invalid ones fill up.

    Order: valid before invalid, then higher score, then lower index; -0 equals +0, NaN ranks above +inf. Above
    temperature 0 a score counts as at least the smallest positive normal number (so zeros stay drawable), and +inf and
    NaN count as the largest finite number. Equal keys: lower index first.

    Args:
        scores: ``[n]`` float16, bfloat16, float32 or float64, n < 2^31.
        k: how many to choose, 0 <= k <= n.
        temperature: 0 or above; without unit, it divides the logarithm of the scores.
        floor: share of the k that is drawn uniformly, in [0, 1].
        valid: ``[n]`` bool; None: all are.
        seed: an int64 number, or a tensor that holds one (on the scores' device, read without a synchronisation).
            The same seed and scores give the same choice on any backend, up to rounding in ``log``. None draws one
            from torch's default generator. Noise of example i: Philox4x32-10 of (seed, i).
        sorted: True: the chosen in the order above by their scores, False: by index.
        backend: ``"auto"`` or a name in :func:`attent.backends`.

    Returns:
        :class:`Selection`: index int64 ``[k]``, score ``[k]``, inclusion ``[k]``, all on the scores' device, without
        gradient.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range; a valid score is negative and temperature
            is above 0 (seen on CPU; elsewhere only under ``ATTENT_CHECK=1``, without it such a score counts as 0).

    Source: Kool, van Hoof, Welling 2019, "Stochastic beams and where to find them" (the sample and q); Horvitz,
    Thompson 1952 (the estimate that the inclusions are for).

    >>> scores = torch.tensor([0.1, 3.0, 2.0, 3.0])
    >>> attent.select_top_k(scores, 3).index
    tensor([1, 3, 2])
    >>> drawn = attent.select_top_k(scores, 2, temperature=1.0, floor=0.5, seed=0)
    >>> drawn.inclusion.shape, bool((drawn.inclusion > 0).all())
    (torch.Size([2]), True)
    """
    check_tensor("scores", scores, "a floating-point tensor [n]", shape=(None,), dtypes=FLOATING)
    if not torch.compiler.is_compiling():  # there they are symbols, which a check could pin to one value
        _check_numbers(scores.shape[0], k, temperature, floor)
    if valid is not None:
        takes = "None or a bool tensor [n] like scores"
        check_tensor("valid", valid, takes, shape=scores.shape, dtypes=(torch.bool,), device=scores.device)
    _check_seed(seed, scores.device)
    if not isinstance(sorted, bool):
        refuse("sorted", describe(sorted), "True or False")
    check_choice("backend", backend, ("auto", *dispatch.BACKENDS))
    noisy = temperature > 0 or floor > 0
    if temperature > 0 and values_readable(scores):
        negative = scores < 0 if valid is None else (scores < 0) & valid
        if bool(negative.any()):
            refuse("scores", f"a smallest score of {float(scores[negative].min())}", "scores >= 0 with temperature > 0")
    drawn = seed_tensor(seed, scores.device) if noisy else None
    scores = scores.detach()
    if nobody_listens((scores, valid, drawn)):
        return Selection(*_select(backend, scores, k, temperature, floor, valid, drawn, sorted))
    return Selection(*torch.ops.attent.select_top_k(scores, k, temperature, floor, valid, drawn, sorted, backend))


def _check_numbers(n: int, k: int, temperature: float, floor: float) -> None:
    """Refuse numbers out of range; called where they are numbers, not symbols of a trace."""
    if n > _INDEX_MASK:
        refuse("scores", f"n={n}", "n < 2^31")
    check_int("k", k, low=0, high=n, why=f"scores holds n={n} examples")
    check_number("temperature", temperature, low=0.0)
    check_number("floor", floor, low=0.0, high=1.0)


def _check_seed(seed: object, device: torch.device) -> None:
    """Refuse a seed that is not None, an int64 number or an int64 tensor of one element."""
    takes = "None, an int in [-2^63, 2^63), or an int64 tensor of one element on the scores' device"
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != device:
            refuse("seed", describe(seed), takes)
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63):
        refuse("seed", describe(seed), takes)


def floor_count(k: int, floor: float) -> int:
    """How many of the k chosen are drawn uniformly: ``k_f = floor(floor · k + ½)``."""
    return math.floor(floor * k + 0.5)


def log_weight(scores: Tensor, temperature: float) -> Tensor:
    """``φ = log(score) / temperature``, finite for every score: see the Order paragraph of :func:`select_top_k`."""
    finite = torch.finfo(scores.dtype)
    positive = scores.nan_to_num(nan=finite.max).clamp_(finite.tiny, finite.max)
    return positive.log_().div_(max(temperature, SMALLEST_TEMPERATURE))


# ---------------------------------------------------------------------------------------------------- registration

torch.library.define(
    "attent::select_top_k",
    "(Tensor scores, SymInt k, float temperature, float floor, Tensor? valid, Tensor? seed, bool sorted, str backend)"
    " -> (Tensor index, Tensor score, Tensor inclusion)",
)


def _run(
    scores: Tensor,
    k: int,
    temperature: float,
    floor: float,
    valid: Tensor | None,
    seed: Tensor | None,
    sorted: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_numbers(scores.shape[0], k, temperature, floor)  # again: compiled callers have them only now
    return _select(backend, scores, k, temperature, floor, valid, seed, sorted)


def _select(backend: str, scores: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    chosen = dispatch.choose("select_top_k", backend, scores.device, scores)
    index, score, inclusion = dispatch.implementation("select_top_k", chosen)(scores, *arguments)
    return index, score, inclusion


def _fake(
    scores: Tensor,
    k: int,
    temperature: float,
    floor: float,
    valid: Tensor | None,
    seed: Tensor | None,
    sorted: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    index = scores.new_empty(k, dtype=torch.int64)
    return index, scores.new_empty(k), scores.new_empty(k, dtype=_working_dtype(scores))


# For every device, and without a gradient: a choice has none.
torch.library.impl("attent::select_top_k", "CompositeExplicitAutograd", _run)
torch.library.register_fake("attent::select_top_k", _fake)


# ---------------------------------------------------------------------------------------------------- torch backend


@dispatch.register("select_top_k", "torch")
def _select_top_k_torch(
    scores: Tensor,
    k: int,
    temperature: float,
    floor: float,
    valid: Tensor | None,
    seed: Tensor | None,
    sorted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Partial sorts of unique int64 ranks, which no tie can make ambiguous; nothing is read back to the host."""
    n = scores.numel()
    k_floor = floor_count(k, floor)
    values = scores.to(_working_dtype(scores))
    by_score = _rank(_descending_code(values), valid)
    if k == 0 or k == n:
        index, inclusion = torch.arange(k, device=scores.device), values.new_ones(k)
    elif temperature == 0 and k_floor == 0:
        index, inclusion = _index(_smallest(by_score, k)), values.new_ones(k)
    else:
        assert seed is not None
        index, inclusion = _draw(values, by_score, k - k_floor, k_floor, temperature, valid, seed)
    order = (by_score[index] if sorted else index).argsort()
    index = index[order]
    return index, scores[index], inclusion[order]


def _draw(
    values: Tensor,
    by_score: Tensor,
    k_first: int,
    k_floor: int,
    temperature: float,
    valid: Tensor | None,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """The ``k_first`` best by key (by score at temperature 0), then ``k_floor`` of the rest; their inclusions."""
    n = values.numel()
    key_bits, floor_bits = random_bits(seed, torch.arange(n, device=values.device))

    rank, phi, key = by_score, values, values
    if temperature > 0:
        phi = log_weight(values, temperature)
        key = gumbel(key_bits, values.dtype).add_(phi)
        # Invalid ones have no noise: where they must fill up, they do it in the order of their scores at any seed.
        rank = _rank(_descending_code(key if valid is None else torch.where(valid, key, values)), valid)
    head = _smallest(rank, k_first + 1)
    # [1], not []: indexing with a zero-dimensional tensor reads it back to the host.
    runner_up = head.amax(0, keepdim=True)
    last_first = head.masked_fill(head == runner_up, -(2**63)).amax(0, keepdim=True)
    index = _index(_smallest(head, k_first))
    if k_floor > 0:
        code = floor_bits - 2**31
        floor_rank = _rank(code if valid is None else torch.where(valid, code, _descending_code(values)), valid)
        floor_rank.masked_fill_(rank < runner_up, 2**63 - 1)
        index = torch.cat([index, _index(_smallest(floor_rank, k_floor))])

    in_first = rank[index] < runner_up
    if temperature > 0 and k_first > 0:
        threshold = torch.where(in_first, key[_index(runner_up)], key[_index(last_first)])
        q = _probability_above(phi[index], threshold)
    else:
        q = in_first.to(values.dtype)
    n_valid = torch.full((), n, device=values.device) if valid is None else valid.sum()
    share = k_floor / (n_valid - k_first).clamp(min=1).to(values.dtype)
    # With k or fewer valid ones nothing is left to chance (and the thresholds may belong to invalid ones).
    return index, torch.where(n_valid <= k_first + k_floor, 1.0, q + (1 - q) * share)


def _probability_above(phi: Tensor, threshold: Tensor) -> Tensor:
    """``q = P(φ + G > κ) = 1 - exp(-exp(φ - κ))``, accurate for small and for large ``φ - κ``."""
    return (phi - threshold).exp_().neg_().expm1_().neg_()


def _descending_code(values: Tensor) -> Tensor:
    """``[n]`` integers in int32's range that rise where ``values`` fall: NaN lowest, then +inf; equal for -0 and +0.

    64-bit values do not fit: the position in a stable sort stands in for them, so that equal ones differ, by index.
    """
    if values.dtype == torch.float64:
        order = torch.sort(values, descending=True, stable=True).indices
        return torch.empty_like(order).scatter_(0, order, torch.arange(values.numel(), device=values.device))
    # One NaN of all (positive, hence above +inf), one zero of both.
    bits = torch.where(values.isnan(), math.nan, values + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ -(2**31), bits ^ -1)


def _rank(code: Tensor, valid: Tensor | None) -> Tensor:
    """``[n]`` unique int64, smaller comes first: from the top, 1 bit for invalid, 32 for ``code``, 31 for the index."""
    code = code.to(torch.int64)
    if valid is not None:
        code = code + torch.where(valid, -(2**31), 2**31)
    return (code << _INDEX_BITS) | torch.arange(code.numel(), device=code.device)


def _index(rank: Tensor) -> Tensor:
    """The index that a rank ends in."""
    return rank.bitwise_and(_INDEX_MASK)


def _smallest(rank: Tensor, k: int) -> Tensor:
    """The k smallest ranks, in no order: for large n far cheaper than a full sort."""
    smallest: Tensor = torch.topk(rank, k, largest=False, sorted=False).values
    return smallest


def _working_dtype(scores: Tensor) -> torch.dtype:
    """Keys and inclusion are float32, and float64 for float64 scores."""
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


# It registers both backends.
from . import kernel_select_top_k as kernel_select_top_k  # noqa: E402
