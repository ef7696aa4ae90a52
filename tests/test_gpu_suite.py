"""The GPU suite, without a GPU: it goes on behind whatever crashes or hangs, keeps every result, and notices errors."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from attent.bench.contenders import PORTABLE, Contenders, Progress, running
from attent.bench.devices import Device, DeviceLost
from attent.bench.select import topk
from attent_kernels import native
from benchmarks import gpu_children, gpu_correct, gpu_host, gpu_library, gpu_stress, gpu_suite
from benchmarks.gpu_children import run_rows, supervise
from benchmarks.gpu_report import report
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

        yield "select", "a", lambda _: ran.append("a") or {"x": 1}
        yield "select", "b", fail
        yield "select", "c", lambda _: ran.append("c") or {"x": 3}

    device = Device("cpu")
    run_rows(file, time.time() + 60, rows(), device)
    found = file.results("select")
    assert found["a"]["x"] == 1 and found["c"]["x"] == 3
    assert found["b"]["failed"] == "RuntimeError: an illegal instruction … and a long trace"
    assert "fail, test_gpu_suite.py:" in found["b"]["trace"]
    again = SuiteFile.create(file.path, PROVENANCE)
    run_rows(again, time.time() + 60, rows(), device)
    assert ran == ["a", "b", "c", "b"]
    other = SuiteFile.create(file.path, PROVENANCE | {"commit": "def"})
    run_rows(other, time.time() - 1, rows(), device)
    assert other.results("select") == {}  # no row starts behind the deadline
    assert SuiteFile.create(file.path, PROVENANCE, again=True).results("select") == {}


def test_results_of_several_machines_merge_by_commit_and_row(tmp_path: Path) -> None:
    def written(name: str, commit: str, part: str, row: str, result: dict[str, Any]) -> Path:
        found = SuiteFile.create(tmp_path / name, PROVENANCE | {"commit": commit})
        assert found.claim(part, row)
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
import os, signal, sys, time
from pathlib import Path
from benchmarks.suite_file import SuiteFile
file = SuiteFile(Path(sys.argv[1]), int(sys.argv[3]))
for row in ("crashes", "hangs", "is killed", "one contender crashes", "fine"):
    if row in file.results("lce") or not file.claim("lce", row):
        continue
    if row == "crashes":
        os._exit(7)
    if row == "is killed":
        os.kill(os.getpid(), signal.SIGSEGV)
    if row == "hangs":
        time.sleep(60)
    if row == "one contender crashes" and "bad" not in file.broken():
        file.enter("good")
        file.enter("bad")
        os._exit(7)
    file.finish("lce", row, {"broken": file.broken()})
"""


@pytest.mark.parametrize("workers", [1, 3])
def test_a_child_that_crashes_or_hangs_costs_only_its_row_or_contender(file: SuiteFile, workers: int) -> None:
    supervise(file, [sys.executable, "-c", CHILD, str(file.path)], time.time() + 60, row_limit=1.0, workers=workers)
    assert file.results("lce") == {
        "crashes": {"failed": "the process ended with 7"},
        "hangs": {"failed": "no result after 1 s"},
        "is killed": {"failed": f"the process ended with signal {signal.SIGSEGV.value}"},
        "one contender crashes": {"broken": {"bad": "the process ended with 7"}},
        "fine": {"broken": {}},
    }


def test_workers_share_rows_and_each_row_runs_once(file: SuiteFile) -> None:
    child = (
        "import sys; from pathlib import Path; from benchmarks.suite_file import SuiteFile\n"
        "file = SuiteFile(Path(sys.argv[1]), int(sys.argv[3]))\n"
        "for row in map(str, range(40)):\n"
        "    if file.claim('correct', row): file.finish('correct', row, {'by': file.worker})\n"
    )
    supervise(file, [sys.executable, "-c", child, str(file.path)], time.time() + 60, row_limit=20, workers=3)
    assert len(file.results("correct")) == 40
    assert sum(SuiteFile(file.path, worker).finished() for worker in range(3)) == 40


def test_a_child_that_never_comes_to_a_row_ends_its_part(file: SuiteFile) -> None:
    supervise(file, [sys.executable, "-c", "raise SystemExit(3)"], time.time() + 60, row_limit=5)
    assert file.results("children") == {"worker 0": {"failed": "the process ended with 3 before any row"}}


def test_the_budget_stops_what_runs_and_blames_nobody(file: SuiteFile) -> None:
    started = time.time()
    supervise(file, [sys.executable, "-c", CHILD.replace('row == "crashes"', "0"), str(file.path)], started + 2, 60.0)
    assert time.time() - started < 20
    assert "hangs" not in file.results("lce") and file.results("children") == {}


