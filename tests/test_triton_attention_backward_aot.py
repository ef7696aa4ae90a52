"""What the Triton backward compiles to for GPUs that need not be there: no spills, shared memory, tensor cores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attent_kernels.attention import backward


def compiled(capability: int, dtype: torch.dtype, width: int, rows: int = 1024, **options: Any) -> list[Any]:
    """What a call with 8 query heads on 4 key heads, 1,024 keys, would launch; the preparation left out."""
    from attent_kernels.attention.records import Attention
    from benchmarks.ahead_of_time import compiled_for

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query = empty(2, rows, 8, width).transpose(1, 2)
    key, value = empty(2, 1024, 4, width).transpose(1, 2), empty(2, 1024, 4, width).transpose(1, 2)
    plain: dict[str, Any] = dict.fromkeys(Attention._fields[3:7]) | {"is_causal": True, "scale": 0.1, "softcap": None}
    attention = Attention(query, key, value, **(plain | {"window_left": -1, "window_right": -1} | options))
    into = backward.Into(*(torch.empty_like(x) for x in (query, key, value)))
    to = backward.ToOutput(torch.empty_like(query), None, None, None, "mean")
    logsumexp = empty(2, 8, rows, dtype=torch.float32)
    with compiled_for(capability) as found:
        backward.attention_backward(attention, torch.empty_like(query), logsumexp, to, into, only_pooled_row=False)
    assert [kernel.kernel for kernel in found] == ["prepare", "key_value_gradients", "query_gradient"]
    return found


def check_resources(found: list[Any]) -> None:
    from benchmarks.ahead_of_time import SHARED_LIMIT

    for kernel in found:
        assert kernel.stack == 0, kernel._replace(ptx="")
        assert kernel.shared <= SHARED_LIMIT[kernel.capability], kernel._replace(ptx="")


@pytest.mark.aot
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("width", [64, 128])
def test_compiles_without_spills_to_tensor_core_products(capability: int, width: int) -> None:
    prepared, *found = compiled(capability, torch.bfloat16, width)
    check_resources([prepared, *found])
    assert all(kernel.has_wgmma if capability == 90 else kernel.has_mma for kernel in found)
    assert all("cp.async.cg.shared.global" in kernel.ptx for kernel in found)  # 16 bytes at a time, in flight


HARD = {"softcap": 5.0, "window_left": 100, "window_right": 7, "is_causal": False}


@pytest.mark.aot
@pytest.mark.parametrize(
    ("capability", "dtype", "width", "rows"),
    [
        (80, torch.bfloat16, 128, 1024),
        (80, torch.bfloat16, 96, 1024),
        (90, torch.bfloat16, 48, 1024),
        (90, torch.bfloat16, 96, 1024),
        (80, torch.float16, 256, 1024),
        (90, torch.bfloat16, 128, 1),
        (80, torch.float32, 64, 1024),
        (80, torch.float32, 256, 1024),
    ],
    ids=str,
)
def test_compiles_without_spills_with_every_option(capability: int, dtype: torch.dtype, width: int, rows: int) -> None:
    check_resources(compiled(capability, dtype, width, rows, **HARD))
