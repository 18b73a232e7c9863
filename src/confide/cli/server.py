"""`confide server run | export`: the coordinator as a service.

`--json` prints: run: one object a line, {event} each; export: {log, checkpoint}.
"""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from confide.cli.render import err, out, show_json
from confide.cli.site_setup import AsJson, PassphraseFile
from confide.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from confide.protocol.manifest import Manifest
    from confide.server.coordinator import Released

__all__ = ["STORE_VARIABLE", "Store", "app", "write_model"]

app = typer.Typer(no_args_is_help=True, help="The coordinator as a service.")
#: Where runs lie, if not in the federation's folder.
STORE_VARIABLE = "CONFIDE_RUN_STORE"
Store = Annotated[
    str | None,
    typer.Option("--store", envvar=STORE_VARIABLE, help="The run store's database URL; else runs.db in the folder."),
]


@app.callback()
def root() -> None:
    """The coordinator as a service."""


@app.command("run")
def run(
    folder: Annotated[Path, typer.Argument(help="The federation's folder.")],
    host: Annotated[
        str | None, typer.Option("--host", help="Address to bind; else the endpoint's host. The port is its own.")
    ] = None,
    store: Store = None,
    at_once: Annotated[
        int, typer.Option("--at-once", min=1, max=16, help="Runs that may be under way at once; more wait.")
    ] = 4,
    wait_for_all: Annotated[
        float, typer.Option("--wait-for-all", min=0, help="Seconds to wait for all sites before fewer begin.")
    ] = 60.0,
    passphrase_file: PassphraseFile = None,
    as_json: AsJson = False,
) -> None:
    """Listen for the sites of the roster, and take runs from the store, until Ctrl-C or SIGTERM.

    Whatever ends it costs nothing: started again, it goes on with the runs that it was in.
    """
    from confide.protocol.keyfiles import passphrase_from
    from confide.server.service import Service, ServiceConfig, run_store

    def tell(event: str) -> None:
        show_json({"event": event}) if as_json else err.print(event, markup=False, soft_wrap=True)

    config = ServiceConfig(
        folder=folder, store=run_store(folder, store), finish=write_model, host=host, at_once=at_once,
        wait_for_all=wait_for_all, tell=tell,
    )  # fmt: skip
    service = Service(config, passphrase_from(passphrase_file))
    end = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: end.set())
    with suppress(KeyboardInterrupt):
        service.run(end)
    tell("ended; what was durable is kept")


def write_model(folder: Path, manifest: Manifest, released: Released) -> None:
    """The released model, with what it costs a person."""
    from confide.clients.training.artifact import save_model
    from confide.privacy.dp import run_label
    from confide.server.outcome import run_loss

    loss = run_loss(manifest)
    line = (
        f"({loss:.4g}, {manifest.privacy.delta:g})-differentially private per {manifest.privacy.unit} "
        f"(add or remove one {manifest.privacy.unit}). {run_label(manifest.privacy.composed_sites)}."
        if loss is not None
        else ". ".join(manifest.warnings or ("No differential privacy: baseline on public data",)) + "."
    )
    save_model(folder / "model.safetensors", released.weights, manifest, released.model, line)


@app.command("export")
def export(
    folder: Annotated[Path, typer.Argument(help="The federation's folder.")],
    to: Annotated[Path, typer.Option("--out", help="New or existing folder for the files.")],
    as_json: AsJson = False,
) -> None:
    """Write the coordinator's log as it is now, its signed checkpoint and the rosters, for auditors.

    Take it after the sites' logs: a log that knows of a run that the coordinator's does not is a finding.
    """
    from confide.privacy.audit.log import CHECKPOINT_SUFFIX, LOG_SUFFIX, export_log
    from confide.protocol.rosterbook import add_rosters
    from confide.server.federation import FederationFolder
    from confide.server.service import LOGS

    chain = FederationFolder(folder).state.chain
    if not (folder / LOGS).is_file():
        raise ConfigError("has no log yet: it has had no run", where=str(folder), hint="confide server run FOLDER")
    path = to / "logs" / f"coordinator{LOG_SUFFIX}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot be made: {error.strerror}", where=str(path.parent)) from None
    export_log(folder / LOGS, path)
    add_rosters(path.parent, chain)
    if as_json:
        show_json({"log": str(path), "checkpoint": str(path.with_suffix(CHECKPOINT_SUFFIX))})
    else:
        out.print(f"{path}, with its checkpoint beside it", markup=False, soft_wrap=True)
