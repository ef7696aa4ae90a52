"""Colours of the report: told apart by any eyes, on light and on dark pages.

Hues after Okabe and Ito (2008, "Color Universal Design"), darkened for white and lightened for black until each has a
contrast of 3:1 or more with what it lies on, as WCAG 2.2 asks of graphics; text has 4.5:1. Tests hold both. Curves
differ by dash and marker as well, and every chart's numbers are there as a table.
"""

from __future__ import annotations

#: page, card: backgrounds. ink, soft: text. line: rules and grids. s0 …: series, in their order.
LIGHT = {
    "page": "#f4f6f8", "card": "#ffffff", "ink": "#1b1f24", "soft": "#525b66", "line": "#dde2e7",
    "s0": "#0072b2", "s1": "#c75000", "s2": "#00805d", "s3": "#a8578a", "s4": "#8a6d00", "s5": "#4c4c4c",
}  # fmt: skip
DARK = {
    "page": "#111418", "card": "#1a1f25", "ink": "#e8ebef", "soft": "#a7b1bc", "line": "#353d46",
    "s0": "#56b4e9", "s1": "#f0883e", "s2": "#2ec49a", "s3": "#dd93c0", "s4": "#e6c34a", "s5": "#c3c8ce",
}  # fmt: skip
SERIES = 6
DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2", "1 4")
