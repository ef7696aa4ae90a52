"""The command line: exit code 0, or 2 with one clear line on stderr and no traceback."""

from __future__ import annotations

import importlib.util

import pytest

import attent
from attent.cli import main


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0 and capsys.readouterr().out == f"attent {attent.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["teach"], ["demo", "--seeds", "three"], ["doctor", "--epochs", "1.5"]])
def test_what_cannot_be_parsed_exits_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("demo --seeds 0", "--seeds"),
        ("demo --data mnist", "--data"),
        ("demo --data fashion-mnist:/no/such/folder", "/no/such/folder"),
        ("demo --out demo.jpg", "--out"),
        ("demo --ratio 0.001", "--ratio"),
        ("doctor --ratio 0", "ratio"),
        ("doctor --epochs 0", "epochs"),
        ("doctor --warmup -1", "warmup"),
        ("doctor --anneal 2", "anneal"),
    ],
)
def test_a_wrong_value_exits_with_two_and_one_line_that_names_it(
    arguments: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith(f"attent {arguments.split()[0]}: error: ") and named in printed.err


def test_a_missing_extra_is_named_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert "pip install matplotlib tqdm" in capsys.readouterr().err


def test_an_interrupted_demo_leaves_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from attent.demo import run

    def interrupt(settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "demo", interrupt)
    assert main(["demo"]) == 130 and capsys.readouterr().err == "interrupted\n"
