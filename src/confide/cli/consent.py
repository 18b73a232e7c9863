"""`confide consent`: what a site's consent officer does, beside the registry. Nothing of it leaves the site by itself.

Every command takes `--json` and then prints one object:

- init: {registry, key, key_fingerprint}
- import: {file, format, events, types, rejected, rejections: [{line, pointer, field, reason}], dry_run, added,
  known, erased: events of erased persons that were passed over}
- grant, withdraw: {purpose, type, effective_at, valid_until, notice_digest, events: how many were recorded, sequence}
- erase: {subject, events: how many closed what was on record, already, forgotten: which charges held her, where
  a ledger was found}
- notice add: {digest, purposes, covers_beneath, sequence}
- notice list: {notices: [{digest, purposes, covers_beneath, sequence, registered_at}]}
- check: {differences: [{purpose, pseudonym, kind}], rebuilt}; exit 4 where there are some and nothing was rebuilt
- status: {subject, known, erased, pseudonym, standings: {purpose: {status, max_epsilon}}, history: [{sequence, …}],
  sequence}
- impact: {persons, runs: [{site, run, purpose, rounds, persons, epsilon, delta, model, released}], policies}
- snapshot: {purpose, at, sequence, threshold, participants: null where fewer than the threshold}
- export: {out, format, events, named, by_pseudonym, left_out}
- receipt: {json, page, pseudonym, signed_by: hex of the public key, or null}
- verify-receipt: {file, valid, signed_by, key_was_given, publisher, created, pseudonym, standings: {purpose: status}}
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from confide.cli.consent_impact import impact
from confide.cli.consent_inputs import (
    HERE,
    JsonOption,
    KeyOption,
    RegistryOption,
    SubjectArgument,
    erased_person,
    event_now,
    identifiers,
    instant,
    key_box,
    notice_digest,
    purpose_list,
    refuse_erased,
    refuse_existing,
    unwritable,
)
from confide.cli.consent_output import FileDisplay, plain_event, refuse_import, show, show_import, show_recorded
from confide.cli.consent_receipt import verify_receipt
from confide.cli.consent_registry import check, copy, erase, init, notices
from confide.cli.render import err, number, out, show_json, when
from confide.cli.site_setup import PassphraseFile
from confide.errors import ConfigError, ConsentError

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Consent: import, grant, withdraw, look up, erase, export. At the site.")
_Purpose = Annotated[str, typer.Option("--purpose", help="What the consent is for, e.g. research/cardiology.")]


@app.callback()
def root() -> None:
    """Consent: import, grant, withdraw, look up, erase, export. At the site."""


app.command("init")(init)
app.command("copy")(copy)
app.command("erase")(erase)
app.command("check")(check)
app.command("impact")(impact)
app.command("verify-receipt")(verify_receipt)
app.add_typer(notices, name="notice")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="CSV, JSONL, 27560 JSON-LD, FHIR R4 Consent, Kantara receipts.")],
    registry: RegistryOption = HERE,
    key: KeyOption = None,
    passphrase_file: PassphraseFile = None,
    form: Annotated[
        str | None, typer.Option("--format", help="csv, jsonl, 27560, fhir, kantara or mapped. Default: by content.")
    ] = None,
    mapping: Annotated[
        Path | None, typer.Option("--mapping", help="What columns and values mean (TOML); see docs/consent.md.")
    ] = None,
    purposes: Annotated[
        str | None,
        typer.Option("--purposes", help="The purposes there are: a,b,c or a file, one a line. Others are rejected."),
    ] = None,
    leave_out_erased: Annotated[
        bool, typer.Option("--leave-out-erased", help="Pass over persons who were erased; else one refuses the file.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check a whole file, then add all of it in one transaction. One rejected record, and nothing is added."""
    from confide.privacy.consent.desk import ConsentDesk
    from confide.privacy.consent.imports import Options, check_file, load_mapping, read_checked

    options = Options(purposes=None if purposes is None else purpose_list(purposes))
    declared = load_mapping(mapping) if mapping is not None else None
    passed_over = list[int]()
    with ConsentDesk(registry, key, key_box(passphrase_file)) as desk, FileDisplay() as display:
        display.doing("checking")
        checked = check_file(file, options, mapping=declared, name=form, progress=display.update)
        added = None
        if not checked.rejected and not dry_run:
            display.doing("applying")
            added = desk.apply(
                read_checked(checked, display.update), on_erased=passed_over.append if leave_out_erased else None
            )
    erased = sum(passed_over)
    if as_json:
        show_json({
            "file": str(file), "format": checked.format.name, "events": checked.events, "types": checked.types,
            "rejected": checked.rejected,
            "rejections": [
                {"line": r.line, "pointer": r.pointer, "field": r.field, "reason": r.reason}
                for r in checked.rejections
            ],
            "dry_run": dry_run, "added": added or 0, "known": 0 if added is None else checked.events - added - erased,
            "erased": erased,
        })  # fmt: skip
    if checked.rejected:
        refuse_import(checked, as_json=as_json)
    if not as_json:
        show_import(checked, added, erased)


