"""Top-k of a pool that is too large for one program: passes that all programs share, one launch each.

A key is 33 bits: 1 for invalid, 32 for the code of a value (``ranks.py``); equal keys are taken in index order. Each
program owns a span of adjacent examples. A pass counts one digit of the keys that match the digits found so far. Each
program adds its histogram to the pool's, which integers allow in any order, and the last one to come finds the digit of
the k-th smallest key. From the programs' own histograms it learns as well how many each span holds below the k-th key
and how many equal to it. So the write pass knows where in index order each program's chosen examples go, and which of
those equal to the k-th are among them. Programs never wait for each other.

A histogram of 256 bins takes about 75 instructions for 32 keys, of 2,048 bins 550: four passes of 8 bits (9 in the
first, with the invalid bit) cost a fifth of three passes of 11, and one launch more. Bytes: each pass reads 4 an
example and 1 of validity; with noise the first one writes 4, with a floor 5 are written once more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .block_sort import sort_in_memory
from .ranks import (
    LAST_RANK,
    descending_code,
    floor_code,
    gumbel,
    index_of_rank,
    log_weight,
    random_bits,
    rank_of,
    value_of_code,
)
from .selection import load_example, write_chosen
from .tickets import take_ticket

#: Examples that a program looks at at a time; a span is a multiple.
CHUNK = 1024
#: Programs at most: 4 for each of the 132 processors of an H100 or H200; at most MOST_PROGRAMS, a power of two.
PROGRAMS = 528
MOST_PROGRAMS = 1024
#: int64 elements that passes leave for later ones, as named below.
STATE = 6

_CHUNK = tl.constexpr(CHUNK)
_PROGRAMS = tl.constexpr(MOST_PROGRAMS)

# The state: of the choice by key, and of the floor's, the k-th key (its digits so far) and how many equal to it are
# taken.
_FIRST_KEY = tl.constexpr(0)
_FLOOR_KEY = tl.constexpr(2)
_N_VALID = tl.constexpr(4)
_RUNNER_UP = tl.constexpr(5)  # the smallest key that is not taken

# Where keys come from: the scores; the scores, with noise, and stored; as stored by such a pass, or by the floor's.
FROM_SCORES = tl.constexpr(0)
WITH_NOISE = tl.constexpr(1)
FROM_CODES = tl.constexpr(2)
FROM_FLOOR = tl.constexpr(3)

# What the floor's first pass notes of each example.
_VALID = tl.constexpr(0)
_INVALID = tl.constexpr(1)
_TAKEN = tl.constexpr(2)

_INT32_MIN = tl.constexpr(-(2**31))


@triton.jit(do_not_specialize=["k", "shift", "width"])
def count_digit(
    score_ptr, valid_ptr, code_ptr, kind_ptr, n, span, k, shift, width, temperature, seed_ptr,
    state_ptr,  # int64 [STATE]
    row_ptr,  # int32 [programs, BINS]: each program's histogram, summed up
    spans_ptr,  # int32 [3, _PROGRAMS], of each span: examples below the k-th key; places, and equal keys, before it
    slot_ptr,  # int64 [programs]: what each program leaves for the last
    histogram_ptr,  # int32 [BINS], zeros, and left so
    ticket_ptr,
    SOURCE: tl.constexpr, HAS_VALID: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Count ``width`` bits of the keys from bit ``shift`` on, and add the digit of the ``k``-th to the state."""
    STATE_AT: tl.constexpr = _FLOOR_KEY if SOURCE == FROM_FLOOR else _FIRST_KEY
    program = tl.program_id(0)
    prefix, left = tl.zeros((), tl.int64), tl.cast(k, tl.int32)
    if not FIRST:
        prefix, left = tl.load(state_ptr + STATE_AT), tl.load(state_ptr + STATE_AT + 1).to(tl.int32)
    seed = tl.load(seed_ptr) if SOURCE == WITH_NOISE else 0
    counts = tl.zeros((BINS,), tl.int32)
    n_valid = tl.zeros((), tl.int32)
    for begin in range(0, span, _CHUNK):
        index = program.to(tl.int64) * span + begin + tl.arange(0, _CHUNK)
        inside = index < n
        key, is_counted = _key(
            score_ptr, valid_ptr, code_ptr, kind_ptr, index, inside, temperature, seed, SOURCE, HAS_VALID
        )
        place = key >> shift
        is_counted = is_counted & (place >> width == prefix)
        counts += tl.histogram(place.to(tl.int32) & ((1 << width) - 1), BINS, mask=is_counted)
        if FIRST:
            n_valid += tl.sum((inside & (key >> 32 == 0)).to(tl.int32))
    if FIRST:
        tl.store(slot_ptr + program, n_valid.to(tl.int64))
    is_last = _publish(program, counts, row_ptr, histogram_ptr, ticket_ptr, BINS)
    if is_last:
        below = tl.zeros((_PROGRAMS,), tl.int32)
        if FIRST:
            tl.store(state_ptr + _N_VALID, tl.sum(_of_all_programs(slot_ptr, 0)))
        else:
            below = _of_all_programs(spans_ptr, 0)
        _find_digit(
            prefix, left, width, below, state_ptr + STATE_AT, row_ptr, spans_ptr, histogram_ptr, LAST, BINS
        )  # fmt: skip


