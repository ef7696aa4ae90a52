"""TRL's trainers compute their loss in a head of their own, without logits: scores beside it.

TRL (here 1.16) gives the model's ``forward`` an argument ``fused_lm_head``: the output layer's weight is read, its
module is not run, and what returns are each token's log-probability and the figures that TRL logs. So neither the
head's ``forward`` nor the model's ``loss_function`` takes part, and to ask TRL for outputs costs it another forward
pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ..._checks import refuse
from .scored_loss import ScoredLoss, by_target, in_place_of, language_targets

_SWITCH = "fused_lm_head"


def has_fused_head(base: Any) -> bool:
    """Whether TRL has put its head into this model's ``forward``."""
    forward = base.__dict__.get("forward")
    return forward is not None and _SWITCH in inspect.signature(forward, follow_wrapped=False).parameters


class LossBesideFusedHead(ScoredLoss):
    """TRL's own loss, and scores from the hidden states that it came from: one more product with the head."""

    def __call__(
        self,
        compute_loss: Callable[[bool], Any],
        base: Any,
        inputs: MutableMapping[str, Any],
        examples: int,
        cu_seqlens: Tensor | None,
        weight: Tensor | None,
        need_outputs: bool,
    ) -> tuple[Tensor, Any, Tensor]:
        targets = language_targets(inputs, examples, cu_seqlens)
        original = base.forward
        scores: list[Tensor] = []

        def forward(*arguments: Any, **options: Any) -> Any:
            if not options.get(_SWITCH) or not torch.is_grad_enabled():
                return original(*arguments, **options)
            hidden: list[Tensor] = []
            handle = base.base_model.register_forward_hook(
                lambda module, args, outputs: hidden.append(outputs.last_hidden_state)
            )
            try:
                outputs = original(*arguments, **options)
            finally:
                handle.remove()
            if not self._checked:
                self._check(original, options)
                self._checked = True
            # The head's module, with another forward: its hooks run, and gather what is sharded.
            beside = in_place_of(self.head.linear, "forward", lambda of: self.score(of, targets, "example"))
            with torch.no_grad(), beside:
                scores.append(self.head.linear(hidden[0])[1])
            if weight is not None:  # TRL's loss is −c·Σ log p over these, [B, T - 1]; [B, T] if not to be shifted
                spread = weight[:, None] if targets.segments is None else by_target(weight, targets)
                outputs.log_probs = outputs.log_probs * spread[:, : outputs.log_probs.shape[1]]
            return outputs

        with in_place_of(base, "forward", forward):
            result = compute_loss(need_outputs)
        if len(scores) != 1:
            got = f"one that ran its head {len(scores)} times for a step"
            refuse("trainer", got, "one whose loss comes from one run of TRL's fused head; for others, score_func=...")
        loss, outputs = result if need_outputs else (result, None)
        return loss, outputs, scores[0]

    def _check(self, original: Callable[..., Any], options: MutableMapping[str, Any]) -> None:
        """Hold the head that was found against the model's own logits: a forward pass, once per run."""
        own = ("labels", "shift_labels", "num_items_in_batch", _SWITCH)
        output: list[Tensor] = []
        handle = self.head.linear.register_forward_hook(lambda module, args, result: output.append(result))
        try:
            # Dropout in it must not shift the random numbers of the run.
            with torch.no_grad(), torch.random.fork_rng():
                inputs = {name: value for name, value in options.items() if name not in own}
                logits = original(**inputs, logits_to_keep=1)["logits"]
        finally:
            handle.remove()
        if len(output) != 1:
            refuse("head", f"{self.head.name!r}, which did not run", "the layer that the model's logits come from")
        self.head.check(output[0], logits)
