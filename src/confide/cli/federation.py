"""`confide federation`: who belongs, and how everybody comes to agree on it.

`--json` prints: init, renew: {folder, federation, endpoint, coordinator_key, authority, valid_until}; add-site,
remove-site, rotate, renew --authority, drop: {version, digest, change}; kit: {kits: {site: file}}; collect: {version,
complete, missing}; show: {federation, version, digest, fingerprint, state: "complete", "proposal" or "empty", change,
missing, endpoint, members: [{site, population, signing_key, exchange_key, node_key, confirmed}]}.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from confide.cli import site_setup
from confide.cli.render import out, show_json, table
from confide.cli.site_setup import AsJson, PassphraseFile, change_of, show_change
from confide.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography.x509 import Certificate

    from confide.protocol.roster import Roster, SignedRoster
    from confide.server.federation import FederationFolder

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Who belongs to a federation; every member signs every change.")
Folder = Annotated[Path, typer.Argument(help="The coordinator's folder.")]


@app.callback()
def root() -> None:
    """Who belongs to a federation; every member signs every change."""


@app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(help="The coordinator's new folder.")],
    name: Annotated[str, typer.Option("--name", help="The federation's name.")],
    endpoint: Annotated[str, typer.Option("--endpoint", help="host:port that sites will connect to.")],
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Make the coordinator's key, a certificate authority and a server certificate, and an empty federation."""
    from cryptography import x509

    from confide.protocol.keyfiles import passphrase_from
    from confide.server.federation import SERVER_CERTIFICATE, FederationFolder

    passphrase = passphrase_from(passphrase_file)
    made = FederationFolder.create(folder, name, endpoint, dt.datetime.now(dt.UTC), passphrase)
    server = x509.load_pem_x509_certificate((folder / SERVER_CERTIFICATE).read_bytes())
    _show_coordinator(made, made.identity(passphrase).public_key.hex(), server, as_json)


