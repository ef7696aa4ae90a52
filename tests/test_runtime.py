"""What launchers share: outputs on any device."""

from __future__ import annotations

import pytest
import torch

from attent_kernels import runtime


@pytest.mark.parametrize("device", ["cpu", "meta"])  # "meta" stands for a GPU that is not the current one
def test_outputs_are_allocated_as_asked(device: str) -> None:
    made = runtime.allocator(torch.device(device))((2, 3), (1, 2), torch.float16)
    assert (made.device.type, made.shape, made.stride(), made.dtype) == (device, (2, 3), (1, 2), torch.float16)
