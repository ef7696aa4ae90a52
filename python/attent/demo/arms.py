"""One training run of each arm: full data, full data at the same compute, attent. All three share one loop."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import attent

from .data import Images
from .learner import VisionTransformer
from .ways import Harvest, InOnePass, Plain, Way

FULL, SAME_COMPUTE, ATTENT = "full data", "full data, same compute", "attent"
ARMS = (FULL, SAME_COMPUTE, ATTENT)

#: Batch size -> learning rate. Every arm tries both batch sizes. Each rate is the best, or within the noise of a seed
#: or two of the best, of those tried for *full data at the same compute* (1 to 6 times 10^-3, on 10,000 and 50,000
#: training images, with a held-out part of the training set and seeds that the demo does not use); attent got the same.
LEARNING_RATES = {32: 2e-3, 64: 3e-3}
WEIGHT_DECAY = 0.05
WARMUP_SHARE = 0.05
#: A run is evaluated after each of this many equal parts of its steps, with the clock stopped.
EVALUATIONS = 5
EVALUATION_BATCH = 1000
SCORING_ROUNDS = 40


@dataclass(frozen=True)
class Run:
    """What one run did and reached. Seconds are measured, teaching included, evaluations excluded."""

    arm: str
    seed: int
    batch_size: int
    steps: int
    seconds: float
    teaching_seconds: float
    accuracy: float  # per cent of the test set, after the last step
    curve: list[tuple[float, float]]  # (seconds, accuracy)
    visits: Tensor  # [N] how often each training image was trained on
    unchosen_seconds: float = 0.0  # one-pass: forward of rows that were then not trained on

    @property
    def examples(self) -> int:
        """Examples trained on, repeats counted."""
        return self.steps * self.batch_size


class Stopwatch:
    """Seconds of the training loop; stopped while a run is evaluated."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self._since

    def start(self) -> None:
        self._since = time.perf_counter()


def train_on_full_data(
    images: Images, seed: int, batch_size: int, steps: int, arm: str, step_done: Callable[[], object]
) -> Run:
    """``steps`` steps over the whole training set, reshuffled at each pass; the learning rate decays over just them."""
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[Tensor]:
        while True:
            order = torch.randperm(len(images.train_images), generator=generator)
            for begin in range(0, len(order) - batch_size + 1, batch_size):
                yield order[begin : begin + batch_size]

    return _learn(images, batches(), steps, arm, seed, batch_size, Plain(images), step_done)


def train_with_attent(
    images: Images,
    seed: int,
    batch_size: int,
    epochs: int,
    ratio: float,
    scoring_seconds: float,
    step_done: Callable[[], object],
) -> Run:
    """``epochs`` passes, full or reduced as the teacher schedules them; scores come out of the loss (the harvest way).

    ``scoring_seconds`` is what the scores cost in each step: it is counted as teaching, with what the teacher measures.
    """
    teacher = attent.Teacher(len(images.train_images), total_epochs=epochs, ratio=ratio, seed=seed)
    sampler = teacher.sampler(batch_size=batch_size)

    def batches() -> Iterator[Tensor]:
        for _ in range(epochs):
            yield from map(torch.tensor, sampler)

    steps = teacher.total_steps(batch_size)
    way = Harvest(images, teacher, scoring_seconds)
    return _learn(images, batches(), steps, ATTENT, seed, batch_size, way, step_done)


