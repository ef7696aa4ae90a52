"""The report's page and pictures: whole, legible to any eyes and to those who have none, in need of nothing else."""

from __future__ import annotations

import base64
import importlib.util
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import attent
from attent.cli import main
from attent.report import TeachingLog, report
from attent.report.charts import Axis, Bars, Columns, Histograms, Lines
from attent.report.figures import MOST_BARS, charts_of
from attent.report.log import read_log
from attent.report.palette import DARK, LIGHT
from attent.report.pictures import as_data_uri
from attent.report.png import write_pngs
from attent.report.svg import svg
from tests.test_report import N, taught


class Page(HTMLParser):
    """The elements of a page, each with what is around it; closed tags are held against the open ones."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> does not close itself in HTML"
        self.elements.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[tuple[dict[str, str | None], tuple[str, ...]]]:
        return [(attributes, around) for name, attributes, around in self.elements if name == tag]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A page of a run compared with another, and one of a run that has just begun."""
    folder = tmp_path_factory.mktemp("runs")
    taught(folder / "run")
    taught(folder / "other", noisy=8)
    TeachingLog(folder / "new", attent.Teacher(4, total_epochs=2))
    compared = report(folder / "run", compare=[folder / "other"]).read_text(encoding="utf-8")
    return {"compared": compared, "new": report(folder / "new").read_text(encoding="utf-8")}


@pytest.mark.parametrize("name", ["compared", "new"])
def test_a_page_is_well_formed_and_refers_to_nothing_outside(pages: dict[str, str], name: str) -> None:
    text = pages[name]
    page = Page(text)
    assert page.open == [] and text.startswith("<!DOCTYPE html>")
    assert [attributes["lang"] for attributes, _ in page.all("html")] == ["en"]
    assert len(page.all("title")) == 1 + len([1 for _, around in page.all("title") if "svg" in around])
    assert not re.search(r"https?:|<script|<link|@import|url\(|\bon\w+=", text)
    addresses = [a[key] for _, a, _ in page.elements for key in ("src", "href", "srcset", "data") if key in a]
    assert all(address is not None and address.startswith("data:image/png;base64,") for address in addresses)
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not re.search(r"\bnan\b|\binf\b", text, re.IGNORECASE)


def test_headings_are_in_order_and_every_part_has_one(pages: dict[str, str]) -> None:
    page = Page(pages["compared"])
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(page.all("figcaption")) == len(page.all("figure")) == 7


def test_every_figure_says_in_words_what_it_shows_and_has_its_numbers_as_a_table(pages: dict[str, str]) -> None:
    page = Page(pages["compared"])
    drawn = [a for a, around in page.all("svg") if "ul" not in around]
    assert len(drawn) == 7
    for attributes in drawn:
        assert attributes["role"] == "img" and re.search(r"\d", attributes["aria-label"] or "")
    assert all(a.get("aria-hidden") == "true" for a, around in page.all("svg") if "ul" in around)
    assert len([1 for _, around in page.all("table") if "figure" in around]) == 7
    assert all(attributes["scope"] == "col" for attributes, _ in page.all("th"))


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_curves_stand_out_from_what_is_behind_them(colours: dict[str, str]) -> None:
    for behind in ("page", "card"):
        assert contrast(colours["ink"], colours[behind]) >= 7
        assert contrast(colours["soft"], colours[behind]) >= 4.5
    assert all(contrast(colours[f"s{i}"], colours["card"]) >= 3 for i in range(6))


# Red-green and blue-yellow blindness, complete, on linear RGB: Machado, Oliveira and Fernandes 2009, "A
# Physiologically-based Model for Simulation of Color Vision Deficiency", severity 1.
BLIND = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}


def seen(colour: str, eyes: str) -> torch.Tensor:
    """CIE L*a*b* of a colour as such eyes see it."""
    srgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)], dtype=torch.float64)
    linear = torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear = (torch.tensor(BLIND[eyes], dtype=torch.float64) @ linear).clamp(0, 1)
    to_xyz = torch.tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]],
        dtype=torch.float64,
    )
    xyz = to_xyz @ linear / torch.tensor([0.95047, 1.0, 1.08883], dtype=torch.float64)
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-9) ** (1 / 3), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("eyes", list(BLIND))
@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_the_three_colours_of_a_chart_differ_to_colour_blind_eyes(colours: dict[str, str], eyes: str) -> None:
    # Areas have up to three colours (curves have dashes and markers too). 10 units of L*a*b* are some four of the
    # differences that trained eyes just see (2.3).
    labs = [seen(colours[f"s{i}"], eyes) for i in range(3)]
    assert min(float((labs[a] - labs[b]).norm()) for a, b in ((0, 1), (0, 2), (1, 2))) >= 10


def test_seconds_of_epochs_add_up_to_the_run(tmp_path: Path) -> None:
    taught(tmp_path)
    events = read_log(tmp_path)
    lessons = [event for event in events if event["event"] == "lesson"]
    for lesson, spent, teaching, saved in zip(lessons, range(10, 70, 10), range(1, 7), range(0, 30, 5), strict=True):
        lesson.update(seconds=float(spent), teaching_seconds=float(teaching), saved_seconds=float(saved))
    chart = next(chart for chart in charts_of("run", events) if chart.name == "seconds")
    assert isinstance(chart, Columns)
    assert dict(chart.series) == {"training": [9.0] * 6, "teaching": [1.0] * 6, "saved (estimated)": [0.0] + [5.0] * 5}


