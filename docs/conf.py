"""Sphinx builds these pages: `make docs`. Every warning is an error; nothing is fetched."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "python"), str(HERE.parent)]

import attent  # noqa: E402

project, author, copyright = "attent", "The attent authors", "2026, the attent authors"
version = release = attent.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"attent {version}"
html_static_path: list[str] = []
html_copy_source = False
pygments_style, pygments_dark_style = "default", "github-dark"

# The pages are read on code hosts too, so they are plain Markdown: no directives, links to files and headings.
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures stay legible; the docstrings say shapes, dtypes and units
autodoc_default_options = {"members": True}
napoleon_custom_sections = [("Source", "notes_style")]
napoleon_use_rtype = False

nitpicky = True
# What other projects document: their pages are not asked, since a build needs no network.
nitpick_ignore_regex = [("py:.*", r"(torch|nn|lightning|transformers|accelerate|numpy|collections|typing|pathlib)\b.*")]


def add_contents(app: Sphinx, name: str, source: list[str]) -> None:
    """The order of the pages in the side bar: a directive that a code host would show as it stands."""
    if name == "index":
        pages = "\n".join(
            [
                *(f"quickstart/{page}" for page in ("plain-loop", "transformers", "trl", "lightning")),
                *(f"quickstart/{page}" for page in ("accelerate", "torchrun")),
            ]
        )
        rest = "how-it-works\nchoosing\ntrainers\nreport\nscore-quality\nstudies\nperformance\nrobustness"
        for title, entries in (("Quickstarts", pages), ("Guides", rest), ("Reference", "api/index")):
            source[0] += f"\n\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{entries}\n```\n"


def escape_stars(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """``*args, **kwargs:`` in one line of "Args": napoleon escapes the first of the two alone."""
    lines[:] = [line.replace("*args, **kwargs:", r"\*args, \*\*kwargs:") for line in lines]


def setup(app: Sphinx) -> None:
    """What Sphinx asks of a configuration."""
    app.connect("autodoc-process-docstring", escape_stars, priority=400)  # before napoleon's 500
    app.connect("source-read", add_contents)
