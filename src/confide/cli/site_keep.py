"""`confide site export | backup | restore`: what may leave a site, and what must not be lost.

`--json` prints: export: {folder, log, checkpoint, entries}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from confide.cli.render import out, show_json
from confide.cli.site_setup import AsJson
from confide.errors import ConfigError, StorageError

__all__ = ["export"]

Folder = Annotated[Path, typer.Argument(help="The site's folder.")]


def export(
    folder: Folder,
    to: Annotated[Path, typer.Option("--out", help="New or existing folder for the files.")],
    as_json: AsJson = False,
) -> None:
    """Write the site's federated log and its signed checkpoint as files, for auditors and the other sites.

    Nothing in it depends on one person. The local log stays here.
    """
    from confide.clients.assembly import SiteFolder
    from confide.privacy.audit.log import CHECKPOINT_SUFFIX, LOG_SUFFIX, export_log

    place = SiteFolder.read(folder)
    if not place.federated_log.is_file():
        raise ConfigError("has no log yet: it has joined no run", where=str(folder), hint="confide site run FOLDER")
    path = to / "logs" / f"{place.config.name}{LOG_SUFFIX}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot be made: {error.strerror}", where=str(path.parent)) from None
    export_log(place.federated_log, path)
    entries = path.read_bytes().count(b"\n")
    if as_json:
        show_json({"folder": str(path.parent), "log": str(path),
                   "checkpoint": str(path.with_suffix(CHECKPOINT_SUFFIX)), "entries": entries})  # fmt: skip
    else:
        out.print(f"{path}: {entries:,} entries, with its checkpoint beside it", markup=False, soft_wrap=True)
