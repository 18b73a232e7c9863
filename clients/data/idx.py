"""Images in IDX files, the format of MNIST (LeCun, Cortes, Burges 1998): `NAME-images-idx3-ubyte.gz`, and
`NAME-labels-idx1-ubyte.gz` beside it.

An image becomes a row: `image` (its number, counted from 1; nobody else's), `label`, and `pixel0`, `pixel1`, … row by
row, 0 to 255.
"""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["IMAGES", "label_file", "read_images"]

#: How a file of images ends.
IMAGES = "-images-idx3-ubyte.gz"
_LABELS = "-labels-idx1-ubyte.gz"
_LARGEST = 2**31


def label_file(images: Path) -> Path:
    """Where the labels of a file of images lie."""
    return images.with_name(images.name.removesuffix(IMAGES) + _LABELS)


def read_images(path: Path) -> pd.DataFrame:
    """The images and their labels.

    Raises:
        ValueError: One of the two is no such file, or they do not go together.
        OSError: One cannot be read.
    """
    images, labels = _read(path, 3), _read(label_file(path), 1)
    if len(images) != len(labels):
        raise ValueError(f"{len(images):,} images, {len(labels):,} labels")
    flat = images.reshape(len(images), -1)
    table = pd.DataFrame(flat, columns=[f"pixel{i}" for i in range(flat.shape[1])])
    table.insert(0, "image", np.arange(1, len(flat) + 1).astype(str))
    table.insert(1, "label", labels)
    return table


def _read(path: Path, dimensions: int) -> NDArray[np.uint8]:
    with gzip.open(path, "rb") as stream:
        head = stream.read(4 + 4 * dimensions)
        shape = [int(n) for n in np.frombuffer(head[4:], dtype=">u4")] if len(head) == 4 + 4 * dimensions else []
        if head[:4] != bytes([0, 0, 8, dimensions]) or math.prod(shape) > _LARGEST:
            raise ValueError(f"{path.name} is no IDX file of bytes in {dimensions} dimension{'s'[: dimensions - 1]}")
        data = stream.read(math.prod(shape) + 1)
    if len(data) != math.prod(shape):
        raise ValueError(f"{path.name} holds another number of bytes than its head says")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)
