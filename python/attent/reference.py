"""The specification: every op of attent in plain PyTorch, unchunked, readable, exact in float64.

Read this to know what attent computes. Nothing here is fast: the whole ``[tokens, V]`` matrix of logits is built, the
whole ``[T, T]`` matrix of attention scores. Backends are tested against these functions in float64, and these functions
are tested against :func:`torch.autograd.grad` of each example's own loss.

Arguments have the meaning, shapes and defaults of the public functions of the same name; they are not checked here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops.scored_attention import Readout, ScoredAttention
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
) -> Any:
    """Cross-entropy of ``input @ linear_weight.T + linear_bias`` and the gradient norm of each example's own loss."""
    tokens = _tokens(input, target, ignore_index, shift, cu_seqlens)
    computed = tokens.valid
    if example_weight is not None:
        computed = computed & (example_weight != 0)[tokens.example]  # not computed at weight 0: loss 0, score 0
    logits = tokens.hidden @ linear_weight.T  # [N, V]
    if linear_bias is not None:
        logits = logits + linear_bias
    mass = _target_mass(tokens.target, computed, logits, label_smoothing, weight)  # [N, V]
    losses, gradient = _cross_entropy_and_gradient(logits, mass, softcap)  # [N], [N, V]

    weighted = losses if example_weight is None else losses * example_weight[tokens.example]
    # The denominators count every valid token, whatever its example's weight: the loss is linear in example_weight.
    if reduction == "none":
        loss = weighted.view(target.shape[: input.dim() - 1])
    elif reduction == "sum":
        loss = weighted.sum()
    elif reduction == "mean":  # as torch: with class indices the denominator is the sum of the targets' class weights
        per_token = tokens.valid.to(losses.dtype)
        if weight is not None and not target.is_floating_point():
            per_token = per_token * weight[tokens.target.clamp(0, len(weight) - 1)]
        total = per_token.sum()
        loss = torch.where(total == 0, weighted.sum() * 0, weighted.sum() / total.where(total != 0, 1))
    else:  # "example"
        loss = tokens.by_example(weighted) / tokens.counts(losses.dtype)
    if score is None:
        return loss

    with torch.no_grad():
        names, biased = (score,) if isinstance(score, str) else score, linear_bias is not None
        scores = {
            name: _score(name, losses, gradient, tokens, per_example, tokens.hidden, linear_weight, biased)
            for name in names
        }
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
    tokens = _tokens(prediction, target, ignore_index, False, cu_seqlens)
    if loss == "cross_entropy":
        mass = _target_mass(tokens.target, tokens.valid, tokens.hidden, 0.0, None)
        losses, gradient = _cross_entropy_and_gradient(tokens.hidden, mass, None)
    else:
        gradient = tokens.hidden - tokens.target
        losses = 0.5 * gradient.square().sum(-1)
    if features is not None:
        features = features.reshape(-1, features.shape[-1])
    name = "logit" if score == "residual" else score
    return _score(name, losses, gradient, tokens, per_example, features, linear_weight, False).detach()


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
    **options: Any,
) -> Selection:
    """The lesson of a pool: :func:`linear_cross_entropy`'s scores, then :func:`select_top_k`, valid examples first."""
    scores = linear_cross_entropy(input, linear_weight, target, score=(score,), **options)[1][score]
    shift, cu_seqlens = options.get("shift", False), options.get("cu_seqlens")
    tokens = _tokens(input, target, options.get("ignore_index", -100), shift, cu_seqlens)
    has_token = tokens.by_example(tokens.valid.float()) > 0
    if options.get("example_weight") is not None:
        has_token &= options["example_weight"] != 0
    return select_top_k(scores, k, temperature=temperature, floor=floor, valid=has_token, seed=seed)


class _Tokens(NamedTuple):
    hidden: Tensor  # [N, D]; or logits or values [N, V] already in hand
    target: Tensor  # [N], or [N, V]
    example: Tensor  # [N] int64
    valid: Tensor  # [N] bool
    num_examples: int

    def by_example(self, values: Tensor) -> Tensor:
        """Token values [N] summed within examples [B]."""
        return values.new_zeros(self.num_examples).index_add(0, self.example, values)

    def counts(self, dtype: torch.dtype) -> Tensor:
        """n, the valid tokens of each example [B]; 1 where there is none, whose sums are 0."""
        return self.by_example(self.valid.to(dtype)).clamp(min=1)


