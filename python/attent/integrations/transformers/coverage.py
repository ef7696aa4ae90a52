"""What the report shows examples by: their class, their length, their text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...distributed import max_over_ranks


class Coverage:
    """Class and length of each example, as batches bring them; noted on their device, read back once an epoch."""

    def __init__(self, num_examples: int) -> None:
        self._known = {name: torch.full((num_examples,), -1) for name in ("groups", "lengths")}

    def note(self, ids: Tensor, inputs: Mapping[str, Any]) -> None:
        """Take class (of one-label examples) and tokens (by the attention mask) from a batch."""
        labels: Any = inputs.get("labels")
        mask: Any = inputs.get("attention_mask")
        values = {
            "groups": labels if _holds(labels, ids, 1) and not labels.is_floating_point() else None,
            "lengths": mask.sum(1) if _holds(mask, ids, 2) else None,
        }
        for name, value in values.items():
            if value is not None:
                if self._known[name].device != ids.device:
                    self._known[name] = self._known[name].to(ids.device)
                self._known[name][ids] = value.long()

    def merged(self) -> dict[str, Tensor]:
        """``groups`` and ``lengths`` ``[N]`` over all ranks, of those that are known. Collective."""
        merged = {name: max_over_ranks(value) for name, value in self._known.items()}
        return {name: value for name, value in merged.items() if bool((value >= 0).any())}


def _holds(value: Any, ids: Tensor, dims: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == dims and len(value) == len(ids)


def class_names(model: Any) -> list[str] | None:
    """The classes' names, where someone named them."""
    names = getattr(model.config, "id2label", None)
    if not names or all(name == f"LABEL_{number}" for number, name in names.items()):
        return None
    return [str(names[number]) for number in sorted(names)]


def show_example(item: Any, tokenizer: Any) -> str:
    """A line about an item of a data set: its text, or its tokens as text, and its label."""
    if not isinstance(item, Mapping):
        return repr(item)
    label = next((item[name] for name in ("label", "labels") if name in item), None)
    number = label if isinstance(label, int) else int(label) if isinstance(label, Tensor) and label.dim() == 0 else None
    text = next((value for value in item.values() if isinstance(value, str)), None)
    if text is None and "input_ids" in item and hasattr(tokenizer, "decode"):
        text = tokenizer.decode(item["input_ids"], skip_special_tokens=True)
    if text is None:
        text = ", ".join(f"{name} {tuple(v.shape)}" if isinstance(v, Tensor) else name for name, v in item.items())
    return text if number is None else f"[{number}] {text}"
