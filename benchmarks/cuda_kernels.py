"""What the CUDA kernels' machine code is meant to have: one row for each ``__global__`` function of csrc/cuda.

``every``: instructions that each instance has, on every architecture; ``some``: that at least one has; ``sm_90a``: that
each has there. The names are those of ``benchmarks.cuda_resources.COUNTED``. No kernel may have a stack. ``registers``:
of a thread on sm_90a when a kernel starts whose warps then pass some on (setmaxnreg); were they fewer, those that take
more would wait for ever.
"""

from __future__ import annotations

from typing import NamedTuple


class Kernel(NamedTuple):
    name: str  # of the __global__ function, without "_kernel"
    every: tuple[str, ...] = ()
    some: tuple[str, ...] = ()
    sm_90a: tuple[str, ...] = ()
    registers: int | None = None


KERNELS = (
    # Selection multiplies nothing; scores are read 16 bytes at a time where they are float32.
    Kernel("select_top_k"),
    Kernel("select_count", some=("16 bytes",)),
    Kernel("select_floor", some=("16 bytes",)),
    Kernel("select_write", some=("16 bytes",)),
    Kernel("select_outputs"),
    Kernel("portable_scorer", every=("HMMA", "LDSM", "LDGSTS")),
    # The tensor memory accelerator copies what LDGSTS copies elsewhere, and wgmma reads it where it lies.
    # 168 = (256 × 240 + 128 × 24) / 384 = (256 × 224 + 128 × 56) / 384.
    Kernel("hopper_scorer", sm_90a=("HGMMA", "UTMALDG", "USETMAXREG"), registers=168),
    Kernel("hopper_attention", sm_90a=("HGMMA", "UTMALDG", "USETMAXREG", "16 bytes"), registers=168),
    Kernel("scored_attention", every=("HMMA", "LDSM", "LDGSTS", "16 bytes")),
)
