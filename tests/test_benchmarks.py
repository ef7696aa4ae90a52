"""The measuring room: contenders alternate, ratios are of pairs, pages say what the results say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attent.bench.timing import Timing, interleave, ratio
from benchmarks import attention, cpu, gpu_targets, linear_cross_entropy, one_pass, select, steps, table
from benchmarks.memory import peak_extra_mib


def test_contenders_run_in_turn_in_alternating_order_and_warmup_is_not_counted() -> None:
    order: list[str] = []
    timings = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert "".join(order) == "abbaabba"
    assert all(len(timing.wall) == len(timing.cpu) == 3 for timing in timings.values())


def test_ratio_is_the_median_of_pairs_not_the_ratio_of_medians() -> None:
    ours, theirs = Timing(wall=[2.0, 30.0, 4.0], cpu=[]), Timing(wall=[1.0, 10.0, 4.0], cpu=[])
    assert ratio(ours, theirs)["median"] == 2.0


def test_pages_say_what_the_committed_results_say() -> None:
    assert table.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("page", "where", "what"),
    [
        ("README.md", table, ("section", lambda: table.BEGIN + "another number" + table.END)),
        ("docs/performance.md", table.gpu_targets, ("lines", lambda: ["another number"])),
        ("docs/score-quality.md", table.score_quality_page, ("lines", lambda: ["another number"])),
    ],
)
def test_a_page_that_says_something_else_is_noticed(
    page: str, where: Any, what: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(where, *what)
    assert table.main(["--check"]) == 1
    assert page in capsys.readouterr().err


def test_a_gpu_target_is_not_yet_measured_until_a_result_of_the_suite_holds_it(tmp_path: Path) -> None:
    assert all(gpu_targets.NOT_YET in line for line in list(gpu_targets.lines(tmp_path))[2:])
    assert len(list(gpu_targets.lines(tmp_path))) == 2 + len(gpu_targets.TARGETS) + 3  # three of the teaching studies

    def contenders(ours: float) -> dict[str, Any]:
        return {name: {"seconds": {"median": s}} for name, s in (("attent triton", ours), ("torch.topk", 4.0))}

    key = "n 1,000,000, k 1,024, hard"
    for date, ours in (("2026-01-01", 3.0), ("2026-02-01", 1.0)):
        parts = {"select": {key: {"contenders": contenders(ours)}, "n 5": {"failed": "x"}}}
        run = {"provenance": {"gpu": "a GPU", "commit": "abcdef123"}, "parts": parts}
        file = tmp_path / "a-gpu" / f"{date}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"runs": {"abcdef123": run}}))
    (line,) = [line for line in gpu_targets.lines(tmp_path) if "a GPU" in line]
    assert (
        "| 0.25 | ≤ 0.5 | a GPU, commit abcdef1: [a-gpu/2026-02-01](../benchmarks/results/a-gpu/2026-02-01.json) |"
        in line
    )


def test_every_gpu_target_names_a_row_and_contenders_that_the_suite_has() -> None:
    workloads = {"attention": attention, "lce": linear_cross_entropy, "select": select, "steps": steps}
    for target in gpu_targets.TARGETS:
        rows = [row for row in workloads[target.part].workloads("gpu") if row.key.startswith(target.row)]
        assert rows, target.what
        # With a time for every contender there is a figure: no name in it is misspelt.
        entries = {c.name: {"seconds": {"median": 2.0}, "peak extra MiB": 5.0} for c in rows[0].contenders.all}
        row = {"contenders": entries}
        assert target.figure(row | {"ratios": rows[0].summary(row)}) is not None, target.what


def test_the_plain_step_of_the_harvest_benchmark_trains_the_same_model() -> None:
    torch.manual_seed(0)
    learner = cpu.VisionTransformer()
    images = torch.randn(5, 28, 28)
    torch.testing.assert_close(cpu.Plain(learner)(images), learner.predict(images))


def test_every_one_pass_contender_trains_and_only_chosen_rows_differ_from_a_full_step() -> None:
    small = {"batch": 6, "tokens": 5, "width": 12, "depth": 1}
    for learner in (one_pass.vision_transformer(**small), one_pass.gpt(**small, vocabulary=11)):
        steps = one_pass.contenders(learner, (0.5,), ("eager", "two_pass", "masked"))
        found = {}
        for name, step in steps.items():
            step()
            found[name] = torch.cat([p.grad.flatten() for p in learner.model.parameters()])
        masked = found.pop("masked at 0.5")
        assert not torch.allclose(found.pop(one_pass.FULL), masked, rtol=1e-2)
        for gradient in found.values():
            # float32: some thousand roundings of 6e-8, of terms as large as the largest
            torch.testing.assert_close(gradient, masked, rtol=1e-4, atol=1e-6 * float(masked.abs().max()) + 1e-7)


def test_the_allocated_peak_counts_what_a_step_holds_at_once() -> None:
    def step() -> None:
        for _ in range(3):  # 4 MiB at a time, three times
            torch.empty(1 << 20).fill_(1)

    one_pass.allocated_peak(step)
    assert one_pass.allocated_peak(step) == 4 << 20


def make_nothing() -> int:
    return 0


def touch_nothing(_: int) -> None:
    return None


def touch_200_mib(_: int) -> None:
    np.ones(200 << 20, dtype=np.uint8).sum()


@pytest.mark.slow
def test_peak_memory_counts_what_a_call_adds_and_frees() -> None:
    # The page tables of 200 MiB and the allocator's own are far below 5 MiB. Linux counts resident pages for each
    # processor by itself and adds up what is above a batch of max(32, 2 processors) pages: so much each of the two
    # readings may lack or have too much.
    processors = os.cpu_count() or 1
    unsure = 2 * processors * max(32, 2 * processors) * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert 200 - unsure <= peak_extra_mib(make_nothing, touch_nothing, touch_200_mib) <= 205 + unsure
