"""From a file to checked events: everything is read once before anything is applied.

Invariants:
1. One rejection, and no event of the file is given out for applying.
2. What is applied is what was checked: the second reading must see the same bytes.
3. Memory does not grow with the file, but for 16 bytes an event and what the first rejections say.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from confide.errors import ConsentError
from confide.privacy.consent.imports.delimited import read_csv_events
from confide.privacy.consent.imports.event import ImportedEvent, Options, Rejection
from confide.privacy.consent.imports.formats import HEAD, Format, choose_format, reader_of
from confide.privacy.consent.imports.mapping import ColumnMapping

__all__ = ["Checked", "Progress", "check_file", "parse_csv", "read_checked", "read_csv"]

#: Bytes read, bytes there are, records read.
Progress = Callable[[int, int, int], None]
_KEPT = 10_000
_SHOWN = 10
_EVERY = 8_192


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """What a file was found to hold.

    Attributes:
        events: How many valid events.
        types: How many of each type.
        rejections: Why it cannot be taken; the first 10,000 of them.
        rejected: How many rejections there are.
        digest: SHA-256 of the bytes that were read.
    """

    path: Path
    format: Format
    options: Options
    mapping: ColumnMapping | None
    events: int
    types: dict[str, int]
    rejections: tuple[Rejection, ...]
    rejected: int
    digest: bytes

    def refusal(self) -> ConsentError | None:
        """The error that says why the file cannot be taken, if it cannot."""
        return _refusal(self.rejections, self.rejected, str(self.path)) if self.rejected else None


def check_file(
    path: Path, options: Options | None = None, *, mapping: ColumnMapping | None = None, name: str | None = None,
    progress: Progress | None = None,
) -> Checked:  # fmt: skip
    """Read a whole file and say what it holds. Applies nothing.

    Args:
        options: What the operator declares; the mapping's values are taken from the mapping.
        mapping: For a format of other columns, and for names of purposes.
        name: The format's name; None tells it from the content.
        progress: Called now and then.

    Raises:
        ConsentError: The file cannot be read, or does not show its format.
        ConfigError: There is no such format, or it needs a mapping.
    """
    purposes = options.purposes if options is not None else None
    chosen = Options(purposes=purposes, values=mapping.values if mapping is not None else {})
    with _open(path) as stream:
        form = _format(stream, path, mapping, name)
        found, kept, rejected = Counter[str](), list[Rejection](), 0
        for item in _counted(reader_of(form, mapping)(stream.buffered, chosen), stream, progress):
            if item.__class__ is Rejection:
                rejected += 1
                if rejected <= _KEPT:
                    kept.append(item)
            else:
                found[cast(ImportedEvent, item).type] += 1
        return Checked(
            path=path, format=form, options=chosen, mapping=mapping, events=found.total(), types=dict(found),
            rejections=tuple(kept), rejected=rejected, digest=stream.digest(),
        )  # fmt: skip


def read_checked(checked: Checked, progress: Progress | None = None) -> Iterator[ImportedEvent]:
    """The events of a file without rejections, for applying in one transaction.

    Raises:
        ConsentError: While iterating: the file has rejections, or is not the one that was checked. Whatever was
            applied of it must be taken back.
    """
    if (refusal := checked.refusal()) is not None:
        raise refusal
    with _open(checked.path) as stream:
        for item in _counted(
            reader_of(checked.format, checked.mapping)(stream.buffered, checked.options), stream, progress
        ):
            if isinstance(item, Rejection):
                break
            yield item
        if stream.digest() != checked.digest:
            raise ConsentError("changed while it was imported", where=str(checked.path),
                               hint="nothing was imported; import it again when nobody writes to it")  # fmt: skip


def read_csv(path: Path) -> list[ImportedEvent]:
    """Read a CSV file of events.

    Raises:
        ConsentError: It cannot be read, or any line is rejected; the rejected lines are named.
    """
    with _open(path, "CSV") as stream:
        events, rejections = _sorted(read_csv_events(stream.buffered, Options()))
    if rejections:
        raise _refusal(rejections, len(rejections), str(path))
    return events


def parse_csv(content: str) -> tuple[list[ImportedEvent], list[Rejection]]:
    """Validate the text of a CSV file. Pure: the same text gives the same answer."""
    if "\0" in content:
        return [], [Rejection(1, "file", "holds a NUL byte, so it is not text")]
    stream = io.BytesIO(content.encode("utf-8", "surrogatepass"))
    events, rejections = _sorted(read_csv_events(stream, Options()))
    return ([], rejections) if rejections else (events, [])


def _sorted(items: Iterator[ImportedEvent | Rejection]) -> tuple[list[ImportedEvent], list[Rejection]]:
    events, rejections = list[ImportedEvent](), list[Rejection]()
    for item in items:
        rejections.append(item) if isinstance(item, Rejection) else events.append(item)
    return events, rejections


def _counted(
    items: Iterator[ImportedEvent | Rejection], stream: _Source, progress: Progress | None
) -> Iterator[ImportedEvent | Rejection]:
    number = 0
    for number, item in enumerate(items, 1):
        if progress is not None and not number % _EVERY:
            progress(stream.position, stream.size, number)
        yield item
    if progress is not None:
        progress(stream.size, stream.size, number)


def _refusal(rejections: tuple[Rejection, ...] | list[Rejection], count: int, where: str) -> ConsentError:
    shown = "; ".join(map(str, rejections[:_SHOWN]))
    more = f"; and {count - _SHOWN:,} more" if count > _SHOWN else ""
    return ConsentError(shown + more, where=where, hint="nothing was imported; mend these lines and import again")


def _format(stream: _Source, path: Path, mapping: ColumnMapping | None, name: str | None) -> Format:
    try:
        return choose_format(stream.buffered.peek(HEAD), mapping, name)
    except ConsentError as error:
        raise ConsentError(error.what, where=str(path), hint=error.hint) from None


class _Source(io.RawIOBase):
    """A file that is read once, from its start to its end: counted and hashed on the way."""

    def __init__(self, file: io.FileIO, path: Path) -> None:
        super().__init__()
        self._file, self._path, self._hash = file, path, hashlib.sha256()
        self.position, self.size = 0, os.fstat(file.fileno()).st_size
        self.buffered = io.BufferedReader(self, HEAD)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # the buffer is what BufferedReader gives
        try:
            count = self._file.readinto(buffer) or 0
        except OSError as error:
            raise _unreadable(error, self._path) from None
        self._hash.update(buffer[:count])
        self.position += count
        return count

    def digest(self) -> bytes:
        """SHA-256 of the whole file."""
        while self.buffered.read(HEAD):
            pass
        return self._hash.digest()

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(path: Path, kind: str = "file") -> _Source:
    try:
        if not path.is_file() and path.exists():
            raise OSError(0, "it is not a file")
        return _Source(path.open("rb", buffering=0), path)
    except FileNotFoundError:
        raise ConsentError(
            "there is no such file", where=str(path), hint=f"give the path of a consent {kind}"
        ) from None
    except OSError as error:
        raise _unreadable(error, path) from None


def _unreadable(error: OSError, path: Path) -> ConsentError:
    return ConsentError(f"cannot be read: {error.strerror}", where=str(path), hint="give a readable file")
