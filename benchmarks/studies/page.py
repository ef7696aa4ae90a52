"""``python -m benchmarks.studies.page``: docs/studies.md and its figure, from committed results only."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from attent.demo.intervals import Difference, mean

from ..provenance import RESULTS
from . import policies
from .analysis import FEWEST_SEEDS, Landed, begun, landed
from .arms import ARMS, FULL
from .catalogue import names
from .figure import draw
from .study import TUNING_BUDGET
from .tuning import SECOND_BUDGET

DOCS = RESULTS.parent.parent / "docs"
FIGURE = "studies.png"


def lines(folder: Path, scale: str) -> Iterator[str]:
    """The page, for the results of a folder."""
    studies = [found for name in names(scale) if (found := landed(folder / f"{name}.jsonl")) is not None]
    yield "# Does teaching pay?"
    yield ""
    yield "<!-- Written by python -m benchmarks.studies.page from benchmarks/results/studies; do not edit. -->"
    yield ""
    yield from _introduction(scale)
    yield ""
    yield from _what_ran(folder, scale, studies)
    if studies:
        yield ""
        yield from _summary(studies)
        yield ""
        yield f"![Metric against measured seconds, a panel for each study]({FIGURE})"
    yield from _policies(folder, scale)
    for study in studies:
        yield ""
        yield from _study(study, scale)
    yield ""
    yield from _repeat(scale)


def _introduction(scale: str) -> Iterator[str]:
    yield (
        "Each study trains one learner on one data set. Every *arm* gets the same seconds, teaching included: a"
        " *budget* is a share of full training's, and the learning rate decays to 0 over each. So an arm is"
        " compared with full training (full data at 100 %) and with **full data at the same compute** (full data at the"
        " arm's budget)."
    )
    yield ""
    yield (
        "Seconds are processor seconds of the process, with one torch thread, since other work shared the machine; they"
        " still grow when others use its caches, so steps are allotted by costs that were measured side by side"
        " beforehand, and the tables show the seconds that the runs then took. Batch size and learning rate are chosen"
        f" for each arm from the same grid of four (all at a budget of {TUNING_BUDGET:.0%}, the better two again at"
        f" {SECOND_BUDGET:.0%}), with a seed and a validation part that the tables do not use. Seeds draw the initial"
        " learner and the order of the data; the data are the same."
    )
    if scale == "small":
        yield ""
        yield (
            "**Small scale**: each run takes seconds on one core. Learners and data are tiny, training is short, and a"
            " step takes 5 to 40 ms, so that what a library spends per operation counts far more than on a GPU: pools"
            " (one-pass, largest loss, selective backprop) cost more here than their arithmetic says. What holds here"
            " need not hold at scale, and the other way round. Nothing here was run on a GPU."
        )
    yield ""
    yield "| arm | what it does |"
    yield "|---|---|"
    for arm in ARMS.values():
        yield f"| {arm.name} | {arm.about} |"


def _what_ran(folder: Path, scale: str, studies: list[Landed]) -> Iterator[str]:
    shown = {study.name for study in studies}
    missing = [name for name in names(scale) if name not in shown]
    if not missing:
        yield "All studies of this scale have run."
        return
    said = []
    for name in missing:
        path = folder / f"{name}.jsonl"
        runs = begun(path) if path.exists() else 0
        said.append(f"`{name}`" + (f" ({runs} runs landed, fewer than {FEWEST_SEEDS} whole seeds)" if runs else ""))
    yield f"**Not yet run**, and so in none of these tables: {', '.join(said)}."


def _summary(studies: list[Landed]) -> Iterator[str]:
    """Where it helps, does nothing, hurts: one row an arm, one column a study."""
    yield "## Better or worse than full data at the same compute"
    yield ""
    yield (
        "Mean difference over the budgets, paired by seed, with its 95 % interval; the sign is turned so that **above 0"
        " is better**. **Bold**: the interval leaves 0 out. Of intervals without any effect one in twenty does so, and"
        f" there are {sum(len(s.arms) - 1 for s in studies)} in this table: a single bold one is weak evidence."
    )
    yield ""
    yield "| arm | " + " | ".join(f"[{s.name}](#{_anchor(s)})" for s in studies) + " |"
    yield "|---|" + "---|" * len(studies)
    for arm in (arm for arm in ARMS if arm != FULL):
        cells = (_signed(s.gain_over_budgets(arm), _digits(s)) if arm in s.arms else "" for s in studies)
        yield f"| {arm} | " + " | ".join(cells) + " |"
    found = (f"{s.detectable(s.budgets):.{_digits(s)}f} ({_metric(s)})" for s in studies)
    yield "| *smallest detectable difference* | " + " | ".join(found) + " |"
    yield ""
    yield (
        "The last row is the power: a true difference of that size would be found four times out of five"
        " ((t₀.₉₇₅ + t₀.₈)·sd/√n, sd pooled over the arms). Smaller ones mostly go unseen, so an interval around 0 says"
        " that no difference was shown, not that there is none."
    )
    yield ""
    for arm in (arm for arm in ARMS if arm != FULL):
        yield f"* {_verdict(arm, studies)}"
    yield ""
    yield _asked_of_the_default(studies)


#: Studies in which the interval of the default's gain is asked to be above 0.
ASKED_BETTER = 3


def _asked_of_the_default(studies: list[Landed]) -> str:
    """Whether attent's defaults are what a default is asked to be, study by study."""
    gains = {study.name: study.gain_over_budgets("harvest") for study in studies if "harvest" in study.arms}
    better = [name for name, gain in gains.items() if gain.low > 0]
    worse = [name for name, gain in gains.items() if gain.high < 0]
    below = [name for name, gain in gains.items() if gain.mean < 0 <= gain.high]
    met = not worse and not below and len(better) >= ASKED_BETTER

    def named(found: list[str]) -> str:
        return ", ".join(f"`{name}`" for name in found) or "none"

    return (
        "Of attent's defaults (harvest) it is asked that they are at least as good as full data at the same compute in"
        f" every study, and better (interval above 0) in at least {ASKED_BETTER}:"
        f" **{'met' if met else 'not met'}**. Interval above 0: {named(better)}; mean at least 0:"
        f" {named([name for name, gain in gains.items() if gain.low <= 0 <= gain.mean])}; mean below 0 within the"
        f" interval: {named(below)}; interval below 0: {named(worse)}."
    )


