"""The demo's images: Fashion-MNIST from gzipped idx files, the shipped subset or any folder that holds the full set."""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .._checks import refuse

#: The four files of a folder: images and labels of each part.
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
IMAGE_SIZE = 28
SUBSET = "subset"
SUBSET_FOLDER = Path(__file__).parent / "data"
#: Mean and standard deviation of the training pixels, on the scale 0 to 1.
PIXEL_MEAN, PIXEL_STD = 0.2860, 0.3530


@dataclass(frozen=True)
class Images:
    """A training and a test set in memory."""

    name: str
    train_images: Tensor  # [N, 28, 28] float32, normalised
    train_labels: Tensor  # [N] int64
    test_images: Tensor  # [M, 28, 28] float32, normalised
    test_labels: Tensor  # [M] int64

    def pixels(self, ids: Tensor) -> Tensor:
        """Training images as they look, [n, 28, 28] in 0 (black) to 1 (white)."""
        return self.train_images[ids] * PIXEL_STD + PIXEL_MEAN


def load(source: str = SUBSET) -> Images:
    """The images that ``--data`` names: ``"subset"`` (shipped, 10,000 + 2,000) or ``"fashion-mnist:FOLDER"``.

    Raises ``ValueError`` if the name is another, or a file of the folder is missing, malformed or unfit for the others.

    >>> from attent.demo.data import load
    >>> images = load()
    >>> images.train_images.shape, images.test_images.shape
    (torch.Size([10000, 28, 28]), torch.Size([2000, 28, 28]))
    """
    kind, _, folder = source.partition(":")
    if source == SUBSET:
        path, name = SUBSET_FOLDER, "Fashion-MNIST, shipped subset"
    elif kind == "fashion-mnist" and folder:
        path, name = Path(folder).expanduser(), f"Fashion-MNIST, {folder}"
    else:
        refuse("--data", repr(source), f"{SUBSET!r} or 'fashion-mnist:FOLDER', the folder with its four .gz files")
    missing = [file for files in FILES.values() for file in files if not (path / file).is_file()]
    if missing:
        refuse("--data", repr(source), f"a folder with {', '.join(missing)}, not found in {path}")
    return Images(name, *_read_part(path, "train"), *_read_part(path, "test"))


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """The unsigned-byte array of one gzipped idx file; ``ValueError`` naming the file if it is anything else.

    The layout: two zero bytes, 8 for unsigned byte, the number of dimensions, each size as a big-endian 32-bit integer,
    then the values (http://yann.lecun.com/exdb/mnist/).
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        refuse(str(path), f"a file that does not unpack ({error})", "a gzipped idx file")
    takes = "an idx file of unsigned bytes"
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        refuse(str(path), f"a file that begins with {content[:4]!r}", takes)
    dimensions = content[3]
    header = 4 + 4 * dimensions
    if dimensions == 0 or len(content) < header:
        refuse(str(path), f"{len(content)} bytes and {dimensions} dimensions", takes)
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    values = np.frombuffer(content, np.uint8, offset=header)
    if values.size != int(np.prod(shape, dtype=np.int64)):
        refuse(str(path), f"{values.size} values", f"the {' x '.join(map(str, shape))} that its header announces")
    return values.reshape(shape)


def _read_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Normalised images and labels of one part, checked against each other."""
    image_file, label_file = (folder / file for file in FILES[part])
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.ndim != 3 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE) or len(images) == 0:
        refuse(str(image_file), f"shape {images.shape}", f"[N, {IMAGE_SIZE}, {IMAGE_SIZE}] with N >= 1")
    if labels.shape != (len(images),):
        refuse(str(label_file), f"shape {labels.shape}", f"[{len(images)}], a label for each image")
    if labels.max() >= len(CLASSES):
        refuse(str(label_file), f"label {labels.max()}", f"labels 0 to {len(CLASSES) - 1}")
    return _normalise(images), torch.from_numpy(labels.astype(np.int64))


def _normalise(images: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(images.astype(np.float32)).div_(255).sub_(PIXEL_MEAN).div_(PIXEL_STD)
