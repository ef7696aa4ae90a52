"""``attent report RUN``: one HTML file that holds all it shows, from the log that a run left."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from .charts import Drawn, Table
from .figures import Events, charts_of, lessons_of, the_run
from .log import FILE, SUSPECTED_SHARE, read_log
from .png import write_pngs
from .style import STYLE
from .svg import svg


def report(
    run: str | Path,
    out: str | Path | None = None,
    compare: Sequence[str | Path] = (),
    *,
    png: str | Path | None = None,
) -> Path:
    """Write the report of ``run``, a folder with ``teaching.jsonl`` (or that file); returns the page's path.

    The page needs no network and runs no script. It shows metrics against measured seconds, seconds spent and saved,
    keep ratios asked and achieved, scores over time, turnover, coverage by class and by length, and examples to look
    at: suspected label noise, always chosen, never seen.

    Args:
        run: the run's folder, or its log.
        out: where the page goes; None: ``teaching.html`` beside the log.
        compare: other runs, whose metrics are drawn along.
        png: a folder for the charts as PNG files, drawn by matplotlib; None: none are written.

    Raises:
        ValueError: there is no log in a run; ``png`` is asked for where matplotlib is not installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     log = attent.report.TeachingLog(folder, attent.Teacher(4, total_epochs=2))
    ...     report(folder).name
    'teaching.html'
    """
    events = read_log(run)
    others = [(str(other), read_log(other)) for other in compare]
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    path = folder / "teaching.html" if out is None else Path(out)
    name = str(folder.resolve())
    if png is not None:
        write_pngs(charts_of(name, events, others), Path(png))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(name, events, others), encoding="utf-8")
    return path


def page(name: str, events: Events, others: Sequence[tuple[str, Events]] = ()) -> str:
    """The page as HTML text."""
    run, lessons = the_run(events), lessons_of(events)
    title = escape(f"Teaching report: {Path(name).name or name}")
    charts = "".join(_figure(chart) for chart in charts_of(name, events, others))
    examples = f"<h2>Examples to look at</h2>{_examples(run, lessons[-1])}" if lessons else ""
    settings = "".join(f"<dt>{escape(key)}</dt><dd>{escape(_short(v))}</dd>" for key, v in run["settings"].items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><header><h1>{title}</h1>"
        f'<p class="lead">{escape(_in_words(run, lessons))}</p></header><main>{_tiles(run, lessons)}'
        f'<details><summary>Settings of the teacher</summary><dl class="settings">{settings}</dl></details>'
        f'<h2>What was taught, and what it took</h2><div class="grid">{charts}</div>{examples}</main>'
        f"<footer>Made by attent report from {FILE}. Seconds are wall clock, of the machine that trained.</footer>"
        "</body></html>\n"
    )


def _short(value: object) -> str:
    if isinstance(value, dict) and value.get("name") == "Constant":
        value = value["value"]
    elif isinstance(value, dict):
        return f"{value.get('name')}({', '.join(f'{k}={_short(v)}' for k, v in value.items() if k != 'name')})"
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------------------------- parts


def _in_words(run: dict[str, Any], lessons: Events) -> str:
    planned = len(run["epoch_sizes"])
    if not lessons:
        return f"No epoch of the {planned} planned is complete yet."
    last, offered = lessons[-1], run["num_examples"] * len(lessons)
    trained = sum(lesson["trained_on"] for lesson in lessons)
    words = (
        f"{len(lessons)} of {planned} epochs over {run['num_examples']:,} examples trained on "
        f"{100 * trained / offered:.0f} % of what full epochs would have, in {last['seconds']:.1f} seconds. "
        f"Teaching took {_seconds(last['teaching_seconds'])} of them"
    )
    saved = last["saved_seconds"]
    if saved is None:
        return f"{words}."
    share = f"{100 * abs(saved) / (last['seconds'] + saved):.0f} %" if last["seconds"] + saved > 0 else "–"
    what = "saved" if saved >= 0 else "cost"
    how = last["saved_seconds_are"]
    return f"{words} and {what} {abs(saved):.1f} seconds ({how}), {share} of the time that full epochs take."


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def _tiles(run: dict[str, Any], lessons: Events) -> str:
    tiles = [("examples", f"{run['num_examples']:,}"), ("epochs", f"{len(lessons)} of {len(run['epoch_sizes'])}")]
    if lessons:
        offered, last = run["num_examples"] * len(lessons), lessons[-1]
        asked, trained = (sum(lesson[key] for lesson in lessons) for key in ("asked", "trained_on"))
        tiles += [
            ("keep ratio asked", f"{asked / offered:.3f}"),
            ("keep ratio achieved", f"{trained / offered:.3f}"),
            ("seconds of training", f"{last['seconds']:.1f}"),
            ("of which teaching", _seconds(last["teaching_seconds"])),
        ]
        if last["saved_seconds"] is not None:
            tiles.append((f"seconds saved ({last['saved_seconds_are']})", f"{last['saved_seconds']:.1f}"))
        if last["nonfinite_scores"]:
            tiles.append(("scores not finite", f"{last['nonfinite_scores']:,}"))
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles)
    return f'<dl class="tiles">{cells}</dl>'


def _figure(chart: Drawn) -> str:
    return (
        f'<figure id="{escape(chart.name, quote=True)}"><figcaption><h3>{escape(chart.title)}</h3>'
        f'<p class="note">{escape(chart.note)}</p></figcaption>{svg(chart)}'
        '<details><summary>The numbers</summary><div class="scroll" tabindex="0">'
        f"{_table(chart.table())}</div></details></figure>"
    )


def _table(table: Table) -> str:
    header, rows = table
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _examples(run: dict[str, Any], lesson: dict[str, Any]) -> str:
    kinds = (
        ("suspected", "Suspected label noise",
         f"Among the highest {100 * SUSPECTED_SHARE:g} % of scores, without a new lowest score in the last visits: "
         "hard, and stays hard. Look before you judge: rare and hard examples are here too."),
        ("always_chosen", "Always chosen", "In every reduced lesson so far (two or more)."),
        ("never_seen", "Never seen", "No score was ever recorded."),
    )  # fmt: skip
    return "".join(
        f'<section class="wide"><h3>{title}: {lesson[key]["count"]:,}</h3>'
        f'<p class="note">{escape(note)}{_how_many_are_shown(lesson[key])}</p>'
        f"{_example_list(lesson[key]['first'], run['group_names'] or [])}</section>"
        for key, title, note in kinds
    )


def _how_many_are_shown(examples: dict[str, Any]) -> str:
    shown = len(examples["first"])
    return f" The first {shown} by score:" if examples["count"] > shown else ""


def _example_list(examples: Events, group_names: Sequence[str]) -> str:
    """A table; a gallery where there are pictures and no text. What no example has is left out."""
    if not examples:
        return "<p>None.</p>"
    told = any(example.get("text") for example in examples)
    cells = [_cells(example, group_names) for example in examples]
    if cells[0]["picture"] and not told:
        tiles = (f"<li>{c['picture']}<b>{c['class']}</b>#{c['id']}, {c['score']}</li>" for c in cells)
        return f'<ul class="gallery">{"".join(tiles)}</ul>'
    columns = [name for name in ("id", "score", "class", "picture", "example") if any(cell[name] for cell in cells)]
    kinds = ["n" if name in ("id", "score") else "text" if name == "example" else "" for name in columns]
    named = list(zip(columns, kinds, strict=True))
    head = "".join(f'<th scope="col" class="{kind}">{name}</th>' for name, kind in named)
    rows = ("".join(f'<td class="{kind}">{cell[name]}</td>' for name, kind in named) for cell in cells)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table></div>"
    )


def _cells(example: dict[str, Any], group_names: Sequence[str]) -> dict[str, str]:
    """An example's columns as HTML."""
    group, picture = example.get("group"), example.get("picture")
    named = group is not None and group < len(group_names)
    alt = f"example {example['id']}"
    return {
        "id": str(example["id"]),
        "score": "–" if example["score"] is None else format(example["score"], ".3g"),
        "class": "" if group is None else escape(str(group_names[group]) if named else str(group)),
        "picture": f'<img src="{escape(picture, quote=True)}" alt="{alt}" width="48" height="48">' if picture else "",
        "example": escape(example.get("text") or ""),
    }
