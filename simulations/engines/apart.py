"""Sites of a simulated run that live in other processes than the one that simulates: each is opened there from the
run's folder, and its officers do there what they would do here.

Invariants:
1. A site is open in one process at a time: whoever opens it holds its lock, and who comes meanwhile waits, or gives up.
2. An update lives in the memory of the process that has the site open, and nowhere else, as in a deployed site.
3. What the simulating process may see beside the protocol is one file a site, `shown.npz`: how much was clipped and, on
   public data only, model and held-out persons. It goes with the run.
"""

from __future__ import annotations

import fcntl
import io
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from confide.clients.cutoff import ReplyTime
from confide.clients.membership import Membership
from confide.clients.policy import SitePolicy
from confide.clients.site import Site
from confide.errors import ConfideError, StorageError
from confide.privacy.files import write_atomically
from confide.protocol.envelope import Envelope, Header
from confide.protocol.manifest import Manifest
from confide.protocol.standing import Standing
from confide.simulations.engines.provisioning import found_parties
from confide.simulations.making import FEDERATION, SiteMaker
from confide.simulations.place import attached_place
from confide.simulations.statistics import STATISTICS, read_learned

__all__ = ["Seen", "SiteApart", "SitesApart", "forget_seen", "open_site", "read_seen", "wait_until_closed"]

_SHOWN, _LOCK = "shown.npz", "open.lock"
#: Seconds that a process waits for another one to let a site go.
_PATIENCE, _LOOK_AGAIN = 60.0, 0.05
#: Sites that a process keeps open at once.
_OPEN = 200


@dataclass(frozen=True, slots=True)
class Seen:
    """What a site has shown last; `weights` and `held_out` (a mask over its persons) only where the data are public."""

    saturated: float
    weights: NDArray[np.float32] | None
    held_out: NDArray[np.bool_] | None


class SiteApart:
    """One site in the process that has it open; answers for it, after its officers have done what the round brings.

    Args:
        site: The site.
        maker: Has made it.
        folder: Its folder in the run's.
        lock: Held while it is open.
        public: The run, where its data are public.
    """

    def __init__(self, site: Site, maker: SiteMaker, folder: Path, lock: int, public: Manifest | None) -> None:
        self._site, self._maker, self._folder, self._lock, self._public = site, maker, folder, lock, public
        self._round = 0

    @property
    def name(self) -> str:
        """The site's."""
        return self._site.name

    @property
    def policy(self) -> SitePolicy:
        """The site's."""
        return self._site.policy

    def handle(self, step: str, request: Envelope) -> Envelope:
        """As `Site.handle`."""
        if step != "train":
            return self._site.handle(step, request)
        at = Header.model_validate_json(request.header)
        if at.round > self._round:
            self._maker.withdraw_until(self.name, at.round, since=self._round)
            self._maker.churn(self.name, at.round)
            self._round = at.round
        reply = self._site.handle(step, request)
        with suppress(ConfideError):  # a site that has left the run has nothing to show
            self._show(at.run)
        return reply

    def note_reply(self, reply: ReplyTime) -> None:
        """As `Site.note_reply`."""
        self._site.note_reply(reply)

    def close(self) -> None:
        """Release the site's files, then the site."""
        self._site.close()
        os.close(self._lock)

    def _show(self, run: str) -> None:
        model, found = self._site.current_model(run), io.BytesIO()
        shown: dict[str, NDArray[np.generic]] = {"saturated": np.array(model.saturated)}
        if self._public is not None:
            shown["weights"] = model.weights
            shown["held_out"] = self._site.participants(self._public).held_out
        np.savez(found, **shown)  # type: ignore[arg-type]  # numpy's stub has a flag among the names
        write_atomically(self._folder / _SHOWN, found.getvalue())