@app.command("grant")
def grant(
    subject: SubjectArgument,
    purpose: _Purpose,
    registry: RegistryOption = HERE,
    key: KeyOption = None,
    passphrase_file: PassphraseFile = None,
    valid_until: Annotated[
        str | None, typer.Option("--valid-until", help="When it ends: ISO 8601 with an offset.")
    ] = None,
    notice: Annotated[
        str | None, typer.Option("--notice", help="The notice shown to the person: a file, or its SHA-256.")
    ] = None,
    lawful_basis: Annotated[str, typer.Option("--lawful-basis", help="For example GDPR-6-1-a.")] = "",
    jurisdiction: Annotated[str, typer.Option("--jurisdiction", help="For example DE.")] = "",
    evidence: Annotated[str, typer.Option("--evidence", help="Where the signed form lies.")] = "",
    max_epsilon: Annotated[
        str | None, typer.Option("--max-epsilon", help="The most this person allows in total. Default: the site's.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Put on record that a person consents, from now on."""
    from confide.privacy.consent.desk import ConsentDesk

    event = event_now({
        "subject": subject, "purpose": purpose, "type": "given", "valid_until": valid_until or "",
        "notice_digest": notice_digest(notice), "lawful_basis": lawful_basis, "jurisdiction": jurisdiction,
        "evidence_ref": evidence, "max_epsilon": max_epsilon or "",
    })  # fmt: skip
    with ConsentDesk(registry, key, key_box(passphrase_file)) as desk:
        refuse_erased(desk, event.subject)
        known = desk.purposes()
        near = get_close_matches(event.purpose, known, n=1, cutoff=0.8) if event.purpose not in known else []
        desk.apply([event])
        sequence = desk.sequence()
    if near:
        err.print("[yellow]Note[/] ", end="")
        err.print(f"the first event for {event.purpose!r}; there are others for {near[0]!r}", markup=False,
                  soft_wrap=True)  # fmt: skip
    show_recorded(event, 1, sequence, as_json=as_json)


@app.command("withdraw")
def withdraw(
    subject: SubjectArgument,
    purpose: _Purpose,
    registry: RegistryOption = HERE,
    key: KeyOption = None,
    passphrase_file: PassphraseFile = None,
    evidence: Annotated[str, typer.Option("--evidence", help="Where the person's message lies.")] = "",
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Record it although the person has no consent on record for the purpose.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Put on record that a person withdraws, from now on. It also ends a consent that was to begin later."""
    from confide.privacy.consent.desk import ConsentDesk

    event = event_now({"subject": subject, "purpose": purpose, "type": "withdrawn", "evidence_ref": evidence})
    with ConsentDesk(registry, key, key_box(passphrase_file)) as desk:
        refuse_erased(desk, event.subject)
        held = sorted({e.purpose for _, e in desk.history(event.subject)})
        if event.purpose not in held and not anyway:
            near = get_close_matches(event.purpose, held, n=1, cutoff=0.0)
            raise ConsentError(
                f"nothing is on record of this person for {event.purpose!r}"
                + (f"; did you mean {near[0]!r}?" if near else ": nor for any other purpose"),
                where="withdraw", hint="check identifier and purpose; --anyway records the withdrawal all the same",
            )  # fmt: skip
        events = desk.withdrawals(event)
        desk.apply(events)
        sequence = desk.sequence()
    show_recorded(event, len(events), sequence, as_json=as_json)


@app.command("status")
def status(
    subject: SubjectArgument,
    registry: RegistryOption = HERE,
    key: KeyOption = None,
    passphrase_file: PassphraseFile = None,
    as_json: JsonOption = False,
) -> None:
    """What is on record of one person, and what it amounts to now. Exit 4 where nothing is."""
    from confide.privacy.consent.desk import ConsentDesk

    with ConsentDesk(registry, key, key_box(passphrase_file)) as desk:
        erased, history = desk.is_erased(subject), desk.history(subject)
        standings = desk.standings(subject, desk.now())
        pseudonym, sequence = desk.pseudonym(subject), desk.sequence()
    if as_json:
        show_json({
            "subject": subject, "known": bool(history), "erased": erased,
            "pseudonym": pseudonym.hex() if pseudonym else None,
            "standings": {p: {"status": s.status.value, "max_epsilon": s.max_epsilon} for p, s in standings.items()},
            "history": [{"sequence": seq, **plain_event(e)} for seq, e in history], "sequence": sequence,
        })  # fmt: skip
    if not history:
        if as_json:
            raise typer.Exit(ConsentError.exit_code)
        if erased:
            raise erased_person(subject)
        raise ConsentError("the registry holds nothing about such a person", where=subject,
                           hint="check the identifier: it is the one of the site's table")  # fmt: skip
    if as_json:
        return
    now = [(purpose, s.status.value + (f", at most ε = {number(s.max_epsilon, 2)}" if s.max_epsilon else ""))
           for purpose, s in standings.items()]  # fmt: skip
    show(f"Consent of {subject} now: for the site only", now)
    shown = Table(box=None, padding=(0, 2, 0, 0), title="On record, as it was learnt", title_justify="left",
                  title_style="bold")  # fmt: skip
    for name in ("number", "effective", "decision", "purpose", "until", "own ε"):
        shown.add_column(name, overflow="fold")
    for seq, e in history:
        until = when(e.valid_until) if e.valid_until is not None else "—"
        cells = f"{seq:,}", when(e.effective_at), e.type.value, e.purpose, until, number(e.max_epsilon, 2)
        shown.add_row(*map(Text, cells))
    out.print(shown)


@app.command("snapshot")
def snapshot(
    purpose: _Purpose,
    registry: RegistryOption = HERE,
    key: KeyOption = None,
    passphrase_file: PassphraseFile = None,
    at: Annotated[str | None, typer.Option("--at", help="As of when: ISO 8601 with an offset. Default: now.")] = None,
    threshold: Annotated[int, typer.Option("--threshold", min=5, help="Smaller numbers are not said.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """How many may participate for a purpose, as of an instant and what is on record. For the site only."""
    from confide.privacy.consent.desk import ConsentDesk
    from confide.privacy.consent.events import from_micros

    as_of = None if at is None else instant(at, "--at")
    with ConsentDesk(registry, key, key_box(passphrase_file)) as desk:
        known = desk.purposes()
        if purpose not in known:
            near = get_close_matches(purpose, known, n=1)
            raise ConsentError(f"no event names the purpose {purpose!r}"
                               + (f"; did you mean {near[0]!r}?" if near else ""), where="snapshot",
                               hint=f"on record: {', '.join(known[:10]) or 'no purpose yet'}")  # fmt: skip
        as_of = desk.now() if as_of is None else as_of
        found = desk.count(purpose, as_of, threshold)
    if as_json:
        show_json({"purpose": purpose, "at": from_micros(as_of).isoformat(), "sequence": found.sequence,
                   "threshold": threshold, "participants": found.participants})  # fmt: skip
        return
    people = f"fewer than {threshold}" if found.participants is None else f"{found.participants:,}"
    show(f"Who may participate in {purpose}: for the site only", [
        ("as of", when(as_of)), ("registry sequence", f"{found.sequence:,}"), ("participants", people),
    ])  # fmt: skip


@app.command("export")
def export(
    out_file: Annotated[Path, typer.Option("--out", help="The new file.")],
    registry: RegistryOption = HERE,
    key: KeyOption = None,
    passphrase_file: PassphraseFile = None,
    form: Annotated[str, typer.Option("--format", help="csv, or 27560 (JSON-LD, one record a line).")] = "csv",
    subjects: Annotated[
        Path | None, typer.Option("--subjects", help="Identifiers to name persons by: one a line, or a table.")
    ] = None,
    column: Annotated[str | None, typer.Option("--column", help="The table's column of identifiers.")] = None,
    named_only: Annotated[
        bool, typer.Option("--named-only", help="Leave out everybody whose identifier is not supplied.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write every event to a file that can be imported. The registry knows pseudonyms only: supply identifiers."""
    from confide.privacy.consent.desk import ConsentDesk
    from confide.privacy.consent.export import EXPORTS, export_events
    from confide.privacy.files import write_private

    if form not in EXPORTS:
        near = get_close_matches(form, EXPORTS, n=1)
        raise ConfigError(f"{form!r} is no format of exports" + (f"; did you mean {near[0]!r}?" if near else ""),
                          where="--format", hint=f"one of {', '.join(EXPORTS)}")  # fmt: skip
    refuse_existing(out_file)
    names = identifiers(subjects, column)
    with ConsentDesk(registry, key, key_box(passphrase_file)) as desk:
        found = export_events(desk, form, names, named_only=named_only)
    try:
        write_private(out_file, found.data)
    except OSError as error:
        raise unwritable(error, out_file) from None
    if as_json:
        show_json({"out": str(out_file), "format": form, "events": found.events, "named": found.named,
                   "by_pseudonym": found.by_pseudonym, "left_out": found.left_out})  # fmt: skip
        return
    show(f"{found.events:,} events written to {out_file}", [
        ("persons by identifier", f"{found.named:,}"), ("by pseudonym", f"{found.by_pseudonym:,}"),
        ("left out", f"{found.left_out:,}"),
    ])  # fmt: skip
    if found.by_pseudonym:
        err.print("[yellow]Note[/] persons by pseudonym cannot be imported again: name them with --subjects, or leave "
                  "them out with --named-only", soft_wrap=True)  # fmt: skip


@app.command("receipt")
def receipt(
    subject: SubjectArgument,
    out_base: Annotated[Path, typer.Option("--out", help="Writes OUT.json (ISO/IEC TS 27560) and OUT.html.")],
    registry: RegistryOption = HERE,
    key: KeyOption = None,
    passphrase_file: PassphraseFile = None,
    controller: Annotated[str, typer.Option("--controller", help="Who is responsible for the data.")] = "this site",
    contact: Annotated[
        str, typer.Option("--contact", help="Where the person withdraws: an address, a name.")
    ] = "this site’s consent officer",
    signing_key: Annotated[
        Path | None, typer.Option("--signing-key", help="An Ed25519 key (PEM, or 32 bytes) that signs the JSON.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write what one person takes home: what she agreed to, until when, how to withdraw, and her pseudonym."""
    from confide.privacy.consent.desk import ConsentDesk
    from confide.privacy.consent.receipt import load_signing_key, make_receipt, write_receipt

    base = out_base.with_suffix("") if out_base.suffix in (".json", ".html") else out_base
    for suffix in (".json", ".html"):
        refuse_existing(base.with_name(base.name + suffix))
    signs = load_signing_key(signing_key) if signing_key is not None else None
    with ConsentDesk(registry, key, key_box(passphrase_file)) as desk:
        made = make_receipt(desk, subject, controller=controller, contact=contact, key=signs)
    try:
        file, page = write_receipt(made, base)
    except OSError as error:
        raise unwritable(error, base) from None
    if as_json:
        show_json({"json": str(file), "page": str(page), "pseudonym": made.pseudonym,
                   "signed_by": made.public_key or None})  # fmt: skip
        return
    show(f"A receipt for {subject}", [
        ("to read", str(page)), ("for machines", str(file)), ("pseudonym", made.pseudonym),
        ("signed by", made.public_key or "nobody (--signing-key)"),
    ])  # fmt: skip
