"""``python -m benchmarks.plot RESULT.json OUT.png``: a result as bars, one panel per workload, from its file alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def draw(result: dict[str, Any], path: Path) -> None:
    """Milliseconds of every contender that has a time, attent's in colour, and the bound as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {key: row for key, row in result["rows"].items() if "contenders" in row}
    timed = {
        key: sorted(
            ((name, entry["seconds"]) for name, entry in row["contenders"].items() if "seconds" in entry),
            key=lambda item: -item[1]["median"],
        )
        for key, row in rows.items()
    }
    heights = [max(1, len(bars)) for bars in timed.values()]
    figure, panels = pyplot.subplots(
        len(rows), 1, figsize=(9, sum(0.3 * h + 0.9 for h in heights)), height_ratios=heights, squeeze=False
    )
    for panel, (key, bars) in zip(panels[:, 0], timed.items(), strict=True):
        milliseconds = [1e3 * seconds["median"] for _, seconds in bars]
        errors = [
            [1e3 * max(0.0, seconds["median"] - seconds["low"]) for _, seconds in bars],
            [1e3 * max(0.0, seconds["high"] - seconds["median"]) for _, seconds in bars],
        ]
        colours = ["tab:orange" if name.startswith("attent") else "tab:gray" for name, _ in bars]
        panel.barh([name for name, _ in bars], milliseconds, xerr=errors, color=colours)
        panel.axvline(1e3 * rows[key]["bound seconds"], color="black", linestyle=":")
        panel.set_title(key, loc="left", fontsize=9)
        panel.tick_params(labelsize=8)
    where = result["provenance"]
    panels[-1, 0].set_xlabel(
        "milliseconds: median and middle half; dotted: the bound by copy bandwidth or matrix product\n"
        f"{where.get('gpu', where['processor'])}, torch {where['torch']}, commit {where['commit'][:7]}",
        fontsize=8,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("result", type=Path)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args(arguments)
    draw(json.loads(asked.result.read_text()), asked.out)


if __name__ == "__main__":
    main()
