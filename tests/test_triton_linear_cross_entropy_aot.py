"""What the kernels of linear cross-entropy compile to on GPUs that need not be there."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from attent_kernels.linear_cross_entropy import gram, rows, slabs
from benchmarks.ahead_of_time import CAPABILITIES, SHARED_LIMIT, compiled_for, unordered_tickets
from benchmarks.resources import COMPILE_SECONDS

pytestmark = pytest.mark.aot
CLASSES, WIDTH = 131072, 4096


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_rows_need_no_stack_and_read_16_bytes_at_a_time(capability: int) -> None:
    logits, of_row, label = meta(384, CLASSES), meta(384), meta(384, dtype=torch.int64)
    gradient = meta(384, CLASSES, dtype=torch.bfloat16)
    with compiled_for(capability) as found:
        rows.row_pass(logits, label, scale=of_row, upstream=of_row, want_squares=True, gradient=gradient)
        rows.row_pass(
            logits,
            label,
            bias=meta(CLASSES, dtype=torch.bfloat16),
            class_weight=meta(CLASSES),
            label_smoothing=0.1,
            softcap=30.0,
            scale=of_row,
            upstream=of_row,
            want_sums=True,
            want_squares=True,
            gradient=gradient,
        )
        slabs.slab_pass(
            meta(2048, 3072),
            meta(2048, dtype=torch.int64),
            meta(6, 2048),
            meta(2048, 3072, dtype=torch.bfloat16),
            first=0,
            softcap=30.0,
        )
    for kernel in found:
        assert kernel.stack == 0 and kernel.shared <= SHARED_LIMIT[capability] and kernel.seconds < COMPILE_SECONDS
        assert re.search(r"ld\.global\.(\w+\.)*v4\.\w*32", kernel.ptx)
        # The logarithm is the library's: lg2.approx has no digits of a small log(1 + x).
        assert "lg2.approx" not in kernel.ptx
    plain, with_all_options, slab = found
    for kernel in (plain, slab):  # three blocks a processor at least: the others read while one computes
        assert kernel.registers * 32 * kernel.warps * 3 <= 65536
    assert with_all_options.registers < 255


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_gram_tiles_are_multiplied_by_tensor_cores_without_atomics(capability: int, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and capability != 90:
        pytest.skip("one architecture says it: float32 is multiplied as float32")
    of_row, label = meta(2048), meta(2048, dtype=torch.int64)
    with compiled_for(capability) as found:
        sums = gram.Gram(meta(2048, dtype=torch.int32), 512, 3072)
        sums.empty = False
        sums.add(meta(2048, 3072, dtype=dtype), of_row)
        weight, bias = meta(CLASSES, WIDTH, dtype=dtype), meta(CLASSES, dtype=dtype)
        own = gram.Own(label, weight, bias, 30.0, of_row, of_row, of_row)
        sums.squares(meta(2048, WIDTH, dtype=dtype), of_row, True, own)
    assert [kernel.kernel for kernel in found] == ["gram_kernel", "finish_kernel"]
    for kernel in found:
        assert kernel.stack == 0 and kernel.shared <= SHARED_LIMIT[capability] and kernel.seconds < COMPILE_SECONDS
        assert kernel.has_mma == (dtype == torch.bfloat16)
        if capability == 90 and dtype == torch.bfloat16:
            assert kernel.has_wgmma
        assert not re.search(r"\b(atom|red)\.", kernel.ptx) and not unordered_tickets(kernel.ptx)
