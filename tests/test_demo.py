"""attent demo: it reads what it says it reads, compares fairly, and says no more than its intervals allow."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from attent.cli import main
from attent.demo import arms, run, table
from attent.demo.arms import ATTENT, FULL, SAME_COMPUTE, Run
from attent.demo.data import CLASSES, FILES, SUBSET_FOLDER, load, read_idx
from attent.demo.intervals import Difference, mean, paired_difference, standard_deviation, t_quantile
from attent.demo.settings import Settings

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_folder(folder: Path, **replaced: bytes) -> Path:
    """A folder of 200 + 50 random images; ``replaced`` puts other gzipped contents in train_images, test_labels, ..."""
    generator = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for part, count in (("train", 200), ("test", 50)):
        images, labels = generator.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        for kind, name, array in zip(("images", "labels"), FILES[part], (images, labels), strict=True):
            content = gzip.compress(idx(array))
            (folder / name).write_bytes(replaced.get(f"{part}_{kind}", content))
    return folder


def small_part_of_the_subset(folder: Path) -> Path:
    """The first 200 + 100 shipped images as a folder of their own."""
    folder.mkdir()
    for part, count in (("train", 200), ("test", 100)):
        for name in FILES[part]:
            (folder / name).write_bytes(gzip.compress(idx(read_idx(SUBSET_FOLDER / name)[:count])))
    return folder


def a_run(
    arm: str, accuracy: float, seconds: float = 10.0, seed: int = 0, size: int = 64, teaching: float = 0.0
) -> Run:
    return Run(
        arm, seed, size, 100, seconds, teaching, accuracy, [(seconds, accuracy)], torch.zeros(20, dtype=torch.int64)
    )


# The images


def test_the_shipped_images_are_those_that_their_note_describes() -> None:
    note = (SUBSET_FOLDER / "ORIGIN.txt").read_text()
    for name in (*FILES["train"], *FILES["test"]):
        content = gzip.decompress((SUBSET_FOLDER / name).read_bytes())
        assert f"{hashlib.sha256(content).hexdigest()}  {name.removesuffix('.gz')}" in note
    assert sum(file.stat().st_size for file in SUBSET_FOLDER.iterdir()) <= 6_000_000
    images = load()
    assert torch.bincount(images.train_labels).tolist() == [1000] * len(CLASSES)
    assert torch.bincount(images.test_labels).tolist() == [200] * len(CLASSES)


def test_a_folder_is_read_whole_and_normalised(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    images = load(f"fashion-mnist:{folder}")
    raw = torch.from_numpy(read_idx(folder / FILES["train"][0]).astype(np.float32)) / 255
    assert images.train_images.shape == (200, 28, 28) and images.test_images.shape == (50, 28, 28)
    # images.pixels undoes the normalisation: two float32 operations each way on values up to 3, a few ulps of 3
    torch.testing.assert_close(images.pixels(torch.arange(200)), raw, rtol=0, atol=8 * 3 * 2**-24)


@pytest.mark.parametrize("source", ["mnist", "fashion-mnist", "fashion-mnist:", "fashion-mnist:/no/such/folder"])
def test_a_source_that_is_none_is_refused_by_name(source: str) -> None:
    with pytest.raises(ValueError, match="--data"):
        load(source)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data")
    (folder / FILES["test"][1]).unlink()
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz"):
        load(f"fashion-mnist:{folder}")


MALFORMED = {
    "not gzip": ("train_images", b"pixels", "gzipped"),
    "cut gzip": ("train_images", gzip.compress(idx(np.zeros((200, 28, 28))))[:-20], "gzipped"),
    "empty": ("test_labels", gzip.compress(b""), "idx file"),
    "floats": ("train_images", gzip.compress(b"\0\0\x0d\x01" + struct.pack(">I", 1) + b"\0" * 4), "idx file"),
    "cut header": ("train_labels", gzip.compress(b"\0\0\x08\x03\0\0"), "idx file"),
    "too few values": ("test_images", gzip.compress(idx(np.zeros((50, 28, 28)))[:-1]), "50 x 28 x 28"),
    "other size": ("train_images", gzip.compress(idx(np.zeros((200, 32, 32)))), r"\[N, 28, 28\]"),
    "no images": ("test_images", gzip.compress(idx(np.zeros((0, 28, 28)))), "N >= 1"),
    "too few labels": ("train_labels", gzip.compress(idx(np.zeros(199))), "a label for each image"),
    "an eleventh class": ("test_labels", gzip.compress(idx(np.arange(50) % 11)), "labels 0 to 9"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_by_name(tmp_path: Path, case: str) -> None:
    which, content, message = MALFORMED[case]
    folder = write_folder(tmp_path / "data", **{which: content})
    part, kind = which.split("_")
    with pytest.raises(ValueError, match=message) as refusal:
        load(f"fashion-mnist:{folder}")
    assert FILES[part][kind == "labels"] in str(refusal.value)


# The statistics


@pytest.mark.parametrize(
    ("degrees", "level", "published"),
    [  # tables of Student's distribution, as in Abramowitz and Stegun's table 26.10
        *[(1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (4, 0.95, 2.776), (5, 0.95, 2.571)],
        *[(9, 0.95, 2.262), (10, 0.95, 2.228), (29, 0.95, 2.045), (30, 0.95, 2.042), (120, 0.95, 1.980)],
        *[(1, 0.99, 63.657), (4, 0.90, 2.132), (10, 0.99, 3.169)],
    ],
)
def test_t_quantiles_are_the_published_ones(degrees: int, level: float, published: float) -> None:
    assert t_quantile(degrees, level) == pytest.approx(published, abs=5e-4)  # published to three decimals


def test_the_paired_interval_of_students_sleep_data_is_the_published_one() -> None:
    # Student, "The probable error of a mean", 1908; the interval as R prints it for t.test(paired = TRUE)
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = paired_difference(first, second)
    assert found.mean == pytest.approx(-1.58, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((-2.4598858, -0.7001142), abs=5e-8)


def test_one_pair_shows_nothing() -> None:
    found = paired_difference([9.0], [1.0])
    assert (found.mean, found.low, found.high) == (8.0, -math.inf, math.inf)
    assert found.sentence("a", "b") == "no difference shown"
    assert math.isnan(standard_deviation([1.0])) and mean([1.0]) == 1.0


@pytest.mark.parametrize(
    ("low", "high", "sentence"),
    [
        (0.1, 0.5, "attent is ahead of full data"),
        (-0.5, -0.1, "attent is behind full data"),
        (-0.1, 0.5, "no difference shown"),
        (0.0, 0.5, "no difference shown"),
        (-0.5, 0.0, "no difference shown"),
    ],
)
def test_a_difference_is_claimed_only_where_the_interval_leaves_zero_out(
    low: float, high: float, sentence: str
) -> None:
    assert Difference((low + high) / 2, low, high, 3).sentence(ATTENT, FULL) == sentence


# The comparison


def test_same_compute_pays_for_attents_steps_and_its_teaching_seconds() -> None:
    # 100 steps in 10 s, and 1 s of teaching: the time of 10 more steps
    assert arms.same_compute_steps(a_run(ATTENT, 90, seconds=11.0, teaching=1.0)) == 110
    assert arms.same_compute_steps(a_run(ATTENT, 90, seconds=10.0, teaching=0.0)) == 100


def test_the_learning_rate_warms_up_and_decays_to_zero_over_the_steps_of_the_run() -> None:
    rates = [arms.warmup_cosine(step, 200) for step in range(201)]
    warmup = round(arms.WARMUP_SHARE * 200)
    assert rates[:warmup] == sorted(rates[:warmup]) and rates[warmup] == 1
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True) and rates[200] == pytest.approx(0, abs=1e-15)


def test_each_arm_is_shown_at_its_better_batch_size_by_one_rule() -> None:
    accuracies = {FULL: {32: 80, 64: 82}, SAME_COMPUTE: {32: 79, 64: 79}, ATTENT: {32: 85, 64: 81}}
    runs = [
        a_run(arm, accuracy, seed=seed, size=size)
        for arm, by_size in accuracies.items()
        for size, accuracy in by_size.items()
        for seed in (0, 1)
    ]
    assert [row.batch_size for row in table.arm_results(runs)] == [64, 64, 32]


def test_saved_seconds_are_measured_against_the_full_arm() -> None:
    runs = [a_run(FULL, 90, seconds=30), a_run(SAME_COMPUTE, 88, seconds=12), a_run(ATTENT, 89, seconds=11, teaching=1)]
    rows = table.arm_results(runs)
    assert [row.saved_seconds for row in rows] == [0, 18, 19]
    text = table.table(rows)
    assert "attent" in text and "89.00" in text and "nan" not in text  # one seed has no standard deviation
    assert len({len(line) for line in text.splitlines()}) == 1


def test_full_data_is_trained_again_where_another_batch_size_left_it_with_less_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = [
        *[a_run(ATTENT, 85, seconds=12.0, size=32), a_run(ATTENT, 84, seconds=9.0, size=64)],
        *[a_run(SAME_COMPUTE, 80, seconds=12.0, size=32), a_run(SAME_COMPUTE, 82, seconds=9.0, size=64)],
    ]
    asked: list[int] = []

    def train(images: object, seed: int, size: int, steps: int, arm: str, step_done: object) -> Run:
        asked.append(steps)
        return a_run(arm, 83, seconds=12.0, size=size)

    monkeypatch.setattr(arms, "train_on_full_data", train)
    run._level(runs, load(), lambda: None, runs.append)
    assert asked == [134]  # 100 steps took 9 s; attent took 12 s
    assert [(r.batch_size, r.seconds) for r in runs if r.arm == SAME_COMPUTE] == [(32, 12.0), (64, 12.0)]

    asked.clear()
    run._level(runs, load(), lambda: None, runs.append)
    assert asked == []  # level already


def test_most_and_least_chosen_are_by_count_then_by_id() -> None:
    visits = torch.tensor([3, 9, 1, 9, 5, 1, *[4] * 30])
    most, least = table.most_and_least_chosen(visits)
    assert most[:3].tolist() == [1, 3, 4] and least[:3].tolist() == [2, 5, 0]


# The whole


def test_the_demo_ends_with_table_intervals_picture_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_part_of_the_subset(tmp_path / "data")
    out, json_file = tmp_path / "demo.png", tmp_path / "demo.json"
    before = torch.get_num_threads()
    arguments = (
        f"--data fashion-mnist:{folder} --seeds 2 --epochs 2 --ratio 0.5 --threads 1 --out {out} --json {json_file}"
    )
    assert main(["demo", *arguments.split()]) == 0
    assert torch.get_num_threads() == before

    text = capsys.readouterr().out
    assert all(head in text for head in ("accuracy %", "seconds", "examples trained on", "teaching s", "saved s"))
    assert out.read_bytes().startswith(PNG_SIGNATURE)
    found = json.loads(json_file.read_text())
    assert {run["arm"] for run in found["runs"]} == {FULL, SAME_COMPUTE, ATTENT}
    assert found["machine"]["torch_threads"] == 1 and found["settings"]["ratio"] == 0.5
    assert found["data"]["train_examples"] == 200 and set(found["versions"]) >= {"attent", "torch", "python"}
    for difference in found["differences"]:
        assert difference["low"] <= difference["mean"] <= difference["high"] and difference["pairs"] == 2
        assert f"{difference['first']} - {difference['second']}: {difference['mean']:+.2f} points" in text
        assert difference["sentence"] in text

    runs = {(run["arm"], run["seed"], run["batch_size"]): run for run in found["runs"]}
    assert len(runs) == 3 * 2 * 2
    for (arm, seed, size), one in runs.items():
        assert len(one["curve"]) == arms.EVALUATIONS and one["curve"][-1] == [one["seconds"], one["accuracy"]]
        if arm == ATTENT:
            # epochs of 200 and 100 examples: the last is not annealed, there are fewer than four
            assert one["examples"] == sum(n // size * size for n in (200, 100))
            assert 0 < one["teaching_seconds"] < one["seconds"]
            assert runs[SAME_COMPUTE, seed, size]["steps"] > one["steps"]
        if arm == FULL:
            assert one["examples"] == 2 * (200 // size * size)
    assert len(found["most_chosen"]) == len(found["least_chosen"]) == table.SHOWN
    assert found["most_chosen"][0]["times"] > found["least_chosen"][0]["times"]


def test_the_demo_teaches_in_one_pass_and_shows_what_the_forward_of_the_rest_took(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_part_of_the_subset(tmp_path / "data")
    out, json_file = tmp_path / "demo.png", tmp_path / "demo.json"
    arguments = f"--way one-pass --data fashion-mnist:{folder} --seeds 1 --epochs 2 --ratio 0.5 --out {out}"
    assert main(["demo", *arguments.split(), "--json", str(json_file)]) == 0
    text = capsys.readouterr().out
    assert "forward of the rest s" in text and "in pools of 64 and 128 images" in text
    found = json.loads(json_file.read_text())
    runs = {(run["arm"], run["batch_size"]): run for run in found["runs"]}
    for (arm, size), one in runs.items():
        if arm == ATTENT:
            # 200 images: an epoch in batches, and one in pools of twice as many, of which a batch is trained on
            assert one["steps"] == 200 // size + 200 // (2 * size) and one["examples"] == one["steps"] * size
            assert 0 < one["unchosen_seconds"] < one["seconds"] and 0 < one["teaching_seconds"] < one["seconds"]
            full = runs[FULL, size]
            taken = one["seconds"] / (full["seconds"] / full["steps"])
            # More where another batch size has left full data with less time than attent took.
            assert runs[SAME_COMPUTE, size]["steps"] >= taken - 0.5
        else:
            assert one["unchosen_seconds"] == 0


def test_pools_are_larger_than_batches_by_the_keep_ratio_in_the_epochs_that_are_not_full() -> None:
    assert arms.one_pass_sizes(1000, 32, 8, 0.25) == [32, 128, 128, 128, 128, 128, 128, 32]
    assert arms.same_seconds_steps(a_run(ATTENT, 90, seconds=5.0), a_run(FULL, 90, seconds=10.0)) == 50


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"seeds": 0}, "--seeds"),
        ({"epochs": 1}, "--epochs"),
        ({"ratio": 0.0}, "--ratio"),
        ({"ratio": 1.5}, "--ratio"),
        ({"ratio": float("nan")}, "--ratio"),
        ({"threads": 0}, "--threads"),
        ({"way": "two-pass"}, "--way"),
        ({"out": Path("demo.jpg")}, "--out"),
        ({"out": Path("no/such/folder/demo.png")}, "--out"),
        ({"json": Path("no/such/folder/demo.json")}, "--json"),
    ],
)
def test_a_wrong_setting_is_refused_before_any_training(setting: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Settings(**setting).check()  # type: ignore[arg-type]
