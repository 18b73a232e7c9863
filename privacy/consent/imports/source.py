"""Bytes into lines and JSON trees, with a bound on everything that hostile bytes could blow up."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn, cast

__all__ = ["MAX_DOCUMENT", "Lines", "PlainLines", "UnreadableError", "documents", "parse_json"]

#: Characters of a line, and of a record that runs over several lines.
_MAX_LINE = 1 << 20
#: Bytes of a file that is one JSON document; what has one record a line may have any length.
MAX_DOCUMENT = 64 << 20
#: A line that is longer needs care.
_LONG = 1 << 14
#: Bytes that are looked at together.
_BLOCK = 1 << 16
_PRINTS = bytes([*range(0x20, 0x7F), *b"\n"])
_MAX_DEPTH = 64
_MAX_DIGITS = 40


class UnreadableError(Exception):
    """Stops the reading of a file or a document; becomes a rejection, never leaves this package."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Lines:
    """The lines of a UTF-8 stream, with their ends as they are.

    Args:
        stream: From its start, or from the start of a line.
        number: Lines of it that were read before.

    Raises:
        UnreadableError: While iterating: it is not text, or a line is too long.
    """

    def __init__(self, stream: BinaryIO, number: int = 0) -> None:
        self._stream, self._encoding = stream, "utf-8" if number else "utf-8-sig"
        #: Lines given out, and those before.
        self.number = number
        #: Characters since the reader last said that a record is complete.
        self.pending = 0

    def __iter__(self) -> Iterator[str]:
        text = io.TextIOWrapper(self._stream, encoding=self._encoding, errors="strict", newline="")
        try:
            while True:
                line = text.readline(_MAX_LINE + 1)
                if not line:
                    return
                self.number += 1
                self.pending += len(line)
                if self.pending > _MAX_LINE:
                    raise UnreadableError(f"is a record of more than {_MAX_LINE:,} characters")
                if "\0" in line:
                    raise UnreadableError("holds a NUL byte, so it is not text")
                yield line
        except UnicodeDecodeError as error:
            what = (
                f"cannot be read as UTF-8 text: byte {error.object[error.start]:#04x}, in this line or one soon after"
            )
            raise UnreadableError(what) from None
        finally:
            text.detach()


class PlainLines:
    """The first blocks of lines of a stream, as long as nothing in them needs care: no quote, no end of line but a line
    feed (or both), nothing that does not print, no line beyond `_LONG`.

    Args:
        stream: From its start.
        delimiter: One character, which may be one that does not print.
    """

    def __init__(self, stream: BinaryIO, delimiter: str) -> None:
        self._stream, self._delimiter = stream, delimiter
        self._kept, self._ended = b"", not delimiter.isascii()
        #: Lines given out.
        self.number = 0

    def header(self) -> list[str] | None:
        """The cells of the first line; None where it needs care."""
        self._kept = first = b"" if self._ended else self._stream.readline(_LONG)
        if not first.endswith(b"\n") or (lines := self._plain(first)) is None or not lines[0]:
            self._ended = True
            return None
        self._kept, self.number = b"", 1
        return lines[0].split(self._delimiter)

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        """(number of the line before, lines without their ends)."""
        while not self._ended:
            read = self._stream.read(_BLOCK)
            whole, end, begun = (self._kept + read).rpartition(b"\n") if read else (self._kept, b"", b"")
            self._ended = not read
            self._kept = whole + end + begun
            if not whole + end or (lines := self._plain(whole + end)) is None:
                self._ended = True
                return
            self._kept = begun
            self.number += len(lines)
            yield self.number - len(lines), lines

    def rest(self) -> BinaryIO:
        """What was not given out, from the start of a line."""
        return cast(BinaryIO, io.BufferedReader(_Joined(self._kept, self._stream)))

    def _plain(self, data: bytes) -> list[str] | None:
        if b'"' in data or (b"\r" in data and b"\r" in (data := data.replace(b"\r\n", b"\n"))):
            return None
        odd = data.translate(None, _PRINTS)
        if odd.strip(self._delimiter.encode()):
            text = _decoded(data)
            if not text or not self._delimiter.isprintable() or not text.replace("\n", "").isprintable():
                return None
        else:
            text = data.decode("ascii")
        lines = text.removesuffix("\n").split("\n")
        return None if max(map(len, lines)) > _LONG else lines


