"""Modules that take the place of a model's last layers and return scores with their loss."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ._checks import FLOATING, autocast_dtype, check_choice, check_int, check_tensor, describe, refuse
from .ops.dispatch import BACKENDS
from .ops.linear_cross_entropy import check_constant, check_options, check_scores, linear_cross_entropy
from .ops.scored_attention import Readout, check_lengths, scored_attention


class ScoringHead(nn.Module):
    """A language model's head or a classifier that, given targets, returns loss and scores instead of logits.

    It takes the place of an ``nn.Linear`` and holds that layer's own parameters under the same names: checkpoints,
    tied embeddings, optimizers and ``fully_shard`` see no difference, and as the weight is read inside ``forward``,
    the module's hooks (FSDP2's gathering among them) have run by then.

    Args:
        linear: the ``nn.Linear`` ``[V, D]`` to replace.
        weight, reduction, ignore_index, label_smoothing, softcap, shift, score, per_example, group, backend: as in
            :func:`attent.linear_cross_entropy`.

    Raises:
        ValueError: ``linear`` is not a plain ``nn.Linear`` (a subclass or a wrapper may compute something else), or has
            hooks of its own, which would no longer run.

    >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 16), torch.nn.Linear(16, 50))
    >>> model[1] = attent.ScoringHead(model[1], score="head", shift=True)
    >>> tokens = torch.randint(50, (4, 12))
    >>> loss, scores = model[1](model[0](tokens), tokens)
    >>> model(tokens).shape
    torch.Size([4, 12, 50])
    """

    class_weight: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        *,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        shift: bool = False,
        score: str | tuple[str, ...] | None = "logit",
        per_example: str = "rms",
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if type(linear) is not nn.Linear:
            refuse("linear", type(linear).__name__, "a plain torch.nn.Linear")
        if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
            refuse("linear", "a layer with hooks", "a layer without: register them on the ScoringHead")
        check_scores(score)
        check_options(reduction, ignore_index, label_smoothing, softcap, shift, per_example, group)
        check_choice("backend", backend, ("auto", *BACKENDS))
        if weight is not None:
            check_constant("weight", weight, linear.out_features, linear.weight.device)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("class_weight", weight, persistent=False)
        self.options: dict[str, Any] = {
            "softcap": softcap,
            "reduction": reduction,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "shift": shift,
            "score": score,
            "per_example": per_example,
            "group": group,
            "backend": backend,
        }
        self.train(linear.training)

    def forward(
        self,
        hidden: Tensor,
        target: Tensor | None = None,
        *,
        example_weight: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Any:
        """Loss and scores of ``hidden`` [B, T, D] or [N, D] under ``target``; without a target, logits [..., V].

        ``example_weight`` ``[B]`` multiplies each example's losses; ``cu_seqlens`` int32 ``[B + 1]`` says where the
        examples of packed rows begin.

        Returns:
            What :func:`attent.linear_cross_entropy` returns with this head's options.

        Raises:
            ValueError: naming the argument, what came and what is taken.
        """
        takes = f"floating-point [..., in_features={self.in_features}]"
        check_tensor("hidden", hidden, takes, dtypes=FLOATING)
        if hidden.dim() < 1 or hidden.shape[-1] != self.in_features:
            refuse("hidden", describe(hidden), takes)
        if target is None:
            logits, softcap = F.linear(hidden, self.weight, self.bias), self.options["softcap"]
            return logits if softcap is None else softcap * (logits / softcap).tanh()
        return linear_cross_entropy(
            hidden,
            self.weight,
            target,
            linear_bias=self.bias,
            weight=self.class_weight,
            example_weight=example_weight,
            cu_seqlens=cu_seqlens,
            **self.options,
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, " + (
            ", ".join(f"{name}={value!r}" for name, value in self.options.items() if name not in ("group", "backend"))
        )


class AttentiveClassifier(nn.Module):
    """Pools a sequence by attention with learned queries and classifies the pool; given labels, scores every example.

    Each of ``pool_queries`` learned queries looks at the tokens with every head; the mean of what they see goes through
    a linear readout. Given labels, losses, scores and the lesson come from one :func:`attent.scored_attention`.

    Args:
        embed_dim: width D of the tokens.
        num_heads: H, a divisor of D.
        num_classes: C.
        pool_queries: how many learned queries.

    Raises:
        ValueError: a number is below 1, or ``num_heads`` does not divide ``embed_dim``.

    Source: Lee et al. 2019, "Set Transformer" (pooling by multihead attention).

    >>> classifier = attent.AttentiveClassifier(embed_dim=32, num_heads=4, num_classes=10)
    >>> tokens, labels = torch.randn(8, 16, 32), torch.arange(8)
    >>> classifier(tokens).shape
    torch.Size([8, 10])
    >>> out = classifier(tokens, labels, top_k=4)
    >>> out.losses[out.selection.index].mean().backward()
    """

    def __init__(self, embed_dim: int, num_heads: int, num_classes: int, pool_queries: int = 1) -> None:
        super().__init__()
        check_int("embed_dim", embed_dim, low=1)
        check_int("num_heads", num_heads, low=1)
        check_int("num_classes", num_classes, low=1)
        check_int("pool_queries", pool_queries, low=1)
        if embed_dim % num_heads != 0:
            refuse("num_heads", num_heads, f"a divisor of embed_dim={embed_dim}")
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.query = nn.Parameter(torch.empty(pool_queries, num_heads, embed_dim // num_heads))
        # No bias: it would add the same to all of a query's scores, and softmax does not see that.
        self.key_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.readout = nn.Linear(embed_dim, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start near the mean of the tokens, with heads that differ, and near the uniform prediction."""
        nn.init.normal_(self.query, std=1 / math.sqrt(self.query.shape[-1]))  # and so the scores of keys of variance 1
        nn.init.xavier_uniform_(self.key_proj.weight)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.zeros_(self.value_proj.bias)
        nn.init.trunc_normal_(self.readout.weight, std=0.02)
        nn.init.zeros_(self.readout.bias)

    def forward(
        self,
        tokens: Tensor,
        target: Tensor | None = None,
        *,
        key_lengths: Tensor | None = None,
        score: str | None = "logit",
        top_k: int | None = None,
        temperature: float = 0.0,
        floor: float = 0.0,
        seed: int | Tensor | None = None,
        backend: str = "auto",
    ) -> Any:
        """Logits of ``tokens`` [B, T, D]; with labels ``target`` [B], what :func:`attent.scored_attention` returns.

        Args:
            tokens: ``[B, T, D]`` in the parameters' dtype.
            target: ``[B]`` int32 or int64 labels in ``[0, C)``.
            key_lengths: ``[B]`` int32 or int64, how many tokens of each example count; the others are not read.
            score, top_k, temperature, floor, seed, backend: as in :func:`attent.scored_attention`.

        Returns:
            Logits ``[B, C]``; with a target, a :class:`attent.ScoredAttention` without output and logsumexp.

        Raises:
            ValueError: an argument has the wrong shape, dtype, device or range.
        """
        dtypes = FLOATING if autocast_dtype(self.query.device) is not None else (self.query.dtype,)
        takes = f"[B, T, embed_dim={self.embed_dim}] in the parameters' dtype, {self.query.dtype}"
        check_tensor(
            "tokens", tokens, takes, shape=(None, None, self.embed_dim), dtypes=dtypes, device=self.query.device
        )
        batch, length, _ = tokens.shape
        by_head = (batch, length, self.num_heads, self.embed_dim // self.num_heads)
        key = self.key_proj(tokens).view(by_head).transpose(1, 2)  # [B, H, T, D / H]
        value = self.value_proj(tokens).view(by_head).transpose(1, 2)
        query = self.query.to(key.dtype).transpose(0, 1).expand(batch, -1, -1, -1)  # [B, H, pool_queries, D / H]
        if target is None:
            return self._logits(query, key, value, key_lengths)
        if type(self.readout) is not nn.Linear:  # an adapter around it would be left out
            refuse("readout", type(self.readout).__name__, "a plain torch.nn.Linear, whose weight is read")
        return scored_attention(
            query,
            key,
            value,
            readout=Readout(self.readout.weight, target, self.readout.bias),
            key_lengths=key_lengths,
            score=score,
            top_k=top_k,
            temperature=temperature,
            floor=floor,
            seed=seed,
            return_output=False,
            backend=backend,
        )

    def _logits(self, query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None) -> Tensor:
        """The same without labels: nothing to score, so PyTorch's own attention will do."""
        if key_lengths is None:
            output = F.scaled_dot_product_attention(query, key, value)
        else:
            batch, _, length, _ = key.shape
            check_lengths("key_lengths", key_lengths, batch, length, key.device)
            inside = (torch.arange(length, device=key.device) < key_lengths[:, None])[:, None, :, None]  # [B, 1, T, 1]
            key, value = key.where(inside, 0), value.where(inside, 0)  # 0 times whatever padding holds might be NaN
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=inside.mT)
            output = output.where(key_lengths[:, None, None, None] > 0, 0)  # not every kernel gives 0 without a key
        pooled: Tensor = output.mean(2).flatten(1)
        logits: Tensor = self.readout(pooled)
        return logits
