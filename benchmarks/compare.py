"""``python -m benchmarks.compare A B``: what B costs over A, where both are commits, or files of results.

Commits: each is checked out beside this checkout and its native module built; then each runs its own benchmark, in
processes of their own that alternate (A B, B A, …), so that the machine's drift meets both alike. A pair of runs gives
a ratio of medians; the interval is Student's, of the logarithms of the pairs' ratios, at 95 % for all rows together
(Bonferroni), so that of a whole table of equals one in twenty shows a difference.

Files: a run's median is known within 1.57·(middle half)/√rounds (McGill, Tukey and Larsen 1978), and the interval is
from one's low end over the other's high end to the opposite. That holds what varied within the runs and nothing of what
changed between them: two files of different days or machines differ by more than their intervals. What differs in their
provenance is printed.

Verdicts: slower or faster by more than the margin; the same within it; or unclear, and more pairs will say. Exits with
1 if anything of attent's is slower. What stands behind ``--`` goes to the program: ``-- --rows "k 1,024" --scale cpu``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from attent.bench.provenance import CHECKOUT
from attent.demo.intervals import mean, standard_deviation, t_quantile

PROGRAMS = ("attention", "linear_cross_entropy", "select", "steps", "cpu")
#: What a result's machine is; a difference in any makes ratios say little.
MACHINE = ("gpu", "driver", "processor", "cores", "torch_threads", "torch", "triton", "python", "native_module")
#: Times that a result holds only over another of the same run.
RATIOS = ("step / full", "step / full, torch.compile")
#: Numbers that say which item of a list this is; others are measured.
IDENTIFIES = ("r", "batch", "ratio", "k")


class Ratio(NamedTuple):
    """B over A with its interval; both bounds None where nothing is known of the spread."""

    value: float
    low: float | None = None
    high: float | None = None

    def verdict(self, margin: float) -> str:
        if self.low is None or self.high is None:
            return "one run each: no interval"
        if self.low > 1 + margin:
            return "slower"
        if self.high < 1 / (1 + margin):
            return "faster"
        return "the same" if self.high <= 1 + margin and self.low >= 1 / (1 + margin) else "unclear"


# -------------------------------------------------------------------------------------------------------------- results


def medians(result: Any, path: tuple[str, ...] = (), rounds: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, spread) of every time in a result: those with a "median" under "seconds", ``RATIOS``.

    An item of a list goes by what identifies it: its texts and its numbers that are no measurements (``r``, ``batch``).
    """
    if isinstance(result, list):
        for item in result:
            yield from medians(item, (*path, *name_of(item)), rounds)
    if not isinstance(result, dict):
        return
    rounds = result.get("rounds", rounds) if isinstance(result.get("rounds", rounds), int) else rounds
    if "median" in result:
        if any(part.startswith("seconds") or part in RATIOS for part in path):
            where = [part for part in path if part not in ("rows", "contenders", "learners", "seconds")]
            yield " | ".join(where), result | {"rounds": rounds}
        return
    for name, value in result.items():
        yield from medians(value, (*path, name), rounds)


def name_of(item: Any) -> tuple[str, ...]:
    """An item of a list, in words: ``{"engine": "eager", "r": 0.5, …}`` is "eager, r 0.5"."""
    if not isinstance(item, dict):
        return ()
    texts = [value for value in item.values() if isinstance(value, str)]
    sizes = [f"{name} {item[name]:g}" for name in IDENTIFIES if isinstance(item.get(name), (int, float))]
    return (", ".join(texts + sizes),) if texts or sizes else ()


def notch(spread: dict[str, Any]) -> tuple[float, float] | None:
    """Where the median of a run's rounds lies, at 95 %; None if the file does not say how far they spread."""
    if not {"low", "high", "rounds"} <= set(spread) or not spread["rounds"] or spread["rounds"] < 2:
        return None
    half = 1.57 * (spread["high"] - spread["low"]) / math.sqrt(spread["rounds"])
    low = spread["median"] - half
    return (low, spread["median"] + half) if low > 0 else None


def of_files(a: Any, b: Any) -> dict[str, Ratio]:
    """Row: B over A, of the rows that both files have."""
    first, second = dict(medians(a)), dict(medians(b))
    found = {}
    for where in first:
        if where not in second:
            continue
        value = second[where]["median"] / first[where]["median"]
        ends = notch(first[where]), notch(second[where])
        found[where] = Ratio(value)
        if ends[0] is not None and ends[1] is not None:
            found[where] = Ratio(value, ends[1][0] / ends[0][1], ends[1][1] / ends[0][0])
    return found


def of_runs(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Ratio]:
    """Row: B over A, of the rows that every run has."""
    runs = [(dict(medians(a)), dict(medians(b))) for a, b in pairs]
    rows = [where for where in runs[0][0] if all(where in run for pair in runs for run in pair)]
    found = {}
    for where in rows:
        logarithms = [math.log(b[where]["median"] / a[where]["median"]) for a, b in runs]
        if len(runs) < 2:
            found[where] = Ratio(math.exp(logarithms[0]))
            continue
        level = 1 - 0.05 / len(rows)
        half = t_quantile(len(runs) - 1, level) * standard_deviation(logarithms) / math.sqrt(len(runs))
        found[where] = Ratio(*(math.exp(mean(logarithms) + sign * half) for sign in (0, -1, 1)))
    return found


