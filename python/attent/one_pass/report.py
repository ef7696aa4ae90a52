"""What a one-pass step did, and what it is expected to cost."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class OnePassReport:
    """``print(step.report())`` says it in words.

    ``engine`` of the last step: ``"eager"``, ``"compile"``, ``"two_pass"``, ``"whole"`` or None before the first
    step. ``"whole"`` is a backward of the whole batch in which rows that were not chosen weigh nothing: exact, but
    saving nothing; where all rows are chosen, as in warm-up, it is what there is to do. ``refused``: why other
    engines were not used. ``keep_ratio``: k / B of the last step. ``cost``: the step over a full step, estimated with
    a backward of twice a forward: (1 + 2r)/3 eager and compiled, (1 + 3r)/3 two-pass, 1 whole. ``probes``: probes run
    so far. ``verified``: gradients compared with the masked full backward; ``largest_error``: the largest relative
    difference.

    >>> step = attent.OnePass(lambda x: x.square().sum(1), engine="two_pass")
    >>> step.backward(step(torch.ones(4, 3, requires_grad=True)), torch.tensor([1, 2]))
    >>> step.report().engine, step.report().keep_ratio
    ('two_pass', 0.5)
    """

    engine: str | None
    refused: dict[str, str] = field(default_factory=dict)
    keep_ratio: float | None = None
    cost: float | None = None
    probes: int = 0
    verified: int = 0
    largest_error: float = 0.0

    def __str__(self) -> str:
        whole = " (the last step's backward was the whole batch's)" if self.engine == "whole" else ""
        lines = [f"engine: {self.engine or 'none yet'}{whole}"]
        if self.cost is not None and self.keep_ratio is not None:
            lines.append(f"cost of a step at r = {self.keep_ratio:.2f}: {self.cost:.2f} of a full step (estimated)")
        lines += [f"not {engine}: {reason}" for engine, reason in self.refused.items()]
        lines.append(
            f"probes: {self.probes}; gradients compared with the full backward: {self.verified},"
            f" largest relative error {self.largest_error:.1e}"
        )
        return "\n".join(lines)


def estimated_cost(engine: str, ratio: float) -> float:
    """A step over a full step, forward 1 and backward 2."""
    return {
        "eager": (1 + 2 * ratio) / 3,
        "compile": (1 + 2 * ratio) / 3,
        "two_pass": (1 + 3 * ratio) / 3,
        "whole": 1.0,
    }[engine]
