"""The GPU suite, without a GPU: it goes on behind whatever crashes or hangs, keeps every result, and notices errors."""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from attent.bench.contenders import Contenders, Progress
from attent.bench.devices import Device, DeviceLost
from attent.bench.select import topk
from benchmarks import gpu_correct, gpu_stress, gpu_suite
from benchmarks.suite_file import SuiteFile, merge

CPU = torch.device("cpu")
PROVENANCE = {"commit": "abc", "uncommitted_changes": False}


@pytest.fixture
def file(tmp_path: Path) -> SuiteFile:
    return SuiteFile.create(tmp_path / "2026-01-02.json", PROVENANCE)


def test_without_a_gpu_it_says_so_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert gpu_suite.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- the file


def test_a_cut_off_run_goes_on_and_tries_again_what_failed(file: SuiteFile) -> None:
    ran: list[str] = []

    def rows() -> Any:
        def fail(_: Progress) -> dict[str, Any]:
            ran.append("b")
            raise RuntimeError("an illegal instruction\nand a long trace")

        yield "a", lambda _: ran.append("a") or {"x": 1}
        yield "b", fail
        yield "c", lambda _: ran.append("c") or {"x": 3}

    device = Device("cpu")
    gpu_suite.run_rows("select", file, time.time() + 60, rows(), device)
    assert file.results("select") == {
        "a": {"x": 1},
        "b": {"failed": "RuntimeError: an illegal instruction"},
        "c": {"x": 3},
    }
    again = SuiteFile.create(file.path, PROVENANCE)
    gpu_suite.run_rows("select", again, time.time() + 60, rows(), device)
    assert ran == ["a", "b", "c", "b"]
    other = SuiteFile.create(file.path, PROVENANCE | {"commit": "def"})
    gpu_suite.run_rows("select", other, time.time() - 1, rows(), device)
    assert other.results("select") == {}  # no row starts behind the deadline
    assert SuiteFile.create(file.path, PROVENANCE, again=True).results("select") == {}


def test_results_of_several_machines_merge_by_commit_and_row(tmp_path: Path) -> None:
    def written(name: str, commit: str, part: str, row: str, result: dict[str, Any]) -> Path:
        found = SuiteFile.create(tmp_path / name, PROVENANCE | {"commit": commit})
        found.start(part, row)
        found.finish(part, row, result)
        return found.path

    first = written("2026-01-01.json", "abc", "lce", "x", {"n": 1})
    second = written("2026-01-03.json", "abc", "lce", "y", {"n": 2})
    third = written("2026-01-02.json", "def", "correct", "z", {"n": 3})
    merged = merge([second, first, third], tmp_path / "gpu")
    assert merged.name == "2026-01-03.json"
    runs = json.loads(merged.read_text())["runs"]
    assert runs["abc"]["parts"] == {"lce": {"x": {"n": 1}, "y": {"n": 2}}}
    assert runs["def"]["parts"] == {"correct": {"z": {"n": 3}}}


# ------------------------------------------------------------------------------------------------- crashes, hangs, loss

CHILD = """
import os, sys, time
from pathlib import Path
from benchmarks.suite_file import SuiteFile
file = SuiteFile(Path(sys.argv[1]))
for row in ("crashes", "hangs", "one contender crashes", "fine"):
    if row in file.results("lce"):
        continue
    file.start("lce", row)
    if row == "crashes":
        os._exit(7)
    if row == "hangs":
        time.sleep(60)
    if row == "one contender crashes" and "bad" not in file.broken():
        file.enter("good")
        file.enter("bad")
        os._exit(7)
    file.finish("lce", row, {"broken": file.broken()})
"""


def test_a_child_that_crashes_or_hangs_costs_only_its_row_or_contender(file: SuiteFile) -> None:
    gpu_suite.supervise("lce", file, [sys.executable, "-c", CHILD, str(file.path)], time.time() + 60, row_limit=1.0)
    assert file.results("lce") == {
        "crashes": {"failed": "the process ended with 7"},
        "hangs": {"failed": "no result after 1 s"},
        "one contender crashes": {"broken": {"bad": "the process ended with 7"}},
        "fine": {"broken": {}},
    }


def test_a_child_that_never_comes_to_a_row_ends_its_part(file: SuiteFile) -> None:
    gpu_suite.supervise("lce", file, [sys.executable, "-c", "raise SystemExit(3)"], time.time() + 60, row_limit=5)
    assert file.results("lce") == {"(all)": {"failed": "the process ended with 3 before any row"}}