@triton.jit(do_not_specialize=["k_first", "k_floor", "shift", "width", "first_shift"])
def count_floor(
    score_ptr, valid_ptr, code_ptr, kind_ptr, n, span, k_first, k_floor, shift, width, first_shift, seed_ptr,
    state_ptr, row_ptr, spans_ptr, slot_ptr, histogram_ptr, ticket_ptr,
    SOURCE: tl.constexpr, HAS_VALID: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Mark who is among the first, give the others the floor's codes, and count the first digit of those.

    ``slot_ptr`` has two rows here: the smallest key that is not taken, and how many are.
    """
    program = tl.program_id(0)
    seed = tl.load(seed_ptr)
    first_key, ties_left = tl.full((), -1, tl.int64), tl.zeros((), tl.int32)
    if k_first > 0:
        first_key = tl.load(state_ptr + _FIRST_KEY)
        ties_left = tl.load(state_ptr + _FIRST_KEY + 1).to(tl.int32) - tl.load(spans_ptr + 2 * _PROGRAMS + program)
    counts = tl.zeros((BINS,), tl.int32)
    n_valid, n_taken = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    runner_up = tl.full((), LAST_RANK, tl.int64)
    for begin in range(0, span, _CHUNK):
        index = program.to(tl.int64) * span + begin + tl.arange(0, _CHUNK)
        inside = index < n
        key, _ = _key(score_ptr, valid_ptr, code_ptr, kind_ptr, index, inside, 1.0, seed, SOURCE, HAS_VALID)
        is_taken, ties_left = _take(key >> first_shift, inside, first_key, ties_left)
        n_taken += tl.sum(is_taken.to(tl.int32))
        is_left = inside & (is_taken == 0)
        runner_up = tl.minimum(runner_up, tl.min(tl.where(is_left, key, LAST_RANK)))
        score, valid = load_example(score_ptr, valid_ptr, index, inside, HAS_VALID)
        n_valid += tl.sum(valid.to(tl.int32))
        _, floor_bits = random_bits(seed, index)
        # The code stored depends on the one that was loaded from there: no thread can overwrite it before.
        code = tl.where(is_taken, 0, tl.where(valid, floor_code(floor_bits), descending_code(score)))
        tl.store(code_ptr + index, code, mask=inside)
        tl.store(kind_ptr + index, tl.where(is_taken, _TAKEN, tl.where(valid, _VALID, _INVALID)), mask=inside)
        digit = (_key_of_code(code, valid) >> shift).to(tl.int32) & ((1 << width) - 1)
        counts += tl.histogram(digit, BINS, mask=is_left)
    tl.store(slot_ptr + program, runner_up)
    tl.store(slot_ptr + _PROGRAMS + program, n_taken.to(tl.int64))
    tl.store(slot_ptr + 2 * _PROGRAMS + program, n_valid.to(tl.int64))
    is_last = _publish(program, counts, row_ptr, histogram_ptr, ticket_ptr, BINS)
    if is_last:
        tl.store(state_ptr + _RUNNER_UP, tl.min(_of_all_programs(slot_ptr, LAST_RANK)))
        tl.store(state_ptr + _N_VALID, tl.sum(_of_all_programs(slot_ptr + 2 * _PROGRAMS, 0)))
        below = _of_all_programs(slot_ptr + _PROGRAMS, 0).to(tl.int32)
        _find_digit(
            tl.zeros((), tl.int64), tl.cast(k_floor, tl.int32), width, below, state_ptr + _FLOOR_KEY,
            row_ptr, spans_ptr, histogram_ptr, False, BINS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["k", "k_first", "k_floor", "shift"])
def write_all(
    score_ptr, valid_ptr, code_ptr, kind_ptr, n, span, k, k_first, k_floor, shift, temperature, state_ptr, spans_ptr,
    slot_ptr, ticket_ptr,
    chosen_ptr,  # int64 [a power of two from k on]: ranks by score
    index_ptr, chosen_score_ptr, inclusion_ptr,
    SOURCE: tl.constexpr, HAS_VALID: tl.constexpr, GUMBEL: tl.constexpr, FLOOR: tl.constexpr,
    FINISH: tl.constexpr,  # the last program writes the outputs, too
    SORTED: tl.constexpr,
):  # fmt: skip
    """Write the ranks by score of all who are chosen, in index order."""
    STATE_AT: tl.constexpr = _FLOOR_KEY if SOURCE == FROM_FLOOR else _FIRST_KEY
    program = tl.program_id(0)
    kth_key = tl.load(state_ptr + STATE_AT)
    place = tl.load(spans_ptr + _PROGRAMS + program)
    ties_left = tl.load(state_ptr + STATE_AT + 1).to(tl.int32) - tl.load(spans_ptr + 2 * _PROGRAMS + program)
    runner_up = tl.full((), LAST_RANK, tl.int64)
    for begin in range(0, span, _CHUNK):
        index = program.to(tl.int64) * span + begin + tl.arange(0, _CHUNK)
        inside = index < n
        key, is_eligible = _key(
            score_ptr, valid_ptr, code_ptr, kind_ptr, index, inside, temperature, 0, SOURCE, HAS_VALID
        )
        is_taken, ties_left = _take(key >> shift, is_eligible, kth_key, ties_left)
        if GUMBEL and not FLOOR:
            runner_up = tl.minimum(runner_up, tl.min(tl.where(inside & (is_taken == 0), key, LAST_RANK)))
        if FLOOR:
            is_taken = is_taken | (inside & (is_eligible == 0))
        score, valid = load_example(score_ptr, valid_ptr, index, inside, HAS_VALID)
        places = place + tl.cumsum(is_taken.to(tl.int32), 0) - 1
        tl.store(chosen_ptr + places, rank_of(descending_code(score), valid, index), mask=is_taken)
        place += tl.sum(is_taken.to(tl.int32))
    if GUMBEL and not FLOOR:
        tl.store(slot_ptr + program, runner_up)
    if FINISH or (GUMBEL and not FLOOR):
        is_last = take_ticket(ticket_ptr, tl.num_programs(0))
        if is_last:
            if GUMBEL and not FLOOR:
                tl.store(state_ptr + _RUNNER_UP, tl.min(_of_all_programs(slot_ptr, LAST_RANK)))
                tl.debug_barrier()
            if FINISH:
                if SORTED:
                    sort_in_memory(chosen_ptr, k, _CHUNK)
                for start in range(0, k, _CHUNK):
                    _write_outputs(
                        start + tl.arange(0, _CHUNK), k, k_first, k_floor, score_ptr, kind_ptr, temperature,
                        state_ptr, chosen_ptr, index_ptr, chosen_score_ptr, inclusion_ptr, GUMBEL, FLOOR,
                    )  # fmt: skip


@triton.jit(do_not_specialize=["k", "k_first", "k_floor"])
def write_outputs(
    k, k_first, k_floor, score_ptr, kind_ptr, temperature, state_ptr, chosen_ptr,
    index_ptr, chosen_score_ptr, inclusion_ptr, GUMBEL: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Index, score and inclusion of the chosen, in the order of ``chosen_ptr``."""
    position = tl.program_id(0).to(tl.int64) * _CHUNK + tl.arange(0, _CHUNK)
    _write_outputs(
        position, k, k_first, k_floor, score_ptr, kind_ptr, temperature, state_ptr, chosen_ptr,
        index_ptr, chosen_score_ptr, inclusion_ptr, GUMBEL, FLOOR,
    )  # fmt: skip


@triton.jit
def _write_outputs(
    position, k, k_first, k_floor, score_ptr, kind_ptr, temperature, state_ptr, chosen_ptr,
    index_ptr, chosen_score_ptr, inclusion_ptr, GUMBEL: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    inside = position < k
    index = index_of_rank(tl.load(chosen_ptr + position, mask=inside, other=0, cache_modifier=".cg"))
    is_first, is_certain = inside, True
    last_first_key, runner_up_key, share = 0.0, 0.0, 0.0
    if GUMBEL or FLOOR:
        n_valid = tl.load(state_ptr + _N_VALID, cache_modifier=".cg").to(tl.int32)
        is_certain = n_valid <= k
    if FLOOR:
        is_first = tl.load(kind_ptr + index, mask=inside, other=0, cache_modifier=".cg") == _TAKEN
        rest = tl.maximum(n_valid - k_first, 1)
        share = tl.div_rn(tl.cast(k_floor, tl.float32), rest.to(tl.float32))
    if GUMBEL:
        last_first_key = _value_of_key(tl.load(state_ptr + _FIRST_KEY, cache_modifier=".cg"))
        runner_up_key = _value_of_key(tl.load(state_ptr + _RUNNER_UP, cache_modifier=".cg"))
    write_chosen(
        index, position, inside, is_first, k_first, score_ptr, temperature, last_first_key, runner_up_key, share,
        is_certain, index_ptr, chosen_score_ptr, inclusion_ptr, GUMBEL, FLOOR,
    )  # fmt: skip


@triton.jit
def _key(
    score_ptr, valid_ptr, code_ptr, kind_ptr, index, inside, temperature, seed,
    SOURCE: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """int64 keys of the examples, and which of them may be taken by their keys."""
    if SOURCE == FROM_FLOOR:
        kind = tl.load(kind_ptr + index, mask=inside, other=_TAKEN)
        code = tl.load(code_ptr + index, mask=inside, other=0)
        return _key_of_code(code, kind != _INVALID), inside & (kind != _TAKEN)
    if SOURCE == FROM_CODES:
        valid = inside
        if HAS_VALID:
            valid = tl.load(valid_ptr + index, mask=inside, other=0) != 0
        return _key_of_code(tl.load(code_ptr + index, mask=inside, other=0), valid), inside
    score, valid = load_example(score_ptr, valid_ptr, index, inside, HAS_VALID)
    if SOURCE == WITH_NOISE:
        key_bits, _ = random_bits(seed, index)
        score = tl.where(valid, gumbel(key_bits) + log_weight(score, temperature), score)
        tl.store(code_ptr + index, descending_code(score), mask=inside)
    return _key_of_code(descending_code(score), valid), inside


@triton.jit
def _key_of_code(code, valid):
    return code.to(tl.int64) - _INT32_MIN + ((valid == 0).to(tl.int64) << 32)


@triton.jit
def _value_of_key(key):
    return value_of_code((key + _INT32_MIN).to(tl.int32))


@triton.jit
def _take(key, is_eligible, kth_key, ties_left):
    """Who is below the k-th key or, as long as there are any left to take, equal to it; how many are left then."""
    is_tie = is_eligible & (key == kth_key)
    tie = tl.cumsum(is_tie.to(tl.int32), 0)
    is_taken = (is_eligible & (key < kth_key)) | (is_tie & (tie <= ties_left))
    return is_taken, ties_left - tl.sum(is_tie.to(tl.int32))


@triton.jit
def _of_all_programs(slot_ptr, other):
    program = tl.arange(0, _PROGRAMS)
    return tl.load(slot_ptr + program, mask=program < tl.num_programs(0), other=other, cache_modifier=".cg")


@triton.jit
def _publish(program, counts, row_ptr, histogram_ptr, ticket_ptr, BINS: tl.constexpr):
    """Add a program's histogram to the pool's; whether it was the last to do so."""
    bins = tl.arange(0, BINS)
    tl.store(row_ptr + program * BINS + bins, tl.cumsum(counts, 0))
    tl.debug_barrier()
    tl.atomic_add(histogram_ptr + bins, counts, mask=counts > 0, sem="relaxed", scope="gpu")
    return take_ticket(ticket_ptr, tl.num_programs(0))


@triton.jit
def _find_digit(
    prefix, left, width, below, state_ptr, row_ptr, spans_ptr, histogram_ptr, LAST: tl.constexpr, BINS: tl.constexpr
):
    """The last program's work: the digit of the k-th key, and what each span holds below it."""
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram_ptr + bins, cache_modifier=".cg")
    up_to = tl.cumsum(counts, 0)
    is_before = up_to < left
    digit = tl.sum(is_before.to(tl.int32))
    left -= tl.max(tl.where(is_before, up_to, 0))
    tl.debug_barrier()  # all have read the histogram
    tl.store(histogram_ptr + bins, tl.zeros((BINS,), tl.int32))
    tl.store(state_ptr, (prefix << width) + digit)
    tl.store(state_ptr + 1, left.to(tl.int64))

    program = tl.arange(0, _PROGRAMS)
    is_there = program < tl.num_programs(0)
    cell_ptrs = row_ptr + program * BINS + digit
    lower = tl.load(cell_ptrs - 1, mask=is_there & (digit > 0), other=0, cache_modifier=".cg")
    below += lower
    if LAST:
        ties = tl.load(cell_ptrs, mask=is_there, other=0, cache_modifier=".cg") - lower
        ties_before = tl.cumsum(ties, 0) - ties
        places = tl.cumsum(below, 0) - below + tl.minimum(ties_before, left)
        tl.store(spans_ptr + _PROGRAMS + program, places, mask=is_there)
        tl.store(spans_ptr + 2 * _PROGRAMS + program, ties_before, mask=is_there)
    else:
        tl.store(spans_ptr + program, below, mask=is_there)
