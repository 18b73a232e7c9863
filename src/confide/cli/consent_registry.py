"""`confide consent init | copy | erase | notice | check`: what concerns the registry itself, or cannot be undone."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from confide.cli.consent_inputs import (
    HERE,
    JsonOption,
    KeyOption,
    RegistryOption,
    SubjectArgument,
    key_box,
    notice_digest,
)
from confide.cli.consent_output import show
from confide.cli.render import err, out, show_json, when
from confide.cli.site_setup import PassphraseFile
from confide.errors import ConfigError, ConsentError

__all__ = ["check", "copy", "erase", "init", "notices"]

_LOSSES = "personal.db"
DESTROYED = "her personal key: nobody, this site included, can compute any more which events were hers"
STAYS = (
    "her events without a name, closed for every purpose (while few are erased, which history was hers may be "
    "guessed); a tombstone, so that this identifier is never enrolled again; in the ledger folder, that she was here "
    "(personal.db): she counts as held by every charge, so her spent ε never starts anew. Models released before stay: "
    "their ε bounds what they say about her"
)
STAYS_KEPT = STAYS.replace(
    "that she was here (personal.db): she counts as held by every charge, so her spent ε never starts anew",
    "which charges held her (personal.db), so that her spent ε does not start anew",
)
NO_LOSSES = (
    "personal.db, which says what charges held her, was not found beside the registry or the key: where there is one, "
    "erase her again with --ledger; a site does it by itself when it starts and its table still names her"
)
YOURS = (
    "backups of the registry until they have expired, copies of it in other runs' folders, files of imports and "
    "exports (event ids still lead to her events), her rows in the site's table, and what her evidence references "
    "point to"
)


def init(
    place: Annotated[str, typer.Argument(help="New or empty folder of the site, or postgresql://… with --key.")],
    key: KeyOption = None,
    passphrase_file: PassphraseFile = None,
    as_json: JsonOption = False,
) -> None:
    """Make a registry (consent.db) and the site's key (site.key). Keep a backup of both, apart from each other.

    In a database the registry takes the site key that --key names, which is made where it does not exist.
    """
    from confide.privacy.consent.desk import KEY, REGISTRY, ConsentDesk
    from confide.privacy.consent.storage import is_url, shown_address

    with ConsentDesk.create(place, key, key_box(passphrase_file)) as desk:
        fingerprint = desk.key_fingerprint
    registry = shown_address(place) if is_url(place) else str(Path(place) / REGISTRY)
    key_file = str(key or Path(place) / KEY)
    if as_json:
        show_json({"registry": registry, "key": key_file, "key_fingerprint": fingerprint})
        return
    show("A new consent registry", [
        ("registry", registry),
        ("site key", f"{key_file} (for ever: who loses it cannot find anybody again)"),
        ("key fingerprint", fingerprint),
        ("next", f"confide consent import FILE --registry {shown_address(place) if is_url(place) else place}"
         + (f" --key {key}" if key is not None else "")),
    ])  # fmt: skip


def copy(
    source: Annotated[str, typer.Argument(help="A registry: its file (consent.db), or postgresql://…")],
    target: Annotated[str, typer.Argument(help="A new one: a file, or an empty database.")],
    as_json: JsonOption = False,
) -> None:
    """Copy a registry as it is, with its order and instants: into a database, out of one, or out of a backup.

    The site key stays where it is; both belong to it. Let nobody write into the old one afterwards.
    """
    from confide.privacy.consent.storage import is_url, shown_address
    from confide.privacy.consent.transfer import copy_registry

    places = [place if is_url(place) else Path(place) for place in (source, target)]
    copy_registry(*places)
    shown = [shown_address(place) for place in places]
    if as_json:
        show_json({"source": shown[0], "target": shown[1]})
    else:
        show("A copy of a consent registry", [("from", shown[0]), ("to", shown[1])])


def erase(
    subject: SubjectArgument,
    registry: RegistryOption = HERE,
    key: KeyOption = None,
    passphrase_file: PassphraseFile = None,
    ground: Annotated[
        str | None, typer.Option("--ground", help="Why the tombstone is kept. Default: GDPR-17-3-b, GDPR-5-2.")
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option("--ledger", help="The site's ledger folder, where it is not the one of its site.toml or key."),
    ] = None,
    keep_rounds: Annotated[
        bool,
        typer.Option("--keep-rounds", help="Keep on record which charges held her: leads to her events, see docs."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Erase a person, for ever: her key is destroyed, and the identifier is never enrolled again.

    Nothing is left that tells which charges held her: she counts as held by all of them from now on. Before, confide
    audit exposure --out tells her which did; with --keep-rounds it does so afterwards, too.
    """
    from confide.privacy.consent.desk import ConsentDesk
    from confide.privacy.consent.erasure import DEFAULT_GROUND

    if ground is not None and not (ground.isprintable() and 0 < len(ground) <= 200):
        raise ConfigError("is empty, too long, or does not print", where="--ground", hint="at most 200 characters")
    losses, stays, forgotten = _record_of_losses(registry, key, ledger), STAYS_KEPT if keep_rounds else STAYS, False
    with ConsentDesk(registry, key, key_box(passphrase_file)) as desk:
        already = desk.is_erased(subject)
        if not already and desk.pseudonym(subject) is None:
            raise ConsentError("the registry holds nothing about such a person", where=subject,
                               hint="check the identifier: it is the one of the site's table")  # fmt: skip
        if not yes and not already:
            _confirm(subject, stays, as_json=as_json)
        added = desk.erase(subject, ground or DEFAULT_GROUND)
        if losses is not None:
            forgotten = _forget(losses, desk.locator(subject), keep=keep_rounds)
    if as_json:
        told = {"subject": subject, "events": added, "already": already}
        show_json(told if losses is None else told | {"forgotten": forgotten})
        return
    show("Erased before; nothing was left to destroy" if already else f"Erased: {subject}", [
        ("destroyed", f"{DESTROYED}; and which charges held her" if forgotten else DESTROYED), ("stays", stays),
        *([("not found", NO_LOSSES)] if losses is None else []), ("left to you", YOURS),
    ])  # fmt: skip


