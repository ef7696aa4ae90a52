"""The specification: every op of attent in plain PyTorch, unchunked, readable, exact in float64.

Read this to know what attent computes. Nothing here is fast: the whole ``[tokens, V]`` matrix of logits is built, the
whole ``[T, T]`` matrix of attention scores. Backends are tested against these functions in float64, and these functions
are tested against :func:`torch.autograd.grad` of each example's own loss.

Arguments have the meaning, shapes and defaults of the public functions of the same name; they are not checked here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .philox import gumbel, random_bits, seed_tensor
from .selection import Selection

# ----------------------------------------------------------------------------- linear cross-entropy and its scores


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    shift: bool = False,
    example_weight: Tensor | None = None,
    score: str | tuple[str, ...] | None = None,
    per_example: str = "rms",
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of ``input @ linear_weight.T + linear_bias`` and the gradient norm of each example's own loss."""
    hidden, labels, example, valid, num_examples = _tokens(input, target, ignore_index, shift, cu_seqlens)
    if example_weight is not None:
        computed = valid & (example_weight != 0)[example]  # an example of weight 0 is not computed: loss 0, score 0
    else:
        computed = valid
    logits = hidden @ linear_weight.T  # [N, V]
    if linear_bias is not None:
        logits = logits + linear_bias
    mass = _target_mass(labels, computed, logits, label_smoothing, weight)  # [N, V]
    losses, gradient = _cross_entropy_and_gradient(logits, mass, softcap)  # [N], [N, V]

    weighted = losses if example_weight is None else losses * example_weight[example]
    # The denominators count every valid token, whatever its example's weight: the loss is linear in example_weight.
    if reduction == "none":
        loss = weighted.view(target.shape[: input.dim() - 1])
    elif reduction == "sum":
        loss = weighted.sum()
    elif reduction == "mean":  # as torch: with class indices the denominator is the sum of the targets' class weights
        per_token = valid.to(losses.dtype)
        if weight is not None and not labels.is_floating_point():
            per_token = per_token * weight[labels.clamp(0, len(weight) - 1)]
        total = per_token.sum()
        loss = torch.where(total == 0, weighted.sum() * 0, weighted.sum() / total.where(total != 0, 1))
    else:  # "example"
        n = _sum_by_example(valid.to(losses.dtype), example, num_examples)
        loss = _sum_by_example(weighted, example, num_examples) / n.clamp(min=1)
    if score is None:
        return loss

    with torch.no_grad():
        names = (score,) if isinstance(score, str) else score
        scores = {
            name: _score(
                name, losses, gradient, valid, example, num_examples, per_example,
                features=hidden, linear_weight=linear_weight, with_bias=linear_bias is not None,
            )
            for name in names
        }  # fmt: skip
    return (loss, scores[score]) if isinstance(score, str) else (loss, scores)


