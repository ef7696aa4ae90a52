"""Two commits, or two results, compared: what is different is called so, and what may be chance is not."""

from __future__ import annotations

import json
import math
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.compare import Ratio, of_files, of_runs
from benchmarks.provenance import RESULTS


def result(seconds: dict[str, float], spread: float = 0.1, rounds: int = 16, **provenance: Any) -> dict[str, Any]:
    contenders = {
        name: {"seconds": {"median": s, "low": s * (1 - spread), "high": s * (1 + spread), "min": s / 2}}
        for name, s in seconds.items()
    }
    return {"provenance": provenance, "rows": {"a shape": {"rounds": rounds, "contenders": contenders}}}


def test_the_interval_of_two_files_is_that_of_their_medians() -> None:
    found = of_files(result({"attent": 2.0, "gone": 1.0}), result({"attent": 3.0, "new": 1.0}))
    assert list(found) == ["a shape | attent"]
    # Middle half 0.2 of the median, 16 rounds: 1.57 · 0.2 / 4.
    half = 1.57 * 0.2 / 4
    assert found["a shape | attent"] == pytest.approx(
        (1.5, 1.5 * (1 - half) / (1 + half), 1.5 * (1 + half) / (1 - half))
    )


def test_the_interval_of_pairs_is_students_of_the_logarithms() -> None:
    factors = (1.1, 1.2, 1.3)
    found = of_runs([(result({"attent": 5.0}), result({"attent": 5.0 * f})) for f in factors])["a shape | attent"]
    logs = [math.log(f) for f in factors]
    centre = sum(logs) / 3
    deviation = math.sqrt(sum((x - centre) ** 2 for x in logs) / 2)
    half = 4.302652729911275 * deviation / math.sqrt(3)  # t of two degrees of freedom at 95 %
    assert found == pytest.approx(tuple(math.exp(centre + s * half) for s in (0, -1, 1)))


def test_a_drifting_machine_does_not_hide_a_difference_between_pairs() -> None:
    # The machine slows down threefold over the runs; B takes 10 % more in each pair.
    drift = [1 + 0.4 * i for i in range(6)]
    found = of_runs(
        [(result({"attent": d}), result({"attent": 1.1 * d * (1 + i % 2 / 100)})) for i, d in enumerate(drift)]
    )
    assert found["a shape | attent"].verdict(0.03) == "slower"


def test_equals_are_called_different_no_more_often_than_the_level_says() -> None:
    draw = random.Random(0)
    rows = [f"attent {i}" for i in range(10)]

    def noisy() -> dict[str, Any]:
        return result({row: math.exp(draw.gauss(0, 0.05)) for row in rows})

    wrong = 0
    for _ in range(400):
        verdicts = {ratio.verdict(0.0) for ratio in of_runs([(noisy(), noisy()) for _ in range(4)]).values()}
        wrong += bool(verdicts & {"slower", "faster"})
    # 5 % of 400 tables are 20, with a standard deviation of 4.4; of 8 runs in a million more than 40.
    assert wrong <= 40


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (Ratio(1.1, 1.05, 1.2), "slower"),
        (Ratio(1.1, 1.01, 1.2), "unclear"),
        (Ratio(0.9, 0.8, 0.95), "faster"),
        (Ratio(1.0, 0.98, 1.02), "the same"),
        (Ratio(1.5), "one run each: no interval"),
    ],
)
def test_verdicts(ratio: Ratio, verdict: str) -> None:
    assert ratio.verdict(0.03) == verdict


def test_files_of_different_machines_are_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps(result({"attent": 1.0, "rival": 1.0}, 0.01, gpu="one", torch="2")))
    b.write_text(json.dumps(result({"attent": 1.5, "rival": 2.0}, 0.01, gpu="two", torch="2")))
    assert compare.main([str(a), str(b)]) == 1
    printed = capsys.readouterr().out
    assert "not the same gpu: one and two" in printed and "not the same torch" not in printed
    assert compare.main([str(a), str(a)]) == 0
    # A slower rival is no fault of ours.
    b.write_text(json.dumps(result({"attent": 1.0, "rival": 2.0}, 0.01)))
    assert compare.main([str(a), str(b)]) == 0


def test_the_suites_file_is_asked_for_one_of_its_commits(tmp_path: Path) -> None:
    runs = {
        c: {"provenance": {}, "parts": {"lce": result({"attent": s})["rows"]}} for c, s in (("abc", 1.0), ("def", 2.0))
    }
    file = tmp_path / "suite.json"
    file.write_text(json.dumps({"runs": runs}))
    found = of_files(compare.read(f"{file}#abc"), compare.read(f"{file}#def"))
    assert {where: ratio.value for where, ratio in found.items()} == {"lce | a shape | attent": 2.0}
    with pytest.raises(SystemExit, match="abc, def"):
        compare.read(str(file))


def test_a_committed_result_is_read() -> None:
    file = max((RESULTS / "cpu").glob("*.json"))
    found = of_files(compare.read(str(file)), compare.read(str(file)))
    assert found and all(ratio.value == 1.0 for ratio in found.values())


def test_results_within_lists_go_by_what_identifies_them() -> None:
    content = json.loads(max((RESULTS / "one_pass").glob("*.json")).read_text(encoding="utf-8"))
    found = of_files(content, content)
    assert found["ViT | eager, r 0.5 | step / full"].value == 1.0
    assert len(found) >= 2 * 5 * 3  # learners, engines, ratios
    slower = json.loads(json.dumps(content))
    row = next(row for row in slower["learners"]["GPT"]["rows"] if (row["engine"], row["r"]) == ("two_pass", 0.25))
    row["step / full"] = {name: 2 * value for name, value in row["step / full"].items()} | {"rounds": 7}
    changed = {where: ratio for where, ratio in of_files(content, slower).items() if ratio.value != 1.0}
    assert list(changed) == ["GPT | two_pass, r 0.25 | step / full"] and compare.is_ours(next(iter(changed)))
    assert changed["GPT | two_pass, r 0.25 | step / full"].verdict(0.03) == "slower"
    assert not compare.is_ours("GPT | masked, r 0.25 | step / full")


@pytest.mark.slow
def test_two_commits_run_their_own_code_and_leave_no_worktree(capsys: pytest.CaptureFixture[str]) -> None:
    if not (compare.CHECKOUT / ".git").exists():
        pytest.skip("not a checkout with its history")
    arguments = ["HEAD", "HEAD", "--no-native", "--pairs", "2", "--program", "select", "--margin", "1000", "--"]
    program = ["--scale", "tiny", "--rows", "k 40", "--contenders", "torch.topk", "attent torch"]
    assert compare.main(arguments + program) == 0
    assert "attent torch" in capsys.readouterr().out
    listed = subprocess.run(["git", "worktree", "list"], cwd=compare.CHECKOUT, capture_output=True, text=True).stdout
    assert "attent-compare-" not in listed
