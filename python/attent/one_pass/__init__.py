"""One-pass teaching: forward the pool once, backward through the chosen rows only."""

from .errors import OnePassError
from .report import OnePassReport
from .step import OnePass

__all__ = ["OnePass", "OnePassError", "OnePassReport"]