def test_of_rows_that_hang_alike_only_the_first_take_their_time(file: SuiteFile) -> None:
    def row(key: str) -> Any:
        return "correct", key, lambda _: {"x": 1}

    for i in range(gpu_children.MOST_HUNG):
        assert file.claim("correct", f"attention, {i}, triton")
        file.finish("correct", f"attention, {i}, triton", {"failed": f"{gpu_children.HUNG} 90 s"})
    rows = [row("attention, window, triton"), row("attention, window, cuda"), row("loss, bias, triton")]
    run_rows(file, time.time() + 60, rows, Device("cpu"))
    found = file.results("correct")
    assert found["attention, window, triton"] == {"failed": "not tried: 3 rows like it hung"}
    assert found["attention, window, cuda"]["x"] == found["loss, bias, triton"]["x"] == 1


def loses_itself(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device that is lost as soon as somebody asks how it is."""

    def lost() -> None:
        raise DeviceLost("illegal memory access")

    device = Device("cpu")
    monkeypatch.setattr(device, "must_be_well", lost)
    return device


def test_a_lost_device_leaves_the_row_open_and_the_contender_is_left_out_next_time(
    file: SuiteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(problem: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    device = loses_itself(monkeypatch)
    workload = gpu_suite.select.workloads("tiny")[0]
    contenders = Contenders()
    contenders.add("torch.topk")(topk)
    contenders.add("attent breaks")(breaks)
    workload = type(workload)(**{**vars(workload), "contenders": contenders})
    ceilings = device.ceilings(tiny=True)

    def rows() -> Any:
        yield "select", "row", lambda progress: gpu_suite.measure(workload, device, ceilings, 1, progress=progress)

    with pytest.raises(DeviceLost):
        run_rows(file, time.time() + 60, rows(), device)
    row = file.open_row()
    assert row is not None and row["contender"] == "attent breaks"
    assert file.blame("the process ended with 1")
    run_rows(file, time.time() + 60, rows(), device)
    found = file.results("select")["row"]["contenders"]
    assert found["attent breaks"] == {"failed": "the process ended with 1"}
    assert found["torch.topk"]["seconds"]["median"] > 0


def test_an_error_that_loses_the_device_keeps_its_words_and_ends_the_child(
    file: SuiteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Progress) -> Any:
        raise RuntimeError("CUDA error: misaligned address")

    device = loses_itself(monkeypatch)
    rows = [("correct", "a", fail), ("correct", "b", lambda _: {"x": 1})]
    with pytest.raises(DeviceLost):
        run_rows(file, time.time() + 60, rows, device)
    assert not file.blame("the process ended with 3")
    monkeypatch.undo()
    run_rows(file, time.time() + 60, rows, device)
    found = file.results("correct")
    assert found["a"]["failed"] == "RuntimeError: CUDA error: misaligned address" and found["b"]["x"] == 1


def test_the_report_ends_with_what_is_wrong_and_how_to_run_it_again(
    file: SuiteFile, capsys: pytest.CaptureFixture[str]
) -> None:
    def put(part: str, key: str, result: dict[str, Any]) -> None:
        assert file.claim(part, key)
        file.finish(part, key, result)

    times = {"seconds": {"median": 0.002}}
    wrong = {"outside budget": ["scores"], "error / budget": {"scores": 3.25, "loss": 0.1}}
    for key in ("a, triton", "b, triton", "c, triton"):
        put("correct", key, {"failed": "RuntimeError: no"})
    put("correct", "d, triton", wrong)
    put("correct", "e, cuda", {"unavailable": "no nvcc"})
    put("lce", "8×8", {"baseline": "mm", "contenders": {"mm": times, "attent triton": times, "attent cuda": wrong}})
    assert report(file, ["correct", "lce"]) == 5
    said = capsys.readouterr().out.splitlines()
    assert "lce | 8×8: mm 2.000 ms; over it: triton 1.00" in said
    assert "WRONG correct | a, triton | failed: RuntimeError: no (and 2 rows more)" in said
    assert "WRONG correct | d, triton | outside budget: scores (3.25 of its budget)" in said
    assert "WRONG lce | 8×8 | attent cuda: outside budget: scores (3.25 of its budget)" in said
    assert "correct: 5 rows in 0 s, 4 wrong, 1 unavailable" in said
    assert said[-2].endswith("--part correct --only 'a, triton'") and "5 rows" in said[-1]


# ------------------------------------------------------------------------------------------------------------ the parts


def test_phases_share_what_is_not_timed_and_compile_first_what_is() -> None:
    every = list(gpu_suite.phases(gpu_suite.PARTS))
    assert every == [["warm", "correct"], ["attention", "select", "host", "lce", "steps"], ["stress"]]
    assert list(gpu_suite.phases(["stress", "lce"])) == [["warm"], ["lce"], ["stress"]]
    assert list(gpu_suite.phases(["host"])) == [["host"]]


def test_portable_kernels_are_checked_and_timed_only_where_there_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "runs_hopper", lambda _: False)
    assert gpu_suite.forms(dry=False) == ("triton", "cuda")
    monkeypatch.setattr(native, "runs_hopper", lambda _: not native.portable_alone)
    assert gpu_suite.forms(dry=False) == ("triton", "cuda", PORTABLE)
    for module in (gpu_suite.attention, gpu_suite.linear_cross_entropy):
        workload = module.workloads("tiny")[0]
        problem = workload.problem(CPU)
        (portable,) = [one for one in workload.contenders.all if PORTABLE in one.name]
        assert portable.available(problem) is None
    with running(PORTABLE) as backend:
        assert backend == "cuda" and native.portable_alone
    with running("cuda") as backend:
        assert backend == "cuda" and not native.portable_alone


def test_only_what_takes_long_to_compile_is_warmed() -> None:
    keys = [key for _, key, _ in gpu_suite.warm_rows(Device("cpu"), True, ["lce", "correct", "steps", "stress"])]
    assert any(key.endswith(", attent triton, head") for key in keys)
    assert {key.split(",")[0] for key in keys} == {"steps", "lce"}
    assert not any("attent cuda" in key or "attent torch" in key for key in keys)


def test_host_times_are_of_every_backend_that_runs_and_others_say_why() -> None:
    rows = dict(gpu_host.rows(CPU))
    found = rows["host: select_top_k, 128 of 256"]()
    assert {"attent torch", "torch.topk"} <= set(found["microseconds a call"]) and "failed" not in found
    assert found["refused"]["attent cuda"]["unavailable"]
    assert len(rows) == 6

    def breaks() -> None:
        raise RuntimeError("no")

    assert gpu_host.measure({"a": breaks, "b": lambda: None}, CPU)["failed"] == "{'a': 'RuntimeError: no'}"


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_correct_holds_every_option_against_the_specification(backend: str) -> None:
    cases = (case for case, _ in gpu_suite.correct_cases(CPU, True, gpu_correct.TINY))
    # Some, since the interpreter takes seconds for one; the slow test below sees all.
    chosen = (
        islice(cases, 0, None, 7)
        if backend == "torch"
        else (case for case in cases if "16 queries" in case[0] and "backward" not in case[0])
    )
    for name, make in chosen:
        result = gpu_correct.check(make(), backend)
        assert "outside budget" not in result, (name, result)


@pytest.mark.slow
def test_correct_runs_every_case() -> None:
    kinds = [(dtype, train) for dtype in (torch.float32, torch.bfloat16) for train in (False, True)]
    cases = [case for kind in kinds for case in gpu_correct.cases(CPU, *kind, gpu_correct.TINY)]
    results = {name: gpu_correct.check(make(), "torch") for name, make in (*cases, *gpu_correct.selections(CPU))}
    assert len(results) > 170
    assert {name: result for name, result in results.items() if set(result) != {"error / budget"}} == {}


def test_correct_holds_what_is_no_kernel_against_the_cpu_and_the_specification() -> None:
    for name, make in gpu_library.cases(CPU):
        result = gpu_correct.check(make(), "triton" if name.startswith("one-pass") else "torch")
        assert "outside budget" not in result, (name, result)


@pytest.mark.parametrize("part", ["scores", "output", "chosen"])
def test_correct_notices_a_wrong_result(part: str) -> None:
    case = next(iter(gpu_correct.cases(CPU, torch.float32, False, gpu_correct.TINY)))[1]()

    def wrong(backend: str) -> Any:
        found = dict(case.run("torch"))
        if backend == "triton":
            found[part] = found[part].flip(0) if part == "chosen" else found[part] * (1 + 1e-4)
        return found

    found = gpu_correct.check(case._replace(run=wrong), "triton")
    assert found["outside budget"] == [part]
    how = found["wrong"][part]
    assert how["different"] > 0 and len(how["most at"]) > 0 and how["is"] != how["should be"]


def test_stress_notices_a_result_that_changes_and_a_ticket_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    from attent_kernels import runtime

    results = iter([torch.tensor([float("nan"), 0.0]), torch.tensor([float("nan"), 0.0]), torch.tensor([1.0, -0.0])])
    found = gpu_stress.poisoned(lambda: [next(results)], CPU, 2)
    assert found["different"] == 1 and "failed" in found
    assert "failed" not in gpu_stress.poisoned(lambda: [torch.ones(2)], CPU, 2)
    monkeypatch.setattr(runtime, "open_tickets", lambda: 3)
    assert "3 tickets" in gpu_stress.poisoned(lambda: [torch.ones(2)], CPU, 1)["failed"]
    assert "failed" in gpu_stress.same_digest("1", "2") and "failed" not in gpu_stress.same_digest("1", "1")


def test_every_stress_runs_where_there_is_no_gpu_or_says_that_it_needs_one() -> None:
    rows = dict(gpu_stress.rows(CPU, "torch", gpu_correct.TINY))
    assert len(rows) == 6 + 4 * 8
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
    assert set(run["parts"]) == {"warm", *parts}
    assert os.listdir(tmp_path) == [path.name]
    for row in run["parts"]["select"].values():
        assert ("seconds" in row["contenders"]["attent triton"]) == (interpreted == "1")
