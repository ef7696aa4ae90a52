"""A teacher's state as a file: what was torn or garbled is refused, never loaded as something else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import attent
from attent.checkpoint import read_file, read_state, write_state
from attent.report import TeachingLog
from attent.report.log import FILE, read_log

N = 40


def taught() -> attent.Teacher:
    teacher = attent.Teacher(N, total_epochs=4, ratio=0.5)
    sampler = teacher.sampler(batch_size=5)
    for _ in range(2):
        for batch in sampler:
            teacher.record(torch.tensor(batch), torch.rand(5))
    return teacher


def test_a_file_holds_the_state(tmp_path: Path) -> None:
    state = taught().state_dict()
    write_state(state, tmp_path / "teacher.pt")
    again = attent.Teacher(N, total_epochs=4, ratio=0.5)
    assert str(read_state(again, tmp_path / "teacher.pt")) == str(state)
    assert str(again.state_dict()["harvest"]) == str(state["harvest"])


def test_a_file_cut_off_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    write_state(taught().state_dict(), path)
    whole = path.read_bytes()
    for length in [0, 1, len(whole) - 1, *random.sample(range(len(whole)), 30)]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"^checkpoint: got .*teacher\.pt, which is torn"):
            read_state(attent.Teacher(N, total_epochs=4, ratio=0.5), path)


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    state = taught().state_dict()
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # a user's setting: ours are written all the same, and theirs stays
    try:
        write_state(state, path)
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(before)
    whole, refused = path.read_bytes(), 0
    places = random.sample(range(len(whole)), 200)
    for place in places:
        garbled = bytearray(whole)
        garbled[place] ^= 1 << random.randrange(8)
        path.write_bytes(garbled)
        try:
            assert str(read_file(path)) == str(state), place
        except ValueError as error:
            assert str(error).startswith("checkpoint: got ")
            refused += 1
    assert refused > len(places) / 2  # the rest is padding, and what is written twice


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "ran",))  # type: ignore[return-value]

    torch.save({"version": Evil()}, tmp_path / "teacher.pt")
    with pytest.raises(ValueError, match=r"^checkpoint: got "):
        read_state(attent.Teacher(N, total_epochs=4), tmp_path / "teacher.pt")
    assert not (tmp_path / "ran").exists()


def test_a_log_cut_off_anywhere_keeps_all_whole_lines_and_goes_on(tmp_path: Path) -> None:
    teacher = taught()
    log = TeachingLog(tmp_path, teacher)
    for step in range(1, 6):
        log.metric("Verlust, größter", step / 10, step)  # a letter may be cut in two as well
    whole = (tmp_path / FILE).read_bytes()
    first = whole.index(b"\n") + 1
    for length in [first, len(whole), *random.sample(range(first, len(whole)), 40)]:
        (tmp_path / FILE).write_bytes(whole[:length])
        kept = whole[:length].count(b"\n") + (whole[length - 1 : length + 1] in (b"}\n",)) - 1
        TeachingLog(tmp_path, teacher, step=5).metric("Verlust, größter", 0.9, 6)
        metrics = [(event["step"], event["value"]) for event in read_log(tmp_path) if event["event"] == "metric"]
        assert metrics == [(step, step / 10) for step in range(1, kept + 1)] + [(6, 0.9)]
