"""Top-k within a launch: the last program of a kernel that has written a pool's scores chooses from them.

Hard, or Gumbel top-k with a floor, and the inclusion probabilities: what ``attent.select_top_k`` defines.

1. Each example's rank (``ranks.py``) goes to scratch memory.
2. Radix selection: the k-th smallest rank, 8 bits a pass, from the highest bit in which ranks differ down to where a
   bin holds just what is still to be taken. Counts are integers, so their order does not matter.
3. The chosen ones' ranks by score are compacted in index order by prefix sums, and sorted (``block_sort.py``).
   A hard choice from up to 512 is a sort of the pool: 2 and the compaction fall away.
With a floor, 2 is done again on the floor's noise of those that were not taken.

Cost, estimated from instruction counts since it has not run on a GPU yet, in cycles on 4 warps. A histogram takes 75
instructions for 32 ranks, so a pass 1,000 for each 1,024 examples and 600 on top; distinct float32 scores take 3 to 4
passes, equal ones up to 8. Ranking takes 300 for each 1,024, 900 with noise, compaction 500. The sort of the k
(``block_sort.py``) is the larger part for large k: 225 a step and 1,024 keys. At 1.75 GHz, in µs:

    n, k                            512, 256    2,048, 1,024    16,384, 1,024    16,384, 8,192
    hard                                   4              15               50              135
    with noise and a floor                10              27              110              195

Scratch memory and scores are read past the L1 cache. A barrier lies between what is stored and where it is loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .block_sort import power_of_two, sort_in_memory, sort_in_registers
from .pools import MAX_IN_LAUNCH as MAX_IN_LAUNCH
from .ranks import (
    FIRST_RANK,
    LAST_RANK,
    as_float32,
    code_of_rank,
    descending_code,
    floor_code,
    gumbel,
    index_of_rank,
    log_weight,
    probability_above,
    random_bits,
    rank_of,
    value_of_code,
)

#: How many examples a pass looks at, and how many keys are sorted, at a time. On 4 warps that is 8 a thread: the
#: temporaries of the noise, or the keys and their partners, fit the registers.
_CHUNK = tl.constexpr(1024)
#: Up to here a smaller tensor is sorted, in fewer cycles; and a hard choice sorts the pool rather than select first.
_FEW = tl.constexpr(512)


def scratch_length(n: int) -> int:
    """Elements of int64 scratch memory that a choice from ``n`` examples takes: their ranks, and a power of two."""
    return n + (1 << max(0, n - 1).bit_length())


@triton.jit
def select_in_block(
    score_ptr,  # float16, bfloat16 or float32 [n]
    valid_ptr,  # int8 [n]; not read unless HAS_VALID
    n,
    k,
    k_floor,  # how many of the k are drawn uniformly
    temperature,
    seed_ptr,  # int64 [1]; not read unless GUMBEL or FLOOR
    index_ptr,  # int64 [k], output
    chosen_score_ptr,  # like the scores [k], output
    inclusion_ptr,  # float32 [k], output
    scratch_ptr,  # int64 [scratch_length(n)]
    HAS_VALID: tl.constexpr,
    GUMBEL: tl.constexpr,  # temperature > 0
    FLOOR: tl.constexpr,  # k_floor > 0
    SORTED: tl.constexpr = True,  # False: in the order of the indices
):
    """Choose k of n <= MAX_IN_LAUNCH examples. Called by one program, on any number of warps."""
    NOISY: tl.constexpr = GUMBEL or FLOOR
    # Triton makes a 1 that a kernel is launched with a constant.
    n, k, k_floor = tl.cast(n, tl.int32), tl.cast(k, tl.int32), tl.cast(k_floor, tl.int32)
    k_first = k - k_floor
    seed = tl.load(seed_ptr) if NOISY else 0
    rank_ptr = scratch_ptr
    chosen_ptr = scratch_ptr + n

    n_valid, lowest, highest = _rank_all(
        score_ptr, valid_ptr, n, temperature, seed, rank_ptr, HAS_VALID=HAS_VALID, GUMBEL=GUMBEL
    )
    # A hard choice from few, and one of all, is a sort of them where they lie.
    is_part = k < n
    if SORTED and not NOISY:
        is_part = is_part & (n > _FEW)
    if k > 0:
        bound, last_first, runner_up = _no_rank_before(), _no_rank_before(), _no_rank_after()
        if is_part & (k_first > 0):
            bound = _bound_of_smallest(rank_ptr, n, k_first, lowest, highest)
        if FLOOR:
            tl.debug_barrier()  # all have read the ranks before they are overwritten
            if is_part:
                last_first, runner_up, lowest, highest = _rank_rest_by_floor(
                    score_ptr, valid_ptr, n, seed, rank_ptr, bound, HAS_VALID
                )
                bound = _bound_of_smallest(rank_ptr, n, k_floor, lowest, highest)
        count, sorted_ptr = k, chosen_ptr
        if NOISY:
            taken_last_first, taken_runner_up = _compact_by_score(
                score_ptr, valid_ptr, n, rank_ptr, tl.where(is_part, bound, LAST_RANK), chosen_ptr, HAS_VALID, FLOOR
            )
            if not FLOOR:
                last_first, runner_up = taken_last_first, taken_runner_up
        else:
            count = tl.where(is_part, k, n)
            sorted_ptr = scratch_ptr + tl.where(is_part, n, 0)
            if is_part:
                _compact(n, rank_ptr, bound, chosen_ptr)

        share = 0.0
        if FLOOR:
            share = tl.div_rn(k_floor.to(tl.float32), tl.maximum(n_valid - k_first, 1).to(tl.float32))
        is_certain = n_valid <= k  # nothing is left to chance, and thresholds may belong to invalid ones
        if count <= _FEW:
            few = tl.arange(0, _FEW)
            rank = tl.load(sorted_ptr + few, mask=few < count, other=LAST_RANK, cache_modifier=".cg")
            if SORTED:
                rank = sort_in_registers(rank, few, 2, power_of_two(count))
            _write(
                rank, few, k, k_first, score_ptr, rank_ptr, temperature, last_first, runner_up, share, is_certain,
                index_ptr, chosen_score_ptr, inclusion_ptr, GUMBEL, FLOOR,
            )  # fmt: skip
        else:
            if SORTED:
                sort_in_memory(sorted_ptr, count, _CHUNK)
            for start in range(0, k, _CHUNK):
                position = start + tl.arange(0, _CHUNK)
                rank = tl.load(sorted_ptr + position, mask=position < k, other=0, cache_modifier=".cg")
                _write(
                    rank, position, k, k_first, score_ptr, rank_ptr, temperature, last_first, runner_up, share,
                    is_certain, index_ptr, chosen_score_ptr, inclusion_ptr, GUMBEL, FLOOR,
                )  # fmt: skip


@triton.jit
def _no_rank_before():
    return tl.full((), FIRST_RANK, tl.int64)


@triton.jit
def _no_rank_after():
    return tl.full((), LAST_RANK, tl.int64)


@triton.jit
def _rank_all(score_ptr, valid_ptr, n, temperature, seed, rank_ptr, HAS_VALID: tl.constexpr, GUMBEL: tl.constexpr):
    """Store the ranks that the first of the chosen are taken by.

    Returns:
        How many examples are valid, the lowest and the highest rank.
    """
    n_valid, lowest, highest = tl.zeros((), tl.int32), _no_rank_after(), _no_rank_before()
    for start in range(0, n, _CHUNK):
        index = start + tl.arange(0, _CHUNK)
        inside = index < n
        score, valid = load_example(score_ptr, valid_ptr, index, inside, HAS_VALID)
        value = score
        if GUMBEL:
            key_bits, _ = random_bits(seed, index)
            # Invalid ones have no noise: where they must fill up, they do it in the order of their scores at any seed.
            value = tl.where(valid, gumbel(key_bits) + log_weight(score, temperature), score)
        rank = rank_of(descending_code(value), valid, index)
        tl.store(rank_ptr + index, rank, mask=inside)
        n_valid += tl.sum(valid.to(tl.int32))
        lowest = tl.minimum(lowest, tl.min(tl.where(inside, rank, LAST_RANK)))
        highest = tl.maximum(highest, tl.max(tl.where(inside, rank, FIRST_RANK)))
    tl.debug_barrier()
    return n_valid, lowest, highest


@triton.jit
def _rank_rest_by_floor(score_ptr, valid_ptr, n, seed, rank_ptr, bound, HAS_VALID: tl.constexpr):
    """Those up to ``bound`` are taken: LAST_RANK marks them; the others get the ranks that the floor is drawn by.

    Returns:
        The last of the ranks up to ``bound`` and the first after it; the lowest and the highest of the new ranks.
    """
    last_first, runner_up, lowest, highest = _no_rank_before(), _no_rank_after(), _no_rank_after(), _no_rank_before()
    for start in range(0, n, _CHUNK):
        index = start + tl.arange(0, _CHUNK)
        inside = index < n
        rank = tl.load(rank_ptr + index, mask=inside, other=LAST_RANK, cache_modifier=".cg")
        is_first = rank <= bound
        last_first = tl.maximum(last_first, tl.max(tl.where(is_first, rank, FIRST_RANK)))
        runner_up = tl.minimum(runner_up, tl.min(tl.where(is_first, LAST_RANK, rank)))
        score, valid = load_example(score_ptr, valid_ptr, index, inside, HAS_VALID)
        _, floor_bits = random_bits(seed, index)
        rank = rank_of(tl.where(valid, floor_code(floor_bits), descending_code(score)), valid, index)
        tl.store(rank_ptr + index, tl.where(is_first, LAST_RANK, rank), mask=inside)
        is_left = inside & (is_first == 0)
        lowest = tl.minimum(lowest, tl.min(tl.where(is_left, rank, LAST_RANK)))
        highest = tl.maximum(highest, tl.max(tl.where(is_left, rank, FIRST_RANK)))
    tl.debug_barrier()
    return last_first, runner_up, lowest, highest


@triton.jit
def _compact(n, rank_ptr, bound, chosen_ptr):
    """Store the ranks up to ``bound`` side by side, in index order."""
    taken_before = tl.zeros((), tl.int32)
    for start in range(0, n, _CHUNK):
        index = start + tl.arange(0, _CHUNK)
        rank = tl.load(rank_ptr + index, mask=index < n, other=LAST_RANK, cache_modifier=".cg")
        is_taken = rank <= bound
        place = taken_before + tl.cumsum(is_taken.to(tl.int32), 0) - 1
        tl.store(chosen_ptr + place, rank, mask=is_taken)
        taken_before += tl.sum(is_taken.to(tl.int32))
    tl.debug_barrier()


@triton.jit
def _compact_by_score(
    score_ptr, valid_ptr, n, rank_ptr, bound, chosen_ptr, HAS_VALID: tl.constexpr, FLOOR: tl.constexpr
):
    """Store the ranks by score of those up to ``bound``, and of those marked as taken, side by side, in index order.

    Returns:
        The last of the ranks up to ``bound``, and the first after it.
    """
    last, following, taken_before = _no_rank_before(), _no_rank_after(), tl.zeros((), tl.int32)
    for start in range(0, n, _CHUNK):
        index = start + tl.arange(0, _CHUNK)
        inside = index < n
        rank = tl.load(rank_ptr + index, mask=inside, other=LAST_RANK, cache_modifier=".cg")
        is_taken = inside & (rank <= bound)
        last = tl.maximum(last, tl.max(tl.where(is_taken, rank, FIRST_RANK)))
        following = tl.minimum(following, tl.min(tl.where(is_taken, LAST_RANK, rank)))
        if FLOOR:
            is_taken = is_taken | (inside & (rank == LAST_RANK))
        score, valid = load_example(score_ptr, valid_ptr, index, inside, HAS_VALID)
        place = taken_before + tl.cumsum(is_taken.to(tl.int32), 0) - 1
        tl.store(chosen_ptr + place, rank_of(descending_code(score), valid, index), mask=is_taken)
        taken_before += tl.sum(is_taken.to(tl.int32))
    tl.debug_barrier()
    return last, following


@triton.jit
def load_example(score_ptr, valid_ptr, index, inside, HAS_VALID: tl.constexpr):
    score = as_float32(tl.load(score_ptr + index, mask=inside, other=0.0, cache_modifier=".cg"))
    valid = inside
    if HAS_VALID:
        valid = tl.load(valid_ptr + index, mask=inside, other=0, cache_modifier=".cg") != 0
    return score, valid


@triton.jit
def _bound_of_smallest(rank_ptr, n, k, lowest, highest):
    """A bound that exactly the ``k`` > 0 smallest of the n ranks do not exceed, by radix selection.

    Ranks from ``highest`` on are not looked at; they are all below 2^64 from ``lowest``, whose differences are meant.
    """
    bins = tl.arange(0, 256)
    extent = (highest - lowest).to(tl.uint64, bitcast=True)
    shift = tl.maximum(_bit_length(extent) - 8, 0)
    width = tl.full((), 8, tl.int32)
    prefix = tl.zeros((), tl.uint64)
    still_to_take = k
    is_open = True
    while is_open:
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, n, _CHUNK):
            index = start + tl.arange(0, _CHUNK)
            rank = tl.load(rank_ptr + index, mask=index < n, other=0, cache_modifier=".cg")
            place = (rank - lowest).to(tl.uint64, bitcast=True) >> shift.to(tl.uint64)
            matches = (index < n) & (place >> width.to(tl.uint64) == prefix)
            digit = place.to(tl.int32) & ((1 << width) - 1)
            counts += tl.histogram(digit, 256, mask=matches)
        up_to = tl.cumsum(counts, 0)
        is_before = up_to < still_to_take
        digit = tl.sum(is_before.to(tl.int32))
        still_to_take -= tl.max(tl.where(is_before, up_to, 0))
        in_bin = tl.sum(tl.where(bins == digit, counts, 0))
        prefix = (prefix << width.to(tl.uint64)) + digit.to(tl.uint64)
        is_open = (in_bin > still_to_take) & (shift > 0)
        width = tl.minimum(shift, 8)
        shift = tl.where(is_open, shift - width, shift)
    bound = ((prefix + 1) << shift.to(tl.uint64)) - 1
    return lowest + tl.minimum(bound, extent).to(tl.int64, bitcast=True)


@triton.jit
def _bit_length(number):
    """Of a uint64 scalar: 0 for 0, 64 for 2^64 - 1."""
    length = tl.zeros((), tl.int32)
    for i in tl.static_range(6):
        upper = number >> (32 >> i)
        length += tl.where(upper > 0, 32 >> i, 0)
        number = tl.where(upper > 0, upper, number)
    return length + number.to(tl.int32)


@triton.jit
def _write(
    rank, position, k, k_first, score_ptr, rank_ptr, temperature, last_first, runner_up, share, is_certain,
    index_ptr, chosen_score_ptr, inclusion_ptr, GUMBEL: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """The outputs at ``position`` < k, whose ranks by score are ``rank``."""
    inside = position < k
    index = index_of_rank(rank)
    is_first = inside
    if FLOOR:
        is_first = tl.load(rank_ptr + index, mask=inside, other=0, cache_modifier=".cg") == LAST_RANK
    write_chosen(
        index, position, inside, is_first, k_first, score_ptr, temperature, value_of_code(code_of_rank(last_first)),
        value_of_code(code_of_rank(runner_up)), share, is_certain, index_ptr, chosen_score_ptr, inclusion_ptr,
        GUMBEL, FLOOR,
    )  # fmt: skip


@triton.jit
def write_chosen(
    index, position, inside, is_first, k_first, score_ptr, temperature, last_first_key, runner_up_key, share,
    is_certain, index_ptr, chosen_score_ptr, inclusion_ptr, GUMBEL: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Index, score and inclusion of the examples ``index``, of which ``is_first`` were not drawn by the floor."""
    tl.store(index_ptr + position, index, mask=inside)
    score = tl.load(score_ptr + index, mask=inside, other=0.0, cache_modifier=".cg")
    tl.store(chosen_score_ptr + position, score, mask=inside)
    inclusion = is_first.to(tl.float32)
    if GUMBEL:
        threshold = tl.where(is_first, runner_up_key, last_first_key)
        q = probability_above(log_weight(as_float32(score), temperature), threshold)
        inclusion = tl.where(k_first > 0, q, 0.0)
    if FLOOR:
        inclusion = inclusion + (1.0 - inclusion) * share
    tl.store(inclusion_ptr + position, tl.where(is_certain, 1.0, inclusion), mask=inside)
