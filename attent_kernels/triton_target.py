"""What Triton compiles for: asked by kernels and their configurations, never by the CUDA C++ launchers."""

from __future__ import annotations

import triton

#: Whether kernels run in Triton's interpreter, on CPU tensors. Decided when they are decorated, that is: once.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


def compute_capability() -> int:
    """Of the device that the next launch goes to: 80, 90, 100, …; 0 in the interpreter."""
    return 0 if INTERPRETED else int(triton.runtime.driver.active.get_current_target().arch)
