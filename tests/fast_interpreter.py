"""Triton's interpreter, without what it does again for every call of a device function: that is half of its time.

It patches ``triton.language`` when a kernel starts, and once more, to the same effect, for each function called from
it. (Triton's own functions name the language differently: theirs are patched as ever.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from triton.runtime.interpreter import InterpretedFunction


@pytest.fixture(scope="module", autouse=True)
def fast_interpreter() -> Iterator[None]:
    """To be imported by test modules that interpret kernels row by row."""

    usual = InterpretedFunction.__call__

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self.fn.__module__.startswith("triton."):
            return usual(self, *arguments, **keywords)
        return self.rewrite()(*arguments, **keywords)

    with mock.patch.object(InterpretedFunction, "__call__", call):
        yield
