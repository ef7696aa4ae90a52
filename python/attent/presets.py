"""The paper's two schedules, done right: each returns a :class:`attent.Teacher` for the training loop you have.

Both are for comparison with AtteNT (arXiv 2602.20461); the library's own defaults are ``Teacher(…)``'s. Here scores are
harvested from training, which costs no forward pass. The paper rescores all data instead, a *full rescoring* of N
forward passes per lesson, each a third of a training pass (forward 1, backward 2). To do as the paper does, rescore
between epochs::

    if rescore:                                            # after an epoch that a new lesson follows
        model.eval()
        with torch.no_grad():
            for ids, x, y in every_example_once:           # not the teaching loader: all of the data
                teacher.record(ids, attent.example_scores(model(x), y))
        model.train()
"""

from __future__ import annotations

from ._checks import check_int, check_number
from .schedules import Incremental, Linear
from .teacher import Teacher


def attent_simple(num_examples: int, total_epochs: int = 5, *, ratio: float = 0.7, seed: int = 0) -> Teacher:
    """The paper's schedule for language models: the first epoch full, then the hardest 70 %, chosen once and kept.

    ``k = floor(ratio · num_examples + ½)`` highest scores of epoch 0 (temperature 0, no floor) in all later epochs; no
    anneal, no reweighting. It saves ``(1 − ratio)·(total_epochs − 1)`` of ``total_epochs`` passes: 24 % at the
    defaults. With harvested scores no rescoring is needed, since epoch 0 has just scored everything. ``seed`` orders
    the examples of each epoch.

    Raises:
        ValueError: an argument is out of range.

    >>> attent.presets.attent_simple(1000).epoch_sizes()
    [1000, 700, 700, 700, 700]
    """
    check_int("total_epochs", total_epochs, low=1)
    return Teacher(
        num_examples,
        total_epochs=total_epochs,
        ratio=ratio,
        temperature=0.0,
        floor=0.0,
        warmup=1,
        anneal=0.0,
        seed=seed,
        interval=total_epochs,
    )


def attent_complex(
    num_examples: int,
    total_epochs: int = 800,
    *,
    initial_ratio: float = 0.2,
    final_ratio: float = 0.8,
    cycles: int = 10,
    initial_interval: float = 5,
    final_interval: float = 10,
    temperature: float = 1.0,
    seed: int = 0,
) -> Teacher:
    """The paper's best schedule for vision: ratio and interval rise, the choice is soft (Gumbel top-k); no floor, no
    anneal.

    Epoch 0 is full. The ratio then rises from ``initial_ratio`` to ``final_ratio`` in ``cycles`` equal stages over
    *all* other epochs, and a lesson is held for ``initial_interval`` to ``final_interval`` epochs. (The paper's code
    puts full epochs between the lessons, which at its defaults leaves about 4 % of the passes to save.) At the defaults
    half of the passes are saved; full rescoring would spend N forwards per lesson of it, 112 lessons in 800 epochs: 37
    passes' worth. ``num_examples``, ``total_epochs``, ``temperature`` and ``seed`` as in :class:`attent.Teacher`.

    Raises:
        ValueError: an argument is out of range.

    >>> attent.presets.attent_complex(1000, 9, cycles=2, initial_interval=2, final_interval=2).epoch_sizes()
    [1000, 200, 200, 200, 200, 800, 800, 800, 800]
    """
    for name, value in (("initial_interval", initial_interval), ("final_interval", final_interval)):
        check_number(name, value, low=1)
    return Teacher(
        num_examples,
        total_epochs=total_epochs,
        ratio=Incremental(initial_ratio, final_ratio, cycles),
        temperature=temperature,
        floor=0.0,
        warmup=1,
        anneal=0.0,
        seed=seed,
        interval=Linear(initial_interval, final_interval),
    )
