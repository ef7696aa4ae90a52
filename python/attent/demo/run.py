"""Runs the demo's three arms over the seeds, prints the report, writes the picture and the JSON."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

import attent

from .._checks import refuse
from ..doctor import usable_cores
from . import arms, table
from .arms import ATTENT, FULL, LEARNING_RATES, SAME_COMPUTE, Run
from .data import Images, load
from .intervals import mean
from .learner import VisionTransformer
from .report import report
from .settings import ONE_PASS, Settings

#: Below this share of attent's seconds, full data at the same compute is trained again with more steps.
LEVEL_ENOUGH = 0.98


def demo(settings: Settings) -> None:
    """Train and report: text to stdout, progress to stderr, the picture, and JSON if asked for.

    Raises ``ValueError`` before any training if a setting or the data cannot be used.
    """
    settings.check()
    _require("matplotlib", "tqdm")
    from .figure import draw  # after the check, and because matplotlib takes a second to import

    images = load(settings.data)
    if len(images.train_images) * settings.ratio < max(LEARNING_RATES):
        refuse(
            "--ratio",
            f"{settings.ratio:g} with {len(images.train_images)} training images",
            f"a keep ratio that leaves at least one batch of {max(LEARNING_RATES)}",
        )
    with _threads(settings.threads):
        print("\n".join(_introduction(settings, images)), flush=True)
        began = time.perf_counter()
        runs = train_all(settings, images)
        total_seconds = time.perf_counter() - began
        content = report(settings, images, runs, total_seconds)
    print()
    print(table.table(table.arm_results(runs)))
    print()
    print("\n".join(table.difference_lines(table.differences(runs))))
    print("seconds: the training loop's, teaching included, evaluations not; saved: of the seconds of full data")
    print(f"The whole comparison took {total_seconds:.0f} s.")
    draw(settings.out, images, runs)
    print(f"Picture: {settings.out}")
    if settings.json is not None:
        settings.json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        print(f"All that was set and measured: {settings.json}")


def train_all(settings: Settings, images: Images) -> list[Run]:
    """Every run, the three arms in turn for each seed and batch size: a machine that drifts, drifts for all of them."""
    from tqdm import tqdm

    runs: list[Run] = []
    in_one_pass = settings.way == ONE_PASS
    scored = {size: arms.pool_size(size, settings.ratio) if in_one_pass else size for size in LEARNING_RATES}
    scoring_seconds = {size: arms.seconds_of_scoring(images, scored[size]) for size in LEARNING_RATES}
    # disable=None: no bar where stderr is not a terminal
    with tqdm(total=_planned_steps(settings, images), unit="step", disable=None, dynamic_ncols=True) as bar:

        def finished(run: Run) -> None:
            runs.append(run)
            what = f"seed {run.seed}  batch {run.batch_size:>3}  {run.arm:<{len(SAME_COMPUTE)}}"
            tqdm.write(f"{what}  {run.accuracy:.2f} %  {run.seconds:7.2f} s", file=sys.stderr)

        for seed in range(settings.seeds):
            for size in LEARNING_RATES:
                bar.set_description(f"seed {seed}, batch {size}")
                steps = settings.epochs * (len(images.train_images) // size)
                full = arms.train_on_full_data(images, seed, size, steps, FULL, bar.update)
                finished(full)
                teach = arms.train_in_one_pass if in_one_pass else arms.train_with_attent
                taught = teach(images, seed, size, settings.epochs, settings.ratio, scoring_seconds[size], bar.update)
                finished(taught)
                steps = arms.same_seconds_steps(taught, full) if in_one_pass else arms.same_compute_steps(taught)
                finished(arms.train_on_full_data(images, seed, size, steps, SAME_COMPUTE, bar.update))
        _level(runs, images, bar.update, finished)
    return runs


def _level(runs: list[Run], images: Images, step_done: Callable[[], object], finished: Callable[[Run], None]) -> None:
    """Make the seconds of the two arms to compare equal again where their better batch sizes are not the same.

    The steps of the same-compute runs cover attent's seconds at one batch size. If attent is better at the other, and
    took longer there, full data is trained again at its own better batch size, with as many steps as fill that time.
    """
    size = table.better_batch_size(runs, SAME_COMPUTE)
    if size == table.better_batch_size(runs, ATTENT):
        return
    short = table.at(runs, SAME_COMPUTE, size)
    share = mean([run.seconds for run in short]) / mean([run.seconds for run in table.best(runs, ATTENT)])
    if share >= LEVEL_ENOUGH:
        return
    for run in short:
        runs.remove(run)
    for run in short:
        steps = math.ceil(run.steps / share)
        finished(arms.train_on_full_data(images, run.seed, size, steps, SAME_COMPUTE, step_done))


def _introduction(settings: Settings, images: Images) -> Iterator[str]:
    parameters = sum(parameter.numel() for parameter in VisionTransformer().parameters())
    sizes = " and ".join(map(str, LEARNING_RATES))
    threads = torch.get_num_threads()
    full_epochs = _teacher(settings, images).epoch_sizes().count(len(images.train_images))
    yield f"attent {attent.__version__}, torch {torch.__version__}, {usable_cores()} cores, {threads} torch threads"
    yield f"data     {images.name}: {len(images.train_images):,} to train on, {len(images.test_images):,} to test on"
    yield f"learner  vision transformer, {parameters:,} parameters, in every arm of a seed the same initial ones"
    yield f"arms     {FULL}: {settings.epochs} epochs"
    yield f"         {SAME_COMPUTE}: for the seconds that attent takes, teaching included"
    reduced = settings.epochs - full_epochs
    if settings.way == ONE_PASS:
        pools = " and ".join(str(arms.pool_size(size, settings.ratio)) for size in LEARNING_RATES)
        yield f"         {ATTENT}, one-pass: {full_epochs} epochs in full, {reduced} in pools of {pools} images,"
        yield "         forward of the pool, backward of a batch chosen from it"
    else:
        yield f"         {ATTENT}: {full_epochs} epochs in full, {reduced} of {settings.ratio:.0%} of the images"
    yield f"         the learning rate decays over each run's own steps; seeds 0 to {settings.seeds - 1}"
    yield f"batches  of {sizes}; {table.BATCH_SIZE_RULE}"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch's threads set to ``count`` for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _planned_steps(settings: Settings, images: Images) -> int:
    """The steps of all runs but the few that pay for teaching seconds, for the progress bar."""
    full_epoch, teacher = len(images.train_images), _teacher(settings, images)
    planned = 0
    for size in LEARNING_RATES:
        planned += settings.epochs * (full_epoch // size)
        if settings.way == ONE_PASS:
            sizes = arms.one_pass_sizes(full_epoch, size, settings.epochs, settings.ratio)
            planned += sum(full_epoch // seen for seen in sizes)
            # A forward of the pool and a backward of the chosen: full data at the same compute takes as many images.
            share = (1 + 2 * settings.ratio) / 3
            planned += int(sum(full_epoch // size * (1 if seen == size else share) for seen in sizes))
        else:
            planned += 2 * teacher.total_steps(size)
    return settings.seeds * planned


def _teacher(settings: Settings, images: Images) -> attent.Teacher:
    """A teacher that is only asked for its plan."""
    return attent.Teacher(len(images.train_images), total_epochs=settings.epochs, ratio=settings.ratio)


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}")
