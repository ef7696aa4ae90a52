"""The python in the pages of docs/ runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_house import ROOT, python_blocks

PAGES = sorted((ROOT / "docs").glob("*.md"))
NEEDS = {"trainers.md": ("transformers", "accelerate", "lightning")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_in_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in NEEDS.get(page.name, ()):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}  # one for the page, as the reader goes
    for number, block in enumerate(python_blocks(page.read_text(encoding="utf-8")), start=1):
        exec(compile(block, f"{page.name}, python block {number}", "exec"), namespace)
