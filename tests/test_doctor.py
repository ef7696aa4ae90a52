"""attent doctor: the machine as it is, and design arithmetic that agrees with the teacher's schedule."""

from __future__ import annotations

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import attent
from attent import doctor
from attent.cli import main
from attent_kernels import native, row_statistics


def saving(ratio: float, epochs: int, training: str, way: str) -> float:
    rows = doctor.report(ratio, epochs, 1, 0.125)["costs"][training]
    return next(row["saving"] for row in rows if row["way"] == way)


def test_step_shares_are_those_of_the_ways_to_teach() -> None:
    r = 0.4
    full = {way.name: way.share(r, backward=2) for way in doctor.WAYS}
    lora = {way.name: way.share(r, backward=1) for way in doctor.WAYS}
    assert full == pytest.approx({"harvest": r, "one-pass": (1 + 2 * r) / 3, "two-pass": (1 + 3 * r) / 3}, rel=1e-12)
    assert lora == pytest.approx({"harvest": r, "one-pass": (1 + r) / 2, "two-pass": (1 + 2 * r) / 2}, rel=1e-12)


@pytest.mark.parametrize(("backward", "two_pass"), [(2.0, 2 / 3), (1.0, 1 / 2)])
def test_only_two_pass_has_a_break_even_below_one(backward: float, two_pass: float) -> None:
    limits = {way.name: way.break_even(backward) for way in doctor.WAYS}
    assert limits == pytest.approx({"harvest": 1, "one-pass": 1, "two-pass": two_pass}, rel=1e-12)
    for way in doctor.WAYS:
        assert way.share(limits[way.name], backward) == pytest.approx(1, rel=1e-12)


def test_the_saving_is_what_warm_up_and_anneal_leave_of_the_teachers_schedule() -> None:
    epochs, ratio = 10, 0.5
    sizes = attent.Teacher(1000, total_epochs=epochs, ratio=ratio, warmup=1, anneal=0.125).epoch_sizes()
    assert saving(ratio, epochs, "full training", "harvest") == pytest.approx(
        1 - sum(sizes) / (epochs * 1000), rel=1e-12
    )
    schedule = doctor.lay_out(ratio, epochs, 1, 0.125)
    assert (schedule.full, schedule.reduced) == (3, 7)


def test_two_pass_at_seventy_per_cent_loses_and_the_report_says_so() -> None:
    assert saving(0.7, 10, "full training", "two-pass") < 0 < saving(0.7, 10, "full training", "one-pass")
    assert "-" in next(
        line for line in doctor.text(doctor.report(0.7, 10, 1, 0.125)).splitlines() if "two-pass" in line
    )


def test_more_epochs_leave_more_of_the_saving() -> None:
    savings = [saving(0.5, epochs, "full training", "harvest") for epochs in (8, 16, 32, 64)]
    assert all(few < many for few, many in pairwise(savings)) and savings[-1] < 0.5


def test_it_prints_versions_devices_backends_and_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for fact in (attent.__version__, torch.__version__, "cpu:", "triton", "two-pass", "ratio < 0.67", "ratio < 0.50"):
        assert fact in text
    for backend, state in attent.backends().items():
        assert any(backend in line and state in line for line in text.splitlines())


def test_its_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--ratio", "0.3", "--epochs", "8"]) == 0
    assert json.loads(capsys.readouterr().out) == doctor.report(0.3, 8, 1, 0.125)


def test_a_missing_native_module_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_statistics, "unavailable", lambda: "no compiler was found")
    assert "not available" in doctor.native_module() and "no compiler was found" in doctor.native_module()


def test_a_native_module_that_loads_is_reported_with_its_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_statistics, "unavailable", lambda: None)
    monkeypatch.setattr(row_statistics, "instruction_sets", lambda: ("avx2", "portable"))
    assert doctor.native_module() == "available (avx2, portable)"


def test_the_cuda_kernels_are_reported_as_they_were_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(**built: object) -> str:
        monkeypatch.setattr(native, "module", SimpleNamespace(**{"cuda_absent": None, "cuda_archs": ""} | built))
        return doctor.cuda_kernels()

    archs = "80;90a"
    assert said(cuda_archs=archs, cuda_versions=lambda: (12080, 13000)) == (
        "sm_80, sm_90a, built with CUDA 13.0; the driver supports 12.8"
    )
    assert said(cuda_archs=archs, cuda_versions=lambda: (0, 13000)).endswith("built with CUDA 13.0; no driver")
    assert said(cuda_absent="no nvcc was found") == "none: no nvcc was found"
    monkeypatch.setattr(native, "module", None)
    assert doctor.cuda_kernels() == "none: there is no native module"
