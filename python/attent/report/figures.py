"""From the events of a log to the charts of its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .charts import Bars, Columns, Drawn, Histograms, Lines
from .log import bin_edges

Events = list[dict[str, Any]]

METRICS = 4  # charts of metrics, at most
MOST_BARS = 24  # of more classes, the half of it that was chosen least and the half that was chosen most
#: What trainers log about the evaluation itself.
NOT_METRICS = ("_runtime", "_per_second", "_time")


def the_run(events: Events) -> dict[str, Any]:
    """The latest start."""
    return [event for event in events if event["event"] == "run"][-1]


def lessons_of(events: Events) -> Events:
    """The epochs, the latest log of each."""
    return list({event["epoch"]: event for event in events if event["event"] == "lesson"}.values())


def charts_of(name: str, events: Events, others: Sequence[tuple[str, Events]] = ()) -> list[Drawn]:
    """All charts that the log of run ``name`` has the numbers for, in the order of the page."""
    run, lessons = the_run(events), lessons_of(events)
    charts: list[Drawn] = [*_metrics(name, events, others)]
    if lessons:
        charts += [_seconds(lessons), _ratio(run, lessons), *_scores(lessons), *_turnover(lessons)]
        charts += _coverage(run, lessons)
    return charts


def _metrics(name: str, events: Events, others: Sequence[tuple[str, Events]]) -> list[Drawn]:
    """What was evaluated, else the training loss; a chart for each."""
    found = {event["name"] for event in events if event["event"] == "metric"}
    evaluated = sorted(metric for metric in found if metric != "loss" and not metric.endswith(NOT_METRICS))
    charts: list[Drawn] = []
    for metric in (evaluated or sorted(found & {"loss"}))[:METRICS]:
        series = []
        for label, log in ((name, events), *others):
            curve = [(e["seconds"], e["value"]) for e in log if e["event"] == "metric" and e["name"] == metric]
            if curve:
                series.append((Path(label).name or label, curve))
        note = "Against measured seconds of training, teaching included; not against steps."
        title = f"{metric.removeprefix('eval_').replace('_', ' ').capitalize()}"
        file = "".join(letter if letter.isalnum() or letter in "_-" else "_" for letter in metric)
        charts.append(Lines(f"metric_{file}", title, note, "measured seconds of training", metric, series))
    return charts


def _seconds(lessons: Events) -> Drawn:
    labels: list[str] = []
    training: list[float] = []
    teaching: list[float] = []
    saved: list[float] = []
    before: dict[str, Any] = {"seconds": 0.0, "teaching_seconds": 0.0, "saved_seconds": 0.0}
    for e in lessons:
        spent = e["teaching_seconds"] - before["teaching_seconds"]
        labels.append(str(e["epoch"]))
        teaching.append(max(spent, 0.0))
        training.append(max(e["seconds"] - before["seconds"] - spent, 0.0))
        saved.append(max((e["saved_seconds"] or 0.0) - (before["saved_seconds"] or 0.0), 0.0))
        before = e
    how = lessons[-1]["saved_seconds_are"]
    note = "Wall clock of each epoch, from its draw to its last score. Teaching: recording, merging, drawing."
    series = [("training", training), ("teaching", teaching)]
    if lessons[-1]["saved_seconds"] is not None:
        note += " Saved: what a full epoch would have taken more"
        note += ", estimated from this run's seconds per example." if how == "estimated" else f" ({how})."
        series.append((f"saved ({how})", saved))
    return Columns("seconds", "Seconds spent and saved", note, "epoch", "seconds", labels, series, stacked=True)


def _ratio(run: dict[str, Any], lessons: Events) -> Drawn:
    n = run["num_examples"]
    series = [("asked", [e["asked"] / n for e in lessons]), ("achieved", [e["trained_on"] / n for e in lessons])]
    note = "Achieved is lower where batches drop tails, or a run was stopped."
    labels = [str(e["epoch"]) for e in lessons]
    return Columns("keep_ratio", "Keep ratio", note, "epoch", "share of all examples", labels, series)


def _scores(lessons: Events) -> list[Drawn]:
    scored = [lesson for lesson in lessons if lesson["histogram"]]
    if not scored:
        return []
    edges = bin_edges()
    edges = [edges[0] ** 2 / edges[1], *edges, edges[-1] ** 2 / edges[-2]]
    used = {int(i) for lesson in scored for i in lesson["histogram"]}
    low, high = min(used), max(used)
    shares = []
    for lesson in scored:
        total = sum(lesson["histogram"].values())
        shares.append([lesson["histogram"].get(str(i), 0) / total for i in range(low, high + 1)])
    medians = [lesson["quantiles"][2] for lesson in scored]
    labels = [str(e["epoch"]) for e in scored]
    note = (
        "Each example's last score, after each epoch. The stronger the blue, the more examples; the line: the median."
    )
    return [
        Histograms("scores", "Scores over time", note, "epoch", "score", labels, edges[low : high + 2], shares, medians)
    ]


def _turnover(lessons: Events) -> list[Drawn]:
    reduced = [e for e in lessons if e["turnover"] is not None]
    if not reduced:
        return []
    labels, series = [str(e["epoch"]) for e in reduced], [("new", [e["turnover"] for e in reduced])]
    note = "Share of each reduced lesson that was not in the one before. 0: the same examples again and again."
    return [Columns("turnover", "Turnover", note, "epoch", "share that is new", labels, series)]


def _coverage(run: dict[str, Any], lessons: Events) -> list[Drawn]:
    reduced = [lesson for lesson in lessons if not lesson["full"]]
    charts: list[Drawn] = []
    for kind, title, of in (
        ("group", "Coverage by class", "class"),
        ("length", "Coverage by length", "tokens"),
    ):
        # Classes and lengths become known as examples are seen; bins as of the last lesson that has them.
        with_it = [lesson for lesson in reduced if kind in lesson["coverage"]]
        if not with_it:
            continue
        labels, examples = (with_it[-1]["coverage"][kind][key] for key in ("labels", "examples"))
        same = [lesson for lesson in with_it if lesson["coverage"][kind]["labels"] == labels]
        chosen = [sum(lesson["coverage"][kind]["chosen"][i] for lesson in same) for i in range(len(labels))]
        names = run["group_names"] if kind == "group" and run["group_names"] else labels
        shown = [i for i in range(len(labels)) if examples[i] > 0]
        share = {i: chosen[i] / (len(same) * examples[i]) for i in shown}
        note = f"Share chosen by reduced lessons, mean of {len(same)}. Dashed: of all examples."
        if len(shown) > MOST_BARS:
            order = sorted(shown, key=lambda i: share[i], reverse=True)
            note += f" The {MOST_BARS // 2} most and the {MOST_BARS // 2} least chosen of {len(shown)}."
            shown = order[: MOST_BARS // 2] + order[-MOST_BARS // 2 :]
        if not shown:
            continue
        usual = sum(lesson["asked"] for lesson in same) / (len(same) * run["num_examples"])
        name = f"coverage_by_{'class' if kind == 'group' else 'length'}"
        bars = [str(names[i]) if i < len(names) else labels[i] for i in shown]
        charts.append(
            Bars(
                name,
                title,
                note,
                "share chosen",
                of,
                bars,
                [share[i] for i in shown],
                [examples[i] for i in shown],
                usual,
            )
        )
    return charts
