"""``attent.scored_attention``: attention whose forward returns losses, each example's gradient norm, and the lesson."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import (
    FLOATING,
    INTEGER,
    autocast_dtype,
    check_choice,
    check_cu_seqlens,
    check_int,
    check_number,
    check_tensor,
    describe,
    dtype_name,
    refuse,
    values_readable,
)
from ..philox import seed_tensor
from ..selection import Selection
from . import cuda_scored_attention as cuda_scored_attention  # registers the CUDA C++ backend
from . import torch_scored_attention as torch_scored_attention  # registers the torch backend
from . import triton_attention_backward as triton_attention_backward  # registers the Triton backend's gradients
from . import triton_scored_attention as triton_scored_attention  # registers the Triton backend
from .linear_cross_entropy import PER_EXAMPLE as PER_EXAMPLE
from .scored_attention_op import Problem, Scoring, run
from .select_top_k import _check_seed

POOLS = ("mean", "first", "last")
TARGET_SCORES = ("residual", "loss")
READOUT_SCORES = ("logit", "head", "loss")


class Readout(NamedTuple):
    """A linear classifier on the pooled output of attention, and the labels it is to give.

    ``weight`` ``[C, Hq * Dv]`` and ``bias`` ``[C]`` may be of any floating dtype; ``target`` ``[B]`` holds int32 or
    int64 labels in ``[0, C)``. ``pool``: the ``"mean"`` of an example's rows, the ``"first"`` or the ``"last"`` one.

    >>> query, head = torch.randn(4, 2, 5, 8), torch.nn.Linear(2 * 8, 3)
    >>> readout = attent.Readout(head.weight, torch.tensor([0, 1, 2, 0]), head.bias, pool="last")
    >>> attent.scored_attention(query, query, query, readout=readout, score="logit").scores.shape
    torch.Size([4])
    """

    weight: Tensor
    target: Tensor
    bias: Tensor | None = None
    pool: str = "mean"


class ScoredAttention(NamedTuple):
    """What :func:`attent.scored_attention` returns; None: not asked for.

    ``output`` ``[B, Hq, Tq, Dv]`` (packed: ``[total_q, Hq, Dv]``) in the query's dtype, and ``logsumexp`` ``[B, Hq,
    Tq]`` (packed: ``[Hq, total_q]``), the natural logarithm of the softmax's denominator. ``losses`` ``[B]``;
    with a readout ``logits`` ``[B, C]`` and ``pooled`` ``[B, Hq * Dv]``, what it classifies. ``scores`` ``[B]`` and
    ``selection``, the top k. ``logits`` and ``pooled`` are in the query's dtype too, the others float32 (float64 for
    float64 inputs). ``output``, ``losses``, ``logits`` and ``pooled`` carry gradients.

    >>> query = torch.randn(4, 2, 5, 8)
    >>> out = attent.scored_attention(query, query, query, target=query, score="residual", top_k=2)
    >>> out.output.shape, out.losses.shape, out.selection.index.shape, out.logits
    (torch.Size([4, 2, 5, 8]), torch.Size([4]), torch.Size([2]), None)
    """

    output: Tensor | None
    logsumexp: Tensor | None
    losses: Tensor
    logits: Tensor | None
    pooled: Tensor | None
    scores: Tensor | None
    selection: Selection | None


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
    return_output: bool = True,
    backend: str = "auto",
) -> ScoredAttention:
    """Attention that also returns each example's loss, the norm of its gradient, and the examples to learn from.

    Query t of an example with Lq queries and Lk keys stands at position ``t + Lk - Lq``: the last query beside the last
    key, as in FlashAttention. Output is ``softmax(s) value`` over the keys a query may look at, where
    ``s = scale · query keyᵀ``, with ``softcap`` c then ``c · tanh(s / c)``.

    ============== =============================================== ===============================================
    of             ``target``: values that output should have      ``readout``: a classifier of the pooled output
    ============== =============================================== ===============================================
    losses         ``1/Lq · Σ_t ½‖f_t − y_t‖²`` over all heads     cross-entropy of ``W h + b``, h the pooled rows
    ``"residual"`` ``s · √Σ_t ‖f_t − y_t‖²``                       –
    ``"logit"``    –                                               ``‖g‖``, ``g = softmax(W h + b) − onehot``
    ``"head"``     –                                               ``‖g‖ · ‖h‖``, with bias ``‖g‖ · √(‖h‖² + 1)``
    ``"loss"``     the loss                                        the loss
    ============== =============================================== ===============================================

    An example is invalid if it has no query: loss 0, score 0, pooled 0, and chosen after every valid one. A query
    without a key to look at has output 0 and logsumexp -inf, and otherwise counts like any other.

    Args:
        query: ``[B, Hq, Tq, D]``, or packed ``[total_q, Hq, D]``; float16, bfloat16, float32 or float64, any strides.
        key: ``[B, Hkv, Tk, D]`` or ``[total_k, Hkv, D]``, in the query's dtype.
        value: ``[B, Hkv, Tk, Dv]`` or ``[total_k, Hkv, Dv]``, in the query's dtype.
        target: like output, of any floating dtype. It takes no gradient. Exactly one of target and readout is needed.
        readout: :class:`Readout`.
        is_causal: look at no key behind one's own position.
        scale: default ``1/√D``.
        enable_gqa: allow Hq to be a multiple of Hkv; query head h looks at key head ``h // (Hq / Hkv)``.
        window: (left, right), look at most so many keys before and behind one's position; -1: no limit.
        softcap: c > 0, as above.
        query_lengths: ``[B]`` int32 or int64, 0 <= Lq <= Tq. What stands behind is not read: it has output 0 and
            logsumexp -inf.
        key_lengths: ``[B]`` int32 or int64, 0 <= Lk <= Tk. What stands behind is not read.
        cu_seqlens_q: ``[B + 1]`` int32, where packed examples start and end; comes with cu_seqlens_k.
        cu_seqlens_k: ``[B + 1]`` int32.
        score: a name in the table.
        per_example: the factor s of ``"residual"``: ``"mean"`` 1/Lq, ``"sum"`` 1, ``"rms"`` 1/√Lq. A readout has one
            token per example, so all three are the same there.
        top_k: choose so many examples by their scores, 0 <= top_k <= B.
        temperature, floor, seed: as in :func:`attent.select_top_k`.
        return_output: False: output and logsumexp are None, and where the pool needs but one row of an example, only
            that row is computed.
        backend: ``"auto"`` or a name in :func:`attent.backends`.

    Returns:
        :class:`ScoredAttention`. In the query's dtype: ``output`` ``[B, Hq, Tq, Dv]`` (stored as ``[B, Tq, Hq, Dv]``)
        or ``[total_q, Hq, Dv]``, ``logits`` ``[B, C]``, ``pooled`` ``[B, Hq * Dv]``. In float32 (float64 for float64
        inputs): ``logsumexp`` ``[B, Hq, Tq]`` or ``[Hq, total_q]`` (natural logarithm), ``losses`` ``[B]``, ``scores``
        ``[B]``. ``selection``: :class:`attent.Selection`. Output, losses, logits and pooled are differentiable (once)
        in query, key, value and the readout's weight and bias; the others carry no gradient.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range. Labels, lengths and cu_seqlens are read on
            CPU, elsewhere only under ``ATTENT_CHECK=1``; without it, a label outside ``[0, C)`` makes that example's
            loss and score NaN, and lengths and cu_seqlens are clamped.

    Under autocast, query, key and value are cast as ``scaled_dot_product_attention`` casts them.

    Source: Dao et al. 2022, "FlashAttention". ``"residual"`` and ``"logit"`` are AtteNT's functional gradient (arXiv
    2602.20461), the latter also EL2N (Paul et al. 2021); ``"head"`` is the norm of the readout's parameter gradient.

    >>> query, key, value = torch.randn(3, 4, 2, 5, 8).unbind(0)
    >>> readout = attent.Readout(torch.randn(10, 16), target=torch.tensor([3, 1, 4, 1]))
    >>> out = attent.scored_attention(query, key, value, readout=readout, score="logit", top_k=2)
    >>> out.output.shape, out.losses.shape, out.selection.index.shape
    (torch.Size([4, 2, 5, 8]), torch.Size([4]), torch.Size([2]))
    >>> bool((out.scores[out.selection.index[0]] == out.scores.max()).all())
    True
    """
    query, key, value = _autocast(query, key, value)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    batch = _check_attention(query, key, value, enable_gqa, query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k)
    for name, flag in (("is_causal", is_causal), ("return_output", return_output)):
        if not isinstance(flag, bool):
            refuse(name, describe(flag), "a bool")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else check_number("scale", scale)
    softcap = None if softcap is None else check_number("softcap", softcap, low=0.0, open_low=True)
    window_left, window_right = _check_window(window)
    if (target is None) == (readout is None):
        refuse(
            "target", "no readout either" if target is None else "a readout too", "exactly one of target and readout"
        )
    if target is not None:
        shape = (*query.shape[:-1], value.shape[-1])
        check_tensor(
            "target", target, f"a floating-point tensor like output, {tuple(shape)}",
            shape=shape, dtypes=FLOATING, device=query.device,
        )  # fmt: skip
        weight, labels, bias, pool = None, None, None, "mean"
    else:
        weight, labels, bias, pool = _check_readout(readout, query, value, batch, query_lengths, cu_seqlens_q)
    if score is not None:
        check_choice("score", score, READOUT_SCORES if target is None else TARGET_SCORES)
    check_choice("per_example", per_example, PER_EXAMPLE)
    temperature = check_number("temperature", temperature, low=0.0)
    floor = check_number("floor", floor, low=0.0, high=1.0)
    _check_seed(seed, query.device)
    noise_seed: Tensor | None = None
    if top_k is not None:
        if score is None:
            refuse("top_k", top_k, "None without a score to choose by")
        check_int("top_k", top_k, low=0, high=batch, why="the batch holds so many examples")
        if temperature > 0 or floor > 0:
            noise_seed = seed_tensor(seed, query.device)

    # The backward needs the rows that the readout looks at, even if the caller does not.
    rows = "all"
    if not return_output:
        has_rows = query.shape[0 if packed else 2] > 0
        trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        if not trains:
            rows = "none"
        elif pool != "mean" and has_rows:
            rows = "pooled"
    problem = Problem(
        query, key, value, target, weight, bias, labels, query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k,
        is_causal, scale, window_left, window_right, softcap, pool, rows, backend,
    )  # fmt: skip
    results = run(problem, Scoring(score, per_example, top_k, temperature, floor, noise_seed))
    return ScoredAttention(
        results.output if return_output else None,
        results.logsumexp if return_output else None,
        results.losses,
        None if readout is None else results.logits,
        None if readout is None else results.pooled,
        None if score is None else results.scores,
        None if top_k is None else Selection(results.chosen, results.chosen_score, results.inclusion),
    )


# ------------------------------------------------------------------------------------------------------------ checks


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast as autocast casts scaled_dot_product_attention, which is on its list of ops for the lower precision."""
    check_tensor("query", query, "a floating-point tensor", dtypes=FLOATING)
    dtype = autocast_dtype(query.device)
    if dtype is None or query.dtype == torch.float64:
        return query, key, value
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(name, tensor, "a floating-point tensor", dtypes=FLOATING)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    enable_gqa: bool,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> int:
    """Refuse tensors that do not fit together; the number of examples."""
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    dtypes, device = (query.dtype,), query.device
    dtype = dtype_name(query.dtype)
    if query.dim() != (3 if packed else 4) or query.shape[1] < 1 or query.shape[-1] < 1:
        layout = (
            "[total_q, Hq, D] with cu_seqlens_*"
            if packed
            else "[B, Hq, Tq, D] (packed [total_q, Hq, D] with cu_seqlens_*)"
        )
        refuse("query", describe(query), f"{layout}, Hq >= 1, D >= 1")
    width = query.shape[-1]
    if packed:
        takes = f"{dtype} [total_k, Hkv, D={width}] like query"
        check_tensor("key", key, takes, shape=(None, None, width), dtypes=dtypes, device=device)
        total_k, kv_heads = key.shape[:2]

        def like_key() -> str:
            return f"{dtype} [total_k={total_k}, Hkv={kv_heads}, Dv] like key"

        check_tensor("value", value, like_key, shape=(total_k, kv_heads, None), dtypes=dtypes, device=device)
    else:
        batch = query.shape[0]

        def like_query() -> str:
            return f"{dtype} [B={batch}, Hkv, Tk, D={width}] like query"

        def like_padded_key() -> str:
            return f"{dtype} [B={batch}, Hkv={kv_heads}, Tk={keys}, Dv] like key"

        check_tensor("key", key, like_query, shape=(batch, None, None, width), dtypes=dtypes, device=device)
        _, kv_heads, keys, _ = key.shape
        check_tensor(
            "value", value, like_padded_key, shape=(query.shape[0], kv_heads, keys, None), dtypes=dtypes, device=device
        )
    if value.shape[-1] < 1:
        refuse("value", describe(value), "Dv >= 1")
    if not isinstance(enable_gqa, bool):
        refuse("enable_gqa", describe(enable_gqa), "a bool")
    heads = query.shape[1]
    if kv_heads != heads:
        if kv_heads < 1 or heads % kv_heads != 0:
            refuse("key", f"Hkv={kv_heads} heads", f"a divisor of Hq={heads}")
        if not enable_gqa:
            refuse("key", f"Hkv={kv_heads} heads", f"Hq={heads}, or a divisor of it with enable_gqa=True")
    if not packed:
        for name, lengths, most in (
            ("query_lengths", query_lengths, query.shape[2]),
            ("key_lengths", key_lengths, keys),
        ):
            check_lengths(name, lengths, query.shape[0], most, query.device)
        return query.shape[0]

    for name, lengths in (("query_lengths", query_lengths), ("key_lengths", key_lengths)):
        if lengths is not None:
            refuse(name, describe(lengths), "None with cu_seqlens_q and cu_seqlens_k, which hold the lengths")
    if cu_seqlens_q is None or cu_seqlens_k is None:
        refuse(
            "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k", "None", "int32 [B + 1]: the two come together"
        )
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query.shape[0], query.device, "total_q")
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, total_k, query.device, "total_k")
    batch = cu_seqlens_q.shape[0] - 1
    if cu_seqlens_k.shape[0] - 1 != batch:
        refuse("cu_seqlens_k", describe(cu_seqlens_k), f"int32 [B + 1 = {batch + 1}] like cu_seqlens_q")
    if batch == 0 and query.shape[0] > 0:
        refuse("cu_seqlens_q", describe(cu_seqlens_q), f"one example at least for total_q={query.shape[0]} queries")
    return batch