def _record_of_losses(registry: str, key: Path | None, ledger: Path | None) -> Path | None:
    """Where the site keeps which charges held whom: in the folder that was named, in the ledger folder of the site
    whose registry or key it is, or beside these. None where nothing was ever charged there.

    Raises:
        ConfigError: The folder that was named holds none, or the site's `site.toml` cannot be read.
    """
    from confide.config.site import load_site
    from confide.privacy.consent.storage import is_url

    if ledger is not None:
        if not (ledger / _LOSSES).is_file():
            raise ConfigError("is missing", where=str(ledger / _LOSSES), hint="--ledger names the folder that holds "
                              "ledger.db and personal.db; leave it out where nothing was ever charged")  # fmt: skip
        return ledger / _LOSSES
    places = [*([] if is_url(registry) else [Path(registry)]), *([] if key is None else [key.parent])]
    for place in places:
        config = place / "site.toml"
        named = [place / load_site(config).folders.ledger] if config.is_file() else []
        for folder in (*named, place):
            if (folder / _LOSSES).is_file():
                return folder / _LOSSES
    return None


def _forget(losses: Path, locator: bytes, *, keep: bool) -> bool:
    """Is it destroyed which charges held her? An erasure that destroyed it before cannot be taken back."""
    from confide.privacy.dp.personal import PersonalLosses

    with closing(PersonalLosses(losses)) as record:
        record.keep(locator) if keep else record.forget([locator])
        return record.is_forgotten(locator)


def _confirm(subject: str, stays: str, *, as_json: bool) -> None:
    if as_json:
        raise ConfigError("cannot be asked with --json", where="confide consent erase", hint="add --yes")
    err.print(f"{subject} will be erased. This cannot be undone.", markup=False, soft_wrap=True)
    err.print(f"Destroyed: {DESTROYED}.", markup=False, soft_wrap=True)
    err.print(f"Stays: {stays}.", markup=False, soft_wrap=True)
    try:
        typed = typer.prompt("Type the identifier to erase her", err=True, default="", show_default=False).strip()
    except typer.Abort:  # nobody is there to type
        err.print()
        typed = ""
    if typed != subject:
        raise ConsentError(
            "nothing was erased", where=subject, hint="the identifier was not repeated; --yes asks nothing"
        )


notices = typer.Typer(no_args_is_help=True, help="Notices: what the texts that persons were shown were written for.")


