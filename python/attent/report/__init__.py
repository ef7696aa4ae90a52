"""What a run taught: a log that trainers write, and the page that ``attent report`` makes of it."""

from __future__ import annotations

from .log import TeachingLog, read_log
from .page import report

__all__ = ["TeachingLog", "read_log", "report"]