@app.command("add-site")
def add_site(
    folder: Folder,
    requests: Annotated[list[Path], typer.Argument(help="Requests that sites have made with confide site init.")],
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Propose a version with these sites. Before the first version is complete, they found the federation."""
    from confide.protocol.provisioning import SignedRequest, read_document

    found = [read_document(path, SignedRequest) for path in requests]
    federation, passphrase = _open(folder, passphrase_file)
    _proposed(federation, federation.add(found, passphrase), as_json)


@app.command("remove-site")
def remove_site(
    folder: Folder,
    site: Annotated[str, typer.Argument(help="Who leaves. It is not asked; everybody else is.")],
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Propose a version without a site."""
    federation, passphrase = _open(folder, passphrase_file)
    _proposed(federation, federation.remove(site, passphrase), as_json)


@app.command("rotate")
def rotate(
    folder: Folder,
    request: Annotated[Path, typer.Argument(help="The site's request, made with confide site rotate.")],
    lost: Annotated[
        bool, typer.Option("--lost", help="The site has lost its old keys (request: confide site init).")
    ] = False,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Propose a site's new keys."""
    from confide.protocol.provisioning import SignedRequest, read_document

    asked = read_document(request, SignedRequest)
    federation, passphrase = _open(folder, passphrase_file)
    _proposed(federation, federation.rotate(asked, passphrase, lost=lost), as_json)


@app.command("drop")
def drop(folder: Folder, as_json: AsJson = False) -> None:
    """Give the proposal up."""
    federation, _ = _open(folder, None, keys=False)
    _proposed(federation, federation.drop(), as_json, dropped=True)


@app.command("kit")
def kit(
    folder: Folder,
    site: Annotated[str | None, typer.Argument(help="Whose; left out: one for every member.")] = None,
    to: Annotated[Path | None, typer.Option("--out", help="Where to write; else kits/ in the folder.")] = None,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Write the files that sites confirm, and connect with: rosters, certificate, endpoint. They hold no secret."""
    from confide.protocol.provisioning import write_document

    federation, passphrase = _open(folder, passphrase_file)
    newest = federation.state.newest
    names = [site] if site is not None else [m.site for m in newest[-1].roster.members] if newest else []
    if not names:
        raise ConfigError("has no member yet", where=str(folder), hint="confide federation add-site REQUEST.json")
    place, files = to or folder / "kits", dict[str, str]()
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name in names:
            path = place / f"{name}.kit.json"
            write_document(path, federation.kit(name, passphrase))
            files[name] = str(path)
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(place)) from None
    if as_json:
        show_json({"kits": files})
        return
    out.print(table("Kits", list(files.items())))
    out.print("Each site: confide site confirm SITE_FOLDER KIT", markup=False)


app.command("confirm")(site_setup.confirm)


@app.command("collect")
def collect(
    folder: Folder,
    files: Annotated[list[Path], typer.Argument(help="Countersignatures that came back from sites.")],
    as_json: AsJson = False,
) -> None:
    """Take in what sites have signed; the last one completes the version."""
    from confide.protocol.provisioning import Countersignature, read_document

    federation, _ = _open(folder, None, keys=False)
    complete = False
    for path in files:
        complete = federation.collect(read_document(path, Countersignature))
    roster = federation.state.newest[-1].roster
    missing = sorted(set(federation.state.missing.values()))
    if as_json:
        show_json({"version": roster.version, "complete": complete, "missing": missing})
    elif complete:
        out.print(f"version {roster.version} is complete: make new kits, with which the sites accept it", markup=False)
    else:
        out.print(f"version {roster.version} still needs: {', '.join(missing)}", markup=False, soft_wrap=True)


@app.command("renew")
def renew(
    folder: Folder,
    authority: Annotated[
        bool, typer.Option("--authority", help="Propose a new certificate authority, which all sites confirm.")
    ] = False,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """A new server key and certificate (397 days). No site is asked: they know the authority."""
    federation, passphrase = _open(folder, passphrase_file)
    now = dt.datetime.now(dt.UTC)
    if authority:
        _proposed(federation, federation.renew_authority(now, passphrase), as_json)
    else:
        server = federation.renew(now, passphrase)
        _show_coordinator(federation, federation.identity(passphrase).public_key.hex(), server, as_json)


@app.command("show")
def show(
    place: Annotated[Path, typer.Argument(help="The coordinator's folder, a site's folder, or a kit.")],
    kit: Annotated[Path | None, typer.Option("--kit", help="With a site's folder: a kit for this site.")] = None,
    as_json: AsJson = False,
) -> None:
    """Members, who has confirmed, and the fingerprint of the newest version: read it to the other operators.

    Of a kit alone no fingerprint is shown: only the site whose kit it is can tell whether its own keys are in it.
    """
    from confide.protocol.fingerprint import fingerprint

    federation, endpoint, chain = _chain_of(place, kit)
    if not chain:
        if as_json:
            show_json({"federation": federation, "version": 0, "digest": None, "fingerprint": None, "state": "empty",
                       "change": None, "missing": [], "endpoint": endpoint, "members": []})  # fmt: skip
        else:
            out.print(f"{federation} has no member yet", markup=False)
        return
    roster, previous = chain[-1].roster, chain[-2].roster if len(chain) > 1 else None
    missing = chain[-1].missing(previous)
    waiting = sorted(set(missing.values()))
    digits = fingerprint(roster) if place.is_dir() else None
    if as_json:
        members = [
            {**m.model_dump(), "confirmed": m.site not in waiting} for m in roster.members
        ]  # fmt: skip
        show_json({"federation": federation, "version": roster.version, "digest": roster.digest, "fingerprint": digits,
                   "state": "proposal" if missing else "complete", "change": change_of(roster), "missing": waiting,
                   "endpoint": endpoint, "members": members})  # fmt: skip
        return
    show_change(roster, previous)
    shown = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for m in roster.members:
        shown.add_row(*map(Text, (m.site, "has not confirmed yet" if m.site in waiting else "confirmed")))
    for gone in sorted(set(waiting) - {m.site for m in roster.members}):
        shown.add_row(*map(Text, (gone, "has not confirmed yet")))
    out.print(shown)
    state = "a proposal: it counts for nothing until all have confirmed" if missing else "complete"
    if digits is None:
        out.print(f"{state}\nfor its fingerprint: confide federation show SITE_FOLDER --kit {place}", markup=False)
        return
    half = len(digits) // 2
    out.print(table("Fingerprint", [("", digits[:half].strip()), ("", digits[half:].strip()), ("state", state)]))


def _chain_of(place: Path, kit: Path | None) -> tuple[str, str | None, Sequence[SignedRoster]]:
    """Federation, endpoint and verified chain of whatever holds one."""
    from confide.clients.enrolment import Confirmation
    from confide.clients.membership import MEMBERSHIP, Membership
    from confide.protocol.provisioning import SignedKit, check_kit, read_document
    from confide.protocol.roster import verify_chain
    from confide.server.federation import STATE, FederationFolder

    if kit is not None:
        looked = Confirmation(place, kit)
        return looked.roster.federation, looked.kit.endpoint, looked.kit.chain
    if (place / STATE).is_file():
        state = FederationFolder(place).state
        return state.name, state.endpoint, state.newest
    if (place / MEMBERSHIP).is_file():
        standing = Membership(place / MEMBERSHIP).standing
        return standing.federation, None, standing.accepted
    if place.is_dir():
        raise ConfigError("holds neither a federation nor a site", where=str(place),
                          hint="name the coordinator's folder, a site's folder, or a kit")  # fmt: skip
    found = check_kit(read_document(place, SignedKit))
    verify_chain(found.chain, proposal=True)
    return found.roster.federation, found.endpoint, found.chain


def _open(folder: Path, passphrase_file: Path | None, *, keys: bool = True) -> tuple[FederationFolder, str | None]:
    from confide.protocol.keyfiles import passphrase_from
    from confide.server.federation import FederationFolder

    return FederationFolder(folder), passphrase_from(passphrase_file) if keys else None


def _proposed(federation: FederationFolder, roster: Roster, as_json: bool, *, dropped: bool = False) -> None:
    if as_json:
        show_json({"version": roster.version, "digest": roster.digest, "change": change_of(roster)})
        return
    if dropped:
        out.print(f"version {roster.version} is given up", markup=False)
        return
    show_change(roster, federation.state.roster)
    waiting = ", ".join(sorted(set(federation.state.missing.values())))
    out.print(f"to be confirmed by {waiting}: make kits with confide federation kit", markup=False, soft_wrap=True)


def _show_coordinator(federation: FederationFolder, key: str, server: Certificate, as_json: bool) -> None:
    from confide.protocol.provisioning import certificate_digest
    from confide.server.federation import AUTHORITY

    authority = certificate_digest((federation.folder / AUTHORITY).read_text())
    state, until = federation.state, server.not_valid_after_utc.date().isoformat()
    if as_json:
        show_json({"folder": str(federation.folder), "federation": state.name, "endpoint": state.endpoint,
                   "coordinator_key": key, "authority": authority, "valid_until": until})  # fmt: skip
        return
    out.print(table(f"Federation {state.name}", [
        ("endpoint", state.endpoint), ("coordinator's key", key), ("certificate authority", authority),
        ("server certificate until", f"{until}; renew with confide federation renew"),
    ]))  # fmt: skip