class SitesApart:
    """The sites of one run that this process answers for, opened when they are asked for.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)  # as in the simulation's own process
        place = attached_place(folder)
        learned = read_learned(folder / STATISTICS) or {}
        self._sources = place.sources(learned.__getitem__)
        self._folder, self._keeping = folder / "sites", place.keeping
        self._keeping.parties = found_parties(self._keeping)
        manifest = self._keeping.manifest
        if manifest is None:
            raise StorageError("holds no run that was begun", where=str(folder))
        self._manifest, self._chain = manifest, self._keeping.chain
        self._members = {member.site: member for member in self._chain[-1].roster.members}
        self._maker = SiteMaker(
            self._sources, self._folder, place.ledgers,
            coordinator=bytes.fromhex(self._chain[-1].roster.coordinator_key), identity=self._keeping.identity,
            member=self._member, vault=self._keeping.vault,
            carried=place.earlier / "sites" if place.earlier is not None else None,
        )  # fmt: skip
        #: The one that was asked for the longest time ago first.
        self._open: dict[str, SiteApart] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All sites of the run, in their order."""
        return tuple(self._sources.records)

    def site(self, name: str) -> SiteApart:
        """One of them; others may be closed for it.

        Raises:
            StorageError: Another process has it open, and does not let it go.
        """
        found = self._open.pop(name, None)
        if found is None:
            while len(self._open) >= _OPEN:
                self._open.pop(next(iter(self._open))).close()
            found = self._opened(name)
        self._open[name] = found
        return found

    def close(self) -> None:
        """Close all that are open."""
        while self._open:
            self._open.pop(next(iter(self._open))).close()

    def _opened(self, name: str) -> SiteApart:
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        lock = _taken(folder / _LOCK, time.monotonic() + _PATIENCE)
        try:
            site = self._maker.make(name)
        except BaseException:
            os.close(lock)
            raise
        public = self._sources.experiment.data.public
        return SiteApart(site, self._maker, folder, lock, self._manifest if public else None)

    def _member(self, name: str) -> Membership:
        parties = self._keeping.parties
        if parties is not None:
            return parties.member(name)
        found = Membership(None, Standing(federation=FEDERATION, me=self._members[name]))
        found.accept(self._chain)
        return found


def open_site(folder: str, name: str) -> SiteApart:
    """What an agent's executor is given as its site: one of a simulated run.

    Args:
        folder: The run's.
        name: The site's.
    """
    return SitesApart(Path(folder)).site(name)


def read_seen(sites: Path, name: str) -> Seen | None:
    """What a site has shown last; None where it has shown nothing yet.

    Args:
        sites: The folder of the run's sites.
        name: The site's.
    """
    try:
        data = (sites / name / _SHOWN).read_bytes()
    except FileNotFoundError:
        return None
    found = np.load(io.BytesIO(data), allow_pickle=False)
    return Seen(float(found["saturated"]), found.get("weights"), found.get("held_out"))


def forget_seen(sites: Path, names: Iterable[str]) -> None:
    """The run is over: what was shown goes, and the locks with it."""
    for name in names:
        (sites / name / _SHOWN).unlink(missing_ok=True)
        (sites / name / _LOCK).unlink(missing_ok=True)


def wait_until_closed(sites: Path, patience: float = _PATIENCE) -> None:
    """Until no other process has any of the run's sites open: whoever had one may be ending just now.

    Args:
        sites: The folder of the run's sites.
        patience: Seconds for all of them.

    Raises:
        StorageError: Another process has one open, and does not let it go.
    """
    deadline = time.monotonic() + patience
    for path in sorted(sites.glob(f"*/{_LOCK}")):
        os.close(_taken(path, deadline))


def _taken(path: Path, deadline: float) -> int:
    """The lock, once another process has let it go: with its end, however it ends."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(lock)
                raise StorageError("is open in another process", where=str(path.parent),
                                   hint="end that process first") from None  # fmt: skip
            time.sleep(_LOOK_AGAIN)
        else:
            return lock
