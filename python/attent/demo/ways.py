"""What each arm does in a step: plain training, or one of the two ways to teach."""

from __future__ import annotations

import time
from typing import Protocol

from torch import Tensor

import attent

from .data import Images
from .learner import VisionTransformer


class Way(Protocol):
    """One step's loss, and what it costs beyond training."""

    unchosen_seconds: float  # forward of rows that were then not trained on

    def loss(self, learner: VisionTransformer, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch of training images, a scalar, and the ids of those that it trains on."""

    def after_step(self) -> None:
        """Called when the optimizer has stepped."""

    def teaching_seconds(self, steps: int) -> float:
        """Seconds of scores, choices and book-keeping in ``steps`` steps."""


class Plain:
    """All rows, no teacher."""

    unchosen_seconds = 0.0

    def __init__(self, images: Images) -> None:
        self._images = images

    def loss(self, learner: VisionTransformer, ids: Tensor) -> tuple[Tensor, Tensor]:
        result = learner(self._images.train_images[ids], self._images.train_labels[ids], None)
        return result.losses.mean(), ids

    def after_step(self) -> None:
        return

    def teaching_seconds(self, steps: int) -> float:
        return 0.0


class Harvest:
    """All rows; their scores, which the forward returns, choose the rows of later epochs."""

    unchosen_seconds = 0.0

    def __init__(self, images: Images, teacher: attent.Teacher, scoring_seconds: float) -> None:
        self._images, self._teacher, self._scoring_seconds = images, teacher, scoring_seconds

    def loss(self, learner: VisionTransformer, ids: Tensor) -> tuple[Tensor, Tensor]:
        result = learner(self._images.train_images[ids], self._images.train_labels[ids], "logit")
        self._ids, self._scores = ids, result.scores
        return result.losses.mean(), ids

    def after_step(self) -> None:
        self._teacher.record(self._ids, self._scores)

    def teaching_seconds(self, steps: int) -> float:
        return float(self._teacher.summary()["teaching_seconds"]) + steps * self._scoring_seconds


class InOnePass:
    """Pools of more rows than a batch: forward them all, learn from a batch of them. A batch is trained on whole."""

    def __init__(self, images: Images, teacher: attent.Teacher, batch_size: int, scoring_seconds: float) -> None:
        self._images, self._teacher, self._batch_size = images, teacher, batch_size
        self._scoring_seconds = scoring_seconds
        self._pools = 0
        self._one_pass: attent.OnePass | None = None
        self.unchosen_seconds = 0.0

    def loss(self, learner: VisionTransformer, ids: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = self._images.train_images[ids], self._images.train_labels[ids]
        if len(ids) <= self._batch_size:
            return learner(images, labels, None).losses.mean(), ids
        if self._one_pass is None:

            def per_example_loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
                result = learner(images, labels, "logit")
                assert result.losses is not None and result.scores is not None
                return result.losses, result.scores

            self._one_pass = attent.OnePass(per_example_loss, engine="eager")
        began = time.perf_counter()
        losses, scores = self._one_pass(images, labels)
        self.unchosen_seconds += (time.perf_counter() - began) * (1 - self._batch_size / len(ids))
        self._pools += 1
        chosen = self._teacher.choose(scores, self._batch_size).index
        return self._one_pass.loss(losses, chosen), ids[chosen]

    def after_step(self) -> None:
        return

    def teaching_seconds(self, steps: int) -> float:
        return float(self._teacher.summary()["teaching_seconds"]) + self._pools * self._scoring_seconds
