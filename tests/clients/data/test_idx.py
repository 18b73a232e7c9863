"""Images in IDX files."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from confide.clients.data.idx import IMAGES, label_file, read_images
from confide.clients.data.source import files_of, read_table, resolve
from confide.errors import DataError


def write(folder: Path, images: int = 5, labels: int = 5, side: int = 3) -> Path:
    """A file of images whose pixels count up, with labels beside it."""
    path = folder / f"train{IMAGES}"
    pixels = bytes(i % 256 for i in range(images * side * side))
    head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (images, side, side))
    path.write_bytes(gzip.compress(head + pixels))
    label_file(path).write_bytes(gzip.compress(bytes([0, 0, 8, 1]) + labels.to_bytes(4, "big") + bytes(range(labels))))
    return path


def test_an_image_is_a_row(tmp_path: Path) -> None:
    table = read_table(write(tmp_path), text=("image",))
    assert list(table.columns) == ["image", "label", *(f"pixel{i}" for i in range(9))]
    assert list(table["image"]) == ["1", "2", "3", "4", "5"]
    assert list(table["label"]) == [0, 1, 2, 3, 4]
    assert np.array_equal(table.iloc[2, 2:].to_numpy(dtype=int), np.arange(18, 27))


def test_both_files_are_what_a_run_is_made_from(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert files_of(path.name, tmp_path) == [path, label_file(path)]


def test_what_debian_has_is_said_in_one_line() -> None:
    with pytest.raises(DataError) as told:
        resolve("/usr/share/datasets/fashion-mnist/nothing-images-idx3-ubyte.gz", Path())
    assert told.value.hint == "run: apt install dataset-fashion-mnist"


def test_counts_that_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="5 images, 4 labels"):
        read_table(write(tmp_path, labels=4))


def test_labels_that_are_not_there(tmp_path: Path) -> None:
    path = write(tmp_path)
    label_file(path).unlink()
    with pytest.raises(DataError, match="cannot be read"):
        read_table(path)


@given(data=st.data())
def test_hostile_bytes_are_an_error_and_nothing_else(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("idx"))
    raw = bytearray(gzip.decompress(path.read_bytes()))
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, min(len(raw), 20) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    path.write_bytes(data.draw(st.sampled_from([gzip.compress(bytes(raw[:cut])), bytes(raw[:cut])])))
    with contextlib.suppress(ValueError, OSError, EOFError, zlib.error):
        assert len(read_images(path)) == 5
