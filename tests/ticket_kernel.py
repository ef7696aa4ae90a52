"""The smallest kernel with a ticket: each program stores its part, the last one folds them.

``python -m tests.ticket_kernel CAPABILITY`` compiles it and prints the tickets that no barrier orders.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl

from attent_kernels.tickets import take_ticket
from benchmarks.ahead_of_time import compiled_for, unordered_tickets

PART = tl.constexpr(1024)


@triton.jit
def fold(x_ptr, part_ptr, sum_ptr, ticket_ptr, programs):
    """Parts of 1024 numbers, added up by the last program."""
    o = tl.arange(0, PART)
    tl.store(part_ptr + tl.program_id(0) * PART + o, tl.load(x_ptr + tl.program_id(0) * PART + o) * 2)
    if take_ticket(ticket_ptr, programs):
        b_sum = tl.zeros([PART], tl.float32)
        for i in range(programs):
            b_sum += tl.load(part_ptr + i * PART + o, cache_modifier=".cg")
        tl.store(sum_ptr + o, b_sum)


def unordered(capability: int) -> list[str]:
    floats = [torch.empty(4 * PART.value, device="meta") for _ in range(3)]
    with compiled_for(capability) as found:
        fold[(4,)](*floats, torch.empty(1, dtype=torch.int32, device="meta"), 4)
    return unordered_tickets(found[0].ptx)


if __name__ == "__main__":
    print("\n".join(unordered(int(sys.argv[1]))))
