"""How a teacher chooses, whatever it chooses from: the settings of a draw, checked once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import INTEGER, check_choice, check_int, check_number, check_tensor, refuse
from .quotas import group_labels


@dataclass(frozen=True, eq=False)
class Policy:
    """Temperature and floor of the draw, weights, quotas, guard, and the seed of all its randomness.

    ``groups``: int64 ``[num_examples]`` in [0, G), or None.
    """

    temperature: float
    floor: float
    reweight: str
    groups: Tensor | None
    demote_after: int | None
    seed: int


def make_policy(
    num_examples: int | None,
    temperature: float,
    floor: float,
    reweight: str,
    groups: Tensor | None,
    demote_after: int | None,
    seed: int,
) -> Policy:
    """The checked policy of a teacher of ``num_examples`` (None: of a stream)."""
    check_number("temperature", temperature, low=0)
    check_number("floor", floor, low=0, high=1)
    check_choice("reweight", reweight, ("none", "inverse"))
    check_int("seed", seed)
    for argument, value in (("groups", groups), ("demote_after", demote_after)):
        if value is not None and num_examples is None:
            refuse(argument, "a value without num_examples", "None, or a value with num_examples, which it is about")
    if demote_after is not None:
        check_int("demote_after", demote_after, low=1)
    if groups is not None:
        takes = f"int64 [num_examples={num_examples}], each at least 0"
        check_tensor("groups", groups, takes, shape=(num_examples,), dtypes=INTEGER)
        groups = groups.cpu().to(torch.int64)
        if int(groups.min()) < 0:
            refuse("groups", f"a lowest of {int(groups.min())}", takes)
        groups = group_labels(groups)
    return Policy(float(temperature), float(floor), reweight, groups, demote_after, seed)
