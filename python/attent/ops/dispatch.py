"""Which backend runs an op: cuda | triton | torch. One asked for by name that cannot run is an error with its reason.

Each backend of an op is a plain function, tensors in, tensors out, registered here by name. ``"auto"`` takes the first
entry of :data:`MEASURED` that fits the device (a backend enters that table only with a committed measurement), else
triton on CUDA devices where the op has a Triton kernel, else torch.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from attent_kernels import native

from .._checks import describe, refuse

BACKENDS = ("cuda", "triton", "torch")

#: op name -> backend name -> implementation
_implementations: dict[str, dict[str, Callable[..., Any]]] = {}

#: (op name, backend name) -> why that backend cannot run a call, of what the op calls :func:`choose` with; None: it can
_refusals: dict[tuple[str, str], Callable[..., str | None]] = {}

#: op name -> device type -> backend measured fastest there. Empty until a committed result fills it.
MEASURED: dict[str, dict[str, str]] = {}


def register(
    op: str, backend: str, *, refuses: Callable[..., str | None] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: this function is how ``backend`` runs ``op``; ``refuses`` says why not, of calls it does not take."""

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        _implementations.setdefault(op, {})[backend] = function
        if refuses is not None:
            _refusals[op, backend] = refuses
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
    if backend == "triton":
        if "triton" not in sys.modules and importlib.util.find_spec("triton") is None:
            return "triton is not installed (it is on Linux x86-64 only)"
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for testing)"
    if backend == "cuda":
        return native.cuda_unavailable()
    return None


# Constant to torch.compile: it does not change within a process, and neither the import system (PyTorch 2.9) nor the
# compiled module's functions can be traced. It is what torch.compiler.assume_constant_result sets; that imports the
# compiler, which takes a second.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(op: str, backend: str, device: torch.device, *call: Any) -> str:
    """The backend that runs ``op`` on ``device``: a name is taken or refused, ``"auto"`` picks.

    ``call`` is what a backend's ``refuses`` looks at, the same for each backend of an op.
    """
    table = _implementations[op]
    if not isinstance(backend, str):
        refuse("backend", describe(backend), "'auto', " + ", ".join(repr(b) for b in BACKENDS))
    if backend == "auto":
        for name in (MEASURED.get(op, {}).get(device.type), "triton" if device.type == "cuda" else None):
            if name in table and unavailable(name) is None and _refusal(op, name, call) is None:
                return name
        return "torch"
    if backend not in BACKENDS:
        refuse("backend", repr(backend), "'auto', " + ", ".join(repr(b) for b in BACKENDS))
    reason = unavailable(backend)
    if reason is None and backend not in table:
        reason = f"{op} has no {backend} kernel yet"
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if reason is None and backend != "torch" and device.type != "cuda" and not interpreted:
        reason = f"it takes CUDA tensors, these are on {device}"
    if reason is None:
        reason = _refusal(op, backend, call)
    if reason is not None:
        refuse("backend", repr(backend), f"a backend that can run here; {backend!r} cannot: {reason}")
    return backend


def _refusal(op: str, backend: str, call: tuple[Any, ...]) -> str | None:
    refuses = _refusals.get((op, backend))
    return None if refuses is None else refuses(*call)


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function that a chosen backend runs ``op`` with."""
    return _implementations[op][backend]
