"""What every launcher needs, without Triton: device and stream, outputs, and the memory that a launch is lent.

A workspace is scratch memory and tickets. Eagerly it is cached per device and stream, where launches follow one
another: it grows and never shrinks. While a CUDA graph is captured it is fresh from the capture's own pool, zeroed by
a memset within the graph: a cached one could be grown, and so freed, while the graph still refers to it.

Scratch memory is not set. Tickets are 0 when a launch starts, and the kernel leaves them 0: whoever takes the last
ticket of a counter resets it. A launch that raises zeroes them from the host.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

#: Scratch tensors start at multiples of this: the widest access, and what Triton's specialisation looks for.
_ALIGNMENT = 256

#: (shape, strides, dtype) -> a tensor whose values are not set.
Allocate = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]


# ------------------------------------------------------------------------------------------------------ device, stream


@functools.cache
def processors(device: torch.device) -> int:
    """How many streaming multiprocessors ``device`` has; 4 on a CPU, those of an H100 where there is no device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4 if device.type == "cpu" else 132


_HERE = nullcontext()


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device: make that the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


# Of a build of PyTorch with CUDA: the current stream's handle without the Stream that torch.cuda makes around it.
_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def current_stream(device: torch.device) -> int:
    """The handle of the stream that work on ``device`` goes to; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.current_stream(device).cuda_stream if _raw_stream is None else _raw_stream(device.index)


#: So many kinds of calls are remembered: packed batches have as many as they have lengths.
_MOST_REMEMBERED = 1024


def remember(kinds: dict[Hashable, Any], kind: Hashable, launch: Any) -> None:
    """Keep what was worked out for a kind of call; all are forgotten when there are too many."""
    if len(kinds) >= _MOST_REMEMBERED:
        kinds.clear()
    kinds[kind] = launch


# ------------------------------------------------------------------------------------------------------------- outputs

# What the code that torch.compile generates allocates with: straight to the allocator, half of torch.empty's time.
_guards: Any = getattr(torch._C._dynamo, "guards", None)
_on_cpu: Allocate | None = getattr(_guards, "_empty_strided_cpu", None)
_on_current_gpu: Allocate | None = getattr(_guards, "_empty_strided_cuda", None)


def allocator(device: torch.device) -> Allocate:
    """What makes outputs of launches on ``device``, each with memory of its own.

    Not parts of one allocation: a view costs what an allocation does, keeps all of it alive as long as one part is
    used, and an operator's outputs must not share memory.
    """
    fast = None
    if device.type == "cpu":
        fast = _on_cpu
    elif device.type == "cuda" and device.index == torch.cuda.current_device():
        fast = _on_current_gpu
    return _allocator_by_name(device) if fast is None else fast


def _allocator_by_name(device: torch.device) -> Allocate:
    def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    return empty


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor whose rows lie one after another."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


# ----------------------------------------------------------------------------------------------------------- workspaces


class Workspace:
    """Memory lent to the launches of one stream; as a context, to one launch. A larger one replaces it, unchanged.

    ``stream``, ``tickets`` and ``scratch`` are what a native launcher takes: a handle and addresses.
    """

    __slots__ = ("counters", "memory", "scratch", "scratch_bytes", "stream", "ticket_count", "tickets")

    def __init__(self, counters: Tensor, memory: Tensor, stream: int) -> None:
        self.counters, self.memory, self.stream = counters, memory, stream  # int32, uint8
        self.tickets, self.scratch = counters.data_ptr(), memory.data_ptr()
        self.ticket_count, self.scratch_bytes = counters.numel(), memory.numel()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.counters.zero_()


#: By device, and by what is one after the other there: a stream of a GPU, a thread of the interpreter.
_workspaces: dict[tuple[torch.device, int], Workspace] = {}


def lend(device: torch.device, tickets: int, scratch_bytes: int) -> Workspace:
    """A workspace of at least ``tickets`` zeros and ``scratch_bytes`` for a launch on the current stream."""
    stream = current_stream(device)
    if device.type != "cuda":
        key = device, threading.get_ident()
    elif torch.cuda.is_current_stream_capturing():
        return Workspace(_zeros(device, tickets), _memory(device, scratch_bytes), stream)
    else:
        key = device, stream
    lent = _workspaces.get(key)
    if lent is None or lent.ticket_count < tickets or lent.scratch_bytes < scratch_bytes:
        # What is too small is freed when its last user lets go, for work that this stream does later.
        enough = lent is not None and lent.ticket_count >= tickets
        counters = lent.counters if lent is not None and enough else _zeros(device, _grown(tickets))
        enough = lent is not None and lent.scratch_bytes >= scratch_bytes
        memory = lent.memory if lent is not None and enough else _memory(device, _grown(scratch_bytes))
        lent = _workspaces[key] = Workspace(counters, memory, stream)
    return lent


# Made within inference mode they could not be changed outside of it.
@torch.inference_mode(False)
def _zeros(device: torch.device, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


@torch.inference_mode(False)
def _memory(device: torch.device, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _grown(size: int) -> int:
    """The next power of two, so that sizes that creep up do not allocate every time; 1 KiB at least."""
    return max(1024, 1 << max(0, size - 1).bit_length())


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
    with lend(device, tickets, size) as lent:
        parts = [
            lent.memory[start : start + length * dtype.itemsize].view(dtype)
            for start, (length, dtype) in zip([0, *ends], scratch, strict=False)
        ]
        yield lent.counters[:tickets], *parts


def poison_workspaces() -> None:
    """For tests: fill all cached scratch memory with bytes that are NaN as floats and impossible as indices."""
    for lent in _workspaces.values():
        lent.memory.fill_(0xFF)


def open_tickets() -> int:
    """For tests: how many tickets the launches so far have left above 0."""
    return sum(int(lent.counters.count_nonzero()) for lent in _workspaces.values() if not lent.counters.is_meta)
