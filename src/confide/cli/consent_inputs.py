"""What the commands about consent are given: files, instants, purposes, and the event that an officer records."""

from __future__ import annotations

import hashlib
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from confide.errors import ConfigError, ConsentError

if TYPE_CHECKING:
    from confide.privacy.consent.desk import ConsentDesk
    from confide.privacy.consent.imports import ImportedEvent
    from confide.protocol.keyfiles import SiteKeyBox

__all__ = [
    "HERE",
    "JsonOption",
    "KeyOption",
    "RegistryOption",
    "SubjectArgument",
    "erased_person",
    "event_now",
    "identifiers",
    "instant",
    "key_box",
    "notice_digest",
    "purpose_list",
    "refuse_erased",
    "refuse_existing",
    "unwritable",
]  # fmt: skip

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
RegistryOption = Annotated[
    str,
    typer.Option("--registry", help="The site's folder (consent.db, site.key), or postgresql://… with --key."),
]
KeyOption = Annotated[
    Path | None, typer.Option("--key", help="The site key, where it lies elsewhere (a simulation's: ledgers/SITE/).")
]
SubjectArgument = Annotated[str, typer.Argument(help="The person's identifier, as in the site's table.")]
HERE = "."
_DIGEST = re.compile(r"(?:sha256:)?[0-9a-f]{64}")


def key_box(file: Path | None) -> SiteKeyBox:
    """What opens the site key."""
    from confide.protocol.keyfiles import SiteKeyBox, passphrase_from

    return SiteKeyBox(passphrase_from(file))


def erased_person(subject: str) -> ConsentError:
    """The answer to whatever is asked of somebody who was erased."""
    return ConsentError(
        "this person was erased: nothing on record can be found under this identifier any more, and nothing can be "
        "recorded", where=subject, hint="an erasure is final",
    )  # fmt: skip


def refuse_erased(desk: ConsentDesk, subject: str) -> None:
    """Nothing is recorded of an erased person.

    Raises:
        ConsentError: She was erased.
    """
    if desk.is_erased(subject):
        raise erased_person(subject)


def event_now(fields: dict[str, str]) -> ImportedEvent:
    """An event as of now, checked as an imported one is."""
    from confide.privacy.consent.events import now_micros
    from confide.privacy.consent.imports import Options
    from confide.privacy.consent.imports.event import EventBuilder

    fields = {name: text.strip() for name, text in fields.items()} | {"event_id": f"cli:{secrets.token_hex(16)}"}
    built = EventBuilder(Options()).build(1, fields, effective=now_micros())
    if isinstance(built, list):
        first = built[0]
        flag = {"subject": "SUBJECT", "notice_digest": "--notice", "evidence_ref": "--evidence"}.get(first.field)
        reason = first.reason.replace("effective_at", "now")
        raise ConfigError(reason, where=flag or "--" + first.field.replace("_", "-"), hint="nothing was recorded")
    return built


def notice_digest(text: str | None) -> str:
    """The digest of a notice: of the file of this name, or the text itself."""
    if not text:
        return ""
    path = Path(text)
    if path.is_file():
        try:
            return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", where=text, hint="name a readable file") from None
    if _DIGEST.fullmatch(text) is None:
        raise ConfigError("is neither a file nor a SHA-256 digest (64 hexadecimal digits)", where=f"--notice {text}",
                          hint="name the file that was shown to the person")  # fmt: skip
    return "sha256:" + text.removeprefix("sha256:")


def instant(text: str, flag: str) -> int:
    """Microseconds UTC of what was given to an option."""
    from confide.privacy.consent.imports import Options
    from confide.privacy.consent.imports.event import EventBuilder

    found = EventBuilder(Options()).instant(text)
    if isinstance(found, str):
        raise ConfigError(found, where=flag, hint="for example 2026-01-31T09:00:00+01:00")
    return found


def purpose_list(text: str) -> frozenset[str]:
    """Purposes from `a,b,c`, or from a file with one a line."""
    lines = _lines(Path(text), "--purposes") if Path(text).is_file() else text.split(",")
    found = frozenset(line.strip() for line in lines if line.strip())
    if not found:
        raise ConfigError("names no purpose", where="--purposes", hint="a,b,c or a file with one a line")
    return found


def identifiers(path: Path | None, column: str | None) -> list[str]:
    """Identifiers from a file with one a line, or from a table's column."""
    if path is None:
        return []
    if column is None:
        return [line.strip() for line in _lines(path, "--subjects") if line.strip()]
    from confide.clients.data.preprocess import require_columns
    from confide.clients.data.source import read_table

    frame = read_table(path, text=(column,))
    require_columns(frame, [column], path.name)
    return [str(value) for value in frame[column].dropna().unique()]


def _lines(path: Path, flag: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ConfigError("there is no such file", where=f"{flag} {path}", hint="one a line, in UTF-8") from None
    except (OSError, UnicodeDecodeError):
        raise ConfigError("cannot be read as UTF-8 text", where=f"{flag} {path}",
                          hint="one a line, in UTF-8; for a table add --column") from None  # fmt: skip


def refuse_existing(path: Path) -> None:
    """Nothing is written over."""
    if path.exists():
        raise ConfigError("is there already", where=str(path), hint="name a new file")


def unwritable(error: OSError, path: Path) -> ConfigError:
    """The error for a file that cannot be written."""
    return ConfigError(f"cannot be written: {error.strerror}", where=str(path), hint="name a place you may write to")
