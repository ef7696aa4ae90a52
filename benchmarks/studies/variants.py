"""What can be wrong with data: too many copies, too few of some classes, wrong labels. Always drawn with one seed."""

from __future__ import annotations

import torch
from torch import Tensor

SEED = 20
DUPLICATED_SHARE, ORIGINALS_SHARE = 0.7, 0.1
TAIL = 50.0


def variant(name: str, labels: Tensor, classes: int, count: int) -> tuple[Tensor, Tensor]:
    """``count`` rows (a long tail: as many as there are) of labelled examples: ids [N] of the originals, labels [N].

    ``"plain"``            the first ``count``
    ``"duplicated"``       70 % of the rows are copies of as many originals as 10 % of the rows
    ``"long tail"``        class c is kept at 50^(-c/(classes-1)): the last has a fiftieth of the first
    ``"mislabelled 10"``   of the plain rows' labels 10 % (any per cent) are another class, drawn uniformly
    """
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.arange(count)
    if name == "duplicated":
        originals = round(ORIGINALS_SHARE * count)
        copies = round(DUPLICATED_SHARE * count)
        ids = torch.cat([torch.arange(count - copies) + originals, torch.arange(copies) % originals])
    elif name == "long tail":
        kept = TAIL ** (-torch.arange(classes) / (classes - 1))
        of_class = [(labels == c).nonzero().squeeze(1) for c in range(classes)]
        # The first class has as many as make the sum ``count``, if there are that many.
        first = min(count / float(kept.sum()), len(of_class[0]))
        ids = torch.cat([members[: round(first * float(share))] for members, share in zip(of_class, kept, strict=True)])
    given = labels[ids].clone()
    if name.startswith("mislabelled "):
        wrong = torch.randperm(len(ids), generator=generator)[: round(float(name.split()[1]) / 100 * len(ids))]
        given[wrong] = (given[wrong] + torch.randint(1, classes, (len(wrong),), generator=generator)) % classes
    elif name not in ("plain", "duplicated", "long tail"):
        raise ValueError(f"variant: got {name!r}; takes 'plain', 'duplicated', 'long tail' or 'mislabelled PERCENT'")
    return ids, given
