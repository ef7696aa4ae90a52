"""Makes the demo's images: of each class of Fashion-MNIST the first 1,000 to train on, the first 200 to test on.

    python tools/make_demo_data.py FOLDER_WITH_THE_FOUR_IDX_GZ_FILES [--out python/attent/demo/data]

The images keep the order of the original files and the four files their names and layout (gzipped idx), so that one
reader serves the subset and the full set. The same input gives the same idx bytes; the checksums in ORIGIN.txt are of
those, not of the gzip wrapping, which differs between zlib builds.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np

from attent.demo.data import CLASSES, FILES, read_idx

TRAIN_PER_CLASS, TEST_PER_CLASS = 1000, 200


def first_of_each_class(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Positions of the first ``per_class`` examples of every class, in file order."""
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(len(CLASSES))]))


def idx_bytes(array: np.ndarray) -> bytes:
    """An unsigned-byte array in the idx layout: two zero bytes, type 8, number of dimensions, sizes, the values."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, default=Path("python/attent/demo/data"))
    args = parser.parse_args()
    for part, per_class in (("train", TRAIN_PER_CLASS), ("test", TEST_PER_CLASS)):
        images, labels = (read_idx(args.source / name) for name in FILES[part])
        chosen = first_of_each_class(labels, per_class)
        for name, array in zip(FILES[part], (images[chosen], labels[chosen]), strict=True):
            content = idx_bytes(array)
            with gzip.GzipFile(args.out / name, "wb", compresslevel=9, mtime=0) as file:
                file.write(content)
            size = (args.out / name).stat().st_size
            print(f"{hashlib.sha256(content).hexdigest()}  {name}  {array.shape} {size:,} bytes gzipped")


if __name__ == "__main__":
    main()
