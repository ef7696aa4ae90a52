"""The demo's report as text: a row per arm, the paired differences with their intervals, and what they allow to say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .arms import ARMS, ATTENT, FULL, SAME_COMPUTE, Run
from .intervals import Difference, mean, paired_difference, standard_deviation

BATCH_SIZE_RULE = "each arm is shown at the batch size with the higher mean final accuracy over the seeds"
#: How many of the images chosen most and least often are shown.
SHOWN = 10


@dataclass(frozen=True)
class ArmResult:
    """One arm at its better batch size, over the seeds."""

    arm: str
    batch_size: int
    accuracy: float
    accuracy_sd: float  # NaN with a single seed
    seconds: float
    teaching_seconds: float
    saved_seconds: float  # the full arm's measured seconds minus this arm's; 0 for the full arm
    examples: float
    unchosen_seconds: float = 0.0  # one-pass: forward of rows that were then not trained on


def better_batch_size(runs: Sequence[Run], arm: str) -> int:
    """The batch size with the higher mean final accuracy over the seeds; the larger (faster) one if they are equal."""
    sizes = {run.batch_size for run in runs if run.arm == arm}
    return max(sizes, key=lambda size: (mean([run.accuracy for run in at(runs, arm, size)]), size))


def at(runs: Sequence[Run], arm: str, batch_size: int) -> list[Run]:
    """The runs of an arm at a batch size, by seed."""
    return sorted((r for r in runs if r.arm == arm and r.batch_size == batch_size), key=lambda r: r.seed)


def best(runs: Sequence[Run], arm: str) -> list[Run]:
    """The runs of an arm at its better batch size, by seed."""
    return at(runs, arm, better_batch_size(runs, arm))


def arm_results(runs: Sequence[Run]) -> list[ArmResult]:
    """Each arm's row of the table."""
    full_seconds = mean([run.seconds for run in best(runs, FULL)])
    results = []
    for arm in ARMS:
        chosen = best(runs, arm)
        seconds = mean([run.seconds for run in chosen])
        results.append(
            ArmResult(
                arm=arm,
                batch_size=chosen[0].batch_size,
                accuracy=mean([run.accuracy for run in chosen]),
                accuracy_sd=standard_deviation([run.accuracy for run in chosen]),
                seconds=seconds,
                teaching_seconds=mean([run.teaching_seconds for run in chosen]),
                saved_seconds=full_seconds - seconds,
                examples=mean([run.examples for run in chosen]),
                unchosen_seconds=mean([run.unchosen_seconds for run in chosen]),
            )
        )
    return results


def differences(runs: Sequence[Run]) -> dict[str, Difference]:
    """attent minus each of the other arms, seed by seed, in points of accuracy."""
    attent = [run.accuracy for run in best(runs, ATTENT)]
    return {arm: paired_difference(attent, [r.accuracy for r in best(runs, arm)]) for arm in (SAME_COMPUTE, FULL)}


def visits_of_attent(runs: Sequence[Run]) -> Tensor:
    """How often attent trained on each image [N], over all seeds at its better batch size."""
    return torch.stack([run.visits for run in best(runs, ATTENT)]).sum(dim=0)


def most_and_least_chosen(visits: Tensor) -> tuple[Tensor, Tensor]:
    """The ids trained on most often and least often, SHOWN of each; equal counts in the order of the ids."""
    most = torch.argsort(visits, descending=True, stable=True)
    least = torch.argsort(visits, stable=True)
    return most[:SHOWN], least[:SHOWN]


def table(results: Sequence[ArmResult]) -> str:
    """The rows under their heads; one-pass has a column of its own for the forward of rows not trained on."""
    full_seconds = next(result.seconds for result in results if result.arm == FULL)
    in_one_pass = any(result.unchosen_seconds > 0 for result in results)
    heads: tuple[str, ...] = ("arm", "batch", "accuracy %", "seconds", "examples trained on", "teaching s")
    heads += ("forward of the rest s", "saved s") if in_one_pass else ("saved s",)
    rows = [
        (
            result.arm,
            str(result.batch_size),
            f"{result.accuracy:.2f}" + ("" if math.isnan(result.accuracy_sd) else f" ± {result.accuracy_sd:.2f}"),
            f"{result.seconds:.2f}",
            f"{result.examples:,.0f}",
            f"{result.teaching_seconds:.2f}" if result.arm == ATTENT else "-",
            *([f"{result.unchosen_seconds:.2f}" if result.arm == ATTENT else "-"] if in_one_pass else []),
            f"{result.saved_seconds:.2f} ({result.saved_seconds / full_seconds:.0%})" if result.arm != FULL else "-",
        )
        for result in results
    ]
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        name, *numbers = row
        return "  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])])

    lines = [line(row) for row in (heads, *rows)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def difference_lines(found: dict[str, Difference]) -> list[str]:
    """One line per comparison: mean, interval, sentence."""
    lines = []
    for arm, difference in found.items():
        interval = (
            "one seed gives no interval"
            if difference.pairs < 2
            else f"95 % interval [{difference.low:+.2f}, {difference.high:+.2f}], paired over {difference.pairs} seeds"
        )
        lines.append(
            f"attent - {arm}: {difference.mean:+.2f} points, {interval}: {difference.sentence('attent', arm)}."
        )
    return lines
