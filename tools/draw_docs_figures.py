"""Draws the figures of docs/how-it-works.md into docs/images, as SVG that is light or dark as its reader is.

python tools/draw_docs_figures.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import attent
from attent.report.charts import Lines, number
from attent.report.palette import DARK, DASHES, LIGHT
from attent.report.svg import svg

RATIO = 0.4
EPOCHS = 8


def styled(drawing: str, name: str, description: str) -> str:
    """A drawing that stands on its own: colours, letters, and words for those who do not see it."""
    light, dark = ("".join(f"--{key}:{value};" for key, value in colours.items()) for colours in (LIGHT, DARK))
    series = "".join(f".f{i}{{fill:var(--s{i})}}.l{i}{{stroke:var(--s{i})}}" for i in range(3))
    style = (
        f"svg{{{light}font:13px system-ui,sans-serif}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}{series}"
        "text{fill:var(--ink)}.soft{fill:var(--soft)}.grid{stroke:var(--line)}.axis{stroke:var(--soft)}"
        "polyline,.arrow{fill:none;stroke-width:2}.back{fill:var(--card)}.on{fill:var(--card)}"
    )
    opening, rest = drawing.split(">", 1)
    box = opening.partition('viewBox="')[2].partition('"')[0].split()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{" ".join(box)}" width="{2 * float(box[2]) * 0.85:.0f}" '
        f'role="img" aria-label="{name}: {description}"><style>{style}</style>'
        f'<rect class="back" width="{box[2]}" height="{box[3]}" rx="6"/>{rest}\n'
    )


def text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{words}</text>'


def lessons() -> str:
    """What each epoch of a run trains on, and where its scores go."""
    sizes = attent.Teacher(1000, total_epochs=EPOCHS, ratio=RATIO).epoch_sizes()
    floor, height, slot, width = 170, 120, 48, 34
    parts = []
    for epoch, size in enumerate(sizes):
        x, tall = 14 + epoch * slot, height * size / 1000
        parts.append(f'<rect class="f{0 if size < 1000 else 2}" x="{x}" y="{floor - tall:.1f}" width="{width}" '
                     f'height="{tall:.1f}" rx="2"/>')  # fmt: skip
        parts.append(text(x + width / 2, floor - tall - 5, f"{size / 10:.0f} %"))
        parts.append(text(x + width / 2, floor + 16, str(epoch), kind="soft"))
        if epoch + 1 < EPOCHS:
            start, end = x + width / 2 + 5, x + slot + width / 2 - 5
            parts.append(f'<path class="arrow l1" d="M{start} {floor + 22}q{(end - start) / 2} 22 {end - start} 0"/>')
            parts.append(f'<path class="f1" d="M{end + 2} {floor + 19}l-8 2l5 6z"/>')
    parts.append(text(14, 18, "warm-up", "start", "soft"))
    parts.append(text(14 + slot * 4, 18, "reduced: drawn by the scores so far", kind="soft"))
    parts.append(text(14 + slot * 7 + width, 18, "anneal", "end", "soft"))
    parts.append(text(200, floor + 52, "epochs; each one's scores decide on the next", kind="soft"))
    drawing = f'<svg viewBox="0 0 400 {floor + 62}">{"".join(parts)}</svg>'
    return styled(drawing, "Lessons", f"epochs train on {', '.join(f'{s / 10:.0f} %' for s in sizes)} of the data")


def costs() -> str:
    """What a pool costs in each way of teaching at keep ratio 1/2; forward 1, backward 2."""
    ways = (
        ("full training", ((1.0, "forward"), (2.0, "backward"))),
        ("harvest", ((0.5, "forward"), (1.0, "backward"))),
        ("one-pass", ((1.0, "forward"), (1.0, "backward"))),
        ("two-pass", ((1.0, "scoring"), (0.5, "forward"), (1.0, "backward"))),
    )
    kinds, unit, left = {"forward": 0, "backward": 1, "scoring": 2}, 85, 96
    parts = []
    for row, (way, pieces) in enumerate(ways):
        x, y = float(left), 34 + 34 * row
        parts.append(text(left - 8, y + 17, way, "end"))
        for cost, kind in pieces:
            parts.append(
                f'<rect class="f{kinds[kind]}" x="{x:.1f}" y="{y}" width="{cost * unit - 1.5:.1f}" height="26" rx="2"/>'
            )
            parts.append(text(x + cost * unit / 2, y + 17, number(cost), kind="on"))
            x += cost * unit
        parts.append(text(x + 6, y + 17, f"= {number(sum(cost for cost, _ in pieces))}", "start"))
    names = (("forward", "forward"), ("backward", "backward"), ("scoring", "no-grad forward"))
    for (kind, name), x in zip(names, (left, left + 82, left + 172), strict=True):
        parts.append(f'<rect class="f{kinds[kind]}" x="{x}" y="11" width="11" height="11" rx="2"/>')
        parts.append(text(x + 16, 21, name, "start", "soft"))
    words = "; ".join(f"{way} {number(sum(cost for cost, _ in pieces))}" for way, pieces in ways)
    return styled(f'<svg viewBox="0 0 400 178">{"".join(parts)}</svg>', "Cost of a pool at keep ratio one half", words)


def inclusion(draws: int = 400) -> str:
    """How likely an example is chosen, by its rank, for three settings."""
    n, k = 60, 24
    scores = torch.exp(-torch.arange(n) / 15.0)
    curves = []
    for name, temperature, floor in (("hard", 0.0, 0.0), ("Gumbel", 1.0, 0.0), ("Gumbel, floor 0.2", 1.0, 0.2)):
        count = torch.zeros(n)
        for seed in range(draws if temperature else 1):
            count[attent.select_top_k(scores, k, temperature=temperature, floor=floor, seed=seed).index] += 1
        share = count / (draws if temperature else 1)
        curves.append((name, [(rank + 1.0, float(share[rank])) for rank in range(n)]))
    chart = Lines("inclusion", "Who is chosen", "", "rank of the score, 1 the highest", "share of draws", curves)
    drawing = svg(chart).partition("<ul")[0]
    keys = "".join(
        f'<line class="l{i}" stroke-width="2.2" x1="232" x2="262" y1="{24 + 18 * i}" y2="{24 + 18 * i}"'
        f' stroke-dasharray="{DASHES[i]}"/>' + text(268, 28 + 18 * i, name, "start")
        for i, (name, _) in enumerate(curves)
    )
    return styled(drawing.replace("</svg>", f"{keys}</svg>"), "Share of draws by rank", chart.description())


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (lessons, costs, inclusion):
        (folder / f"{draw.__name__}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