class _Joined(io.RawIOBase):
    """Bytes, and then a stream."""

    def __init__(self, first: bytes, stream: BinaryIO) -> None:
        super().__init__()
        self._first, self._stream = first, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # the buffer is what BufferedReader gives
        data = self._first[: len(buffer)] if self._first else self._stream.read(len(buffer))
        self._first = self._first[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""


def documents(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """(line, tree) of every JSON document: one a line, or the whole file. A document that cannot be read comes as an
    `UnreadableError` in the tree's place.

    Raises:
        UnreadableError: The file cannot be read on.
    """
    first = stream.readline(MAX_DOCUMENT + 1).removeprefix(b"\xef\xbb\xbf")
    line = 1
    while first and not first.strip():
        first, line = stream.readline(MAX_DOCUMENT + 1), line + 1
    if len(first) > MAX_DOCUMENT:
        raise UnreadableError(_TOO_LARGE)
    following = stream.readline(MAX_DOCUMENT + 1)
    try:
        tree: Any = parse_json(first)
    except UnreadableError:
        # The first line is no document of its own, so all lines together are one.
        whole = first + following + stream.read(max(0, MAX_DOCUMENT + 1 - len(first) - len(following)))
        if len(whole) > MAX_DOCUMENT:
            raise UnreadableError(_TOO_LARGE) from None
        yield line, _parsed(whole)
        return
    yield line, tree
    while following:
        line += 1
        if following.strip():
            yield line, _parsed(following)
        following = stream.readline(MAX_DOCUMENT + 1)
        if len(following) > MAX_DOCUMENT:
            raise UnreadableError(_TOO_LARGE)


_TOO_LARGE = f"is a JSON document of more than {MAX_DOCUMENT >> 20} MiB; write one record a line"


def _parsed(data: bytes) -> Any:
    try:
        return parse_json(data)
    except UnreadableError as error:
        return error


def parse_json(data: bytes | str) -> Any:
    """A tree of objects, lists, text, numbers, truth values and null, in which nothing is ambiguous.

    Raises:
        UnreadableError: It is not JSON in UTF-8; names a key twice; holds half a character, a NUL, or a number that is
            not finite or absurdly long; or is nested too deeply.
    """
    try:
        text = data.decode() if isinstance(data, bytes) else data
        if "\0" in text:
            raise UnreadableError("holds a NUL byte, so it is not text")
        tree = _decoder.decode(text)
    except UnicodeDecodeError as error:
        raise UnreadableError(f"cannot be read as UTF-8 text: byte {data[error.start]!r}") from None
    except RecursionError:
        raise UnreadableError(_TOO_DEEP) from None
    except json.JSONDecodeError as error:
        raise UnreadableError(f"is not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    _look_through(tree)
    return tree


_TOO_DEEP = f"is nested more than {_MAX_DEPTH} levels deep"


def _look_through(tree: Any) -> None:
    """Refuse depth and lone surrogates, without recursion."""
    level = [tree]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                below += node
                below += node.values()
            elif isinstance(node, list):
                below += node
            elif isinstance(node, str) and not node.isascii() and any("\ud800" <= c <= "\udfff" for c in node):
                raise UnreadableError("holds half a character (a lone surrogate)")
        if not below:
            return
        level = below
    raise UnreadableError(_TOO_DEEP)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise UnreadableError(f"names {twice[:40]!r} twice in one object")
    return found


def _whole(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise UnreadableError("holds a number of absurd length")
    return int(text)


def _real(text: str) -> float:
    value = float(text) if len(text) <= _MAX_DIGITS else math.inf
    if not math.isfinite(value):
        raise UnreadableError("holds a number that is not finite, or of absurd length")
    return value


def _no_constant(text: str) -> NoReturn:
    raise UnreadableError(f"holds {text}, which is not JSON")


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_whole, parse_float=_real, parse_constant=_no_constant)
