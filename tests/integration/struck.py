"""The commands of a deployment, in which a process dies at a named moment.

`python -m tests.integration.struck confide …` is the command `confide`; where that is a site's agent, it starts
`… struck executor ROLE` for its two processes. What they call is wrapped from outside, and each moment has a name.
Where an order for it lies in the folder `CONFIDE_STRIKES` (`PARTY.json`), it is taken away, so that it is carried out
once. Then a process is killed with SIGKILL, the one at hand or, of a site's two, the SuperNode; or the one at hand
waits until a file is there.

Moments of a site, by round: `train` (charged, before the first record is read), `seal` (sealed, nothing stored), `add`
(the reply is durable, and has not left), `open` (a sum is opened, and not applied), `release` (logged, not answered).
Moments of a coordinator: `asked`, `kept` (a request, a reply is durable), `added`, `handed`, `replied` (by its link's
own threads), with step and round.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.forked import wrap

FOLDER = "CONFIDE_STRIKES"
#: Seconds after which a process that is held goes on by itself.
_PATIENCE = 600.0
_EXECUTOR = "confide.clients.executor"


def _folder() -> Path:
    return Path(os.environ[FOLDER])


def reach(party: str, moment: str) -> None:
    """A moment has come. Does not return where this process is the one to die."""
    order = _folder() / f"{party}.json"
    with suppress(FileNotFoundError):
        told = json.loads(order.read_text())
        if told["moment"] == moment:
            order.rename(order.with_suffix(".struck"))
            if told.get("until"):
                _wait_for(Path(told["until"]))
                return
            victim = int(Path(told["pid_file"]).read_text()) if told["pid_file"] else os.getpid()
            os.kill(victim, signal.SIGKILL)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def note(**what: Any) -> None:
    """Keep what happened, durably and outside of the product."""
    wire = os.open(_folder() / "wire.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(wire, json.dumps(what).encode() + b"\n")
    os.fsync(wire)
    os.close(wire)


def watch_site() -> None:
    """Name the moments of a site, in its executor."""
    from confide.clients.rounds import RoundSteps
    from confide.clients.run import SiteRun
    from confide.clients.site import Site
    from confide.privacy.sealing.slots import SlotSession
    from tests.attacks.federation import header_of

    at: list[Any] = ["", 0]  # site and round of the request at hand: there is one at a time

    def handle(real: Callable[..., Any], site: Site, step: str, request: Any) -> Any:
        at[:] = [site.name, header_of(request).round]
        reply = real(site, step, request)
        if step == "seal":
            reach(site.name, f"add {at[1]}")
        return reply

    def compute(real: Callable[..., Any], run: SiteRun, round_: int, *rest: Any) -> Any:
        note(site=run.site, run=run.manifest.run, computed=round_)
        reach(run.site, f"train {round_}")
        return real(run, round_, *rest)

    def seal(real: Callable[..., Any], *rest: Any) -> Any:
        sealed = real(*rest)
        reach(at[0], f"seal {at[1]}")
        return sealed

    def apply(real: Callable[..., Any], run: SiteRun, model: Any, reference: Any, chunks: Any) -> Any:
        opened = real(run, model, reference, chunks)
        reach(run.site, f"open {reference.round}")
        return opened

    def release(real: Callable[..., Any], *rest: Any) -> Any:
        answer = real(*rest)
        reach(at[0], "release")
        return answer

    wrap(Site, "handle", handle)
    wrap(SiteRun, "compute", compute)
    wrap(SiteRun, "apply", apply)
    wrap(SlotSession, "seal", seal)
    wrap(RoundSteps, "release", release)


def watch_coordinator() -> None:
    """Name the moments of a coordinator and of the link in its process."""
    from confide.privacy.sealing.accumulate import LatticeAccumulator
    from confide.server.journal import Journal
    from confide.server.linkstate import RosterState

    at = ["", 0]  # what a coordinator waits for; where there are several runs, the one that asked last
    here = threading.local()  # of several runs, each has a thread of its own

    def asked(real: Callable[..., None], journal: Journal, place: Any, requests: Any) -> None:
        real(journal, place, requests)
        at[:] = [place.step, place.round]
        here.round = place.round
        reach("coordinator", f"asked {place.step} {place.round}")

    def kept(real: Callable[..., None], journal: Journal, place: Any, *rest: Any) -> None:
        real(journal, place, *rest)
        reach("coordinator", f"kept {place.step} {place.round}")

    def added(real: Callable[..., None], *rest: Any) -> None:
        real(*rest)
        reach("coordinator", f"added {getattr(here, 'round', at[1])}")

    def handed(real: Callable[..., Any], *args: Any, **options: Any) -> Any:
        note(asks=options["node_id"] if "node_id" in options else args[1])
        found = real(*args, **options)
        for message in found:
            _in_the_link("handed", message)
        return found

    def replied(real: Callable[..., Any], state: RosterState, message: Any) -> Any:
        stored = real(state, message)
        _in_the_link("replied", message)
        return stored

    def _in_the_link(what: str, message: Any) -> None:
        if message.metadata.message_type.rpartition(".")[2] == at[0]:
            reach("coordinator", f"{what} {at[0]} {at[1]}")

    wrap(Journal, "put_requests", asked)
    wrap(Journal, "put_reply", kept)
    wrap(LatticeAccumulator, "add", added)
    wrap(RosterState, "get_message_ins", handed)
    wrap(RosterState, "store_message_res", replied)


def _start_executors_here() -> None:
    """An agent's processes are those of this program."""
    real = subprocess.Popen

    class Popen(real):  # type: ignore[type-arg,valid-type,misc]  # it is a class for everybody else, too
        def __init__(self, command: Any, *rest: Any, **options: Any) -> None:
            if _EXECUTOR in command:
                place = command.index(_EXECUTOR)
                command = [*command[:place], "tests.integration.struck", "executor", *command[place + 1 :]]
            super().__init__(command, *rest, **options)

    subprocess.Popen = Popen  # type: ignore[misc]


def main() -> None:
    """The entry point."""
    what, arguments = sys.argv[1], sys.argv[2:]
    sys.argv = [what, *arguments]
    if what == "executor":
        from confide.clients.executor import main as execute

        if arguments == ["site"]:
            watch_site()
        execute()
        return
    if arguments[:2] == ["server", "run"]:
        watch_coordinator()
    if arguments[:2] == ["site", "run"]:
        _start_executors_here()
    from confide.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
