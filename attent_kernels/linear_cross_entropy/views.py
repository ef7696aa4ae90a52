"""Tensors as kernels see them: a pointer and its strides, in elements, so that no layout needs a copy."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

Pointer = Any  # a tensor on the host, a pointer in the kernel


class Vector(NamedTuple):
    """[n]"""

    ptr: Pointer
    stride: int


class Matrix(NamedTuple):
    """[rows, columns]"""

    ptr: Pointer
    row: int
    column: int


class TokenRows(NamedTuple):
    """[B, T, columns], row r being token r % T of example r // T; [N, columns] is [N, 1, columns]."""

    ptr: Pointer
    example: int
    token: int
    column: int


def vector(values: Tensor | None) -> Vector | None:
    return None if values is None else Vector(values, values.stride(0))


def token_rows(values: Tensor) -> TokenRows:
    """Of a tensor whose last dimension is the columns."""
    if values.dim() == 2:
        return TokenRows(values, values.stride(0), 0, values.stride(1))
    return TokenRows(values, *values.stride())


def is_aligned(values: Tensor) -> bool:
    """Whether Triton loads rows of a matrix by vectors: it looks for strides that 16 divides, and adjacent columns."""
    return values.stride(-1) == 1 and values.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in values.stride()[:-1])
