"""Passes over a chunk of logits [C, V] in place: cap, exponentials and what they sum to, the gradient of the logits.

The columns may start at class ``first`` of the vocabulary: a slab of a long example's second pass, or a rank's shard.

Numerics, index targets: nothing is subtracted that could cancel. With the target's own column taken out,
a = Σ_{v≠y} exp(z_v − m) and s = Σ_{v≠y} exp(z_v − m)² give, with l = a + exp(z_y − m), 1 − p_y = a/l and
‖p − onehot‖² = (a² + s)/l²; the gradient's target column is written as −(1 − p_y). With smoothing ε the target column
is (M − m_y) − M (1 − p_y), where M − m_y, what the smoothing puts on the other classes, is known in closed form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import attent_kernels.row_statistics as native

from . import tokens
from .vocabulary_shards import Shard


class Targets(NamedTuple):
    """How a target spreads its mass m_v = w_v q_v over the classes; factors of a whole token are applied elsewhere."""

    class_weight: Tensor | None  # [V], where smoothing or soft targets make it more than a factor of the token
    label_smoothing: float
    shard: Shard
    squared: bool = False  # the loss is ½‖z − target‖², not cross-entropy: nothing is exponentiated


class Statistics(NamedTuple):
    """What the logits of some tokens sum to; M = Σ_v m_v."""

    losses: Tensor  # [C] −Σ_v m_v log p_v
    logsumexp: Tensor  # [C]
    own: Tensor | None  # [C] the gradient's entry in the target's own column, index targets
    square: Tensor | None  # [C] the squared norm of the gradient in the raw logits; None: write the gradient to know it
    mass: Tensor | None = None  # [C] M; None: 1
    factor: Tensor | None = None  # [C] M/l, which turns exp(z − m) into M p; None: 1
    slope: Tensor | None = None  # [C, V] of the softcap


class TorchPasses(NamedTuple):
    """The two passes in PyTorch operations, for every kind of target."""

    targets: Targets
    softcap: float | None

    def statistics_(self, z: Tensor, target: Tensor, *, gradient_follows: bool) -> Statistics:
        """What logits [C, V] sum to; they are overwritten with exp(z̃ − m)."""
        slope = cap_(z, self.softcap, need_slope=gradient_follows)
        statistics = exponentials_(z, target, self.targets)
        if self.softcap is None:
            return statistics
        return statistics._replace(slope=slope, square=None)

    def gradient_(self, z: Tensor, target: Tensor, statistics: Statistics) -> None:
        """Overwrite what ``statistics_`` left with the gradient in the raw logits."""
        gradient_(z, target, statistics.factor, statistics.own, self.targets, self.targets.shard.first)
        if statistics.slope is not None:
            z.mul_(statistics.slope)


class NativePasses(NamedTuple):
    """The two passes of the native module: index targets on CPU, each pass one read (and one write) of the chunk."""

    softcap: float | None

    def statistics_(self, z: Tensor, target: Tensor, *, gradient_follows: bool) -> Statistics:
        """What logits [C, V] sum to; they stay as they are."""
        losses, logsumexp, square = native.row_statistics(z, target, softcap=self.softcap)
        return Statistics(losses, logsumexp, None, square)

    def gradient_(self, z: Tensor, target: Tensor, statistics: Statistics) -> None:
        """Overwrite logits with their gradient."""
        ones = torch.ones_like(statistics.losses)
        native.logits_gradient_(z, target, statistics.losses, statistics.logsumexp, ones, softcap=self.softcap)


def choose_passes(targets: Targets, softcap: float | None, target: Tensor) -> TorchPasses | NativePasses:
    """The native module's passes where it is installed and covers the case, PyTorch's elsewhere."""
    covered = not (target.is_floating_point() or targets.label_smoothing > 0 or targets.shard.group is not None)
    if covered and target.device.type == "cpu" and native.unavailable() is None:
        return NativePasses(softcap)
    return TorchPasses(targets, softcap)


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """z = h Wᵀ + b [C, V], written to ``out`` in its dtype."""
    if hidden.dtype == out.dtype:
        if bias is None:
            return torch.mm(hidden, weight.t(), out=out)
        return torch.addmm(bias, hidden, weight.t(), out=out)
    if hidden.device.type == "cuda":  # accumulated and kept in float32
        out.copy_(torch.mm(hidden, weight.t(), out_dtype=out.dtype))
    else:  # rounded to the input's dtype, as F.linear does
        out.copy_(torch.mm(hidden, weight.t()))
    return out if bias is None else out.add_(bias)


def cap_(z: Tensor, softcap: float | None, *, need_slope: bool) -> Tensor | None:
    """z̃ = c tanh(z/c) in place; returns the slope d = 1 − (z̃/c)² [C, V] where a gradient will need it."""
    if softcap is None:
        return None
    z.div_(softcap).tanh_()
    slope = torch.addcmul(torch.ones((), dtype=z.dtype, device=z.device), z, z, value=-1) if need_slope else None
    z.mul_(softcap)
    return slope


def exponentials_(z: Tensor, target: Tensor, targets: Targets) -> Statistics:
    """Turn capped logits into exp(z − m) in place (0 in the target's own column) and say what they sum to."""
    shard, smoothing = targets.shard, targets.label_smoothing
    if targets.squared:
        residual = torch.linalg.vector_norm(z - target, dim=1)
        nothing = residual.new_zeros(()).expand_as(residual)
        return Statistics(0.5 * residual.square(), nothing, None, residual.square())

    # From here on logits are counted from their maximum, so that no loss is a difference of large numbers.
    maximum = shard.max_(z.amax(1))
    z.sub_(maximum[:, None])
    if target.is_floating_point():
        masses = class_masses(target, targets, z.dtype)
        expected = expected_of_masses(z, masses)
        mass = masses.sum(1)
        normaliser = z.exp_().sum(1)
        log_normaliser = normaliser.log()
        losses = mass * log_normaliser - expected
        return Statistics(losses, maximum + log_normaliser, None, None, mass, mass / normaliser)

    column, absent = own_column(target, shard.first, z.shape[1], shard.group is None)
    own = z.gather(1, column).squeeze(1)
    if absent is not None:
        own = shard.max_(own.masked_fill(absent, -torch.inf))
    expected = expected_logit(z, own, target, targets) if smoothing > 0 else own
    put_(z, column, absent, torch.full_like(own, -torch.inf))
    others = shard.sum_(z.exp_().sum(1))
    normaliser = others + own.exp()
    # log l keeps its small part where l is 1 + a with a tiny: the target then holds the maximum.
    log_normaliser = torch.where(own == 0, others.log1p(), normaliser.log())
    logsumexp = maximum + log_normaliser
    if smoothing == 0:
        square = shard.sum_(square_norms(z)).add_(others.square()).div_(normaliser.square())
        losses = log_normaliser - own
        return Statistics(losses, logsumexp, -others / normaliser, square, None, normaliser.reciprocal())
    mass, on_others = index_masses(target, targets, z.dtype)
    own_entry = on_others - mass * (others / normaliser)
    losses = mass * log_normaliser - expected
    return Statistics(losses, logsumexp, own_entry, None, mass, mass / normaliser)


def gradient_(
    z: Tensor, target: Tensor, factor: Tensor | None, own: Tensor | None, targets: Targets, first: int
) -> None:
    """Turn exponentials z into the gradient M p − m of the capped logits in place, M p = factor · z.

    The columns are classes ``first`` and on; of probabilities, ``target`` holds the same columns. Of a squared loss,
    z are values, and become z − target.
    """
    classes = z.shape[1]
    if factor is not None:
        z.mul_(factor[:, None])
    if target.is_floating_point():
        z.sub_(class_masses(target, targets, z.dtype, first))
        return
    assert own is not None
    if targets.label_smoothing > 0:
        spread = targets.label_smoothing / targets.shard.classes
        if targets.class_weight is None:
            z.sub_(spread)
        else:
            z.sub_(targets.class_weight[first : first + classes].to(z.dtype) * spread)
    put_(z, *own_column(target, first, classes, classes == targets.shard.classes), own)


def own_column(target: Tensor, first: int, classes: int, complete: bool) -> tuple[Tensor, Tensor | None]:
    """The target's column [C, 1] among classes [first, first + classes), and where [C] it is absent (None: nowhere)."""
    if complete:
        return target[:, None], None
    column = target - first
    return column.clamp(0, classes - 1)[:, None], (column < 0) | (column >= classes)


def put_(z: Tensor, column: Tensor, absent: Tensor | None, values: Tensor) -> None:
    """Write values [C] to each row's own column, except where that is absent."""
    if absent is not None:
        values = torch.where(absent, z.gather(1, column).squeeze(1), values)
    z.scatter_(1, column, values[:, None])


def class_masses(target: Tensor, targets: Targets, dtype: torch.dtype, first: int = 0) -> Tensor:
    """m = w ⊙ ((1 − ε) q + ε/V) of soft targets, for the columns given [C, ·]; a squared loss's target as it is."""
    masses = target.to(dtype)
    if targets.label_smoothing > 0:
        masses = masses * (1 - targets.label_smoothing) + targets.label_smoothing / targets.shard.classes
    if targets.class_weight is not None:
        masses = masses * targets.class_weight[first : first + masses.shape[1]].to(dtype)
    return masses


def index_masses(target: Tensor, targets: Targets, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """M [C], and what of it lies on the other classes, M − m_y [C], of smoothed index targets."""
    smoothing, classes = targets.label_smoothing, targets.shard.classes
    if targets.class_weight is None:
        mass = torch.ones(len(target), dtype=dtype, device=target.device)
        return mass, mass * (smoothing * (classes - 1) / classes)
    weights = targets.class_weight.to(dtype)
    own, total = weights[target], weights.sum()
    return (1 - smoothing) * own + smoothing / classes * total, smoothing / classes * (total - own)


def expected_of_masses(z: Tensor, masses: Tensor) -> Tensor:
    """Σ_v m_v z_v [C], where 0 times a logit of −inf is 0."""
    if tokens.may_look(z.device):
        expected: Tensor = torch.linalg.vecdot(masses, z)
        if not bool(expected.isnan().any()):  # no need to look for a mass of 0 at each logit
            return expected
    finite: Tensor = torch.linalg.vecdot(masses, z.masked_fill(masses == 0, 0))
    return finite


def expected_logit(z: Tensor, own: Tensor, target: Tensor, targets: Targets) -> Tensor:
    """Σ_v m_v z_v of smoothed index targets [C]."""
    smoothing, classes = targets.label_smoothing, targets.shard.classes
    if targets.class_weight is None:
        return (1 - smoothing) * own + smoothing / classes * targets.shard.sum_(z.sum(1))
    weights = targets.class_weight.to(z.dtype)
    of_all = z.masked_fill(weights == 0, 0) @ weights  # 0 times a logit of −inf is 0
    return (1 - smoothing) * weights[target] * own + smoothing / classes * of_all


def square_norms(rows: Tensor) -> Tensor:
    """Σ_v x_v² of each row [C], read once, without a squared copy."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.square_()
