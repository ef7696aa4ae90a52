"""Recording: buffered without a look at the values, merged by id, later calls over earlier ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

import attent
from attent.store import RecordBuffer, ScoreStore

N = 7
score = st.one_of(st.floats(0, 8, width=32), st.sampled_from([math.nan, math.inf, -math.inf]))
calls = st.lists(st.lists(st.tuples(st.integers(0, N - 1), score), max_size=5), max_size=6)


@given(merges=st.lists(calls, max_size=4))
def test_the_store_holds_what_a_plain_loop_over_the_records_would(
    merges: list[list[list[tuple[int, float]]]],
) -> None:
    buffer, store = RecordBuffer(), ScoreStore(N)
    last, lowest, stale = [math.nan] * N, [math.inf] * N, [0] * N
    visits, seen, nonfinite = [0] * N, [-1] * N, 0
    for epoch, merge in enumerate(merges):
        latest: dict[int, float] = {}
        for call in merge:
            buffer.add(torch.tensor([i for i, _ in call], dtype=torch.int64), torch.tensor([s for _, s in call]))
            for i, value in call:
                nonfinite += not math.isfinite(value)
                if math.isfinite(value):
                    latest[i] = value
        for i in {i for call in merge for i, _ in call}:
            visits[i] += 1
            seen[i] = epoch
        for i, value in latest.items():
            last[i] = value
            stale[i] = 0 if value < lowest[i] else stale[i] + 1
            lowest[i] = min(lowest[i], value)
        ids, scores, _ = buffer.take()
        about = store.update(ids, scores, epoch)
        assert about.tolist() == [any(i == j for call in merge for j, _ in call) for i in range(N)]
    assert torch.equal(store.score.isnan(), torch.tensor(last).isnan())
    assert torch.equal(store.score.nan_to_num(), torch.tensor(last).nan_to_num())
    assert store.lowest.tolist() == lowest
    assert store.stale_visits.tolist() == stale
    assert store.visits.tolist() == visits
    assert store.last_seen.tolist() == seen
    assert store.nonfinite == nonfinite


def test_the_buffer_keeps_copies_since_loaders_and_graphs_reuse_their_memory() -> None:
    buffer = RecordBuffer()
    ids, scores = torch.tensor([1, 2]), torch.tensor([0.5, 0.25])
    buffer.add(ids, scores)
    ids.fill_(9)
    scores.fill_(9)
    kept_ids, kept_scores, _ = buffer.take()
    assert kept_ids.tolist() == [1, 2] and kept_scores.tolist() == [0.5, 0.25]


def test_thousands_of_calls_keep_their_order_and_numbers() -> None:
    buffer = RecordBuffer()
    for call in range(3000):  # far beyond what is compacted in between
        buffer.add(torch.tensor([call, call]), torch.tensor([float(call), -1.0]))
    ids, scores, numbers = buffer.take()
    assert torch.equal(ids, torch.arange(3000).repeat_interleave(2))
    assert torch.equal(numbers, ids)
    assert torch.equal(scores[::2], torch.arange(3000.0))
    buffer.add(torch.tensor([0]), torch.tensor([0.0]))
    assert buffer.take()[2].tolist() == [3000]  # numbers go on, so that later calls stay later
    assert all(part.numel() == 0 for part in buffer.take())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_of_any_float_dtype_are_kept_as_float32_and_ids_as_integers(dtype: torch.dtype) -> None:
    large = 2**24 + 1  # not a float32: an id that passed through one would change
    buffer = RecordBuffer()
    buffer.add(torch.tensor([large], dtype=torch.int32), torch.tensor([0.5], dtype=dtype, requires_grad=True))
    ids, scores, _ = buffer.take()
    assert ids.tolist() == [large] and ids.dtype == torch.int64
    assert scores.tolist() == [0.5] and scores.dtype == torch.float32 and not scores.requires_grad


def test_recording_reads_nothing_from_a_device() -> None:
    # Fake tensors have no values: whatever read one back would raise.
    teacher = attent.Teacher(10, total_epochs=2)
    with FakeTensorMode():
        ids, scores = torch.empty(4, dtype=torch.int64, device="cuda"), torch.empty(4, device="cuda")
        for _ in range(2000):
            teacher.record(ids, scores)


def demoted(scores: list[list[float]], after: int, share: float) -> list[int]:
    store = ScoreStore(len(scores[0]))
    for epoch, row in enumerate(scores):
        store.update(torch.arange(len(row)), torch.tensor(row), epoch)
    chosen: Tensor = store.demoted(after, share).nonzero().squeeze(1)
    return chosen.tolist()


def test_demoted_are_the_highest_scores_that_stopped_improving() -> None:
    #        hard, no better | hard, improving | easy, no better | easy | ...
    first = [9.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    later = [[9.0, 8.0 - i, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5] for i in range(3)]
    assert demoted([first, *later], after=3, share=0.25) == [0]
    assert demoted([first, *later], after=4, share=0.25) == []  # it had three chances, not four
    assert demoted([first, *later], after=3, share=0.1) == []  # 0.1 of 8 is nobody
    assert demoted([first, *later, [8.9, *first[1:]]], after=3, share=0.25) == []  # it improved after all


def test_nobody_is_demoted_before_anything_is_known() -> None:
    assert ScoreStore(100).demoted(1, 0.02).sum() == 0