def _tokens(input: Tensor, target: Tensor, ignore_index: int, shift: bool, cu_seqlens: Tensor | None) -> _Tokens:
    """Every layout as one list of tokens."""
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
    return _Tokens(input, target, example, valid, num_examples)


def _target_mass(
    labels: Tensor, valid: Tensor, logits: Tensor, label_smoothing: float, weight: Tensor | None
) -> Tensor:
    """The mass w_v q_v of the target on each class [N, V]: smoothed, times class weights, 0 for ignored tokens."""
    classes = logits.shape[-1]
    if labels.is_floating_point():
        q = labels.to(logits.dtype)
    else:
        q = torch.nn.functional.one_hot(labels.long().where(valid, 0), classes).to(logits.dtype)
    q = (1 - label_smoothing) * q + label_smoothing / classes
    if weight is not None:
        q = q * weight
    return q * valid[:, None]


def _cross_entropy_and_gradient(logits: Tensor, mass: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Token losses ℓ_t = −Σ_v m_v log p_v [N]; their gradients in the raw logits, d (M p − m) [N, V], M = Σ_v m_v."""
    capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_p = capped.log_softmax(-1)
    losses = torch.where(mass == 0, 0, -mass * log_p).sum(-1)  # 0 times a log of −inf is 0
    slope = 1 if softcap is None else 1 - (capped / softcap).square()
    gradient = slope * (mass.sum(-1, keepdim=True) * log_p.exp() - mass)
    return losses, gradient


def _score(
    name: str,
    losses: Tensor,
    gradient: Tensor,
    tokens: _Tokens,
    per_example: str,
    features: Tensor | None,
    linear_weight: Tensor | None,
    with_bias: bool,
) -> Tensor:
    """One named score [B] from token losses [N], token gradients g [N, V] and head inputs h [N, D]."""
    n = tokens.counts(losses.dtype)
    scale = {"mean": 1 / n, "sum": torch.ones_like(n), "rms": n.rsqrt()}[per_example]
    if name == "loss":  # always the mean
        return tokens.by_example(losses) / n
    if name == "logit":  # ‖∂L_i/∂z‖ = s √Σ_t ‖g_t‖²
        square = tokens.by_example(gradient.square().sum(-1))
    elif name == "hidden":  # ‖∂L_i/∂h‖ = s √Σ_t ‖Wᵀ g_t‖²
        assert linear_weight is not None
        square = tokens.by_example((gradient @ linear_weight).square().sum(-1))
    else:  # "head": ‖∂L_i/∂W‖ = s ‖Σ_t g_t h_tᵀ‖, cross-token terms included; with bias, of [W b]
        assert features is not None
        if with_bias:
            features = torch.cat([features, features.new_ones(len(features), 1)], dim=-1)
        of = [tokens.example == i for i in range(tokens.num_examples)]
        square = gradient.new_tensor([(gradient[t].T @ features[t]).square().sum() for t in of])
    return scale * square.sqrt()


# ----------------------------------------------------------------------------------------------- scored attention


def scored_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    target: Tensor | None = None,
    readout: Readout | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    score: str | None = None,
    per_example: str = "rms",
    top_k: int | None = None,
    temperature: float = 0.0,
    floor: float = 0.0,
    seed: int | Tensor | None = None,
) -> ScoredAttention:
    """Attention, then each example's loss and the gradient norm of that loss, one example at a time."""
    packed = cu_seqlens_q is not None and cu_seqlens_k is not None
    if packed:
        queries, keys = _segments(query, cu_seqlens_q), _segments(key, cu_seqlens_k)
        values, targets = _segments(value, cu_seqlens_k), _segments(target, cu_seqlens_q)
    else:
        queries, keys = _rows(query, query_lengths), _rows(key, key_lengths)
        values, targets = _rows(value, key_lengths), _rows(target, query_lengths)

    outputs, logsumexps, losses, logits, pooled, scores = [], [], [], [], [], []
    for i, (q, k, v) in enumerate(zip(queries, keys, values, strict=True)):  # [Hq, Lq, D], [Hkv, Lk, D], [Hkv, Lk, Dv]
        scaled = q.shape[-1] ** -0.5 if scale is None else scale
        output, logsumexp = _attend(q, k, v, scaled, softcap, is_causal, (-1, -1) if window is None else window)
        outputs.append(output)
        logsumexps.append(logsumexp.detach())
        n = output.shape[1]
        if readout is None:
            residual = output - targets[i]  # f_t - y_t over all heads
            losses.append(0.5 * residual.square().sum() / max(n, 1))
            s = {"mean": 1 / max(n, 1), "sum": 1, "rms": max(n, 1) ** -0.5}[per_example]
            norm = s * residual.norm()
        else:
            rows = {"mean": slice(None), "first": slice(0, 1), "last": slice(-1, None)}[readout.pool]
            h = (output[:, rows].mean(1) if n > 0 else output.sum(1)).flatten()  # [Hq * Dv], 0 without a query
            z = readout.weight @ h + (0 if readout.bias is None else readout.bias)  # [C]
            label = torch.nn.functional.one_hot(readout.target[i].long().clamp(0, len(z) - 1), len(z))
            losses.append(-(label * z.log_softmax(0)).sum() * (n > 0))
            pooled.append(h)
            logits.append(z)
            norm = (z.softmax(0) - label).norm() * (n > 0)  # one token: per_example makes no difference
            if score == "head":  # the gradient in W is g hᵀ, that in b is g
                norm = norm * (h.square().sum() + (readout.bias is not None)).sqrt()
        scores.append((losses[-1] if score == "loss" else norm).detach())

    heads, width = query.shape[1], value.shape[-1]
    if packed:
        whole = torch.cat([query.new_zeros(0, heads, width), *(o.transpose(0, 1) for o in outputs)])
        logsumexp = torch.cat([query.new_zeros(heads, 0), *logsumexps], dim=1)
    else:
        pad = [(0, query.shape[2] - o.shape[1]) for o in outputs]
        padded = [torch.nn.functional.pad(o, (0, 0, *p)) for o, p in zip(outputs, pad, strict=True)]
        whole = _stack(padded, query.new_zeros(heads, query.shape[2], width))
        padded = [torch.nn.functional.pad(x, p, value=-math.inf) for x, p in zip(logsumexps, pad, strict=True)]
        logsumexp = _stack(padded, query.new_zeros(heads, query.shape[2]))
    all_scores = None if score is None else _stack(scores, query.new_zeros(()))
    selection = None
    if all_scores is not None and top_k is not None:
        valid = torch.tensor([o.shape[1] > 0 for o in outputs], dtype=torch.bool, device=query.device)
        selection = select_top_k(all_scores, top_k, temperature=temperature, floor=floor, valid=valid, seed=seed)
    return ScoredAttention(
        output=whole,
        logsumexp=logsumexp,
        losses=_stack(losses, query.new_zeros(())),
        logits=None if readout is None else _stack(logits, query.new_zeros(len(readout.weight))),
        pooled=None if readout is None else _stack(pooled, query.new_zeros(heads * width)),
        scores=all_scores,
        selection=selection,
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None,
    is_causal: bool,
    window: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """One example's attention: output [Hq, Lq, Dv] and logsumexp [Hq, Lq]; 0 and -inf for a query without a key."""
    group = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    s = scale * query @ key.mT  # [Hq, Lq, Lk]
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    lq, lk = s.shape[1:]
    left, right = window
    position = torch.arange(lq, device=s.device)[:, None] + lk - lq  # the last query stands beside the last key
    j = torch.arange(lk, device=s.device)[None, :]
    allowed = torch.ones(lq, lk, dtype=torch.bool, device=s.device)
    if is_causal:
        allowed &= j <= position
    if left >= 0:
        allowed &= j >= position - left
    if right >= 0:
        allowed &= j <= position + right
    s = s.masked_fill(~allowed, -math.inf)
    logsumexp = s.logsumexp(-1)
    # Without a key, exp(-inf - -inf) would be NaN, and so would its gradient.
    p = (s - logsumexp.masked_fill(~allowed.any(-1), 0)[..., None]).exp()
    return p @ value, logsumexp


def _segments(tensor: Tensor | None, cu_seqlens: Tensor | None) -> list[Tensor]:
    """Packed [total, H, D] as one [H, L, D] per example."""
    if tensor is None or cu_seqlens is None:
        return []
    return [tensor[a:b].transpose(0, 1) for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]


def _rows(tensor: Tensor | None, lengths: Tensor | None) -> list[Tensor]:
    """Padded [B, H, T, D] as one [H, L, D] per example."""
    if tensor is None:
        return []
    each = [tensor.shape[2]] * len(tensor) if lengths is None else lengths.tolist()
    return [example[:, :length] for example, length in zip(tensor, each, strict=True)]


def _stack(examples: list[Tensor], like: Tensor) -> Tensor:
    """Tensors of B examples as one [B, ...]; none at all: [0, ...] like ``like``."""
    return torch.stack(examples) if examples else like[None][:0]


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
