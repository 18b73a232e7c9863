"""How the commands about consent look."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.text import Text

from confide.cli.render import Display, err, out, show_json, table, when
from confide.errors import ConsentError

if TYPE_CHECKING:
    from confide.privacy.consent.events import ConsentEvent
    from confide.privacy.consent.imports import Checked, ImportedEvent

__all__ = ["FileDisplay", "plain_event", "refuse_import", "show", "show_import", "show_recorded"]

_LISTED = 20


def show(title: str, rows: list[tuple[str, str]]) -> None:
    """A heading that may be longer than what stands under it."""
    out.print(Text(title, style="bold"), soft_wrap=True)
    out.print(table("", rows))


class FileDisplay(Display):
    """How far a file is read, on a terminal."""

    def __init__(self) -> None:
        super().__init__("checking")

    def doing(self, what: str) -> None:
        self._bar.update(self._task, description=what, completed=0)

    def update(self, position: int, size: int, records: int) -> None:
        self._bar.update(self._task, completed=position, total=size or 1, note=f"{records:,} records")


def refuse_import(checked: Checked, *, as_json: bool) -> None:
    """Every fault of a file, and the error they amount to."""
    for rejection in checked.rejections[:_LISTED]:
        err.print(str(rejection), markup=False, soft_wrap=True)
    if checked.rejected > _LISTED:
        err.print(f"and {checked.rejected - _LISTED:,} more (--json lists the first 10,000)", markup=False)
    count = f"{checked.rejected:,} {'fault' if checked.rejected == 1 else 'faults'}"
    what = ConsentError(f"{count} in a file read as {checked.format.name}; nothing was imported",
                        where=str(checked.path), hint="mend the records named above, and import again")  # fmt: skip
    if not as_json:
        raise what
    err.print(str(what), markup=False, soft_wrap=True)
    raise typer.Exit(ConsentError.exit_code)


def show_import(checked: Checked, added: int | None, erased: int = 0) -> None:
    """What a sound file held, and what of it was new."""
    kinds = ", ".join(f"{count:,} {name}" for name, count in sorted(checked.types.items())) or "none"
    rows = [("file", str(checked.path)), ("read as", checked.format.title), ("events", f"{checked.events:,} ({kinds})")]
    if added is None:
        rows.append(("applied", "nothing: a dry run"))
    else:
        rows.append(("added", f"{added:,}"))
        rows.append(("known already", f"{checked.events - added - erased:,}"))
    if erased:
        rows.append(("passed over", f"{erased:,} of persons who were erased"))
    show("The file holds nothing that leaves a doubt", rows)


def show_recorded(event: ImportedEvent, count: int, sequence: int, *, as_json: bool) -> None:
    """What was put on record."""
    from confide.privacy.consent.events import from_micros

    until = from_micros(event.valid_until).isoformat() if event.valid_until is not None else None
    if as_json:
        show_json({
            "purpose": event.purpose, "type": event.type.value,
            "effective_at": from_micros(event.effective_at).isoformat(), "valid_until": until,
            "notice_digest": event.notice_digest or None, "events": count, "sequence": sequence,
        })  # fmt: skip
        return
    rows = [("purpose", event.purpose), ("from", when(event.effective_at)), ("registry sequence", f"{sequence:,}")]
    if event.type.value == "given":
        rows[2:2] = [("until", when(event.valid_until) if event.valid_until is not None else "withdrawn"),
                     ("notice", event.notice_digest or "none")]  # fmt: skip
    if count > 1:
        rows.append(("also ended", f"{count - 1} consent that was to begin later"))
    show(f"On record: {event.type.value} by {event.subject}", rows)


def plain_event(event: ConsentEvent) -> dict[str, object]:
    """An event as JSON."""
    from confide.privacy.consent.events import from_micros

    return {
        "event_id": event.event_id, "purpose": event.purpose, "type": event.type.value,
        "effective_at": from_micros(event.effective_at).isoformat(),
        "valid_until": from_micros(event.valid_until).isoformat() if event.valid_until is not None else None,
        "notice_digest": event.notice_digest, "lawful_basis": event.lawful_basis, "jurisdiction": event.jurisdiction,
        "evidence_ref": event.evidence_ref, "max_epsilon": event.max_epsilon,
    }  # fmt: skip
