"""Top-k selection on its own, on a GPU: one launch for up to 16,384 scores, 3 to 10 for up to 2^31.

Launches beyond ``ONE_LAUNCH`` scores, by their dtype; nothing is read back, and no program waits for another:

                                                                            float32   bfloat16   float16
    digits of the scores, 8 bits each: 16-bit scores have fewer                   4          2         3
    or, above temperature 0, digits of the keys                                   4          4         4
    with a floor, digits of its noise                                           + 4        + 4       + 4
    writing the chosen; up to 4,096 of them, their sort and the outputs         + 1        + 1       + 1
    for more, the outputs, after one ``torch.sort`` of k unique int64           + 1        + 1       + 1

Memory: 8 bytes for each chosen (``torch.sort`` takes its own on top), 4 an example with noise, 5 with a floor.

Estimates, since none of this has run on a GPU yet. One program of 16 warps is bound by its instructions: 650 cycles
for 1,024 scores a pass, so 1.5 µs a thousand in four passes, 24 µs at 16,384. Five launches take about 12 µs there, but
keep the host busy for some 50 µs when nothing is queued, which is what decided. It sorts 1,024 keys in some 7 µs, 4,096
in some 40; then ``torch.sort``, about 35 µs and several launches, takes over. At n = 1M, k = 1,024: 5 launches that
read 4 MB each from the L2 cache, 3 to 4 µs each, and that sort: about 25 µs.

Why float32 takes 5 launches and not 4, each launch being 2 to 3 µs:

* Three digits of 11 bits: a histogram of 2,048 bins takes 550 instructions for 32 keys, one of 256 takes 75 (see
  ``selection_passes.py``). 1M keys on 528 schedulers: 3 × 18.6 µs instead of 4 × 2.5.
* The last digit counted and the chosen written in one launch: whoever comes last would alone sort out the keys that
  agree in their upper 24 bits. Of 1M different scores those are a few; where scores are all but equal they are all,
  300 cycles for 1,024: 170 µs. Nothing can be launched instead in that case, since nothing is read back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import selection_passes as passes
from .runtime import on_device_of, workspace
from .selection import MAX_IN_LAUNCH, scratch_length, select_in_block

#: Pools up to here take one launch.
ONE_LAUNCH = MAX_IN_LAUNCH
#: Of larger pools, up to so many chosen are sorted by the last program.
ONE_PROGRAM_SORT = 4096

_KEY_BITS = 32  # and one above them for invalid
_DIGIT = 8
#: The lowest key bit that differs among scores of a dtype: the others are bits that float32 has on top.
_LOWEST_BIT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}

# 128 registers a thread: without a number the compiler would rather spill than keep further programs off a processor.
# There are none beside one program, and no more than four beside those of a pass.
_ONE_PROGRAM = {"num_warps": 16, "maxnreg": 128}
_PASS = {"num_warps": 4, "maxnreg": 128}
_LAST_PASS = {"num_warps": 8, "maxnreg": 128}  # its last program may have a sort to do


def select_top_k(
    scores: Tensor, k: int, temperature: float, k_floor: int, valid: Tensor | None, seed: Tensor | None, sorted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose ``k`` of ``n`` examples: what ``attent.select_top_k`` defines.

    Args:
        scores: ``[n]`` float16, bfloat16 or float32, n < 2^31. Not contiguous: copied first.
        k: 0 <= k <= n.
        temperature: 0: by score; above: Gumbel top-k.
        k_floor: how many of the k are drawn uniformly.
        valid: ``[n]`` bool, or None.
        seed: int64 ``[1]``; None only where temperature and k_floor are 0.
        sorted: in the order of the scores, or of the indices.

    Returns:
        index int64 ``[k]``, score ``[k]`` like scores, inclusion float32 ``[k]``.
    """
    index = scores.new_empty(k, dtype=torch.int64)
    outputs = index, scores.new_empty(k), scores.new_empty(k, dtype=torch.float32)
    if k > 0:
        scores = scores.contiguous()
        flags = scores if valid is None else valid.contiguous().view(torch.int8)
        seed = index if seed is None else seed  # not read
        with on_device_of(scores):
            select = _in_one_launch if scores.numel() <= ONE_LAUNCH else _in_passes
            select(scores, k, temperature, k_floor, flags, seed, outputs,
                   valid is not None, temperature > 0, sorted)  # fmt: skip
    return outputs


