"""Tickets: how the program that comes last, of those that work on one thing, knows that it is the last.

Every program stores its part, then takes a ticket. Whoever draws the highest finds all the others' parts in memory,
folds them in a fixed order and resets the counter, so that a launch can be repeated or replayed in a CUDA graph. Nobody
waits for anybody: programs need not run at the same time.

Other programs' parts must be read past the L1 cache of this one's processor: ``tl.load(..., cache_modifier=".cg")``.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

#: A stress test's switch: each program waits for up to some 65 µs before it takes a ticket, so that any order of
#: arrival happens. Read once, when this module is imported.
DELAYED = tl.constexpr(os.environ.get("ATTENT_DELAY_TILES") == "1")


@triton.jit
def take_ticket(ticket_ptr, count):
    """Whether this program is the last of ``count`` to come here; all that they stored before is then visible to it.

    The atomic operation releases what its own thread stored, and acquires for it. Triton up to 3.8 puts no block
    barrier between tensor stores and a scalar atomic, so without this one the other threads' stores would be unordered
    with it: the last program could read stale parts.
    """
    if DELAYED:
        _wait_a_while()
    tl.debug_barrier()
    is_last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == count - 1
    if is_last:
        tl.store(ticket_ptr, 0)
    return is_last


@triton.jit
def _wait_a_while():
    tl.inline_asm_elementwise(
        "{ .reg .u32 t; mov.u32 t, %clock; and.b32 t, t, 0xffff; nanosleep.u32 t; mov.u32 $0, t; }",
        "=r",
        [],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
