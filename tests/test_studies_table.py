"""README's teaching table and the studies' targets say what the committed runs say, or that there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import studies_table
from benchmarks.studies.arms import FULL
from benchmarks.studies.catalogue import names

from .study_learners import write_results


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Full training at 10; budgets of 50, 65, 80 and 100 % give 5, 6.5, 8 and 10; the margin is 0.5; 3 s at 100 %."""
    folder = tmp_path / "studies" / "small"
    write_results(folder, "vit", {"harvest": 1.6, "one-pass": 0.0})
    write_results(folder, "gpt", {"harvest": -0.6}, higher=False)
    return tmp_path


def test_without_results_nothing_is_said_to_have_run(tmp_path: Path) -> None:
    table = [line for line in studies_table.lines(tmp_path) if line.startswith("| ")][1:]
    assert len(table) == len(names("small"))
    assert all(line.count(studies_table.NOT_RUN) == 3 for line in table)
    assert all("not yet measured" in line for line in studies_table.targets(tmp_path))


def test_a_study_that_landed_has_its_difference_budgets_and_link(results: Path) -> None:
    lines = list(studies_table.lines(results))
    (vit,) = [line for line in lines if "small/vit.jsonl" in line]
    # Differences gain - 0.05, gain, gain + 0.05 over three seeds: half the interval is 4.303 · 0.05/sqrt(3) = 0.124.
    assert "[vit](benchmarks/results/studies/small/vit.jsonl)" in vit
    assert "**+1.60 [+1.48, +1.72]**, 3 seeds" in vit and vit.endswith("| 100% | 80% |")
    (gpt,) = [line for line in lines if "small/gpt.jsonl" in line]
    assert "lower is better" in gpt and "**−0.6000 [−0.7242, −0.4758]**" in gpt and gpt.endswith("| 100% | none |")
    assert sum(f"| {studies_table.NOT_RUN} |" in line for line in lines) == len(names("small")) - 2


def test_the_targets_are_of_measured_seconds_and_say_where_nothing_is_saved(results: Path) -> None:
    ratio, vision, language = studies_table.targets(results)
    # At 80 %: 0.1 s of teaching, and 3 - 2.4 s saved.
    assert "vit: 0.17; gpt: saves none" in ratio and "≤ 0.01" in ratio and "CPU scale" in ratio
    assert "vit: −20 % at a budget of 80% (full data: +0 % at a budget of 100%)" in vision and "gpt" not in vision
    assert (
        "gpt: not within the margin (full data: +0 % at" in language
        and "../benchmarks/results/studies/small/gpt.jsonl" in language
    )
    study = studies_table.rows(results)[0].study
    assert study is not None and studies_table.change_in_seconds(study, FULL) == 0
