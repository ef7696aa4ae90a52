"""What the public edge says when an argument is wrong: which one, what came, what is taken.

Checks live at the public edge, once; code behind it trusts its inputs. Shapes, dtypes and devices are always checked.
Values (labels, ``cu_seqlens``, lengths) are read only where that costs no synchronisation: see :func:`values_readable`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int32, torch.int64)


def refuse(argument: str, got: object, takes: str) -> NoReturn:
    """Raise the library's one form of complaint: a ``ValueError`` that names the argument."""
    raise ValueError(f"{argument}: got {got}; takes {takes}")


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def describe(value: object) -> str:
    """A short description of what was passed: a tensor by its shape, dtype and device, anything else by its repr."""
    if isinstance(value, Tensor):
        kind = dtype_name(value.dtype)
        if not is_strided(value):  # its shape may not even be defined
            kind += " nested" if value.is_nested else " " + str(value.layout).removeprefix("torch.")
            return f"a {kind} tensor on {value.device}"
        return f"a {kind} tensor of shape {tuple(value.shape)} on {value.device}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}... ({type(value).__name__})"


def check_tensor(
    argument: str,
    value: object,
    takes: str | Callable[[], str],
    *,
    shape: Sequence[int | None] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Refuse ``value`` unless it is a tensor of this shape (None: any size), one of these dtypes, on this device.

    Sparse and nested tensors are refused: no op here reads their layouts.
    ``takes`` is a function where it names sizes: they may be symbols, which a compiler's trace cannot put into words.
    """
    if not isinstance(value, Tensor):
        refuse(argument, describe(value), in_words(takes))
    if not is_strided(value):
        refuse(argument, describe(value), f"{in_words(takes)}, a dense tensor")
    if shape is not None and not has_shape(value, shape):
        refuse(argument, describe(value), in_words(takes))
    if dtypes is not None and value.dtype not in dtypes:
        refuse(argument, describe(value), in_words(takes))
    if device is not None and value.device != device:
        refuse(argument, describe(value), f"{in_words(takes)}, on {device} like the other tensors")
    return value


def is_strided(value: Tensor) -> bool:
    """Whether ``value`` has elements at strides: neither sparse nor nested."""
    return value.layout == torch.strided and not value.is_nested


def check_has_values(argument: str, value: Tensor) -> None:
    """Refuse a meta tensor, for what is kept and read later: the error would come far from its cause."""
    if value.is_meta:
        refuse(argument, describe(value), "a tensor with values")


def check_ids(example_ids: Tensor, num_examples: int) -> None:
    """Refuse ids outside [0, N), where they can be read at no cost, and ids without values."""
    check_has_values("example_ids", example_ids)
    if values_readable(example_ids) and example_ids.numel() > 0:
        low, high = (int(bound) for bound in example_ids.aminmax())
        if low < 0 or high >= num_examples:
            takes = f"ids in [0, num_examples={num_examples}), as attent.indexed gives them"
            refuse("example_ids", low if low < 0 else high, takes)


def has_shape(value: Tensor, shape: Sequence[int | None]) -> bool:
    """Whether ``value`` is of this shape; None: any size."""
    sizes = value.shape
    if len(sizes) != len(shape):
        return False
    for want, size in zip(shape, sizes, strict=True):  # noqa: SIM110  # all() of a generator takes three times as long
        if want is not None and want != size:
            return False
    return True


def in_words(takes: str | Callable[[], str]) -> str:
    return takes if isinstance(takes, str) else takes()


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    """Refuse ``value`` unless it is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        refuse(argument, describe(value), "one of " + ", ".join(repr(c) for c in choices))


def check_number(
    argument: str, value: object, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> float:
    """Refuse ``value`` unless it is a finite number in [low, high] (or (low, high] with ``open_low``)."""
    takes = f"a number in {'(' if open_low else '['}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse(argument, describe(value), takes)
    # Comparisons rather than math.isfinite: a compiler's trace may hold a symbol here. NaN fails the first.
    if not -math.inf < value < math.inf or value < low or value > high or (open_low and value == low):
        refuse(argument, value, takes)
    return value


def check_int(argument: str, value: object, *, low: int | None = None, high: int | None = None, why: str = "") -> None:
    """Refuse ``value`` unless it is an int in [low, high]; a compiler's symbolic ints are taken as they are."""
    if isinstance(value, torch.SymInt):
        return
    fits = isinstance(value, int) and (low is None or value >= low) and (high is None or value <= high)
    if not fits or isinstance(value, bool):
        # Written only now: in a compiler's trace, formatting a symbolic bound would pin it to one value.
        span = f"[{'-inf' if low is None else low}, {'inf' if high is None else high}]"
        refuse(argument, describe(value), f"an int in {span}" + (f" ({why})" if why else ""))


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on this device; None where it is off. Meta tensors have none, and asking is an error."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def values_readable(value: Tensor) -> bool:
    """Whether values may be read to check them: on CPU outside a trace, elsewhere only with ATTENT_CHECK=1."""
    if torch.compiler.is_compiling() or isinstance(value, torch._subclasses.FakeTensor) or value.is_meta:
        return False
    return value.device.type == "cpu" or os.environ.get("ATTENT_CHECK") == "1"


def check_cu_seqlens(argument: str, value: object, total: int, device: torch.device, total_name: str) -> Tensor:
    """Refuse ``value`` unless it is int32 ``[B+1]``, rises from 0 to ``total`` and never falls."""

    def takes() -> str:
        return f"int32 [B+1] rising from 0 to {total_name}={total}, never falling"

    cu_seqlens = check_tensor(argument, value, takes, shape=(None,), dtypes=(torch.int32,), device=device)
    if cu_seqlens.numel() < 1:
        refuse(argument, describe(cu_seqlens), takes())
    if values_readable(cu_seqlens) and not (
        int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == total and bool((cu_seqlens.diff() >= 0).all())
    ):
        refuse(argument, cu_seqlens.tolist() if cu_seqlens.numel() <= 16 else describe(cu_seqlens), takes())
    return cu_seqlens
