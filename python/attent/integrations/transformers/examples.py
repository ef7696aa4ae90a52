"""The example id on its way from the data set to the loss: past column removal and through any collator."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from ..._checks import describe, refuse

ID = "example_id"
IGNORED = -100
CU_SEQLENS = "example_cu_seqlens"  # of a batch that holds its examples in one row


class NumberedDataset(Dataset[Any]):
    """Items become ``(id, item)``. A tuple, never a dict: what edits dict items on their way lets it pass untouched."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return int(index), self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        # Unpickling asks before __init__ has run. __getitems__ is there exactly where the data set has it.
        if name != "__getitems__" or "dataset" not in self.__dict__:
            raise AttributeError(name)
        fetch = self.dataset.__getitems__
        return lambda indices: list(zip(map(int, indices), fetch(indices), strict=True))


class NumberedCollator:
    """Takes the ids off, lets the user's collator make the batch of the items it knows, and adds the ids to it."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, numbered: Sequence[tuple[int, Any]]) -> Any:
        batch = self.collate([item for _, item in numbered])
        if not isinstance(batch, MutableMapping):
            refuse("data_collator", f"one that returns {describe(batch)}", "one that returns a dict of model inputs")
        batch[ID] = torch.tensor([number for number, _ in numbered])
        tokens = batch.get("input_ids")
        if isinstance(tokens, torch.Tensor) and tokens.dim() == 2 and len(tokens) == 1 < len(numbered):
            # Padding-free. The items' own lengths say where each begins: positions that start at 0 would say where
            # documents do, and an example may be a row packed from several.
            lengths = [len(item["input_ids"]) for _, item in numbered]
            padding = tokens.shape[1] - sum(lengths)  # up to a multiple; no target is in it
            if padding > 0 and bool((batch["labels"][0, -padding:] == IGNORED).all()):
                lengths[-1] += padding
            if sum(lengths) != tokens.shape[1]:
                got = f"one that made {tokens.shape[1]} tokens in one row of {sum(lengths)} in {len(lengths)} examples"
                refuse("data_collator", got, "one that keeps all tokens of its examples, or a row for each of them")
            batch[CU_SEQLENS] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return batch