def read(name: str) -> Any:
    """A file of results; of one of the GPU suite, which holds several commits, ``FILE#COMMIT`` or the only one."""
    path, _, commit = name.partition("#")
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if "runs" not in content:
        return content
    chosen = [key for key in content["runs"] if key.startswith(commit)]
    if len(chosen) != 1:
        raise SystemExit(f"{name}: has runs of {', '.join(content['runs'])}; takes FILE#COMMIT of one of them")
    run: Any = content["runs"][chosen[0]]
    return {"provenance": run["provenance"], "rows": run["parts"]}


def machine_differences(a: Any, b: Any) -> list[str]:
    first, second = a.get("provenance", {}), b.get("provenance", {})
    pairs = {name: (first.get(name), second.get(name)) for name in MACHINE}
    return [f"{name}: {one} and {other}" for name, (one, other) in pairs.items() if one != other]


# -------------------------------------------------------------------------------------------------------------- commits


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def checked_out(commit: str, native: bool) -> Iterator[Path]:
    """A worktree of ``commit`` with its native module; it goes when the context ends."""
    with tempfile.TemporaryDirectory(prefix="attent-compare-") as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            if native:
                build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
                done = subprocess.run(build, cwd=tree, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"the native module of {commit} does not build:\n{done.stderr[-2000:]}")
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def run(tree: Path, program: str, arguments: Sequence[str]) -> Any:
    """The result of a benchmark of the checkout ``tree``, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", f"benchmarks.{program}", *arguments, "--json", str(out)]
        path = os.pathsep.join([str(tree / "python"), str(tree)])
        done = subprocess.run(
            command, cwd=tree, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
        if done.returncode or not out.exists():
            raise SystemExit(f"{' '.join(command[1:])} failed in {tree}:\n{done.stderr[-2000:]}")
        return json.loads(out.read_text(encoding="utf-8"))


def measured(trees: tuple[Path, Path], program: str, arguments: Sequence[str], pairs: int) -> list[tuple[Any, Any]]:
    """The pairs of runs; every second pair begins with B."""
    found = []
    for i in range(pairs):
        order = (0, 1) if i % 2 == 0 else (1, 0)
        results = {which: run(trees[which], program, arguments) for which in order}
        found.append((results[0], results[1]))
        print(f"pair {i + 1} of {pairs}", file=sys.stderr, flush=True)
    return found


# --------------------------------------------------------------------------------------------------------------- report


def lines(ratios: dict[str, Ratio], margin: float) -> Iterator[str]:
    """One line a row, the largest ratio first."""
    for where, ratio in sorted(ratios.items(), key=lambda item: -item[1].value):
        interval = "" if ratio.low is None or ratio.high is None else f"[{ratio.low:.3f}, {ratio.high:.3f}]"
        yield f"{ratio.value:7.3f} {interval:17} {ratio.verdict(margin):8} {where}"
    if ratios:
        yield f"{median(ratio.value for ratio in ratios.values()):7.3f} median of {len(ratios)} rows"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", metavar="A", help="a commit, or a .json file of results (FILE#COMMIT of the GPU suite)")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--program", choices=PROGRAMS, default="linear_cross_entropy", help="what commits run")
    parser.add_argument("--pairs", type=int, default=6, help="runs of each commit (default 6)")
    parser.add_argument("--margin", type=float, default=0.03, help="what counts as a difference (default 0.03)")
    parser.add_argument("--no-native", action="store_true", help="build no native module: both in PyTorch alone")
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    asked = parser.parse_args(given[:end])
    files = [".json" in name for name in (asked.a, asked.b)]
    if files[0] != files[1]:
        parser.error(f"got {asked.a} and {asked.b}; takes two commits, or two .json files")
    if files[0]:
        a, b = read(asked.a), read(asked.b)
        for line in machine_differences(a, b):
            print(f"not the same {line}")
        ratios = of_files(a, b)
    else:
        commits = [git("rev-parse", "--verify", f"{name}^{{commit}}") for name in (asked.a, asked.b)]
        with ExitStack() as stack:
            trees = [stack.enter_context(checked_out(commit, not asked.no_native)) for commit in commits]
            pairs = measured((trees[0], trees[1]), asked.program, given[end + 1 :], asked.pairs)
        ratios = of_runs(pairs)
    if not ratios:
        print("no row that both have", file=sys.stderr)
        return 2
    print(f"B over A: {asked.b} over {asked.a}, margin {asked.margin:g}")
    print("\n".join(lines(ratios, asked.margin)))
    slower = [where for where, ratio in ratios.items() if ratio.verdict(asked.margin) == "slower"]
    return 1 if any(is_ours(where) for where in slower) else 0


def is_ours(where: str) -> bool:
    """A row of attent's: its contender's name begins so; in files without contenders, all are but masked losses."""
    if where.rpartition(" | ")[2] in RATIOS:
        return "masked" not in where
    return where.rpartition(" | ")[2].startswith("attent") or " | " not in where


if __name__ == "__main__":
    sys.exit(main())
