"""``ATTENT_AUTOTUNE=1``: which tile sizes are fastest here, measured once for each kind of call, and printed.

For those who fill the table in :mod:`.configurations`: by default the table decides, so that a job never stops to
measure, and results never depend on what a clock said. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

from .configurations import CANDIDATES, Configuration, configuration
from .launch_scorer import score_tokens

_Kind = tuple[Any, ...]
_found: dict[_Kind, Configuration] = {}


def fastest(arguments: dict[str, Any], seconds_of: Callable[[Callable[[], object]], float] | None = None) -> Any:
    """The fastest of the candidates for a call like this one; None where nothing can be measured, or all is given.

    Args:
        arguments: of :func:`.launch_scorer.score_tokens`.
        seconds_of: measures a function; by default by ``triton.testing.do_bench`` on the GPU, cold L2.
    """
    hidden, weight = arguments["input"], arguments["linear_weight"]
    if seconds_of is None:
        if hidden.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return None
        seconds_of = _seconds
    if hidden.dtype == torch.float32 or not hidden.numel():
        return None
    kind = _kind(arguments)
    if kind not in _found:
        measured: dict[Configuration, float] = {}
        for candidate in dict.fromkeys((configuration(hidden.dtype, 1 << 20, 1 << 20), *CANDIDATES)):
            try:
                measured[candidate] = seconds_of(lambda tiles=candidate: score_tokens(**{**arguments, "tiles": tiles}))
            except triton.runtime.errors.OutOfResources:
                continue
        _found[kind] = min(measured, key=lambda candidate: measured[candidate])
        flops = 2 * hidden.numel() * weight.shape[0]
        print(f"attent: scorer, {hidden.numel() // hidden.shape[-1]} tokens, {tuple(weight.shape)}, {kind[1]}:")
        for candidate, seconds in sorted(measured.items(), key=lambda item: item[1]):
            print(f"  {candidate}  # {seconds * 1e3:.3f} ms, {flops / seconds / 1e12:.0f} TFLOP/s")
    return _found[kind]


def _seconds(function: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(function, return_mode="median")) / 1e3


def _kind(arguments: dict[str, Any]) -> _Kind:
    """What decides: the device, dtype, sizes up to a factor of 2, and what is computed."""
    hidden, weight, target = arguments["input"], arguments["linear_weight"], arguments["target"]
    return (
        hidden.device,
        hidden.dtype,
        hidden.shape[-1],
        (hidden.numel() // hidden.shape[-1]).bit_length(),
        weight.shape[0].bit_length(),
        target.is_floating_point(),
        *(bool(arguments[name]) for name in ("label_smoothing", "softcap")),
        *(arguments[name] is None for name in ("linear_bias", "weight", "cu_seqlens", "choose")),
    )
