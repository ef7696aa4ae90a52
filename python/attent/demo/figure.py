"""The demo's picture: accuracy against measured seconds, and the images that were chosen most and least often."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from .arms import ARMS, ATTENT, FULL, SAME_COMPUTE, Run
from .data import CLASSES, Images
from .intervals import mean, standard_deviation
from .table import SHOWN, best, difference_lines, differences, most_and_least_chosen, visits_of_attent

#: Okabe and Ito's colours, told apart with every kind of colour vision; the markers differ as well.
STYLES = {FULL: ("#000000", "s"), SAME_COMPUTE: ("#D55E00", "^"), ATTENT: ("#0072B2", "o")}
COLUMNS = 5
#: Characters of a line of small text under the curves.
LINE_WIDTH = 118


def draw(path: Path, images: Images, runs: Sequence[Run]) -> None:
    """Write the picture as a PNG file."""
    figure = Figure(figsize=(12.8, 6.0), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.25, 1), wspace=0.04)
    left, right = halves
    _curves(left.subplots(), runs)
    lines = [textwrap.fill(line, LINE_WIDTH) for line in difference_lines(differences(runs))]
    left.supxlabel("\n".join(lines), fontsize="small")
    visits, chosen = visits_of_attent(runs), best(runs, ATTENT)
    most, least = most_and_least_chosen(visits)
    above, below = right.subfigures(2, 1, hspace=0.06)
    over = f"over {len(chosen)} run{'s' if len(chosen) > 1 else ''}"
    _thumbnails(above, f"attent trained on these most often ({over})", images, most, visits)
    _thumbnails(below, f"... and on these least often ({over})", images, least, visits)
    figure.savefig(path, dpi=150, format="png")


def _curves(axes: Any, runs: Sequence[Run]) -> None:
    """Each arm's mean accuracy over the seeds, with a band of one standard deviation, against mean measured seconds."""
    for arm in ARMS:
        colour, marker = STYLES[arm]
        points = list(zip(*(run.curve for run in best(runs, arm)), strict=True))
        seconds = [mean([s for s, _ in point]) for point in points]
        centre = [mean([a for _, a in point]) for point in points]
        label = f"{arm} (batch {best(runs, arm)[0].batch_size}): {centre[-1]:.2f} %"
        axes.plot(seconds, centre, color=colour, marker=marker, label=label, zorder=3)
        if len(points[0]) > 1:
            spread = [standard_deviation([a for _, a in point]) for point in points]
            low, high = ([c + sign * s for c, s in zip(centre, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(seconds, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.axhline(centre[-1], color=colour, linewidth=0.8, linestyle=":", alpha=0.7)
    seeds = len(best(runs, FULL))
    spread_words = ", band: one standard deviation" if seeds > 1 else ""
    axes.set_title(f"Accuracy against measured seconds\n(mean of {seeds} seed{'s' if seeds > 1 else ''}{spread_words})")
    axes.set_xlabel("seconds of training, teaching included")
    axes.set_ylabel("test accuracy, %")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", title="learning rate decayed over each arm's own steps", alignment="left")


def _thumbnails(figure: Any, title: str, images: Images, ids: Tensor, visits: Tensor) -> None:
    """The images with their class and how often they were trained on."""
    figure.suptitle(title, fontsize="medium")
    grid = list(figure.subplots(-(-SHOWN // COLUMNS), COLUMNS).flat)
    for axes in grid:
        axes.set_axis_off()
    for axes, image_id, pixels in zip(grid, ids.tolist(), images.pixels(ids), strict=False):
        axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1)
        label = CLASSES[int(images.train_labels[image_id])]
        axes.set_title(f"{label} {int(visits[image_id])}×", fontsize="small", pad=2)