def example_scores(
    prediction: Tensor,
    target: Tensor,
    *,
    loss: str = "cross_entropy",
    score: str = "logit",
    features: Tensor | None = None,
    linear_weight: Tensor | None = None,
    ignore_index: int = -100,
    per_example: str = "rms",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Scores of predictions already in hand: logits under cross-entropy, or values under ½‖prediction − target‖²."""
    if loss == "squared" and prediction.dim() == 1:  # one number per example
        prediction, target = prediction[:, None], target[:, None]
    if loss == "cross_entropy":
        logits, labels, example, valid, num_examples = _tokens(prediction, target, ignore_index, False, cu_seqlens)
        mass = _target_mass(labels, valid, logits, 0.0, None)
        losses, gradient = _cross_entropy_and_gradient(logits, mass, None)
    else:
        values, wanted, example, valid, num_examples = _tokens(prediction, target, ignore_index, False, cu_seqlens)
        gradient = values - wanted
        losses = 0.5 * gradient.square().sum(-1)
    if features is not None:
        features = features.reshape(-1, features.shape[-1])
    return _score(
        "logit" if score == "residual" else score, losses, gradient, valid, example, num_examples, per_example,
        features=features, linear_weight=linear_weight, with_bias=False,
    ).detach()  # fmt: skip


def gradient_scores(
    losses: Tensor, outputs: Tensor | tuple[Tensor, ...], example_index: Tensor | None = None
) -> Tensor:
    """‖∂losses[i]/∂outputs[rows of i]‖, one example and one autograd call at a time."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    scores = []
    for i, loss in enumerate(losses):
        square = losses.new_zeros(())
        for gradient in torch.autograd.grad(loss, outputs, retain_graph=True):
            rows = gradient[i] if example_index is None else gradient[example_index == i]
            square = square + rows.square().sum()
        scores.append(square.sqrt())
    return torch.stack(scores).detach() if scores else losses.new_zeros(0)


def score_and_select(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    k: int,
    *,
    score: str = "logit",
    temperature: float = 0.0,
    floor: float = 0.0,
    seed: int | Tensor | None = None,
    **options: object,
) -> Selection:
    """The lesson of a pool: :func:`linear_cross_entropy`'s scores, then :func:`select_top_k` with valid examples first."""
    _, scores = linear_cross_entropy(input, linear_weight, target, score=score, **options)  # type: ignore[arg-type, misc]
    shift, cu_seqlens = bool(options.get("shift", False)), options.get("cu_seqlens")
    ignore_index, example_weight = options.get("ignore_index", -100), options.get("example_weight")
    _, _, example, valid, num_examples = _tokens(input, target, ignore_index, shift, cu_seqlens)  # type: ignore[arg-type]
    has_token = _sum_by_example(valid.float(), example, num_examples) > 0
    if isinstance(example_weight, Tensor):
        has_token &= example_weight != 0
    return select_top_k(scores, k, temperature=temperature, floor=floor, valid=has_token, seed=seed)


def _tokens(
    input: Tensor, target: Tensor, ignore_index: int, shift: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Every layout as one list of tokens: hidden [N, D], target [N] or [N, V], example of each [N], valid [N], and B."""
    if cu_seqlens is not None:
        num_examples = len(cu_seqlens) - 1
        example = torch.arange(num_examples, device=input.device).repeat_interleave(cu_seqlens.diff().long())
    else:
        num_examples = len(input)
        tokens_each = input.shape[1:-1].numel()
        example = torch.arange(num_examples, device=input.device).repeat_interleave(tokens_each)
        target = target.flatten(0, input.dim() - 2)
        input = input.flatten(0, -2)
    valid = torch.ones(len(input), dtype=torch.bool, device=input.device)
    if shift:  # token t predicts target t + 1; the last token of an example predicts nothing
        target = target.roll(-1, 0)
        valid = torch.cat([example[1:] == example[:-1], valid.new_zeros(min(1, len(valid)))])
    if not target.is_floating_point():
        valid = valid & (target != ignore_index)
    return input, target, example, valid, num_examples


def _target_mass(
    labels: Tensor, valid: Tensor, logits: Tensor, label_smoothing: float, weight: Tensor | None
) -> Tensor:
    """The mass w_v q_v that the target puts on each class, [N, V]: smoothed, times class weights, 0 for ignored tokens."""
    classes = logits.shape[-1]
    if labels.is_floating_point():
        q = labels.to(logits.dtype)
    else:
        q = torch.nn.functional.one_hot(labels.where(valid, 0), classes).to(logits.dtype)
    q = (1 - label_smoothing) * q + label_smoothing / classes
    if weight is not None:
        q = q * weight
    return q * valid[:, None]


def _cross_entropy_and_gradient(logits: Tensor, mass: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Token losses ℓ_t = −Σ_v m_v log p_v [N] and their gradients in the raw logits, d (M p − m), M = Σ_v m_v [N, V]."""
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_p = capped.log_softmax(-1)
    losses = -torch.where(mass == 0, 0, mass * log_p).sum(-1)
    slope = 1 if softcap is None else 1 - (capped / softcap).square()
    gradient = slope * (mass.sum(-1, keepdim=True) * log_p.exp() - mass)
    return losses, gradient


def _score(
    name: str,
    losses: Tensor,
    gradient: Tensor,
    valid: Tensor,
    example: Tensor,
    num_examples: int,
    per_example: str,
    *,
    features: Tensor | None,
    linear_weight: Tensor | None,
    with_bias: bool,
) -> Tensor:
    """One named score [B] from token losses [N], token gradients g [N, V] and head inputs h [N, D]."""
    n = _sum_by_example(valid.to(losses.dtype), example, num_examples).clamp(min=1)
    scale = {"mean": 1 / n, "sum": torch.ones_like(n), "rms": n.rsqrt()}[per_example]
    if name == "loss":  # always the mean
        return _sum_by_example(losses, example, num_examples) / n
    if name == "logit":  # ‖∂L_i/∂z‖ = s √Σ_t ‖g_t‖²
        square = _sum_by_example(gradient.square().sum(-1), example, num_examples)
    elif name == "hidden":  # ‖∂L_i/∂h‖ = s √Σ_t ‖Wᵀ g_t‖²
        assert linear_weight is not None
        square = _sum_by_example((gradient @ linear_weight).square().sum(-1), example, num_examples)
    else:  # "head": ‖∂L_i/∂W‖ = s ‖Σ_t g_t h_tᵀ‖, cross-token terms included; with bias, of [W b]
        assert features is not None
        if with_bias:
            features = torch.cat([features, features.new_ones(len(features), 1)], dim=-1)
        of = [example == i for i in range(num_examples)]
        square = gradient.new_tensor([(gradient[t].T @ features[t]).square().sum() for t in of])
    return scale * square.sqrt()


def _sum_by_example(values: Tensor, example: Tensor, num_examples: int) -> Tensor:
    return values.new_zeros(num_examples).index_add(0, example, values)


# ----------------------------------------------------------------------------------------------- scored attention


# ------------------------------------------------------------------------------------------------------- selection


def select_top_k(
    scores: Tensor,
    k: int,
    *,
    temperature: float = 0.0,
    floor: float = 0.0,
    valid: Tensor | None = None,
    seed: int | Tensor | None = None,
    sorted: bool = True,
) -> Selection:
    """Choose k of n examples: k1 by key (by score at temperature 0), then k_f = k − k1 uniformly from the rest."""
    n = len(scores)
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    score: list[float] = scores.to(dtype).tolist()
    is_valid: list[bool] = [True] * n if valid is None else valid.tolist()
    pool = [i for i in range(n) if is_valid[i]]
    k_floor = math.floor(floor * k + 0.5)
    k_first = k - k_floor
    key_bits = floor_bits = torch.zeros(n, dtype=torch.int64, device=scores.device)
    if temperature > 0 or k_floor > 0:
        key_bits, floor_bits = random_bits(seed_tensor(seed, scores.device), torch.arange(n, device=scores.device))

    def ranking(value: list[float]) -> list[int]:
        """Valid before invalid; higher value first, of the invalid ones higher score first; lower index first."""
        examples = list(range(n))
        examples.sort(key=lambda i: (not is_valid[i], *_descending(value[i] if is_valid[i] else score[i]), i))
        return examples

    key = phi = score
    if temperature > 0:
        finite = torch.finfo(dtype)
        positive = scores.to(dtype).nan_to_num(nan=finite.max, posinf=finite.max).clamp(finite.tiny, finite.max)
        log_weight = positive.log() / max(temperature, 1e-30)
        phi, key = log_weight.tolist(), (log_weight + gumbel(key_bits, dtype)).tolist()

    def inclusion(i: int) -> float:
        if len(pool) <= k:
            return 1.0
        if k_first == 0:
            q = 0.0
        elif temperature == 0:
            q = float(i in first)
        else:
            others = [key[j] for j in pool if j != i]
            others.sort(reverse=True)
            q = -math.expm1(-math.exp(min(phi[i] - others[k_first - 1], 700.0)))  # a float64 ends at exp(709)
        return q + (1 - q) * k_floor / (len(pool) - k_first)

    first = set(ranking(key)[:k_first])
    rest = [i for i in ranking([-float(bits) for bits in floor_bits.tolist()]) if i not in first]
    chosen = first | set(rest[:k_floor])
    index = [i for i in (ranking(score) if sorted else range(n)) if i in chosen]
    positions = torch.tensor(index, dtype=torch.int64, device=scores.device)
    probabilities = torch.tensor([inclusion(i) for i in index], dtype=dtype, device=scores.device)
    return Selection(positions, scores[positions], probabilities)


def _descending(value: float) -> tuple[int, float]:
    """A sort key that puts NaN first, then higher values first; -0 equals 0."""
    return (0, 0.0) if math.isnan(value) else (1, -value)
