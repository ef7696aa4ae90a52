"""``python -m benchmarks.table``: writes the tables of README and docs from the committed results and nothing else.

``--check`` writes nothing and fails if a page says anything but what the newest results say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import cpu, gpu_targets, score_quality_page, studies_table
from .one_pass import TARGETS
from .provenance import RESULTS

README = RESULTS.parent.parent / "README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def newest(name: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest committed result of a benchmark, if there is one."""
    files = sorted((RESULTS / name).glob("*.json"))
    return (files[-1], json.loads(files[-1].read_text())) if files else None


def section() -> str:
    """What stands between README's marks."""
    return "\n".join([BEGIN, "", *_teaching(), "", *studies_table.lines(), "", *_cost(), "", *_one_pass(), END])


def pages() -> dict[Path, str]:
    """Each page that holds generated text, and what stands between its marks."""
    scores = "\n".join([BEGIN, "", *score_quality_page.lines(), "", END])
    targets = "\n".join([BEGIN, "", *gpu_targets.lines(), "", END])
    return {README: section(), score_quality_page.PAGE: scores, gpu_targets.PAGE: targets}


def _link(path: Path) -> str:
    return f"[{path.parent.name}/{path.stem}]({path.relative_to(README.parent).as_posix()})"


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


def _machine(provenance: dict[str, Any]) -> str:
    return f"{_cores(provenance['cores'])}, {provenance['torch_threads']} torch threads, torch {provenance['torch']}"


def _teaching() -> Iterator[str]:
    found = newest("demo")
    yield "**Does teaching pay?** Fashion-MNIST, 28×28 grey images, the demo's small vision transformer, CPU."
    yield ""
    if found is None:
        yield "Not yet measured."
        return
    path, result = found
    data, settings = result["data"], result["settings"]
    yield "| arm | batch | accuracy % | measured seconds | examples trained on | teaching seconds | saved seconds |"
    yield "|---|---|---|---|---|---|---|"
    for arm in result["arms"]:
        spread = "" if arm["accuracy_sd"] is None else f" ± {arm['accuracy_sd']:.2f}"
        taught = f"{arm['teaching_seconds']:.2f}" if arm["arm"] == "attent" else ""
        saved = "" if arm["arm"] == "full data" else f"{arm['saved_seconds']:.1f}"
        yield (
            f"| {arm['arm']} | {arm['batch_size']} | {arm['accuracy']:.2f}{spread} | {arm['seconds']:.1f} |"
            f" {arm['examples']:,.0f} | {taught} | {saved} |"
        )
    yield ""
    for difference in result["differences"]:
        interval = "one seed gives no interval"
        if difference["low"] is not None:
            interval = f"95 % interval [{difference['low']:+.2f}, {difference['high']:+.2f}]"
        yield (
            f"* attent − {difference['second']}: {difference['mean']:+.2f} points, {interval},"
            f" {difference['pairs']} paired seeds: {difference['sentence']}."
        )
    yield ""
    yield (
        f"{data['train_examples']:,} + {data['test_examples']:,} images, {settings['epochs']} epochs, keep ratio"
        f" {settings['ratio']:g}, {settings['seeds']} seeds, {_cores(result['machine']['cores'])}: {_link(path)}."
    )
    if "notes" in result:
        yield f"{result['notes']}"


def _cost() -> Iterator[str]:
    found = newest("cpu")
    yield "**What does it cost?** Ratios within one run, on a CPU; GPU: [docs/performance.md](docs/performance.md)."
    yield ""
    if found is None:
        yield "Not yet measured."
        return
    path, result = found
    yield "| what | measured | target |"
    yield "|---|---|---|"
    for what, measured, target in _cost_rows(result["rows"]):
        yield f"| {what} | {measured} | {target} |"
    yield ""
    yield f"{_machine(result['provenance'])}, native module {result['provenance']['native_module']}: {_link(path)}."


