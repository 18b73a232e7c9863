"""`confide site run`: a site's agent beside its data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from confide.cli.render import err, show_json
from confide.cli.site_setup import AsJson, PassphraseFile

__all__ = ["run"]


def run(
    folder: Annotated[Path, typer.Argument(help="The site's folder.")],
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Connect to the coordinator and take part in its runs, as site.toml allows, until Ctrl-C or SIGTERM.

    With a passphrase a run survives a restart of the site: its keys then lie on the disk, encrypted.
    """
    from confide.clients.agent import run_agent
    from confide.clients.service import agent_config, alone
    from confide.protocol.keyfiles import passphrase_from

    config = agent_config(folder, passphrase_from(passphrase_file))
    with alone(folder):
        if as_json:
            show_json({"event": "started", "coordinator": config.superlink})
        else:
            err.print(f"connecting to {config.superlink}; logs: {config.folder}", markup=False, soft_wrap=True)
        run_agent(config)
    if as_json:
        show_json({"event": "ended"})
