"""`confide site init | confirm | rotate | lock`: how a site comes into a federation, and its keys.

`--json` prints: init: {folder, request, config, encrypted}; rotate: {folder, request}; lock: {folder,
encrypted}; confirm: {state: "countersigned" or "accepted", federation, version, digest, change, file, missing,
to_write}.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from confide.cli.render import out, show_json, table
from confide.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from confide.protocol.roster import Roster

__all__ = ["AsJson", "PassphraseFile", "change_of", "confirm", "init", "lock", "rotate", "show_change"]

PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file", help="The keys' passphrase, in a file. Else: CONFIDE_PASSPHRASE, CONFIDE_PASSPHRASE_FILE."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def init(
    folder: Annotated[Path, typer.Argument(help="The site's new folder.")],
    name: Annotated[str, typer.Option("--name", help="The site's name in the federation.")],
    federation: Annotated[str, typer.Option("--federation", help="The federation's name.")],
    population: Annotated[
        int, typer.Option("--population", help="Declared number of persons: a public constant, not a count.")
    ],
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Make a site: its keys (which stay here), an empty consent registry, a site.toml, and a request to join."""
    from confide.clients.enrolment import CONFIG, make_site
    from confide.protocol.keyfiles import passphrase_from

    passphrase = passphrase_from(passphrase_file)
    request = make_site(folder, name, federation, population, passphrase)
    if as_json:
        show_json({"folder": str(folder), "request": str(request), "config": str(folder / CONFIG),
                   "encrypted": passphrase is not None})  # fmt: skip
        return
    out.print(table(f"Site {name}", [
        ("keys", "encrypted under your passphrase" if passphrase else "not encrypted: readable for you only"),
        ("send to the coordinator", str(request)), ("then edit", str(folder / CONFIG)),
    ]))  # fmt: skip
    out.print("Nothing else of this folder ever leaves the site. Back it up as a whole.", markup=False)


def rotate(
    folder: Annotated[Path, typer.Argument(help="The site's folder.")],
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Make new keys and a request under both; the old ones stay in force until everybody has confirmed."""
    from confide.clients.enrolment import change_keys
    from confide.protocol.keyfiles import passphrase_from

    request = change_keys(folder, passphrase_from(passphrase_file))
    if as_json:
        show_json({"folder": str(folder), "request": str(request)})
    else:
        out.print(f"send to the coordinator: {request}", markup=False, soft_wrap=True)


def lock(
    folder: Annotated[Path, typer.Argument(help="The site's folder.")],
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Put the keys that lie in the clear under a passphrase, site.key too. From then on every command needs it."""
    from confide.clients.enrolment import encrypt_keys
    from confide.protocol.keyfiles import PASSPHRASE, passphrase_from

    passphrase = passphrase_from(passphrase_file)
    if passphrase is None:
        raise ConfigError("is missing", where="--passphrase-file", hint=f"or set {PASSPHRASE}")
    done = encrypt_keys(folder, passphrase)
    if as_json:
        show_json({"folder": str(folder), "encrypted": done})
        return
    out.print(f"encrypted: {', '.join(done)}" if done else "nothing lay in the clear", markup=False, soft_wrap=True)
    if done:
        out.print("copies made before, backups on other disks among them, are as they were", markup=False)


def confirm(
    folder: Annotated[Path, typer.Argument(help="The site's folder.")],
    kit: Annotated[Path, typer.Argument(help="The kit that the coordinator made for this site.")],
    fingerprint: Annotated[
        str | None, typer.Option("--fingerprint", help="What the other sites' operators read to you.")
    ] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """At the site: look at a roster's change, compare its fingerprint with the others', and sign it; then accept it."""
    from confide.clients.enrolment import Confirmation
    from confide.protocol.keyfiles import passphrase_from

    passphrase = passphrase_from(passphrase_file)
    looked = Confirmation(folder, kit)
    if not as_json:
        show_change(looked.roster, looked.kit.previous)
    if looked.compare and fingerprint is None:
        fingerprint = _ask(as_json, looked.call)
    outcome = looked.confirm(fingerprint, passphrase)
    if as_json:
        show_json({
            "state": outcome.state, "federation": outcome.roster.federation, "version": outcome.roster.version,
            "digest": outcome.roster.digest, "change": change_of(outcome.roster),
            "file": str(outcome.file) if outcome.file else None, "missing": list(outcome.missing),
            "to_write": list(outcome.to_write),
        })  # fmt: skip
        return
    if outcome.state == "accepted":
        out.print(f"\nversion {outcome.roster.version} holds here from now on", markup=False)
        for line in outcome.to_write:
            out.print(f"write into site.toml: {line}", markup=False, soft_wrap=True)
        return
    out.print(f"\nsigned; send to the coordinator: {outcome.file}", markup=False, soft_wrap=True)
    if outcome.missing:
        out.print(f"as this kit knows, still to sign: {', '.join(outcome.missing)}", markup=False, soft_wrap=True)


def _ask(as_json: bool, call: Sequence[str]) -> str:
    """From the keyboard, where there is one."""
    who = ", ".join(call)
    if as_json or not sys.stdin.isatty():
        raise ConfigError("is missing", where="--fingerprint",
                          hint=f"call the operators of {who}; each reads what confide federation show SITE_FOLDER "
                          "--kit KIT says to him")  # fmt: skip
    out.print(
        f"\nCall the operators of {who}, on numbers that you know by yourself. Each reads to you what his own site "
        "says (confide federation show SITE_FOLDER --kit KIT); it must be the same for all. Type it:", markup=False,
    )  # fmt: skip
    return str(typer.prompt("fingerprint"))


def change_of(roster: Roster) -> dict[str, object]:
    """A version's change, for JSON."""
    return {"kind": roster.change.kind, "sites": list(roster.change.sites)}


_SAYS = {
    "found": "founds the federation with",
    "add": "adds",
    "remove": "removes",
    "rotate": "gives new keys (signed by the old ones) to",
    "replace": "gives new keys, AFTER LOSS OF THE OLD ONES, to",
    "authority": "changes the certificate authority",
}


def show_change(roster: Roster, previous: Roster | None) -> None:
    """What a version changes, and who is in it then."""
    head = (
        f"Version {roster.version} of {roster.federation} {_SAYS[roster.change.kind]} {', '.join(roster.change.sites)}"
    )
    out.print(Text(head.strip(), style="bold"))
    if previous is not None:
        out.print(f"after version {previous.version}", style="dim")
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("", "site", "population", "signing key"):
        shown.add_column(name, justify="right" if name == "population" else "left")
    for m in roster.members:
        old = previous.member(m.site) if previous else None
        mark = "" if old == m else "new" if old is None else "keys"
        shown.add_row(*map(Text, (mark, m.site, f"{m.population:,}", f"{m.signing_key[:16]}…")))
    for gone in previous.members if previous else ():
        if roster.member(gone.site) is None:
            shown.add_row(*map(Text, ("gone", gone.site, f"{gone.population:,}", f"{gone.signing_key[:16]}…")))
    out.print(shown)
