"""A data set whose items know their own id: the teacher's handle on examples through any shuffle or collator."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from operator import index as as_int
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from ._checks import describe, refuse


def indexed(dataset: Any) -> IndexedDataset:
    """Wrap a map-style data set so that each item carries its id, its position in ``dataset``.

    A dict item (any Mapping) gains ``"example_id"``. A tuple is prepended with the id; a named tuple becomes plain, as
    its type has no field for it. Everything else, lists too, becomes ``(id, item)``. ``len``, ``__getitems__``
    and all attributes are the data set's own; it goes through worker processes as the data set itself does. Wrap last:
    over a Subset ids count within the subset.

    Raises:
        ValueError: the data set is iterable-style (a stream has no ids: choose within pools with
            :meth:`Teacher.choose`), has no ``len`` or no ``__getitem__``, or its dict items already hold
            ``"example_id"``.

    >>> attent.indexed([("a", 0), ("b", 1)])[1]
    (1, 'b', 1)
    >>> attent.indexed([{"text": "a"}])[0]
    {'text': 'a', 'example_id': 0}
    >>> attent.indexed(["a", "b"])[-1]
    (1, 'b')
    """
    if isinstance(dataset, IterableDataset):
        refuse(
            "dataset", type(dataset).__name__, "a map-style data set; for a stream, choose within pools: Teacher.choose"
        )
    for method in ("__getitem__", "__len__"):
        if not hasattr(dataset, method):
            refuse(
                "dataset", f"{describe(dataset)}, without {method}", "a map-style data set with __getitem__ and __len__"
            )
    return IndexedDataset(dataset)


class IndexedDataset(Dataset[Any]):
    """What :func:`indexed` returns."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        index = as_int(index)
        return _with_id(self._id(index), self.dataset[index])

    def __getattr__(self, name: str) -> Any:
        # Only reached for what is not here. Unpickling asks before __init__ has run, and dunders are not to be
        # borrowed: __getitems__ is, so that the DataLoader fetches in one call exactly where the data set can.
        if name == "dataset" or (name.startswith("__") and name != "__getitems__"):
            raise AttributeError(name)
        if name == "__getitems__":
            fetch = self.dataset.__getitems__
            return lambda indices: self._get_items(fetch, indices)
        return getattr(self.dataset, name)

    def _get_items(self, fetch: Any, indices: Sequence[Any]) -> list[Any]:
        numbers = [as_int(index) for index in indices]
        return [_with_id(self._id(number), item) for number, item in zip(numbers, fetch(numbers), strict=True)]

    def _id(self, index: int) -> int:
        return index + len(self) if index < 0 else index


def _with_id(example_id: int, item: Any) -> Any:
    if isinstance(item, Mapping):
        if "example_id" in item:
            refuse("dataset", "items with an 'example_id' of their own", "items without: rename or drop that column")
        if not isinstance(item, MutableMapping):
            return {**item, "example_id": example_id}
        item = copy.copy(item)  # the data set may hand out the dict it keeps
        item["example_id"] = example_id
        return item
    if isinstance(item, tuple):
        return (example_id, *item)
    return (example_id, item)