def test_of_many_classes_the_most_and_the_least_chosen_are_drawn(tmp_path: Path) -> None:
    teacher = attent.Teacher(300, total_epochs=4, ratio=0.5, temperature=0, floor=0)
    sampler, log = teacher.sampler(batch_size=10), TeachingLog(tmp_path, teacher)
    for step in range(2):
        for batch in sampler:
            teacher.record(torch.tensor(batch), 1 + torch.tensor(batch, dtype=torch.float32))
        log.lesson(step, groups=torch.arange(300) // 5)
    chart = next(chart for chart in charts_of("run", read_log(tmp_path)) if chart.name == "coverage_by_class")
    assert isinstance(chart, Bars) and len(chart.labels) == MOST_BARS and "of 60" in chart.note
    half = MOST_BARS // 2
    assert set(chart.values[:half]) == {1.0} and set(chart.values[half:]) == {0.0}
    assert chart.line_at == 0.5 and chart.counts == [5] * MOST_BARS


def test_logarithmic_axes_have_round_ticks_in_their_range() -> None:
    assert Axis(0.001, 50, 0, 1, logarithmic=True).ticks() == pytest.approx([0.001, 0.01, 0.1, 1, 10])
    assert Axis(0.7, 1.0, 0, 1, logarithmic=True).ticks() == pytest.approx([0.7, 0.8, 0.9, 1.0])
    assert Axis(0.7, 1.0, 0, 10, logarithmic=True)(0.7) == 0
    assert Axis(1e-6, 1e3, 0, 9, logarithmic=True)(1.0) == pytest.approx(6)


def test_charts_of_one_point_are_drawn() -> None:
    alone: list[Lines | Columns | Bars | Histograms] = [
        Lines("a", "A", "", "s", "y", [("run", [(1.0, 2.0)])]),
        Columns("b", "B", "", "epoch", "y", ["0"], [("new", [0.0])]),
        Bars("c", "C", "", "share", "class", ["x"], [0.0], [3], 0.0),
        Histograms("d", "D", "", "epoch", "score", ["0"], [1.0, 1.06], [[1.0]], [1.03]),
    ]
    for chart in alone:
        assert "nan" not in svg(chart) and chart.table()[1] and chart.description()


# ------------------------------------------------------------------------------------------------------------- pictures


def test_examples_come_with_their_class_and_their_picture(tmp_path: Path) -> None:
    teacher = attent.Teacher(6, total_epochs=3, ratio=0.5)
    log = TeachingLog(tmp_path, teacher, group_names=["cat", "dog"], picture=lambda i: torch.full((100, 50), i / 6))
    list(teacher.sampler())
    teacher.record(torch.arange(4), torch.ones(4))
    log.lesson(4, groups=torch.arange(6) % 2)
    first = read_log(tmp_path)[-1]["never_seen"]["first"]
    assert [(example["id"], example["group"]) for example in first] == [(4, 0), (5, 1)]
    text = report(tmp_path).read_text(encoding="utf-8")
    pictures = Page(text).all("img")
    assert [attributes["alt"] for attributes, _ in pictures] == ["example 4", "example 5"]
    assert "<b>dog</b>#5, –" in text


def test_a_picture_is_a_png_of_its_pixels(tmp_path: Path) -> None:
    image_of = pytest.importorskip("matplotlib.image")
    colours = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    for image in (colours, colours[0], colours[:1], colours / 255):
        content = base64.b64decode(as_data_uri(image).partition(",")[2])
        (tmp_path / "picture.png").write_bytes(content)
        read = torch.from_numpy(image_of.imread(tmp_path / "picture.png")) * 255  # [H, W] or [H, W, 3]
        expected = colours.permute(1, 2, 0).float() if image.dim() == 3 and len(image) == 3 else colours[0].float()
        assert torch.allclose(read, expected, atol=0.5)
    large = base64.b64decode(as_data_uri(torch.rand(3, 640, 320)).partition(",")[2])
    assert large[16:24] == (32).to_bytes(4, "big") + (64).to_bytes(4, "big")  # width, height


@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.zeros(4, 5, 5), torch.zeros(0, 5), None])
def test_what_is_no_picture_is_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"^picture: got "):
        as_data_uri(wrong)


@pytest.mark.slow
def test_pngs_are_written_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_of = pytest.importorskip("matplotlib.image")
    taught(tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "--png", str(tmp_path / "pngs")]) == 0
    names = {file.stem for file in (tmp_path / "pngs").iterdir()}
    assert names == {"metric_eval_accuracy", "seconds", "keep_ratio", "scores", "turnover", "coverage_by_class",
                     "coverage_by_length"}  # fmt: skip
    for file in (tmp_path / "pngs").iterdir():
        pixels = image_of.imread(file)
        assert pixels.shape[1] == 1024 and float(pixels[..., :3].std()) > 0.05  # something is drawn
    assert main(["report", str(tmp_path / "run"), "--png"]) == 0
    assert (tmp_path / "run" / "scores.png").is_file()


def test_a_chart_is_drawn_as_a_png_that_says_in_words_what_it_shows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    chart = Lines("a", "A", "", "seconds", "accuracy", [("run", [(1.0, 0.5), (2.0, 0.75)])])
    (file,) = write_pngs([chart], tmp_path / "pngs")
    assert file == tmp_path / "pngs" / "a.png"
    with image.open(file) as read:
        assert read.size == (1024, 608) and read.info["Description"] == chart.description()


def test_pngs_without_matplotlib_are_refused_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taught(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["report", str(tmp_path), "--png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 0  # the page needs none of it


def test_the_number_of_examples_is_the_runs(tmp_path: Path) -> None:
    taught(tmp_path)
    text = report(tmp_path).read_text(encoding="utf-8")
    # 60 + 4 · 30 + 60 of 6 · 60
    assert f"6 of 6 epochs over {N} examples trained on 67 %" in text and "(estimated)" in text
