"""``attent bench``: the shapes that are asked for, an exit code that says whether attent was right, no checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import attent
from attent.bench import command, provenance, select
from attent.bench.contenders import Contenders
from attent.cli import main

CPU = ["--device", "cpu", "--dtype", "float32", "--rounds", "1"]


def measured(arguments: str, contenders: list[str], out: Path) -> dict[str, Any]:
    asked = ["bench", *arguments.split(), *CPU, "--contenders", *contenders, "--out", str(out)]
    assert main(asked) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    (row,) = result["rows"].values()
    assert set(row["contenders"]) == set(contenders)
    assert all("seconds" in entry for entry in row["contenders"].values()), row
    assert result["provenance"]["torch"] == torch.__version__
    return row


@pytest.mark.parametrize(
    ("arguments", "contenders", "shape"),
    [
        (
            "attention --batch 2 --heads 4 --kv-heads 2 --queries 9 --head-dim 8 --causal",
            ["SDPA, FlashAttention", "attent torch + top-k"],
            {"B": 2, "H": 4, "KV": 2, "Tq": 9, "Tk": 9, "D": 8, "causal": True, "classes": 0},
        ),
        (
            "attention --batch 3 --queries 1 --keys 7 --head-dim 8 --classes 5",
            ["SDPA, FlashAttention", "attent torch"],
            {"B": 3, "H": 8, "KV": 8, "Tq": 1, "Tk": 7, "D": 8, "causal": False, "classes": 5},
        ),
        (
            "loss --tokens 12 --width 8 --vocabulary 11 --tokens-each 4 --train",
            ["matrix products alone", "eager", "attent torch, head"],
            {"tokens": 12, "width": 8, "vocabulary": 11, "tokens each": 4, "targets": "random"},
        ),
        (
            "select --n 300 --k 7 --ties",
            ["torch.topk", "attent torch"],
            {"n": 300, "k": 7, "draws": False, "ties": True},
        ),
        (
            "harvest --batch 2 --tokens 4 --width 8 --heads 2 --depth 1 --vocabulary 11",
            ["full logits", "attent torch, logit and teacher"],
            {"B": 2, "T": 4, "D": 8, "heads": 2, "depth": 1, "V": 11},
        ),
        (
            "one-pass --batch 4 --tokens 3 --width 8 --heads 2 --depth 1 --classes 3",
            ["full step", "attent one-pass, eager"],
            {"B": 4, "T": 3, "D": 8, "heads": 2, "depth": 1, "classes": 3},
        ),
    ],
)
def test_what_is_asked_for_is_measured(
    arguments: str, contenders: list[str], shape: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = measured(arguments, contenders, tmp_path / "result.json")
    assert row["shape"] == shape
    printed = capsys.readouterr().out
    assert "caches left as they are" in printed and "matrix product" in printed  # the policy and the ceilings, said
    assert all(name in printed for name in contenders)


def test_something_wrong_of_attents_shows_in_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    contenders = Contenders()
    contenders.add("torch.topk")(select.topk)
    contenders.add("attent, wrong")(lambda problem: lambda: {"score": problem.scores[: problem.k]})
    monkeypatch.setattr(select, "CONTENDERS", contenders)
    assert main(["bench", "select", "--n", "50", "--k", "3", *CPU]) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("attention --queries 3 --keys 4 --causal", "--keys"),
        ("attention --heads 4 --kv-heads 3", "--kv-heads"),
        ("loss --tokens 10 --tokens-each 4", "--tokens-each"),
        ("select --n 3 --k 4", "--k"),
        ("select --n 30 --k 4 --dtype float16", "--dtype"),
        ("harvest --width 10 --heads 3", "--heads"),
        ("select --n 30 --k 4 --contenders nobody", "--contenders"),
        ("select --n 30 --k 4 --out /no/such/folder/x.json", "--out"),
    ],
)
def test_what_cannot_be_measured_is_named(arguments: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"attent bench: error: {named}: got ")


def test_a_shape_that_does_not_fit_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room for 8 TiB\nat length")

    monkeypatch.setattr(command, "measure", full)
    assert main(["bench", "select", "--n", "30", "--k", "4", *CPU]) == 2
    assert "no room for 8 TiB; takes" in capsys.readouterr().err


def test_it_needs_no_checkout(tmp_path: Path) -> None:
    # As from a wheel: elsewhere, with the packages on the path and nothing else of the repository.
    for package in (Path(attent.__file__).parent, Path(attent.__file__).parents[2] / "attent_kernels"):
        (tmp_path / package.name).symlink_to(package)
    run = subprocess.run(
        [sys.executable, "-m", "attent.cli", "bench", "select", "--n", "50", "--k", "3", *CPU, "--out", "x.json"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "0"}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "x.json").read_text())["benchmark"] == "select"


def test_the_commit_of_somebody_elses_checkout_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATTENT_COMMIT", raising=False)
    monkeypatch.setattr(
        provenance, "_run", lambda *arguments: str(tmp_path) if "--show-toplevel" in arguments else "abc"
    )
    assert provenance.commit() == "unknown"
    monkeypatch.setattr(provenance, "CHECKOUT", tmp_path)
    assert provenance.commit() == "abc"