def train_in_one_pass(
    images: Images,
    seed: int,
    batch_size: int,
    epochs: int,
    ratio: float,
    scoring_seconds: float,
    step_done: Callable[[], object],
) -> Run:
    """``epochs`` passes over all images. Those that harvest would reduce run in pools, a batch of each trained on.

    ``scoring_seconds`` is what the scores of a pool cost.
    """
    teacher = attent.Teacher(len(images.train_images), total_epochs=epochs, ratio=ratio, seed=seed)
    sizes = one_pass_sizes(len(images.train_images), batch_size, epochs, ratio)
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[Tensor]:
        for size in sizes:
            order = torch.randperm(len(images.train_images), generator=generator)
            for begin in range(0, len(order) - size + 1, size):
                yield order[begin : begin + size]

    steps = sum(len(images.train_images) // size for size in sizes)
    way = InOnePass(images, teacher, batch_size, scoring_seconds)
    return _learn(images, batches(), steps, ATTENT, seed, batch_size, way, step_done)


def one_pass_sizes(num_examples: int, batch_size: int, epochs: int, ratio: float) -> list[int]:
    """For each epoch how many images a step sees: a batch, or a pool of which a batch is the keep ratio."""
    plan = attent.Teacher(num_examples, total_epochs=epochs, ratio=ratio).epoch_sizes()
    return [batch_size if size == num_examples else pool_size(batch_size, ratio) for size in plan]


def pool_size(batch_size: int, ratio: float) -> int:
    """Rows of a pool of which a batch is the keep ratio."""
    return round(batch_size / ratio)


def same_seconds_steps(attent_run: Run, full_run: Run) -> int:
    """Steps on full data that take attent's measured seconds, at what a step of the full run took (one-pass)."""
    return max(1, round(attent_run.seconds / (full_run.seconds / full_run.steps)))


def same_compute_steps(attent_run: Run) -> int:
    """Steps on full data that take attent's measured seconds (harvest, whose steps are full data's own): as many, and
    those that its teaching would have paid for.
    """
    seconds_per_step = (attent_run.seconds - attent_run.teaching_seconds) / attent_run.steps
    return attent_run.steps + math.ceil(attent_run.teaching_seconds / seconds_per_step)


def seconds_of_scoring(images: Images, batch_size: int) -> float:
    """What returning scores adds to one step: the median of paired forwards with and without them, never below 0.

    It is far below what a busy machine adds to a wall clock, so it is taken from the processor time of this thread.
    """
    torch.manual_seed(0)
    learner = VisionTransformer()
    batch, labels = images.train_images[:batch_size], images.train_labels[:batch_size]

    def seconds(score: str | None) -> float:
        began = time.thread_time()
        learner(batch, labels, score)
        return time.thread_time() - began

    pairs = [(seconds("logit"), seconds(None)) for _ in range(SCORING_ROUNDS)]
    return max(0.0, statistics.median(scored - plain for scored, plain in pairs))


def accuracy(learner: VisionTransformer, images: Images) -> float:
    """Per cent of the test images that the learner names right."""
    right = 0
    with torch.no_grad():
        for begin in range(0, len(images.test_labels), EVALUATION_BATCH):
            part = slice(begin, begin + EVALUATION_BATCH)
            named = learner.predict(images.test_images[part]).argmax(dim=1)
            right += int((named == images.test_labels[part]).sum())
    return 100 * right / len(images.test_labels)


def _learn(
    images: Images,
    batches: Iterator[Tensor],
    steps: int,
    arm: str,
    seed: int,
    batch_size: int,
    way: Way,
    step_done: Callable[[], object],
) -> Run:
    """The loop of every arm; what attent adds to it is in :mod:`.ways`."""
    torch.manual_seed(seed)  # the same initial learner in every arm
    learner = VisionTransformer()
    rate = LEARNING_RATES[batch_size]
    optimizer = torch.optim.AdamW(learner.parameters(), lr=rate, weight_decay=WEIGHT_DECAY, fused=True)
    scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, steps))
    trained_on, curve = [], []
    checkpoints = [math.ceil(steps * part / EVALUATIONS) for part in range(1, EVALUATIONS + 1)]
    watch = Stopwatch()
    for step in range(1, steps + 1):
        loss, ids = way.loss(learner, next(batches))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        scheduler.step()
        way.after_step()
        trained_on.append(ids)
        if step in checkpoints:
            watch.stop()
            curve += [(watch.seconds, accuracy(learner, images))] * checkpoints.count(step)  # more than 1 in tiny runs
            watch.start()
        step_done()
    taught = way.teaching_seconds(steps)
    visits = torch.bincount(torch.cat(trained_on), minlength=len(images.train_images))
    unchosen = way.unchosen_seconds
    return Run(arm, seed, batch_size, steps, curve[-1][0], taught, curve[-1][1], curve, visits, unchosen)


def warmup_cosine(step: int, steps: int) -> float:
    """The share of the peak learning rate at ``step`` of ``steps``: a linear warm-up, then a cosine down to 0."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
