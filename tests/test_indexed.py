"""attent.indexed: every item carries its position in the data set, whatever kind of item and loader it is."""

from __future__ import annotations

import collections
import pickle
from collections import UserDict, namedtuple
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import attent

Pair = namedtuple("Pair", ["x", "y"])


class Sentences(Dataset[Any]):
    """A map-style data set with columns, like those of text libraries: fetches many at once."""

    column_names = ("text", "label")

    def __init__(self) -> None:
        self.fetches: list[list[int]] = []
        self.format = "plain"

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"text": f"sentence {index}", "label": index % 2}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        self.fetches.append(indices)
        return [self[index] for index in indices]

    def with_format(self, name: str) -> Sentences:
        self.format = name
        return self


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"a": 5}, {"a": 5, "example_id": 1}),
        (UserDict({"a": 5}), UserDict({"a": 5, "example_id": 1})),
        (collections.OrderedDict(a=5), collections.OrderedDict(a=5, example_id=1)),
        (MappingProxyType({"a": 5}), {"a": 5, "example_id": 1}),
        ((5, 6), (1, 5, 6)),
        ((), (1,)),
        (Pair(5, 6), (1, 5, 6)),
        ([5, 6], (1, [5, 6])),
        (5, (1, 5)),
        ("text", (1, "text")),
        (None, (1, None)),
    ],
)
def test_each_kind_of_item_gets_its_id_in_its_way(item: Any, expected: Any) -> None:
    got = attent.indexed([None, item])[1]
    assert got == expected
    assert type(got) is type(expected)


def test_a_tensor_item_becomes_a_pair() -> None:
    got = attent.indexed(torch.arange(6.0).reshape(3, 2))[2]
    assert got[0] == 2 and got[1].tolist() == [4.0, 5.0]


def test_the_data_sets_own_dicts_are_not_touched() -> None:
    kept = [{"a": 5}]
    attent.indexed(kept)[0]
    assert kept == [{"a": 5}]


def test_len_attributes_and_methods_are_the_data_sets_own() -> None:
    inner = Sentences()
    data = attent.indexed(inner)
    assert len(data) == 10
    assert data.column_names == ("text", "label")
    assert data.with_format("torch") is inner and data.format == "torch"
    with pytest.raises(AttributeError, match="nowhere"):
        data.nowhere  # noqa: B018


def test_many_are_fetched_at_once_exactly_where_the_data_set_can() -> None:
    inner = Sentences()
    data = attent.indexed(inner)
    assert [item["example_id"] for item in data.__getitems__([3, 1])] == [3, 1]
    assert inner.fetches == [[3, 1]]
    next(iter(DataLoader(data, batch_size=4)))
    assert inner.fetches[1:] == [[0, 1, 2, 3]]
    assert not hasattr(attent.indexed([1, 2]), "__getitems__")


def test_an_index_may_be_negative_or_a_scalar_tensor() -> None:
    data = attent.indexed(["a", "b", "c"])
    assert data[-1] == (2, "c") and data[torch.tensor(1)] == (1, "b")


def test_ids_survive_shuffling_collating_and_worker_processes() -> None:
    data = attent.indexed(TensorDataset(torch.arange(100, 140), torch.arange(40) % 3))
    seen = []
    for ids, x, y in DataLoader(data, batch_size=7, shuffle=True, num_workers=2):
        assert ids.dtype == torch.int64
        assert torch.equal(x, ids + 100) and torch.equal(y, ids % 3)
        seen += ids.tolist()
    assert sorted(seen) == list(range(40)) and seen != sorted(seen)
    batch = next(iter(DataLoader(attent.indexed(Sentences()), batch_size=4, shuffle=True)))
    assert batch["text"] == [f"sentence {i}" for i in batch["example_id"].tolist()]


def test_it_pickles_for_workers_that_are_spawned() -> None:
    data = pickle.loads(pickle.dumps(attent.indexed(Sentences())))
    assert data[3]["example_id"] == 3 and data.column_names == ("text", "label")


def test_over_a_subset_ids_count_within_the_subset() -> None:
    assert attent.indexed(Subset(range(10), [7, 8]))[1] == (1, 8)  # type: ignore[arg-type]


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class NoLength:
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    ("dataset", "words"),
    [(Stream(), r"Teacher\.choose"), (NoLength(), "__len__"), (iter([1]), "__getitem__"), (None, "__getitem__")],
)
def test_what_has_no_ids_is_refused_with_the_way_out(dataset: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"^dataset: got .*{words}"):
        attent.indexed(dataset)


@pytest.mark.parametrize("kind", [dict, MappingProxyType])
def test_an_id_column_that_is_there_already_is_refused(kind: type[Mapping[str, int]]) -> None:
    data = attent.indexed([kind({"example_id": 5})])  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="rename or drop that column"):
        data[0]
