"""A teacher's state as a file: written whole or not at all, and read without running code from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ._checks import refuse

if TYPE_CHECKING:
    from .teacher import Teacher


def write_state(state: dict[str, Any], path: str | Path) -> None:
    """Write a state dict, the teacher's or a larger one, to ``path``; killed meanwhile, it leaves the old file, if any.

    >>> import os, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_state(attent.Teacher(4, total_epochs=2).state_dict(), f"{folder}/teacher.pt")
    ...     os.listdir(folder)
    ['teacher.pt']
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the contents
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_state(teacher: Teacher, path: str | Path) -> dict[str, Any]:
    """Load ``path``, a file of :func:`write_state`, into ``teacher``; returns the state.

    Raises:
        ValueError: the file is not there, or not a state of this teacher.

    >>> import tempfile
    >>> teacher = attent.Teacher(4, total_epochs=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_state(teacher.state_dict(), f"{folder}/teacher.pt")
    ...     sorted(read_state(teacher, f"{folder}/teacher.pt")["position"])
    ['epoch', 'position']
    """
    if not Path(path).is_file():
        refuse("checkpoint", f"no {path}", "a checkpoint saved while the teacher was in use, which holds its state")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    teacher.load_state_dict(state)
    return state
