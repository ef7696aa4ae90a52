"""The report in a real browser, where there is one: nothing sticks out, letters are legible, dark is dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest

from attent.report import report
from tests.test_report import taught

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to render the page in")

# The page in a frame as wide as the screen in question (a window has a least width), and what the frame then measures.
# Letters in a chart shrink and grow with it. Text of 0 × 0 is hidden, in a closed <details>.
MEASURE = """<body style="margin:0"><iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe>
<script>addEventListener("load", () => {{
  const frame = document.querySelector("iframe"), page = frame.contentDocument, view = frame.contentWindow
  const shown = [...page.querySelectorAll("text,p,td,th,dd,dt,h1,h2,h3,li,summary")]
    .filter(e => e.getBoundingClientRect().width > 0)
  const size = e => parseFloat(view.getComputedStyle(e).fontSize) *
    (e.closest("figure > svg") ? e.closest("svg").getBoundingClientRect().width / 400 : 1)
  const out = document.createElement("pre")
  out.textContent = JSON.stringify({{
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    columns: new Set([...page.querySelectorAll("figure")]
      .map(e => Math.round(e.getBoundingClientRect().left))).size,
    smallest: Math.min(...shown.map(size)), count: shown.length,
    outside: [...page.querySelectorAll("figure > svg text")].filter(e => {{
      const box = e.getBoundingClientRect(), around = e.closest("svg").getBoundingClientRect()
      return box.left < around.left - 1 || box.right > around.right + 1 || box.bottom > around.bottom + 1
    }}).map(e => e.textContent), background: view.getComputedStyle(page.body).backgroundColor,
    quirks: page.compatMode,
  }})
  document.body.append(out)
}})</script>"""


def measured(page: str, width: int, tmp_path: Path, *options: str) -> dict[str, object]:
    assert BROWSER is not None
    file = tmp_path / "frame.html"
    file.write_text(MEASURE.format(width=width, page=escape(page, quote=True)), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
        *options, "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    page = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(r"<pre>(.*?)</pre>", page)
    assert found is not None, page[:500]
    values: dict[str, object] = json.loads(found.group(1))
    return values


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    taught(folder / "run")
    taught(folder / "a-run-with-quite-a-long-name-to-compare-with")
    return report(folder / "run", compare=[folder / "a-run-with-quite-a-long-name-to-compare-with"]).read_text("utf-8")


@pytest.mark.parametrize(("width", "columns"), [(400, 1), (800, 2), (1200, 3)])
def test_nothing_sticks_out_and_letters_are_legible(page: str, tmp_path: Path, width: int, columns: int) -> None:
    found = measured(page, width, tmp_path)
    assert found["quirks"] == "CSS1Compat" and int(str(found["count"])) > 100
    assert found["overflow"] == 0 and found["outside"] == []
    assert found["columns"] == columns
    # The small print around the charts has 13 pixels; 10 is what a chart on a telephone may shrink its letters to.
    assert float(str(found["smallest"])) >= 10


def test_the_page_is_dark_for_those_who_prefer_it(page: str, tmp_path: Path) -> None:
    light = measured(page, 400, tmp_path)
    dark = measured(page, 400, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert (light["background"], dark["background"]) == ("rgb(244, 246, 248)", "rgb(17, 20, 24)")
