"""Which backend runs an op: cuda | triton | torch. One asked for by name that cannot run is an error with its reason.

Each backend of an op is a plain function, tensors in, tensors out, registered here by name. ``"auto"`` takes the first
entry of :data:`MEASURED` that fits the device (a backend enters that table only with a committed measurement), else
triton on CUDA devices where the op has a Triton kernel, else torch.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from .._checks import refuse

BACKENDS = ("cuda", "triton", "torch")

#: op name -> backend name -> implementation
_implementations: dict[str, dict[str, Callable[..., Any]]] = {}

#: op name -> device type -> backend measured fastest there. Empty until a committed result fills it.
MEASURED: dict[str, dict[str, str]] = {}


def register(op: str, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: this function is how ``backend`` runs ``op``."""

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        _implementations.setdefault(op, {})[backend] = function
        return function

    return note


def backends() -> dict[str, str]:
    """Each backend and whether it can run here: ``"available"``, or the reason why not.

    >>> attent.backends()["torch"]
    'available'
    """
    return {name: unavailable(name) or "available" for name in BACKENDS}


def unavailable(backend: str) -> str | None:
    """Why ``backend`` cannot run on this machine; None if it can."""
    if backend == "torch":
        return None
    if not any(backend in table for table in _implementations.values()):
        return f"this release of attent has no {backend} kernels yet"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (it is on Linux x86-64 only)"
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for testing)"
    if backend == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    return None


def choose(op: str, backend: str, device: torch.device) -> str:
    """The backend that runs ``op`` on ``device``: a name is taken or refused, ``"auto"`` picks."""
    table = _implementations[op]
    if backend == "auto":
        measured = MEASURED.get(op, {}).get(device.type)
        if measured is not None and measured in table and unavailable(measured) is None:
            return measured
        if device.type == "cuda" and "triton" in table and unavailable("triton") is None:
            return "triton"
        return "torch"
    if backend not in BACKENDS:
        refuse("backend", repr(backend), "'auto', " + ", ".join(repr(b) for b in BACKENDS))
    reason = unavailable(backend)
    if reason is None and backend not in table:
        reason = f"{op} has no {backend} kernel yet"
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if reason is None and backend != "torch" and device.type != "cuda" and not interpreted:
        reason = f"it takes CUDA tensors, these are on {device}"
    if reason is not None:
        refuse("backend", repr(backend), f"a backend that can run here; {backend!r} cannot: {reason}")
    return backend


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function that a chosen backend runs ``op`` with."""
    return _implementations[op][backend]