def check_lengths(name: str, lengths: Tensor | None, batch: int, most: int, device: torch.device) -> None:
    """Refuse lengths that are not [B] integers in [0, most]."""
    if lengths is None:
        return

    def takes() -> str:
        return f"int32 or int64 [B={batch}], each in [0, {most}]"

    check_tensor(name, lengths, takes, shape=(batch,), dtypes=INTEGER, device=device)
    if values_readable(lengths) and bool(((lengths < 0) | (lengths > most)).any()):
        refuse(name, f"values from {int(lengths.min())} to {int(lengths.max())}", takes())


def _check_window(window: object) -> tuple[int, int]:
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        refuse("window", describe(window), "None or (left, right), two ints >= -1")
    left, right = window
    check_int("window", left, low=-1, why="left; -1: no limit")
    check_int("window", right, low=-1, why="right; -1: no limit")
    return left, right


def _check_readout(
    readout: object,
    query: Tensor,
    value: Tensor,
    batch: int,
    query_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, str]:
    """Refuse a readout that does not fit; its weight, labels, bias and pool."""
    if not isinstance(readout, Readout):
        refuse("readout", type(readout).__name__, "an attent.Readout")
    weight, labels, bias, pool = readout
    width, device = query.shape[1] * value.shape[-1], query.device
    takes = f"a floating-point tensor [C, Hq * Dv = {width}], C >= 1"
    check_tensor("readout.weight", weight, takes, shape=(None, width), dtypes=FLOATING, device=device)
    classes = weight.shape[0]
    if classes < 1:
        refuse("readout.weight", describe(weight), takes)
    if bias is not None:
        takes = f"None or a floating-point tensor [C={classes}]"
        check_tensor("readout.bias", bias, takes, shape=(classes,), dtypes=FLOATING, device=device)
    check_choice("readout.pool", pool, POOLS)

    def of_labels() -> str:
        return f"int32 or int64 labels [B={batch}] in [0, C={classes})"

    check_tensor("readout.target", labels, of_labels, shape=(batch,), dtypes=INTEGER, device=device)
    if values_readable(labels) and batch > 0:
        low, high = torch.aminmax(labels)
        if int(low) >= 0 and int(high) < classes:
            return weight, labels, bias, pool
        outside = (labels < 0) | (labels >= classes)
        if query_lengths is not None:  # the label of an example without a query means nothing
            outside &= query_lengths > 0
        if cu_seqlens_q is not None:
            outside &= cu_seqlens_q.diff() > 0
        if bool(outside.any()):
            refuse("readout.target", f"a label of {int(labels[outside][0])}", of_labels())
    return weight, labels, bias, pool
