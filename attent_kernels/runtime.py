"""What every launcher of a kernel needs: the device it runs on, and the memory it is lent for one launch.

A workspace is scratch memory and tickets. Eagerly it is cached per device and stream, where launches follow one
another: it grows and never shrinks. While a CUDA graph is captured it is fresh from the capture's own pool, zeroed by
a memset within the graph: a cached one could be grown, and so freed, while the graph still refers to it.

Scratch memory is not set. Tickets are 0 when a launch starts, and the kernel leaves them 0: whoever takes the last
ticket of a counter resets it. A launch that raises zeroes them from the host.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # the CUDA kernels do without
    triton = None

#: Whether kernels run in Triton's interpreter, on CPU tensors. Decided when they are decorated, that is: once.
INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)

#: Scratch tensors start at multiples of this: the widest access, and what Triton's specialisation looks for.
_ALIGNMENT = 256

_Key = tuple[torch.device, int]
_scratch: dict[_Key, Tensor] = {}  # uint8
_tickets: dict[_Key, Tensor] = {}  # int32


def compute_capability() -> int:
    """Of the device that the next launch goes to: 80, 90, 100, …; 0 in the interpreter."""
    return 0 if INTERPRETED else int(triton.runtime.driver.active.get_current_target().arch)


def processors(device: torch.device) -> int:
    """How many streaming multiprocessors ``device`` has; 4 in the interpreter, those of an H100 where there is none."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4 if INTERPRETED else 132


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make that the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@contextmanager
def workspace(
    device: torch.device, tickets: int, scratch: Sequence[tuple[int, torch.dtype]] = ()
) -> Iterator[tuple[Tensor, ...]]:
    """Lend ``tickets`` zeros and a tensor of each (length, dtype) in ``scratch``, for launches within this context.

    Yields:
        int32 ``[tickets]``, then one uninitialised tensor for each entry of ``scratch``.
    """
    ends, size = [], 0
    for length, dtype in scratch:
        size += -(-length * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        ends.append(size)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        counters = torch.zeros(tickets, dtype=torch.int32, device=device)
        memory = torch.empty(size, dtype=torch.uint8, device=device)
    else:
        counters, memory = _cached(device, tickets, size)
    parts = [
        memory[start : start + length * dtype.itemsize].view(dtype)
        for start, (length, dtype) in zip([0, *ends], scratch, strict=False)
    ]
    try:
        yield counters[:tickets], *parts
    except BaseException:
        counters.zero_()
        raise


def _cached(device: torch.device, tickets: int, size: int) -> tuple[Tensor, Tensor]:
    # What is one after the other on a GPU is a stream; in the interpreter it is a thread.
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else threading.get_ident())
    if key not in _tickets or _tickets[key].numel() < tickets:
        _tickets[key] = torch.zeros(_grown(tickets), dtype=torch.int32, device=device)
    if key not in _scratch or _scratch[key].numel() < size:
        _scratch[key] = torch.empty(_grown(size), dtype=torch.uint8, device=device)
    return _tickets[key], _scratch[key]


def _grown(size: int) -> int:
    """The next power of two, so that sizes that creep up do not allocate every time; 1 KiB at least."""
    return max(1024, 1 << max(0, size - 1).bit_length())


def poison_workspaces() -> None:
    """For tests: fill all cached scratch memory with bytes that are NaN as floats and impossible as indices."""
    for memory in _scratch.values():
        memory.fill_(0xFF)


def open_tickets() -> int:
    """For tests: how many tickets the launches so far have left above 0."""
    return sum(int(counters.count_nonzero()) for counters in _tickets.values() if not counters.is_meta)