def _cost_rows(rows: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    scorer = rows.get("scorer")
    if scorer:
        ratios = scorer["ratio to F.linear alone"]
        about = 'scorer, `"logit"` / `F.linear` alone (4096×512×32768, float32)'
        native, passes = (cpu.scorer_ratio(scorer, native) for native in (True, False))
        if native is not None:
            yield about, f"{native:.2f}", f"≤ {cpu.NATIVE_TARGET:g}"
            about = "the same without the native module"
        yield about, f"{passes:.2f}", f"≤ {cpu.PYTORCH_TARGET:g}"
        yield 'scorer, `"head"` / `F.linear` alone, one token per example', f"{ratios['head']['median']:.2f}", ""
        logits = f"(the logits are {scorer['logits MiB']:.0f} MiB)"
        yield f"the scorer's peak extra memory {logits}", f"{scorer['peak extra MiB']:.0f} MiB", "≤ 100 MiB"
    loss = rows.get("training loss")
    if loss:
        yield (
            "loss forward + backward / `F.cross_entropy(F.linear)`, no scores",
            f"{loss['ratio to full logits']['attent']['median']:.2f}",
            "",
        )
        rival = loss["ratio to full logits"].get("F.linear_cross_entropy, chunked")
        if rival:
            yield "PyTorch's chunked `F.linear_cross_entropy` / the same", f"{rival['median']:.2f}", ""
        yield (
            'the loss with `"logit"` scores / without',
            f"{loss['ratio of scoring to not']['logit']['median']:.3f}",
            "",
        )
    harvest = rows.get("harvest step")
    if harvest:
        taught = harvest["ratio with the teacher / without"]["median"]
        yield (
            "training step with the teacher / without (the demo's ViT, batch 128, one thread)",
            f"{taught:.3f}",
            "≤ 1.02",
        )
        rival = harvest["ratio with the teacher / plain PyTorch"]["median"]
        yield "the same / the same layers in plain PyTorch", f"{rival:.3f}", ""
    if "teacher" in rows:
        seconds = rows["teacher"]["seconds"]["median"]
        yield "recording and drawing for 1,000,000 ids", f"{seconds:.2f} s", "≤ 0.5 s"


_ENGINES = {
    "eager": "eager",
    "aot_eager": "compiled, operation by operation",
    "inductor": "compiled by Inductor",
    "two_pass": "two-pass",
    "masked": "masked loss",
}


def _one_pass() -> Iterator[str]:
    found = newest("one_pass")
    if found is None:
        return
    path, result = found
    yield "**What does a one-pass step cost?** Forward of a pool, backward of the share r of it, over a full step."
    yield ""
    yield "| learner, engine | r = 0.25 | r = 0.5 | r = 0.75 | target at 0.5 | peak memory at 0.5 |"
    yield "|---|---|---|---|---|---|"
    for name, learner in result["learners"].items():
        counted = learner["counting forward 1, backward 2"]
        for way, ratios in counted.items():
            yield f"| {name}: {way}, counting | {' | '.join(f'{ratios[r]:.2f}' for r in ratios)} |  |  |"
        for engine, words in _ENGINES.items():
            rows = {row["r"]: row for row in learner["rows"] if row["engine"] == engine}
            if not rows:
                continue
            # Inductor is measured against a full step under torch.compile.
            of = "step / full, torch.compile" if engine == "inductor" else "step / full"
            shares = (f"{row[of]['median']:.2f} [{row[of]['low']:.2f}, {row[of]['high']:.2f}]" for row in rows.values())
            target = f"≤ {TARGETS[engine]:g}" if engine in TARGETS else ""
            yield f"| {name}: {words} | {' | '.join(shares)} | {target} | {rows[0.5]['peak / full']:.2f} |"
    yield ""
    shapes = "; ".join(
        f"{name}: {', '.join(f'{what} {size}' for what, size in learner['shape'].items())}"
        for name, learner in result["learners"].items()
    )
    rounds = next(iter(result["learners"].values()))["rows"][0]["step / full"]["rounds"]
    provenance = result["provenance"]
    yield (
        f"Medians [middle half] of {rounds} interleaved rounds, processor time, one thread. Inductor's are over a full"
        f" step under `torch.compile`. {shapes}. {provenance['processor']}, torch {provenance['torch']}: {_link(path)}."
    )
    yield ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.table", description="The tables of README and docs from results."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not up to date")
    asked = parser.parse_args(arguments)
    outdated = []
    for page, measured in pages().items():
        text = page.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        wanted = before + measured + rest.split(END)[1]
        if wanted == text:
            continue
        outdated.append(page)
        if not asked.check:
            page.write_text(wanted, encoding="utf-8")
    if asked.check and outdated:
        names = ", ".join(page.relative_to(README.parent).as_posix() for page in outdated)
        print(f"not what the committed results say: {names}; run python -m benchmarks.table", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
