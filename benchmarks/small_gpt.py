"""The small language model of ``attent.bench``, and the texts it reads, byte by byte: for studies on language."""

from __future__ import annotations

import tarfile
from pathlib import Path

import torch
from torch import Tensor

from attent.bench.small_gpt import BYTES, Block, SmallGPT

__all__ = ["BYTES", "Block", "SmallGPT", "read_texts"]


def read_texts(source: str | Path) -> Tensor:
    """All ``.txt`` files of a folder or a tar archive, in the order of their names, as one uint8 tensor."""
    path = Path(source).expanduser()
    if path.is_dir():
        contents = [file.read_bytes() for file in sorted(path.glob("*.txt"))]
    else:
        with tarfile.open(path) as archive:
            members = sorted((m for m in archive if m.isfile() and m.name.endswith(".txt")), key=lambda m: m.name)
            contents = [archive.extractfile(m).read() for m in members]
    if not contents:
        raise ValueError(f"--texts: got {source}; takes a folder or a tar archive with .txt files")
    return torch.frombuffer(bytearray(b"\n".join(contents)), dtype=torch.uint8)
