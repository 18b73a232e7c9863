"""Is this site's state the continuation of what it was? A restored backup must not be a fresh budget.

Three witnesses, from the nearest to the farthest:
1. *Its own log*: every charge that the log holds is in the ledger, and none was shrunk that the log says stands.
2. *Its record of personal losses*: whoever was held by a charge was held by one that the ledger knows.
3. *Its peers*: they keep the latest state of this site's log that it has signed, and show it when a run's keys are
   agreed on. Against a ledger and a log that were put back *together* only this helps, and only where a peer that saw
   a later state takes part in the run; see docs/THREAT_MODEL.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from confide.clients.store import SiteStore
from confide.errors import AuditError, BudgetError, ConfigError, SealingError
from confide.privacy.audit.log import Log, read_lines, stored_entries
from confide.privacy.audit.records import Charged, Record, Settled
from confide.privacy.dp import Ledger
from confide.privacy.dp.events import event_from_json
from confide.privacy.dp.personal import PersonalLosses
from confide.protocol.envelope import MAX_REPLY_BODY, carries, chunk_digests, verify
from confide.protocol.identity import Identity
from confide.protocol.manifest import Manifest
from confide.protocol.messages import Statement
from confide.protocol.sightings import Sighting, pack_sightings, unpack_sightings, watched_by, watchers_of

__all__ = ["Continuity", "check_ledger", "complete_ledger"]

_DATABASE = b"SQLite format 3\0"
_COMPLETE = (
    "restore the newest backup of the ledger, or add what it lacks from the site's log, which only ever raises ε: "
    "confide site recover LEDGER_FOLDER --log LOG"
)


def check_ledger(ledger: Ledger, log: Log, personal: PersonalLosses) -> None:
    """Witnesses 1 and 2.

    Raises:
        BudgetError: The ledger is not what was charged: deleted, put back to an earlier day, or edited.
    """
    reserved, charges, where = ledger.reservations(), ledger.charges(), f"ledger {ledger.path}"
    logged, given_back = set[str](), dict[str, int]()
    for entry in log.entries():
        if isinstance(entry, Charged):
            logged.add(entry.charge)
            if reserved.get(entry.charge) != event_from_json(entry.event):
                raise BudgetError(
                    f"does not hold charge {entry.charge} as this site's own log does: the ledger was deleted, edited "
                    "or put back to an earlier day", where=where, hint=_COMPLETE,
                )  # fmt: skip
        elif isinstance(entry, Settled):
            given_back[entry.charge] = entry.steps
    for charge in logged:
        if charges[charge].steps < given_back.get(charge, reserved[charge].steps):
            raise BudgetError(f"gives back more of charge {charge} than this site's own log does: it was edited",
                              where=where, hint="restore the newest backup of the ledger")  # fmt: skip
    unknown = sorted(personal.charges_held() - set(reserved))
    if unknown:
        raise BudgetError(
            f"does not hold charge {unknown[0]}, under which persons took part: the ledger was deleted or put back to "
            "an earlier day", where=where, hint=_COMPLETE,
        )  # fmt: skip


def complete_ledger(ledger: Ledger, log: Path) -> list[str]:
    """Add to a ledger what a log says was charged and the ledger lacks. It only ever raises ε.

    Args:
        ledger: The site's ledger.
        log: A site's federated log, its own or an exported one; anybody's copy of it will do, as nothing but charges
            is taken from it.

    Returns:
        The names of the charges that were added.

    Raises:
        AuditError: The file is no log.
        BudgetError: A charge is in the ledger with other parameters: it was edited.
    """
    try:
        data = log.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(log), hint="name the site's log") from None
    added, known = [], ledger.reservations()
    records: Iterator[Record] = (
        (record for record, _ in stored_entries(log))
        if data.startswith(_DATABASE)
        else (record for record, _, _ in read_lines(data[: data.rfind(b"\n") + 1], str(log)))
    )
    for record in records:
        if isinstance(record, Charged):
            ledger.restore(record.charge, event_from_json(record.event))
            added += [record.charge] if record.charge not in known else []
    return added


class Continuity:
    """Witness 3: what this site keeps of its peers' logs, and what it makes of what they keep of its own.

    Args:
        identity: The site's name and key.
        log: Its federated log.
        store: Where sightings are kept.
    """

    def __init__(self, identity: Identity, log: Log, store: SiteStore) -> None:
        self._identity, self._log, self._store = identity, log, store

    def sightings(self, manifest: Manifest) -> bytes:
        """What this site has seen of its neighbours in the roster: the chunk of its `join` reply."""
        watched = (manifest.member(site) for site in watched_by(manifest, self._identity.name))
        keys = [member.public_key for member in watched if member is not None]
        return pack_sightings([s for key in sorted(keys) if (s := self._store.sighting(manifest.federation, key))])

    def note(self, manifest: Manifest, statements: Sequence[Statement]) -> None:
        """Keep the latest state of each neighbour's log among signed replies that were verified.

        Only of those that have trained: they have been shown before what others keep of them. The log of one that was
        put back, and has grown since, must not take the place of the state that it no longer has.
        """
        watched = set(watched_by(manifest, self._identity.name))
        found: list[tuple[str, int, Sighting]] = []
        for statement in statements:
            member = manifest.member(statement.site)
            if member is not None and statement.site in watched:
                sighting = Sighting.of(statement.envelope())
                header = sighting.checked(bytes.fromhex(member.public_key), member.site)
                found.append((member.public_key, int(header.checkpoint.partition(":")[0]), sighting))
        self._store.note_sightings(manifest.federation, found)

    def check(self, manifest: Manifest, statements: Sequence[Statement], chunks: Sequence[bytes]) -> None:
        """Does this site's log still hold everything that its watchers have seen of it?

        Args:
            manifest: The run.
            statements: Every participant's signed `join` reply, verified.
            chunks: The sightings of those of them that watch this site, in the order of their names.

        Raises:
            SealingError: A watcher's sightings are missing or not the ones it signed.
            AuditError: They show a state of this site's log that it does not have: all of this site's state was put
                back to an earlier day. Final: the site answers nothing more.
        """
        me, by_site = self._identity, {s.site: s for s in statements}
        present = [w for w in watchers_of(manifest, me.name) if w in by_site]
        if len(chunks) != len(present):
            raise SealingError("the sightings of this site's watchers are not all there", where=f"site {me.name}")
        for watcher, chunk in zip(present, chunks, strict=True):
            self._carried_by(manifest, by_site[watcher], chunk)
            for sighting in unpack_sightings(chunk):
                self._look_back(sighting, manifest.federation, watcher)

    def _carried_by(self, manifest: Manifest, statement: Statement, chunk: bytes) -> None:
        member = manifest.member(statement.site)
        if member is None:
            raise SealingError("a watcher from outside the roster", where=f"site {statement.site[:64]}")
        key = bytes.fromhex(member.public_key)
        header = verify(statement.envelope(), key, sender=member.site, with_chunks=False, max_body=MAX_REPLY_BODY)
        if not carries(header, chunk_digests((chunk,))):
            raise SealingError("sightings that their site did not sign", where=f"site {member.site}")

    def _look_back(self, sighting: Sighting, federation: str, watcher: str) -> None:
        try:
            header = sighting.checked(self._identity.public_key, self._identity.name)
        except SealingError:
            return  # about somebody else, or about a key that is no longer this site's
        size, _, root = header.checkpoint.partition(":")
        if header.federation == federation and not self._log.held(int(size), bytes.fromhex(root)):
            error = AuditError(
                f"{watcher} keeps a state of this site's log with {size} entries, signed by this site, that the log "
                "here does not have: this site's state was put back to an earlier day", where=f"site {watcher}",
                hint="restore the newest backup of the whole site folder; without one nobody knows what was charged "
                "since: ask the coordinators for their logs of the runs since then, complete the ledger from them, "
                "and join again under a new key",
            )  # fmt: skip
            self._store.halt(error.what)
            raise error