def _in_one_launch(
    scores: Tensor, k: int, temperature: float, k_floor: int, flags: Tensor, seed: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor], has_valid: bool, gumbel: bool, sorted: bool,
) -> None:  # fmt: skip
    n = scores.numel()
    with workspace(scores.device, 0, [(scratch_length(n), torch.int64)]) as (_, scratch):
        _select_kernel[(1,)](
            scores, flags, n, k, k_floor, temperature, seed, *outputs, scratch,
            HAS_VALID=has_valid, GUMBEL=gumbel, FLOOR=k_floor > 0, SORTED=sorted, **_ONE_PROGRAM,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n", "k", "k_floor"])
def _select_kernel(
    score_ptr, valid_ptr, n, k, k_floor, temperature, seed_ptr, index_ptr, chosen_score_ptr, inclusion_ptr, scratch_ptr,
    HAS_VALID: tl.constexpr, GUMBEL: tl.constexpr, FLOOR: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    select_in_block(
        score_ptr, valid_ptr, n, k, k_floor, temperature, seed_ptr, index_ptr, chosen_score_ptr, inclusion_ptr,
        scratch_ptr, HAS_VALID, GUMBEL, FLOOR, SORTED,
    )  # fmt: skip


def _in_passes(
    scores: Tensor, k: int, temperature: float, k_floor: int, flags: Tensor, seed: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor], has_valid: bool, gumbel: bool, sorted: bool,
) -> None:  # fmt: skip
    n, k_first = scores.numel(), k - k_floor
    floor = k_floor > 0
    gumbel = gumbel and k_first > 0
    chunks = triton.cdiv(n, passes.CHUNK)
    span = triton.cdiv(chunks, passes.PROGRAMS) * passes.CHUNK
    grid = (triton.cdiv(n, span),)
    bins = 512 if has_valid else 256  # of the first digit, which has the invalid bit on top

    codes = scores.new_empty(n if gumbel or floor else 1, dtype=torch.int32)
    kinds = scores.new_empty(n if floor else 1, dtype=torch.int8)
    finish = k <= ONE_PROGRAM_SORT
    chosen = scores.new_empty(triton.next_power_of_2(k) if finish else k, dtype=torch.int64)
    scratch = [
        (passes.STATE, torch.int64),
        (grid[0] * bins, torch.int32),
        (3 * passes.MOST_PROGRAMS, torch.int32),
        (3 * passes.MOST_PROGRAMS, torch.int64),
    ]
    with workspace(scores.device, 1 + bins, scratch) as (tickets, state, rows, spans, slots):
        histogram, ticket = tickets[:bins], tickets[bins:]
        pool = scores, flags, codes, kinds, n, span

        def count(k: int, source: int, shifts: list[int], start: int) -> None:
            for i in range(start, len(shifts)):
                first = i == 0
                width = _KEY_BITS + has_valid - shifts[0] if first else shifts[i - 1] - shifts[i]
                later = passes.FROM_CODES if source == passes.WITH_NOISE else source
                passes.count_digit[grid](
                    *pool, k, shifts[i], width, temperature, seed, state, rows, spans, slots, histogram, ticket,
                    SOURCE=source if first else later, FIRST=first, LAST=i == len(shifts) - 1,
                    BINS=bins if first else 256, HAS_VALID=has_valid, **_PASS,
                )  # fmt: skip

        source, shifts = passes.FROM_SCORES, _shifts(_LOWEST_BIT[scores.dtype])
        if gumbel:
            source, shifts = passes.WITH_NOISE, _shifts(0)
        if k_first > 0:
            count(k_first, source, shifts, 0)
        source = passes.FROM_CODES if gumbel else source
        if floor:
            first_shift, shifts = shifts[-1], _shifts(0)
            passes.count_floor[grid](
                *pool, k_first, k_floor, shifts[0], _KEY_BITS + has_valid - shifts[0], first_shift, seed, state, rows,
                spans, slots, histogram, ticket, SOURCE=source, BINS=bins, HAS_VALID=has_valid,
                **_PASS,
            )  # fmt: skip
            source = passes.FROM_FLOOR
            count(k_floor, source, shifts, 1)
        passes.write_all[grid](
            *pool, k, k_first, k_floor, shifts[-1], temperature, state, spans, slots, ticket, chosen, *outputs,
            SOURCE=source, GUMBEL=gumbel, FLOOR=floor, FINISH=finish, SORTED=sorted,
            HAS_VALID=has_valid, **_LAST_PASS,
        )  # fmt: skip
        if not finish:
            chosen = chosen.sort().values if sorted else chosen
            passes.write_outputs[(triton.cdiv(k, passes.CHUNK),)](
                k, k_first, k_floor, scores, kinds, temperature, state, chosen, *outputs,
                GUMBEL=gumbel, FLOOR=floor, **_PASS,
            )  # fmt: skip


def _shifts(lowest_bit: int) -> list[int]:
    """Where the digits start, from the highest: 8 bits each, the last ones fewer, down to ``lowest_bit``."""
    shifts = [_KEY_BITS - _DIGIT]
    while shifts[-1] > lowest_bit:
        shifts.append(max(shifts[-1] - _DIGIT, lowest_bit))
    return shifts
