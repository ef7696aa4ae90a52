"""The tables of docs/score-quality.md, from the newest committed result of :mod:`.score_quality`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .provenance import RESULTS

TRUTHS = ("all parameters", "all but embeddings")
PAGE = RESULTS.parent.parent / "docs" / "score-quality.md"


def lines() -> Iterator[str]:
    """What stands between the page's marks."""
    files = sorted((RESULTS / "score_quality").glob("*.json"))
    if not files:
        yield "Not yet measured."
        return
    result = json.loads(files[-1].read_text())
    learners, scale = result["learners"], result["scale"]
    low, high = scale["lengths"]
    yield f"## A language model, every example {scale['length']} bytes long"
    yield ""
    yield from _one_length(learners["GPT, one length"])
    yield ""
    yield "The same, from embeddings of standard deviation 0.02 (as GPT-2 starts) instead of 1 (PyTorch's default):"
    yield ""
    yield from _one_length(learners["GPT, small embeddings"])
    yield ""
    yield f"## The same language model, lengths from {low} to {high} bytes (log-uniform)"
    yield ""
    yield from _mixed_lengths(learners["GPT, mixed lengths"])
    yield ""
    yield "## A vision transformer with an attention pool"
    yield ""
    yield from _one_length(learners["ViT"])
    yield ""
    yield from _origin(files[-1], result)


def _one_length(learner: dict[str, Any]) -> Iterator[str]:
    """Rank correlations, a column for each training step that was looked at."""
    steps = learner["steps"]
    yield "| score | true norm over | " + " | ".join(_when(entry["step"]) for entry in steps) + " |"
    yield "|---|---|" + "---|" * len(steps)
    for of in TRUTHS:
        for i, row in enumerate(steps[0]["scores"]):
            cells = (_correlation(next(iter(entry["scores"][i][f"spearman, {of}"].values()))) for entry in steps)
            yield f'| `"{row["score"]}"` | {of} | ' + " | ".join(cells) + " |"
    yield ""
    yield _about(learner)


def _mixed_lengths(learner: dict[str, Any]) -> Iterator[str]:
    """After the last step: correlation with the true norm of each L_i, and who is chosen."""
    last = learner["steps"][-1]
    scalings = list(last["true norm chooses"])
    yield f"{_when(last['step']).capitalize()}; the middle columns are against the true norm of the L_i that they name."
    yield ""
    yield (
        "| score | `per_example` | " + " | ".join(f'`"{s}"`' for s in scalings) + " | shortest third | longest third |"
    )
    yield "|---|---|" + "---|" * (len(scalings) + 2)
    for row in last["scores"]:
        cells = " | ".join(_correlation(row["spearman, all parameters"][s]) for s in scalings)
        scaling = "(always a mean)" if row["score"] == "loss" else f'`"{row["per_example"]}"`'
        yield f'| `"{row["score"]}"` | {scaling} | {cells} | {_shares(row["chosen"])} |'
    for s in scalings:
        blank = " | ".join("1" if s == other else "" for other in scalings)
        yield f'| true norm | `"{s}"` | {blank} | {_shares(last["true norm chooses"][s])} |'
    yield ""
    yield _about(learner)


def _about(learner: dict[str, Any]) -> str:
    def at_each_step(of: str, form: str) -> str:
        return ", ".join(f"{entry[of]['mean']:{form}} {_when(entry['step'])}" for entry in learner["steps"])

    shares = at_each_step("embeddings' share of the squared norm", ".0%").replace("%", " %")
    losses = at_each_step("mean loss", ".2f")
    embeddings = f"the embeddings' share of the squared norm: {shares}"
    return f"{learner['parameters']:,} parameters; {embeddings}; mean loss: {losses}."


def _origin(path: Path, result: dict[str, Any]) -> Iterator[str]:
    scale, where = result["scale"], result["provenance"]
    seconds = sum(learner["processor seconds"] for learner in result["learners"].values())
    yield (
        f"Mean ± standard deviation over {result['seeds']} seeds (they draw weights, batches and the"
        f" {scale['examples']} examples scored each time); AdamW, batch {scale['batch']}, constant learning rate."
        f" torch {where['torch']}, {seconds:.0f} processor seconds in all, commit {where['commit'][:7]}:"
        f" [{path.parent.name}/{path.stem}](../{path.relative_to(PAGE.parent.parent).as_posix()})."
    )


def _when(step: int) -> str:
    return "at initialisation" if step == 0 else f"after {step} steps"


def _correlation(of: dict[str, float]) -> str:
    return f"{of['mean']:.2f} ± {of['sd']:.2f}".replace("-", "−")


def _shares(chosen: dict[str, dict[str, float]]) -> str:
    return " | ".join(f"{100 * chosen[of]['mean']:.0f} %" for of in ("short", "long"))
