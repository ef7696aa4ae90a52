"""A teacher's state as a file: written whole or not at all, and read without running code from it."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
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
        with open(unfinished, "wb") as file, _with_checksums():
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the contents
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_state(teacher: Teacher, path: str | Path) -> dict[str, Any]:
    """Load ``path``, a file of :func:`write_state`, into ``teacher``; returns the state.

    Raises:
        ValueError: the file is not there, is torn, or is not a state of this teacher.

    >>> import tempfile
    >>> teacher = attent.Teacher(4, total_epochs=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_state(teacher.state_dict(), f"{folder}/teacher.pt")
    ...     sorted(read_state(teacher, f"{folder}/teacher.pt")["position"])
    ['epoch', 'position']
    """
    state = read_file(path)
    teacher.load_state_dict(state)
    return state


def read_file(path: str | Path) -> dict[str, Any]:
    """The state in a file of :func:`write_state`, on the CPU, if it is whole.

    ``torch.load`` finds a file that was cut off; a byte that changed in a tensor it does not, so the checksums that
    ``torch.save`` wrote are looked at first.

    Args:
        path: that file.

    Returns:
        The dictionary that was written.

    Raises:
        ValueError: the file is not there, or is not what :func:`write_state` wrote.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_state({"step": 3, "teacher": {}}, f"{folder}/state.pt")
    ...     read_file(f"{folder}/state.pt")["step"]
    3
    """
    if not Path(path).is_file():
        refuse("checkpoint", f"no {path}", "a checkpoint saved while the teacher was in use, which holds its state")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            for record in archive.infolist():
                if record.external_attr & 0x10:  # one bit of the directory makes torch read nothing into a tensor
                    damaged = record.filename
        state: dict[str, Any] = {} if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever garbled bytes make of themselves
        damaged = f"{type(error).__name__}: {error}"
    if damaged:
        refuse("checkpoint", f"{path}, which is torn or no such file ({damaged})", "a file that write_state wrote")
    return state


@contextmanager
def _with_checksums() -> Iterator[None]:
    """Whatever is set elsewhere, what is saved here has its checksums."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