@notices.callback()
def notices_root() -> None:
    """Notices: what the texts that persons were shown were written for."""


@notices.command("add")
def add_notice(
    file: Annotated[str, typer.Argument(help="The text that persons were shown: a file, or its SHA-256.")],
    purposes: Annotated[
        list[str], typer.Option("--purpose", help="What it was written for. Give it once for each purpose.")
    ],
    covers_beneath: Annotated[
        bool, typer.Option("--covers-beneath", help="The text says that every purpose beneath is included.")
    ] = False,
    registry: RegistryOption = HERE,
    key: KeyOption = None,
    passphrase_file: PassphraseFile = None,
    as_json: JsonOption = False,
) -> None:
    """Put on record, for ever, what a notice was written for. A grant that names it for another purpose is none."""
    from confide.privacy.consent.desk import ConsentDesk

    wanted = [purpose.strip() for purpose in purposes]
    if not all(p and p.isprintable() and len(p) <= 200 for p in wanted):
        raise ConfigError("is empty, too long, or does not print", where="--purpose", hint="at most 200 characters")
    digest = notice_digest(file)
    with ConsentDesk(registry, key, key_box(passphrase_file)) as desk:
        notice = desk.add_notice(digest, wanted, covers_beneath=covers_beneath)
    if as_json:
        show_json({"digest": notice.digest, "purposes": sorted(notice.purposes),
                   "covers_beneath": notice.covers_beneath, "sequence": notice.sequence})  # fmt: skip
        return
    show("On record: a notice", [
        ("digest", notice.digest), ("written for", ", ".join(sorted(notice.purposes))),
        ("reaches beneath", "yes" if notice.covers_beneath else "no"), ("registry sequence", f"{notice.sequence:,}"),
    ])  # fmt: skip


@notices.command("list")
def list_notices(
    registry: RegistryOption = HERE,
    key: KeyOption = None,
    passphrase_file: PassphraseFile = None,
    as_json: JsonOption = False,
) -> None:
    """The notices on record."""
    from confide.privacy.consent.desk import ConsentDesk
    from confide.privacy.consent.events import from_micros

    with ConsentDesk(registry, key, key_box(passphrase_file)) as desk:
        found = desk.notices()
    if as_json:
        show_json({"notices": [
            {"digest": n.digest, "purposes": sorted(n.purposes), "covers_beneath": n.covers_beneath,
             "sequence": n.sequence, "registered_at": from_micros(n.registered_at).isoformat()} for n in found
        ]})  # fmt: skip
        return
    if not found:
        out.print("No notice is on record: confide consent notice add FILE --purpose …")
        return
    show("Notices on record", [
        (f"{n.sequence:,}", f"{', '.join(sorted(n.purposes))}{' and all beneath' if n.covers_beneath else ''}; since "
         f"{when(n.registered_at)}; {n.digest}") for n in found
    ])  # fmt: skip


def check(
    registry: RegistryOption = HERE,
    key: KeyOption = None,
    passphrase_file: PassphraseFile = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Make what is kept for speed anew from the events.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare what the registry keeps for speed with its events. Where they differ nobody takes part any more."""
    from confide.privacy.consent.desk import ConsentDesk

    with ConsentDesk(registry, key, key_box(passphrase_file)) as desk:
        found = desk.check()
        if rebuild:
            desk.rebuild()
    if as_json:
        show_json({
            "differences": [{"purpose": d.purpose, "pseudonym": d.pseudonym.hex(), "kind": d.kind} for d in found],
            "rebuilt": rebuild,
        })  # fmt: skip
    if found and not rebuild:
        what = ConsentError(
            f"{len(found):,} {'place does' if len(found) == 1 else 'places do'} not say what the events say; nobody "
            "takes part any more", where=registry,
            hint="find out who wrote to the database, then: confide consent check --rebuild",
        )  # fmt: skip
        if not as_json:
            raise what
        err.print(str(what), markup=False, soft_wrap=True)
        raise typer.Exit(ConsentError.exit_code)
    if as_json:
        return
    if not found:
        out.print("The registry says what its events say." + (" Rebuilt all the same." if rebuild else ""))
        return
    out.print(f"{len(found):,} differences, rebuilt from the events. Find out who wrote to the database.")