def _verdict(arm: str, studies: list[Landed]) -> str:
    """One sentence, from the intervals alone."""
    by_verdict: dict[str, list[str]] = {"helps in": [], "hurts in": [], "shows no difference in": []}
    for study in studies:
        if arm in study.arms:
            gain = study.gain_over_budgets(arm)
            verdict = "helps in" if gain.low > 0 else "hurts in" if gain.high < 0 else "shows no difference in"
            by_verdict[verdict].append(study.name)
    return f"{arm}: " + "; ".join(f"{said} {', '.join(where)}" for said, where in by_verdict.items() if where) + "."


def _policies(folder: Path, scale: str) -> Iterator[str]:
    """What single settings of a teacher change, from runs that the tables above do not use."""
    rows = policies.table(folder, names(scale))
    if not rows:
        return
    yield ""
    yield "## Which settings"
    yield ""
    budgets = " and ".join(f"{budget:.0%}" for budget in policies.BUDGETS)
    yield (
        "`python -m benchmarks.studies.policies` puts a teacher with one other setting (or two) in the harvest arm's"
        f" place, at that arm's batch size and learning rate, at budgets of {budgets}, with {len(policies.SEEDS)} seeds"
        " and the validation part, which no other table uses. Each cell: mean difference to full data at the same"
        " compute ± half of its 95 % interval, **in margins** of the study (0.5 points of accuracy, 0.02 bits per byte,"
        " 0.004 of squared error), so that studies can be put side by side; above 0 is better. *prune*: InfoBatch's two"
        " levels, of fixed sizes, by a teacher's own settings (ratio 0.75, temperature 0, floor 1/3, reweighted by the"
        " inverse): the upper half, and every other example of the lower half, counted twice."
    )
    yield ""
    yield from rows
    yield ""
    yield (
        "Mean and worst are over the studies that a row has. A setting would replace the default if it were better than"
        " the first row beyond its noise in several studies and worse in none; with intervals this wide that takes"
        " more than a row's mean."
    )


