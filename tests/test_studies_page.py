"""docs/studies.md says what the committed runs say, and no more."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from attent.demo.intervals import t_quantile
from benchmarks.provenance import RESULTS
from benchmarks.studies import page
from benchmarks.studies.analysis import landed
from benchmarks.studies.arms import FULL
from benchmarks.studies.catalogue import SCALES, Missing, Sources, load, names
from benchmarks.studies.page import DOCS, lines
from benchmarks.studies.sweep import BUDGETS

from .study_learners import write_results

GAINS = {"harvest": 1.0, "one-pass": -1.0, "InfoBatch": 0.0}


@pytest.mark.parametrize("higher", [True, False])
def test_gains_are_positive_where_the_arm_is_better_whatever_the_metric(tmp_path: Path, higher: bool) -> None:
    study = landed(write_results(tmp_path, "vit", GAINS, higher))
    assert study is not None and study.seeds == [0, 1, 2] and study.budgets == list(BUDGETS)
    for arm, gain in GAINS.items():
        found = study.gain(arm, 0.5)
        # Differences gain − 0.05, gain, gain + 0.05: sd 0.05.
        half = t_quantile(2) * 0.05 / math.sqrt(3)
        assert (found.mean, found.low, found.high) == pytest.approx((gain, gain - half, gain + half))
        over = study.gain_over_budgets(arm)
        assert (over.mean, over.pairs) == (pytest.approx(gain), 3)


@pytest.mark.parametrize("higher", [True, False])
def test_the_smallest_budget_is_the_first_within_the_margin_of_full_training(tmp_path: Path, higher: bool) -> None:
    # Full training is at 10; budgets give 5, 6.5, 8 and 10, the margin is 0.5.
    gains = {"harvest": 1.6, "one-pass": 1.4, "InfoBatch": -0.4, "largest loss": -0.6}
    study = landed(write_results(tmp_path, "vit", gains, higher))
    assert study is not None
    found = {arm: study.smallest_budget(arm) for arm in (FULL, *gains)}
    assert found == {FULL: 1.0, "harvest": 0.8, "one-pass": 1.0, "InfoBatch": 1.0, "largest loss": None}


def test_the_detectable_difference_follows_from_the_spread_of_the_pairs(tmp_path: Path) -> None:
    study = landed(write_results(tmp_path, "vit", GAINS))
    assert study is not None
    # sd 0.05 in every pair; t_0.975 = 4.303, t_0.8 = 1.061 with 2 degrees of freedom.
    assert study.detectable() == pytest.approx((4.3027 + 1.0607) * 0.05 / math.sqrt(3), rel=1e-3)


def test_seeds_count_once_all_of_their_runs_have_landed(tmp_path: Path) -> None:
    path = write_results(tmp_path, "vit", GAINS, seeds=4)
    whole = path.read_text().splitlines()
    runs_of_a_seed = len(BUDGETS) * (1 + len(GAINS))
    before = 1 + 6 * (1 + len(GAINS))  # the costs and the grid
    path.write_text("\n".join(whole[: before + 4 * runs_of_a_seed - 1]) + "\n")
    study = landed(path)
    assert study is not None and study.seeds == [0, 1, 2]
    path.write_text("\n".join(whole[: before + 3 * runs_of_a_seed - 1]) + "\n")
    assert landed(path) is None


def test_runs_at_a_point_that_is_no_longer_the_best_do_not_count(tmp_path: Path) -> None:
    path = write_results(tmp_path, "vit", GAINS)
    stale = [json.loads(line) for line in path.read_text().splitlines()[-len(BUDGETS) * (1 + len(GAINS)) :]]
    with path.open("a") as file:
        for run in stale:
            file.write(json.dumps(run | {"learning_rate": 0.001, "value": 0.0}) + "\n")
    study = landed(path)
    assert study is not None and study.gain("harvest", 0.5).mean == pytest.approx(1.0)


def test_the_page_says_helps_only_where_the_interval_does(tmp_path: Path) -> None:
    write_results(tmp_path, "vit", GAINS)
    text = "\n".join(lines(tmp_path, "small"))
    assert "* harvest: helps in vit." in text
    assert "* one-pass: hurts in vit." in text
    assert "* InfoBatch: shows no difference in vit." in text
    assert "| harvest | **+1.00 [+0.88, +1.12]** |" in text
    assert "| InfoBatch | +0.00 [−0.12, +0.12] |" in text
    assert "**Not yet run**, and so in none of these tables: `gpt`" in text


def test_the_page_names_studies_that_have_begun(tmp_path: Path) -> None:
    write_results(tmp_path, "gpt", GAINS, seeds=2)
    text = "\n".join(lines(tmp_path, "small"))
    assert "`gpt` (56 runs landed, fewer than 3 whole seeds)" in text and "Better or worse" not in text


def test_page_and_figure_are_written(tmp_path: Path) -> None:
    write_results(tmp_path / "results" / "small", "vit", GAINS)
    write_results(tmp_path / "results" / "small", "gpt", GAINS, higher=False)
    (tmp_path / "docs").mkdir()
    assert page.main(["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")]) == 0
    assert (tmp_path / "docs" / "studies.md").read_text().startswith("# Does teaching pay?")
    assert (tmp_path / "docs" / page.FIGURE).read_bytes().startswith(b"\x89PNG")


def test_the_committed_page_is_that_of_the_committed_results() -> None:
    assert (DOCS / "studies.md").read_text() == "\n".join(lines(RESULTS / "studies" / "small", "small")) + "\n"


def test_a_study_that_cannot_run_says_what_it_needs() -> None:
    for name in ("gpt", "minilm"):
        with pytest.raises(Missing, match="needs --texts"):
            load("small", name, Sources())


def test_studies_have_names_of_their_own() -> None:
    for scale in SCALES:
        assert len(names(scale)) == len(set(names(scale))) == 10
    study = load("small", "vit-mislabelled-30", Sources())
    assert study.name == "vit-mislabelled-30" and study.title.endswith("mislabelled 30 %")


def test_the_page_says_whether_the_default_is_what_was_asked(tmp_path: Path) -> None:
    def said(**gains: float) -> str:
        for name, gain in gains.items():
            write_results(tmp_path, name.replace("_", "-"), {"harvest": gain})
        return next(line for line in lines(tmp_path, "small") if line.startswith("Of attent's defaults"))

    # The pairs differ by ± 0.05: an interval of ± 0.12.
    assert "**met**. Interval above 0: `vit`, `gpt`, `mae`; mean at least 0: none;" in said(vit=1.0, gpt=0.2, mae=0.5)
    found = said(vit=1.0, gpt=0.1, mae=-0.1, gpt_lora=-1.0)
    assert "**not met**" in found and "mean below 0 within the interval: `mae`; interval below 0: `gpt-lora`." in found
