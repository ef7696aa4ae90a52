"""What the forward kernel compiles to, beside its resources (test_resources.py)."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks.resource_cases import HARD, attention_problem, triton


@pytest.mark.aot
@pytest.mark.parametrize("width", [64, 72])
def test_rows_that_start_at_multiples_of_16_bytes_are_loaded_so(width: int) -> None:
    """Also where a head dimension is a multiple of 8 and not of 16, which Triton does not see by itself."""
    from benchmarks.ahead_of_time import compiled_for

    with compiled_for(90) as found:
        triton("scored_attention")(attention_problem(width, torch.bfloat16), HARD._replace(top_k=None))
    (kernel,) = found
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, 0x([0-9a-f]+)", kernel.ptx)
    assert sizes and set(sizes) == {"10"}
    assert re.search(r"ld\.global(\.\w+)*\.b16\b", kernel.ptx) is None
