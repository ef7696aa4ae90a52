"""The pages of docs/: their python runs, their links lead somewhere, their figures are what their script draws."""

from __future__ import annotations

import importlib.util
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from tests.test_house import ROOT, python_blocks

DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
NEEDS = {
    "trainers": ("transformers", "accelerate", "lightning"),
    "quickstart/transformers": ("transformers", "accelerate"),
    "quickstart/trl": ("trl", "accelerate"),
    "quickstart/lightning": ("lightning",),
    "quickstart/accelerate": ("accelerate",),
}


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS).with_suffix(""))


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page.read_text("utf-8"))], ids=name_of)
def test_the_python_in_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in NEEDS.get(name_of(page), ()):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}  # one for the page, as the reader goes
    for number, block in enumerate(python_blocks(page.read_text(encoding="utf-8")), start=1):
        exec(compile(block, f"{page.name}, python block {number}", "exec"), namespace)


def anchors(page: Path) -> set[str]:
    """What a page's headings are called in links, on code hosts and in the built pages."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = page if not file else (page.parent / file).resolve()
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert broken == []


def test_every_picture_of_a_page_is_described() -> None:
    pictures = [match for page in PAGES for match in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text("utf-8"))]
    assert len(pictures) >= 6 and all(len(description) > 20 for description, _ in pictures)


# -------------------------------------------------------------------------------------------------------------- figures


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_docs_figures", ROOT / "tools" / "draw_docs_figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("figure", ["lessons", "costs"])
def test_the_figures_are_what_their_script_draws(script: ModuleType, figure: str) -> None:
    assert getattr(script, figure)() == (DOCS / "images" / f"{figure}.svg").read_text(encoding="utf-8")


def test_figures_stand_on_their_own(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Balanced(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.open.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    monkeypatch.setattr(sys, "argv", ["draw", str(tmp_path)])
    script.main()
    for file in (*tmp_path.iterdir(), *(DOCS / "images").glob("*.svg")):
        text = file.read_text(encoding="utf-8")
        reader = Balanced()
        reader.feed(text)
        assert reader.open == [] and "prefers-color-scheme:dark" in text and 'role="img" aria-label="' in text
        assert set(re.findall(r"https?:[^\"]+", text)) == {"http://www.w3.org/2000/svg"}
