"""Tile sizes of the Triton scorer by architecture and dtype: why each is so.

Nothing here has run on a GPU yet: it is derived, and checked by ahead-of-time compilation for registers, spills and
shared memory. ``ATTENT_AUTOTUNE=1`` measures :data:`CANDIDATES` (see :mod:`..autotune`).
"""

from __future__ import annotations

from typing import Any

import torch

from ..triton_target import INTERPRETED, compute_capability
from .cut import Configuration, Cut, cut
from .scorer_workspace import Choose, ToScore

__all__ = ["CANDIDATES", "Configuration", "Cut", "configuration", "cut", "kind_of", "processors"]


#: Half precision, by least compute capability. wgmma reads both operands from shared memory, which delivers 128 bytes a
#: clock: 128 × 256 tiles take about that at the tensor cores' full rate, 128 × 128 tiles a third more. A row of 256
#: logits is 128 accumulators in each thread of 8 warps, as many as leave room for the sums. mma.sync (sm_80) holds its
#: operands in registers too, so there 128 columns are what fits.
#:
#: Operands come by plain pointers (cp.async), not by TMA descriptors: those made on the device need a host-side
#: allocator, those made on the host are encoded anew for each call, and neither could be measured here.
HALF = {
    80: Configuration(128, 128, 32, 8, 4, 1, False),
    90: Configuration(128, 256, 64, 8, 3, 1, True),
}

#: float32 in full precision ("ieee") has no tensor cores: small tiles, whose operands fit in registers beside the sums.
#: Without a number the compiler would rather spill, where the launch chooses too, than hold one program less at a time.
FLOAT32 = Configuration(64, 64, 32, 8, 2, 1, False, 32, 168)

#: What options add to a logit stands in registers beside it: label smoothing by class weights its mass, a softcap its
#: slope. Then fewer logits are summed up at a time; and with the first, or the second beside any smoothing, a choice or
#: norms of hidden states, whose numbers live through the products, half the accumulators and no loads ahead.
_CROWDED: dict[str, Any] = {"classes": 128, "width": 64, "stages": 3, "flatten": False, "columns": 16}
#: A target of probabilities is loaded as adjacent elements of a row, so that a thread meets as many rows as a warp has
#: columns less, and keeps its sums for each: half the rows as well, and a quarter of the accumulators beside a choice.
#: The same where class weights, smoothing and a softcap come together.
_SOFT: dict[str, Any] = _CROWDED | {"rows": 64}

#: What the search tries in half precision.
CANDIDATES = (
    Configuration(128, 256, 64, 8, 3, 1, True),
    Configuration(128, 256, 64, 8, 3, 1, False),
    Configuration(128, 256, 64, 8, 4, 1, True),
    Configuration(256, 128, 64, 8, 3, 1, True),
    Configuration(128, 128, 64, 8, 3, 1, True),
    Configuration(128, 128, 64, 4, 3, 2, False),
    Configuration(64, 256, 64, 4, 3, 1, True),
    Configuration(128, 128, 32, 8, 4, 1, False),
)

#: Values are what matters in the interpreter, and each operation costs, however small its tensors are.
_INTERPRETED = Configuration(32, 32, 32, 4, 1, 1, False)

#: The least number of columns of a matrix product on tensor cores.
_FEWEST_CLASSES = 16


def configuration(
    dtype: torch.dtype,
    tokens: int,
    classes: int,
    *,
    aligned: bool = True,
    capped: bool = False,
    smoothed: bool = False,
    weighted: bool = False,
    soft: bool = False,
    extra: bool = False,
) -> Configuration:
    """What the table says, in tiles that are not mostly empty for a few tokens or classes.

    ``aligned``: operands are loaded by vectors; element by element they take an address each. ``smoothed``: labels
    are; ``weighted``: and by class weights; ``soft``: the target is probabilities; ``extra``: the launch chooses, or
    takes the norms of hidden states.
    """
    if INTERPRETED:
        return _INTERPRETED
    if dtype == torch.float32:
        chosen = FLOAT32._replace(registers=255) if soft else FLOAT32  # as many sums as below
        if capped and extra and not soft:  # with 32, or with 168 registers, it spills in Triton 3.6.0
            chosen = chosen._replace(columns=16, registers=255)
    else:
        capability = compute_capability()
        chosen = HALF[max((least for least in HALF if least <= capability), default=min(HALF))]
        if soft:
            chosen = chosen._replace(**_SOFT | {"classes": 64 if extra else 128})
        elif weighted and capped:  # without a number sm_100's compiler spills to have two programs at a time
            chosen = chosen._replace(**_SOFT | {"registers": 255})
        elif weighted or (capped and (smoothed or extra)):
            chosen = chosen._replace(**_CROWDED)
            if 90 <= capability < 100 and not weighted and not extra:
                chosen = chosen._replace(columns=32)  # with 16, 24 bytes in Triton 3.5.1 and 3.6.0
        elif capped:
            # With 16 sm_90 spills 104 bytes; with 8 sm_100's compiler takes twice the time, 23 s.
            chosen = chosen._replace(columns=8 if 90 <= capability < 100 else 16)
    if not aligned:
        chosen = chosen._replace(classes=min(chosen.classes, 64), width=32, flatten=False)
    few = max(_FEWEST_CLASSES, 1 << max(0, classes - 1).bit_length())
    if few <= chosen.classes // 2:
        chosen = chosen._replace(classes=few, warps=4, resident=2)
    if tokens <= 64 and chosen.rows > 64:  # the least number of rows of wgmma
        chosen = chosen._replace(rows=64, classes=min(chosen.classes, 128), warps=4)
    return chosen


def kind_of(what: ToScore, choose: Choose | None) -> tuple[Any, ...]:
    """What decides which tiles are fastest: dtype, sizes within 2, options."""
    hidden = what.input
    optional = what.linear_bias, what.weight, what.cu_seqlens, choose
    return (
        hidden.dtype,
        hidden.shape[-1],
        (hidden.numel() // hidden.shape[-1]).bit_length(),
        what.linear_weight.shape[0].bit_length(),
        what.target.is_floating_point(),
        bool(what.label_smoothing),
        bool(what.softcap),
        *(value is None for value in optional),
    )


def processors(device: torch.device) -> int:
    """Its multiprocessors; those of H100 and H200 where nothing runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
