"""``attent report RUN``: one HTML file that holds all it shows, from the log that a run left."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from . import charts
from .log import SUSPECTED_SHARE, bin_edges, read_log

Events = list[dict[str, Any]]

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1340px; padding: 0 1rem; color: #222;
       background: #fff; }
h1 { margin-bottom: 0; } h2 { font-size: 1.05rem; margin: 0 0 .4rem; } .note { color: #555; margin: .2rem 0 .6rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.tile { border: 1px solid #ccc; border-radius: 6px; padding: .5rem .9rem; min-width: 9.5rem; }
.tile b { display: block; font-size: 1.35rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 1rem; }
section { border: 1px solid #ccc; border-radius: 6px; padding: .8rem 1rem; overflow-x: auto; }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; fill: #222; }
.legend span { margin-right: 1.2rem; } .legend i { display: inline-block; width: .8rem; height: .8rem;
  margin-right: .35rem; border-radius: 2px; vertical-align: -1px; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .15rem .6rem .15rem 0;
  vertical-align: top; border-bottom: 1px solid #eee; }
td.n { white-space: nowrap; font-variant-numeric: tabular-nums; }
"""


def report(run: str | Path, out: str | Path | None = None, compare: Sequence[str | Path] = ()) -> Path:
    """Write the report of ``run``, a folder with ``teaching.jsonl`` (or that file); returns the page's path.

    ``out``: where to; None: ``teaching.html`` beside the log. ``compare``: other runs, whose metrics are drawn along.
    The page needs no network and runs no script.

    Raises:
        ValueError: there is no log in a run.
    """
    events = read_log(run)
    others = [(str(other), read_log(other)) for other in compare]
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    path = folder / "teaching.html" if out is None else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(str(run), events, others), encoding="utf-8")
    return path


def page(name: str, events: Events, others: Sequence[tuple[str, Events]] = ()) -> str:
    """The page as HTML text."""
    run = [event for event in events if event["event"] == "run"][-1]
    lessons = list({event["epoch"]: event for event in events if event["event"] == "lesson"}.values())
    sections = [_metrics(name, events, others)]
    if lessons:
        sections += [_ratio(run, lessons), _seconds(lessons), _scores(lessons), _turnover(lessons)]
        sections += _coverage(run, lessons)
    tables = _examples(lessons[-1]) if lessons else []
    settings = ", ".join(f"{key}={_short(value)}" for key, value in run["settings"].items())
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>Teaching: {escape(name)}</title><style>{STYLE}</style></head><body>'
        f"<h1>Teaching report: {escape(Path(name).name or name)}</h1>"
        f'<p class="note">{escape(settings)}</p>{_tiles(run, lessons)}'
        f'<div class="grid">{"".join(section for section in sections if section)}</div>'
        f'<div class="grid" style="margin-top:1rem">{"".join(tables)}</div></body></html>\n'
    )


def _short(value: object) -> str:
    if isinstance(value, dict) and value.get("name") == "Constant":
        value = value["value"]
    elif isinstance(value, dict):
        return f"{value.get('name')}({', '.join(f'{k}={_short(v)}' for k, v in value.items() if k != 'name')})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _section(title: str, note: str, chart: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{chart}</section>'


# ---------------------------------------------------------------------------------------------------------------- parts


def _tiles(run: dict[str, Any], lessons: Events) -> str:
    planned = len(run["epoch_sizes"])
    tiles = [("examples", f"{run['num_examples']:,}"), ("epochs", f"{len(lessons)} of {planned}")]
    if lessons:
        offered, last = run["num_examples"] * len(lessons), lessons[-1]
        trained = sum(lesson["trained_on"] for lesson in lessons)
        asked = sum(lesson["asked"] for lesson in lessons)
        tiles += [
            ("keep ratio asked", f"{asked / offered:.3f}"),
            ("keep ratio achieved", f"{trained / offered:.3f}"),
            ("seconds of training", f"{last['seconds']:.1f}"),
            ("of which teaching", f"{last['teaching_seconds']:.2f}"),
        ]
        if last["saved_seconds"] is not None:
            tiles.append((f"seconds saved ({last['saved_seconds_are']})", f"{last['saved_seconds']:.1f}"))
    return (
        f'<div class="tiles">{"".join(f"<div class=tile>{escape(k)}<b>{escape(v)}</b></div>" for k, v in tiles)}</div>'
    )


def _metrics(name: str, events: Events, others: Sequence[tuple[str, Events]]) -> str:
    """What was evaluated, else the training loss; a scale of its own for each."""
    found = {event["name"] for event in events if event["event"] == "metric"}
    skipped = ("_runtime", "_per_second", "_time")
    evaluated = sorted(n for n in found if n != "loss" and not n.endswith(skipped))
    wanted = evaluated or sorted(found & {"loss"})
    drawn = []
    for metric in wanted[:4]:
        series = []
        for label, log in ((name, events), *others):
            curve = [(e["seconds"], e["value"]) for e in log if e["event"] == "metric" and e["name"] == metric]
            if curve:
                series.append((Path(label).name or label, curve))
        drawn.append(charts.lines(series, "measured seconds of training, teaching included", metric))
    return _section("Metrics", "Against measured seconds, not against steps.", "".join(drawn)) if drawn else ""


