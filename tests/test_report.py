"""The teaching log and the page made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import attent
from attent.cli import main
from attent.report import TeachingLog, report
from attent.report.log import FILE, bin_edges, read_log

N, EPOCHS = 60, 6


def taught(folder: Path, epochs: int = EPOCHS, noisy: int = 7) -> attent.Teacher:
    """A run whose scores fall, those of one example excepted; example 3 is never finite."""
    teacher = attent.Teacher(N, total_epochs=EPOCHS, ratio=0.5, seed=1)
    sampler, groups, lengths = teacher.sampler(batch_size=10), torch.arange(N) % 3, torch.arange(N) + 5
    log = TeachingLog(folder, teacher, group_names=["a<b", "c", "d"], show=lambda i: f"text {i} <script>")
    step = 0
    for epoch in range(epochs):
        for batch in sampler:
            ids = torch.tensor(batch)
            teacher.record(ids, torch.where(ids == noisy, 5.0, (1.0 + ids / N) / (epoch + 1)))
            step += 1
        log.metric("eval_accuracy", 0.5 + epoch / 20, step)
        log.lesson(step, groups=groups, lengths=lengths)
    return teacher


def test_the_log_holds_what_the_teacher_did(tmp_path: Path) -> None:
    teacher = taught(tmp_path)
    events = read_log(tmp_path)
    lessons = [event for event in events if event["event"] == "lesson"]
    assert [lesson["asked"] for lesson in lessons] == teacher.epoch_sizes() == [60, 30, 30, 30, 30, 60]
    assert [lesson["trained_on"] for lesson in lessons] == teacher.epoch_sizes()
    assert [lesson["full"] for lesson in lessons] == [True, False, False, False, False, True]
    assert [lesson["turnover"] for lesson in lessons if lesson["turnover"] is not None] == teacher.summary()["turnover"]
    last = lessons[-1]
    assert sum(last["histogram"].values()) == N
    assert last["coverage"]["group"]["chosen"] == [20, 20, 20] and sum(last["coverage"]["length"]["examples"]) == N
    assert [example["id"] for example in last["suspected"]["first"]] == [7]
    assert last["always_chosen"]["count"] == len(teacher.summary()["always_chosen_ids"])
    assert [event["value"] for event in events if event["event"] == "metric"] == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75]
    seconds = [event["seconds"] for event in events]
    assert seconds == sorted(seconds)


def test_histogram_bins_lie_below_their_edges(tmp_path: Path) -> None:
    teacher = attent.Teacher(5, total_epochs=1)
    list(teacher.sampler())
    teacher.record(torch.arange(5), torch.tensor([0.0, 1e-9, 1.0, 0.99, 1e9]))
    TeachingLog(tmp_path, teacher).lesson(1)
    edges, histogram = bin_edges(), read_log(tmp_path)[-1]["histogram"]
    one = next(i for i, edge in enumerate(edges) if edge > 1.0)
    assert histogram == {"0": 2, str(one - 1): 1, str(one): 1, str(len(edges)): 1}


def test_a_resumed_run_takes_the_place_of_what_it_trains_anew(tmp_path: Path) -> None:
    teacher = taught(tmp_path, epochs=4)  # steps 6, 9, 12, 15
    with open(tmp_path / FILE, "a") as file:
        file.write('{"event": "lesson", "step": 18, "epo')  # killed while writing
    TeachingLog(tmp_path, teacher, step=9).metric("eval_accuracy", 0.9, step=12)
    metrics = [(event["step"], event["value"]) for event in read_log(tmp_path) if event["event"] == "metric"]
    assert metrics == [(6, 0.5), (9, 0.55), (12, 0.9)]


def test_the_page_shows_each_side_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taught(tmp_path / "run")
    taught(tmp_path / "other", noisy=8)
    assert main(["report", str(tmp_path / "run"), "--compare", str(tmp_path / "other")]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "run" / "teaching.html"
    text = path.read_text(encoding="utf-8")
    assert "a&lt;b" in text and "text 7 &lt;script&gt;" in text
    assert text.count("<polyline") == 2  # one metric of two runs
    for title in ("Keep ratio", "Seconds", "estimated", "Scores over time", "Coverage by class", "Coverage by length",
                  "Turnover", "Never seen: 0", "Always chosen", "Suspected label noise: 1"):  # fmt: skip
        assert title in text


def test_a_run_that_just_began_has_a_page_too(tmp_path: Path) -> None:
    TeachingLog(tmp_path, attent.Teacher(4, total_epochs=2))
    assert "No epoch of the 2 planned" in report(tmp_path, tmp_path / "pages" / "now.html").read_text()


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "run: got" in capsys.readouterr().err
    (tmp_path / FILE).write_text(json.dumps({"event": "run", "version": 99, "step": 0}) + "\n")
    with pytest.raises(ValueError, match="version 99"):
        read_log(tmp_path)