def test_a_lost_device_leaves_the_row_open_and_the_contender_is_left_out_next_time(
    file: SuiteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device("cpu")

    def breaks(problem: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def lost() -> None:
        raise DeviceLost("illegal memory access")

    monkeypatch.setattr(device, "must_be_well", lost)
    workload = gpu_suite.select.workloads("tiny")[0]
    contenders = Contenders()
    contenders.add("torch.topk")(topk)
    contenders.add("attent breaks")(breaks)
    workload = type(workload)(**{**vars(workload), "contenders": contenders})
    ceilings = device.ceilings(tiny=True)

    def rows() -> Any:
        yield "row", lambda progress: gpu_suite.measure(workload, device, ceilings, 1, progress=progress)

    with pytest.raises(DeviceLost):
        gpu_suite.run_rows("select", file, time.time() + 60, rows(), device)
    row = file.open_row()
    assert row is not None and row["contender"] == "attent breaks"
    assert file.blame("the process ended with 1")
    gpu_suite.run_rows("select", file, time.time() + 60, rows(), device)
    found = file.results("select")["row"]["contenders"]
    assert found["attent breaks"] == {"failed": "the process ended with 1"}
    assert found["torch.topk"]["seconds"]["median"] > 0


# ------------------------------------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_correct_holds_every_option_against_the_specification(backend: str) -> None:
    cases = gpu_correct.cases(CPU, (torch.float32,), gpu_correct.TINY)
    # Some, since the interpreter takes seconds for one; the slow test below sees all.
    chosen = (
        islice(cases, 0, None, 7)
        if backend == "torch"
        else (case for case in cases if "16 queries" in case.name and "backward" not in case.name)
    )
    for case in chosen:
        result = gpu_correct.check(case, backend)
        assert "outside budget" not in result, (case.name, result)


@pytest.mark.slow
def test_correct_runs_every_case() -> None:
    results = {
        case.name: gpu_correct.check(case, "torch")
        for case in gpu_correct.cases(CPU, (torch.float32, torch.bfloat16), gpu_correct.TINY)
    }
    assert len(results) > 150
    assert {name: result for name, result in results.items() if set(result) != {"error / budget"}} == {}


@pytest.mark.parametrize("part", ["scores", "output", "chosen"])
def test_correct_notices_a_wrong_result(part: str) -> None:
    case = next(iter(gpu_correct.cases(CPU, (torch.float32,), gpu_correct.TINY)))

    def wrong(backend: str) -> Any:
        found = dict(case.run("torch"))
        if backend == "triton":
            found[part] = found[part].flip(0) if part == "chosen" else found[part] * (1 + 1e-4)
        return found

    assert gpu_correct.check(case._replace(run=wrong), "triton")["outside budget"] == [part]


def test_stress_notices_a_result_that_changes_and_a_ticket_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    from attent_kernels import runtime

    results = iter([torch.tensor([float("nan"), 0.0]), torch.tensor([float("nan"), 0.0]), torch.tensor([1.0, -0.0])])
    found = gpu_stress.poisoned(lambda: [next(results)], CPU, 2)
    assert found["different"] == 1 and "failed" in found
    assert "failed" not in gpu_stress.poisoned(lambda: [torch.ones(2)], CPU, 2)
    monkeypatch.setattr(runtime, "open_tickets", lambda: 3)
    assert "3 tickets" in gpu_stress.poisoned(lambda: [torch.ones(2)], CPU, 1)["failed"]
    assert "failed" in gpu_stress.compare({"x": "1", "y": "2"}, {"x": "1", "y": "3"})
    assert "failed" not in gpu_stress.compare({"x": "1"}, {"x": "1"})


def test_every_stress_runs_where_there_is_no_gpu_or_says_that_it_needs_one() -> None:
    rows = dict(gpu_stress.rows(CPU, "torch", gpu_correct.TINY))
    assert len(rows) == 4 + 1 + 3 * 8
    for key, run in rows.items():
        if not key.startswith("delayed"):  # a process of its own: below
            result = run()
            assert ("launches" in result) == key.startswith("poisoned"), (key, result)


@pytest.mark.slow
@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_the_whole_suite_runs_dry(interpreted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if interpreted == "0":
        monkeypatch.delenv("TRITON_INTERPRET")
        parts = list(gpu_suite.PARTS)
    else:
        parts = ["select"]  # in the interpreter the others take minutes
    monkeypatch.chdir(Path(gpu_suite.__file__).parent.parent)
    assert gpu_suite.main(["--dry", "--out", str(tmp_path), "--budget", "600", "--part", *parts]) == 0
    (path,) = tmp_path.glob("*.json")
    (run,) = json.loads(path.read_text())["runs"].values()
    assert set(run["parts"]) == set(parts)
    assert os.listdir(tmp_path) == [path.name]
    for row in run["parts"]["select"].values():
        assert ("seconds" in row["contenders"]["attent triton"]) == (interpreted == "1")
