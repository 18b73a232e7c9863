"""`confide site export | backup | restore`: what may leave a site, and what must not be lost.

`--json` prints: export: {folder, log, checkpoint, entries}; backup: {backup, files, bytes, left_out};
restore: {folder, files}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from confide.cli.render import out, show_json
from confide.cli.site_setup import AsJson, PassphraseFile
from confide.errors import ConfigError, StorageError

__all__ = ["backup", "export", "restore"]

Folder = Annotated[Path, typer.Argument(help="The site's folder.")]


def export(
    folder: Folder,
    to: Annotated[Path, typer.Option("--out", help="New or existing folder for the files.")],
    as_json: AsJson = False,
) -> None:
    """Write the site's federated log, its signed checkpoint and the rosters that the site has accepted as files.

    For auditors and the other sites. Nothing in it depends on one person. The local log stays here.
    """
    from confide.clients.assembly import SiteFolder
    from confide.clients.membership import MEMBERSHIP, Membership
    from confide.privacy.audit.log import CHECKPOINT_SUFFIX, LOG_SUFFIX, export_log
    from confide.protocol.rosterbook import add_rosters

    place = SiteFolder.read(folder)
    if not place.federated_log.is_file():
        raise ConfigError("has no log yet: it has joined no run", where=str(folder), hint="confide site run FOLDER")
    path = to / "logs" / f"{place.config.name}{LOG_SUFFIX}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot be made: {error.strerror}", where=str(path.parent)) from None
    export_log(place.federated_log, path)
    add_rosters(path.parent, Membership(folder / MEMBERSHIP).standing.accepted)
    entries = path.read_bytes().count(b"\n")
    if as_json:
        show_json({"folder": str(path.parent), "log": str(path),
                   "checkpoint": str(path.with_suffix(CHECKPOINT_SUFFIX)), "entries": entries})  # fmt: skip
    else:
        out.print(f"{path}: {entries:,} entries, with its checkpoint beside it", markup=False, soft_wrap=True)


def backup(
    folder: Folder,
    to: Annotated[Path, typer.Option("--out", help="The new file.")],
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Copy everything that must not be lost into one encrypted file, of one moment; the site may run meanwhile.

    Not in it: keys of runs, and the table itself. A registry in PostgreSQL is in it, as a file. Keep the newest only:
    an older one, restored, has forgotten what was charged since.
    """
    from confide.clients.backup import back_up, left_out

    files, missing = back_up(folder, to, _passphrase(passphrase_file)), left_out(folder)
    if as_json:
        show_json({"backup": str(to), "files": files, "bytes": to.stat().st_size, "left_out": missing})
        return
    out.print(f"{to}: {len(files)} files, {to.stat().st_size:,} bytes, encrypted", markup=False, soft_wrap=True)
    for what in missing:
        out.print(f"not in it: {what}", markup=False, soft_wrap=True)


def restore(
    file: Annotated[Path, typer.Argument(help="The backup.")],
    to: Annotated[Path, typer.Option("--out", help="A new folder for the site.")],
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Unpack a backup into a new folder. Before the site starts: confide site recover, with the newest copy of its log.

    See docs/runbooks/lost-key.md.
    """
    from confide.clients.backup import REGISTRY_COPY
    from confide.clients.backup import restore as unpack

    files = unpack(file, to, _passphrase(passphrase_file))
    if as_json:
        show_json({"folder": str(to), "files": files})
        return
    out.print(f"{to}: {len(files)} files", markup=False, soft_wrap=True)
    if REGISTRY_COPY in files:
        out.print(f"the registry of the database server is {to / REGISTRY_COPY}: put it into an empty database with "
                  f"confide consent copy {to / REGISTRY_COPY} postgresql://…, or name the file in site.toml "
                  "[folders] consent", markup=False, soft_wrap=True)  # fmt: skip
    out.print("the table is not among them: put it where site.toml [data] names it", markup=False, soft_wrap=True)
    out.print("what was charged after the backup: confide site recover LEDGER --log NEWEST_COPY_OF_ITS_LOG",
              markup=False, soft_wrap=True)  # fmt: skip


def _passphrase(file: Path | None) -> str:
    from confide.protocol.keyfiles import PASSPHRASE, passphrase_from

    found = passphrase_from(file)
    if found is None:
        raise ConfigError("is missing", where="--passphrase-file", hint=f"or set {PASSPHRASE}: a backup is encrypted")
    return found