def _study(study: Landed, scale: str) -> Iterator[str]:
    about, digits = study.about, _digits(study)
    settings = about["settings"]
    yield f"## {about['title']}"
    yield ""
    sizes = ", ".join(f"{name} {value}" for name, value in settings["sizes"].items())
    yield f'`{study.name}`: {sizes}. Score `"{settings["score"]}"`.'
    batches, rates = settings["grid"]
    grid = f"batch sizes {' and '.join(map(str, batches))}, learning rates {' and '.join(map(str, rates))}"
    yield (
        f"Full training: {settings['passes']:.3g} passes at batch size {max(batches)},"
        f" {mean([study.cell(FULL, 1.0).seconds]):.2f} s; grid: {grid}; AdamW, weight decay {settings['weight_decay']};"
        f" {len(study.seeds)} seeds. Margin: {about['margin']} ({_metric(study)},"
        f" {'higher' if study.sign > 0 else 'lower'} is better)."
    )
    yield ""
    budgets = study.budgets
    yield (
        "| arm | batch, rate | "
        + " | ".join(f"{b:.0%}" for b in budgets)
        + " | smallest budget within the margin of full training |"
    )
    yield "|---|---|" + "---|" * (len(budgets) + 1)
    for arm in study.arms:
        batch, rate = study.point(arm)
        cells = (f"{mean(study.cell(arm, b).values):.{digits}f} ± {study.spread(arm, b):.{digits}f}" for b in budgets)
        found = study.smallest_budget(arm)
        yield f"| {arm} | {batch}, {rate:g} | {' | '.join(cells)} | {'none' if found is None else f'{found:.0%}'} |"
    yield ""
    yield "Mean ± standard deviation over the seeds, at each budget. Against full data at the same compute, paired:"
    yield ""
    yield "| arm | " + " | ".join(f"{b:.0%}" for b in budgets) + " | over the budgets |"
    yield "|---|" + "---|" * (len(budgets) + 1)
    for arm in study.arms:
        if arm != FULL:
            differences = [study.gain(arm, b) for b in budgets] + [study.gain_over_budgets(arm)]
            yield f"| {arm} | " + " | ".join(_signed(d, digits) for d in differences) + " |"
    yield ""
    yield (
        "Above 0 is better; bold: the interval leaves 0 out. Smallest detectable difference:"
        f" {study.detectable():.{digits}f} at one budget, {study.detectable(budgets):.{digits}f} over the budgets."
        f" What the runs took at {budgets[0]:.0%} and at 100 %:"
    )
    yield ""
    yield "| arm | CPU s | of them teaching | forward of rows not trained on | examples trained on |"
    yield "|---|---|---|---|---|"
    for arm in study.arms:
        ends = [study.cell(arm, budget) for budget in (budgets[0], budgets[-1])]
        columns = (
            ", ".join(f"{c.seconds:.2f}" for c in ends),
            ", ".join(f"{c.teaching_seconds:.2f}" for c in ends),
            ", ".join(f"{c.unchosen_seconds:.2f}" for c in ends),
            ", ".join(f"{c.examples:,.0f}" for c in ends),
        )
        yield f"| {arm} | " + " | ".join(columns) + " |"
    where = about["provenance"]
    yield ""
    yield (
        f"{study.all_runs} runs, the grid's included, {study.all_seconds:.0f} CPU s of training."
        f" torch {where['torch']}, {where['processor']}, {where['date']}, commit {where['commit'][:7]}:"
        f" [studies/{study.name}](../benchmarks/results/studies/{scale}/{study.name}.jsonl)."
    )


def _repeat(scale: str) -> Iterator[str]:
    yield "## Run it"
    yield ""
    yield f"    python -m benchmarks.studies --scale {scale} --texts TEXTS.tar.gz --resume --share 1/2 &"
    yield f"    python -m benchmarks.studies --scale {scale} --texts TEXTS.tar.gz --resume --share 2/2"
    yield f"    python -m benchmarks.studies.policies --scale {scale} --texts TEXTS.tar.gz"
    yield "    python -m benchmarks.studies.page"
    yield ""
    yield (
        "A run lands in `benchmarks/results/studies/` as soon as it is done, under a hash of its settings and of the"
        " code it depends on (words and layout of that code do not count); `--resume` skips those that are there. Two"
        " processes may share the studies between them (`--share`), each with one thread. `--scale gpu` has larger"
        " learners and data; it was not yet run on a GPU."
    )


def _metric(study: Landed) -> str:
    return str(study.about["settings"]["metric"][0])


def _digits(study: Landed) -> int:
    return {"accuracy, %": 2, "mean squared error": 4}.get(_metric(study), 3)


def _signed(difference: Difference, digits: int) -> str:
    text = f"{difference.mean:+.{digits}f} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"
    text = text.replace("-", "−")
    return f"**{text}**" if difference.low > 0 or difference.high < 0 else text


def _anchor(study: Landed) -> str:
    kept = (c for c in study.about["title"].lower().replace(" ", "-") if c.isalnum() or c in "-_")
    return "".join(kept)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.page", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "studies")
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--scale", default="small")
    asked = parser.parse_args(arguments)
    folder = asked.results / asked.scale
    (asked.docs / "studies.md").write_text("\n".join(lines(folder, asked.scale)) + "\n")
    shown = [found for name in names(asked.scale) if (found := landed(folder / f"{name}.jsonl")) is not None]
    if shown:
        draw(asked.docs / FIGURE, shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
