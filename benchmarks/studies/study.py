"""What a study is: a learner with its data, a metric with a margin, a grid, and how long full training is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

from torch import Tensor, nn

#: The grid is tried at this budget, with a seed that the sweep does not use, and judged on the validation part.
TUNING_BUDGET, TUNING_SEED = 0.65, 1000


class Learner(Protocol):
    """A model and its data, ready to train: the same for every arm of a seed."""

    num_examples: int

    def parameters(self) -> Iterable[nn.Parameter]:
        """What is trained."""

    def batch(self, ids: Tensor) -> tuple[Tensor, ...]:
        """The examples of ``ids`` [B], tensors of leading size B."""

    def losses(self, *batch: Tensor, score: str | None) -> tuple[Tensor, Tensor | None]:
        """Losses [B] of a batch and, if a score is named, scores [B] out of the same forward."""

    def evaluate(self, part: str) -> float:
        """The study's metric on ``"validation"`` or ``"test"``."""


@dataclass(frozen=True)
class Metric:
    name: str
    higher_is_better: bool
    margin: float  # a mean within this of full training's counts as equal
    digits: int = 2

    @property
    def sign(self) -> int:
        """What a value is multiplied with so that more is better."""
        return 1 if self.higher_is_better else -1


@dataclass(frozen=True)
class Study:
    """Everything that a run depends on but arm, point, budget and seed; ``settings`` is what is kept of it."""

    name: str
    title: str
    score: str  # what attent's arms choose by
    metric: Metric
    batch_sizes: tuple[int, ...]
    learning_rates: tuple[float, ...]
    passes: float  # of full training, at the largest batch size
    make: Callable[[int], Learner]  # seed -> learner; the data are the same for all seeds
    code: tuple[ModuleType, ...]  # modules that the learner and its data come from
    sizes: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.05
    device: str = "cpu"
    seeds: int = 4

    @property
    def points(self) -> list[tuple[int, float]]:
        """The grid."""
        return [(batch, rate) for batch in self.batch_sizes for rate in self.learning_rates]

    @property
    def settings(self) -> dict[str, Any]:
        """In JSON's types; a run with other settings is another run."""
        metric = [self.metric.name, self.metric.higher_is_better]
        grid = [list(self.batch_sizes), list(self.learning_rates)]
        return {
            "study": self.name, "score": self.score, "metric": metric, "grid": grid, "passes": self.passes,
            "sizes": self.sizes, "weight_decay": self.weight_decay, "device": self.device,
        }  # fmt: skip