def _ratio(run: dict[str, Any], lessons: Events) -> str:
    n = run["num_examples"]
    asked, achieved = [e["asked"] / n for e in lessons], [e["trained_on"] / n for e in lessons]
    labels = [str(e["epoch"]) for e in lessons]
    note = (
        "Share of all examples, by epoch. Achieved is lower where batches drop tails or a run was resumed or stopped."
    )
    return _section("Keep ratio", note, charts.bars(labels, [("asked", asked), ("achieved", achieved)], "share"))


def _seconds(lessons: Events) -> str:
    labels, learning, teaching = [], [], []
    before = {"seconds": 0.0, "teaching_seconds": 0.0}
    for e in lessons:
        spent = e["teaching_seconds"] - before["teaching_seconds"]
        labels.append(str(e["epoch"]))
        teaching.append(max(spent, 0.0))
        learning.append(max(e["seconds"] - before["seconds"] - spent, 0.0))
        before = e
    saved = lessons[-1]["saved_seconds"]
    note = "Wall-clock seconds of each epoch, from its draw to its last score; teaching is recording, merging, drawing."
    if saved is not None:
        how = lessons[-1]["saved_seconds_are"]
        note += f" Saved in all: {saved:.1f} s, {how}"
        note += " from this run's seconds per example." if how == "estimated" else "."
    return _section("Seconds", note, charts.bars(labels, [("training", learning), ("teaching", teaching)], "seconds"))


def _scores(lessons: Events) -> str:
    edges = bin_edges()
    edges = [edges[0] ** 2 / edges[1], *edges, edges[-1] ** 2 / edges[-2]]
    used = {int(i) for lesson in lessons for i in lesson["histogram"]}
    if not used:
        return ""
    low, high = min(used), max(used)
    cells = []
    for lesson in lessons:
        total = sum(lesson["histogram"].values()) or 1
        cells.append([lesson["histogram"].get(str(i), 0) / total for i in range(low, high + 1)])
    medians = [lesson["quantiles"][2] if lesson["quantiles"] else 0.0 for lesson in lessons]
    chart = charts.heatmap([str(e["epoch"]) for e in lessons], edges[low : high + 2], cells, "epoch", "score", medians)
    note = "Last known score of every example after each epoch; darker: more examples; the line is the median."
    return _section("Scores over time", note, chart)


def _turnover(lessons: Events) -> str:
    reduced = [e for e in lessons if e["turnover"] is not None]
    if not reduced:
        return ""
    note = "Share of each epoch's lesson that was not in the lesson before."
    chart = charts.bars([str(e["epoch"]) for e in reduced], [("new", [e["turnover"] for e in reduced])], "share")
    return _section("Turnover", note, chart)


def _coverage(run: dict[str, Any], lessons: Events) -> list[str]:
    reduced = [lesson for lesson in lessons if not lesson["full"]]
    sections = []
    for kind, title in (("group", "Coverage by class"), ("length", "Coverage by length in tokens")):
        # Classes and lengths become known as examples are seen; bins as of the last lesson that has them.
        with_it = [lesson for lesson in reduced if kind in lesson["coverage"]]
        if not with_it:
            continue
        labels, examples = (with_it[-1]["coverage"][kind][key] for key in ("labels", "examples"))
        same = [lesson for lesson in with_it if lesson["coverage"][kind]["labels"] == labels]
        share = [
            sum(lesson["coverage"][kind]["chosen"][i] for lesson in same) / (len(same) * examples[i])
            if examples[i]
            else 0.0
            for i in range(len(labels))
        ]
        names = run["group_names"] if kind == "group" and run["group_names"] else labels
        usual = sum(lesson["asked"] for lesson in same) / (len(same) * run["num_examples"])
        note = f"Share of each that reduced lessons chose, mean of {len(same)}; dashed: share of all examples."
        sections.append(
            _section(
                title, note, charts.bars(names[: len(labels)], [("chosen", share)], "share chosen", "", line_at=usual)
            )
        )
    return sections


def _examples(lesson: dict[str, Any]) -> list[str]:
    share = f"{100 * SUSPECTED_SHARE:g} %"
    kinds = (
        ("suspected", "Suspected label noise",
         f"Among the highest {share} of scores, and no new lowest score in the last visits: hard, and stays hard. Look "
         "at the label before you trust it; hard and rare examples are here too."),
        ("always_chosen", "Always chosen", "In every reduced lesson so far (two or more)."),
        ("never_seen", "Never seen", "No score was ever recorded."),
    )  # fmt: skip
    sections = []
    for key, title, note in kinds:
        rows = "".join(
            f'<tr><td class="n">{example["id"]}</td><td class="n">'
            f"{'–' if example['score'] is None else format(example['score'], '.3g')}</td>"
            f"<td>{escape(example['text'] or '')}</td></tr>"
            for example in lesson[key]["first"]
        )
        count = lesson[key]["count"]
        table = f"<table><tr><th>id</th><th>score</th><th>example</th></tr>{rows}</table>" if count else "<p>None.</p>"
        shown = len(lesson[key]["first"])
        more = f" The first {shown} by score:" if count > shown else ""
        sections.append(_section(f"{title}: {count}", note + more, table))
    return sections
