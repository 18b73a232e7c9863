"""One run in the store: what the coordinator must find again after it was killed at any point.

Invariants:
1. A request is stored before it is sent, so that the very same bytes are sent again: sites answer the same request from
   their own store, and refuse another one for the same step.
2. A step that is closed stays as it ended: nobody is asked again who did not answer then.
3. Every change belongs to the process that opened the run last; the state of the log is noted with each.
4. What nobody needs any more goes: a round's messages when it ends, and a sum once every member that has not left for
   good has applied it. So the store grows with what replay needs, and by one short row a round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Table, and_, bindparam, delete, func, insert, select, update

from confide.errors import LeftError, StorageError
from confide.privacy.audit import records as audit
from confide.privacy.audit.log import Log
from confide.protocol import messages as m
from confide.protocol.envelope import Address, Envelope
from confide.server import tables as t
from confide.server.bulk import Bulk, slices
from confide.server.totals import RoundOutcome, Total, total_of

__all__ = ["Journal", "Position"]

Floats = NDArray[np.float64]
#: Entries of the coordinator's own doing, of which there is one each.
_ONCE = (
    audit.RunCreated, audit.Cohort, audit.RoundAbandoned, audit.MetricsReleased, audit.ModelReleased, audit.RunEnded,
)  # fmt: skip
_PLACE = ("run", "epoch", "round", "step", "attempt")


def _here(table: Table) -> Any:
    return and_(*(table.c[name] == bindparam(f"of_{name}") for name in _PLACE))


#: What is asked for every message, made once: making a statement costs more than running it.
_MINE = and_(t.run.c.run == bindparam("of_run"), t.run.c.owner == bindparam("of_owner"))
_NOTE_POSITION = update(t.run).where(_MINE).values(position=bindparam("to_position"))
_IS_CLOSED = select(t.closed.c.round).where(_here(t.closed))
_MESSAGES = select(t.message).where(_here(t.message), t.message.c.kind == bindparam("of_kind"))
_PUT_MESSAGE = insert(t.message)


@dataclass(frozen=True, slots=True)
class Position:
    """How far a run is: `members` agreed on keys (None: not yet), `next` is the round under way."""

    finished: bool
    epoch: int
    members: tuple[str, ...] | None
    next: int
    #: What the sites called the model that they trained from last.
    model: str


class Journal:
    """See the module; made by `RunStore.open`.

    Args:
        transaction: Begins one.
        run: The run.
        owner: Names this process.
        log: The coordinator's log.
    """

    def __init__(
        self, transaction: Callable[[], AbstractContextManager[Connection]], run: str, owner: str, log: Log
    ) -> None:
        self._transaction, self._run, self._owner, self._log = transaction, run, owner, log
        self._bulk = Bulk(run)
        at, latest = self.position(), self.latest()[0]
        since = min(at.next, latest) if latest else 0
        #: What the log holds already of what a resumed process comes by again.
        keys = (_key(e) for e in log.entries() if e.run == run)
        self._logged = {k for k in keys if k is not None and (at.finished or k[1] >= since)}

    # --- the log --------------------------------------------------------------------------------------------------

    def append_once(self, record: audit.Record) -> None:
        """Add an entry to the log, unless an earlier process of this run has."""
        if _key(record) not in self._logged:
            self._log.append(record)

    # --- messages -------------------------------------------------------------------------------------------------

    def put_requests(self, place: Address, requests: Mapping[str, Envelope]) -> None:
        """Store signed requests before any of them is sent."""
        with self._write() as db:
            self._put_messages(db, place, "request", requests)

    def requests(self, place: Address) -> dict[str, Envelope]:
        """The signed requests of a step, by site; empty where none was stored."""
        return self._messages(place, "request")

    def put_reply(self, place: Address, site: str, reply: Envelope) -> None:
        """Keep a verified reply."""
        with self._write() as db:
            self._put_messages(db, place, "reply", {site: reply})

    def replies(self, place: Address) -> dict[str, Envelope]:
        """The replies of a step that were kept, by site."""
        return self._messages(place, "reply")

    def asked(self, place: Address) -> tuple[str, ...]:
        """Whom the requests of a step are for; empty where none was stored."""
        query = select(t.message.c.site).where(_here(t.message), t.message.c.kind == "request")
        with self._transaction() as db:
            return tuple(sorted(db.scalars(query, _at(place))))

    def close(self, place: Address) -> None:
        """Nobody is waited for any more."""
        if not self.closed(place):
            with self._write() as db:
                db.execute(insert(t.closed).values(**_columns(place)))

    def closed(self, place: Address) -> bool:
        """Was a step closed?"""
        with self._transaction() as db:
            return db.scalar(_IS_CLOSED, _at(place)) is not None

    def refuse(self, site: str, refusal: m.Refusal) -> None:
        """Keep why a site did not take part, without what no database takes as text; its latest reason counts."""
        refusal = m.Refusal(kind=t.storable(refusal.kind), reason=t.storable(refusal.reason))
        with self._write() as db:
            db.execute(delete(t.refusal).where(t.refusal.c.run == self._run, t.refusal.c.site == site))
            db.execute(insert(t.refusal).values(run=self._run, site=site, kind=refusal.kind, reason=refusal.reason))
            if refusal.kind == LeftError.kind:
                here = and_(t.applied.c.run == self._run, t.applied.c.site == site)
                db.execute(update(t.applied).where(here).values(gone=1))

    def refusals(self) -> dict[str, m.Refusal]:
        """Each site's latest refusal."""
        with self._transaction() as db:
            found = db.execute(select(t.refusal).where(t.refusal.c.run == self._run))
            return {row.site: m.Refusal(kind=row.kind, reason=row.reason) for row in found}

    # --- how far the run is ---------------------------------------------------------------------------------------

    def position(self) -> Position:
        """As it was stored last."""
        with self._transaction() as db:
            row = db.execute(select(t.run).where(t.run.c.run == self._run)).one()
        members = None if row.members is None else tuple(json.loads(row.members))
        return Position(row.status == "finished", row.epoch, members, row.next, row.model)

    def agree(self, epoch: int, members: Sequence[str]) -> None:
        """Keys are agreed on; how is no longer of interest."""
        with self._write(epoch=epoch, members=json.dumps(list(members))) as db:
            passing = t.message.c.step.in_(("secret", "keys"))
            db.execute(delete(t.message).where(t.message.c.run == self._run, passing))
            db.execute(insert(t.applied), [{"run": self._run, "site": s, "round": 0, "gone": 0} for s in members])
            self._bulk.forget(db)

    def put_total(self, total: Total) -> None:
        """Keep a round's sum."""
        with self._write() as db:
            (chunks,) = self._bulk.put(db, [total.chunks])
            reference = total.reference.model_dump_json()
            sealed = json.dumps([m.Statement.of(s, e).model_dump() for s, e in total.sealed.items()])
            values = {"reference": reference, "chunks": chunks, "sealed": sealed, "uplink": total.uplink}
            db.execute(delete(t.total).where(t.total.c.run == self._run, t.total.c.round == total.round))
            db.execute(insert(t.total).values(run=self._run, round=total.round, **values))

    def totals(self, first: int, last: int) -> list[Total]:
        """The sums kept of these rounds, oldest first."""
        here = and_(t.total.c.run == self._run, t.total.c.round >= first, t.total.c.round <= last)
        with self._transaction() as db:
            rows = db.execute(select(t.total).where(here).order_by(t.total.c.round)).all()
            bulk = self._bulk.get(db, [row.chunks for row in rows])
        return [total_of(row, chunks) for row, chunks in zip(rows, bulk, strict=True)]

    def latest(self, before: int | None = None) -> tuple[int, tuple[str, ...]]:
        """(round, cohort) of the latest sum, or of the latest before a round; (0, ()) where there is none."""
        query = select(t.total.c.round, t.total.c.reference).where(t.total.c.run == self._run)
        if before is not None:
            query = query.where(t.total.c.round < before)
        with self._transaction() as db:
            row = db.execute(query.order_by(t.total.c.round.desc()).limit(1)).first()
        return (0, ()) if row is None else (row.round, m.SumReference.model_validate_json(row.reference).cohort)

    def applied(self) -> dict[str, int]:
        """The latest sum that each member has applied that has not left for good."""
        there = and_(t.applied.c.run == self._run, t.applied.c.gone == 0)
        with self._transaction() as db:
            rows = db.execute(select(t.applied.c.site, t.applied.c.round).where(there))
            return {site: round_ for site, round_ in rows}

    def admit(self, sites: Iterable[str]) -> None:
        """These have joined after the others."""
        known = self.applied()
        new = [{"run": self._run, "site": s, "round": 0, "gone": 0} for s in sites if s not in known]
        if new:
            with self._write() as db:
                db.execute(insert(t.applied), new)

    def vouched(self, before: int) -> tuple[int, dict[str, Envelope]]:
        """The latest round before another whose `train` replies are kept, and those; (0, {}) where there is none."""
        of = t.message.c
        here = and_(of.run == self._run, of.step == "train", of.kind == "reply", of.round < before)
        with self._transaction() as db:
            row = db.execute(select(of.round, of.epoch).where(here).order_by(of.round.desc()).limit(1)).first()
            if row is None:
                return 0, {}
            rows = db.execute(select(t.message).where(here, of.round == row.round)).all()
            bulk = self._bulk.get(db, [found.chunks for found in rows])
        return row.round, {
            found.site: Envelope(found.header, found.signature, found.body, chunks)
            for found, chunks in zip(rows, bulk, strict=True)
        }

    def end_round(self, outcome: RoundOutcome, present: Iterable[str], model: str, vouching: int | None = None) -> None:
        """Close a round, and let go of what nobody needs any more.

        Args:
            outcome: How it ended.
            present: Who has applied every sum before it.
            model: What the sites call the model that they trained from; empty where nobody did.
            vouching: Where rounds are drawn: the round whose `train` replies vouch for the model that is handed over.
                They are kept, and the sums since; who missed earlier ones needs no others.
        """
        number, run = outcome.round, self._run
        before = self.latest(before=number)[0]
        with self._write(next=number + 1, **({"model": model} if model else {})) as db:
            metrics = None if outcome.metrics is None else outcome.metrics.astype("<f8").tobytes()
            db.execute(
                insert(t.outcome).values(
                    run=run, round=number, cohort=json.dumps(outcome.cohort), abandoned=int(outcome.abandoned),
                    uplink=outcome.uplink_bytes, update_bytes=outcome.update_bytes,
                    metrics_round=outcome.metrics_round, metrics=metrics,
                )
            )  # fmt: skip
            members = [t.applied.c.site.in_(part) for part in slices(list(present))]
            for some in members:
                db.execute(update(t.applied).where(t.applied.c.run == run, some).values(round=before))
            if outcome.abandoned:
                db.execute(delete(t.total).where(t.total.c.run == run, t.total.c.round == number))
            self._prune(db, number, vouching)

    def outcomes(self) -> Iterator[RoundOutcome]:
        """Of every round that has ended, oldest first."""
        with self._transaction() as db:
            rows = db.execute(select(t.outcome).where(t.outcome.c.run == self._run).order_by(t.outcome.c.round)).all()
        for row in rows:
            metrics = None if row.metrics is None else np.frombuffer(row.metrics, dtype="<f8").astype(np.float64)
            yield RoundOutcome(
                row.round, tuple(json.loads(row.cohort)), bool(row.abandoned), row.uplink, row.metrics_round, metrics,
                row.update_bytes,
            )  # fmt: skip

    def outcome(self, round_: int) -> RoundOutcome | None:
        """How a round ended; None where it has not."""
        return next((o for o in self.outcomes() if o.round == round_), None)

    def finish(self) -> None:
        """The model is released; only what was, the first model and how the rounds ended stay."""
        with self._write(status="finished") as db:
            run = self._run
            db.execute(delete(t.closed).where(t.closed.c.run == run, t.closed.c.step != "release"))
            db.execute(delete(t.applied).where(t.applied.c.run == run))
            db.execute(update(t.total).where(t.total.c.run == run).values(chunks="[]"))
            released = and_(t.message.c.step == "release", t.message.c.kind == "reply")
            db.execute(delete(t.message).where(t.message.c.run == run, ~released))
            self._bulk.forget(db)

    # --- parts ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _write(self, **changes: Any) -> Iterator[Connection]:
        """A change of the run, if it is still this process's.

        Raises:
            StorageError: Another process has taken the run over, or the database does not take it.
        """
        note = _NOTE_POSITION.values(**changes) if changes else _NOTE_POSITION
        with self._transaction() as db:
            values = {"of_run": self._run, "of_owner": self._owner, "to_position": self._log.checkpoint().short}
            if db.execute(note, values).rowcount != 1:
                raise StorageError("another process has taken this run over", where=f"run {self._run}",
                                   hint="one coordinator drives a run; this one stops")  # fmt: skip
            yield db

    def _prune(self, db: Connection, ended: int, vouching: int | None) -> None:
        """Messages of rounds that are over (but the last `train` replies: they show who was at the end), and sums that
        everybody has who may still ask."""
        run, of = self._run, t.message.c
        kept = and_(of.round == (vouching or ended), of.step == "train", of.kind == "reply")
        db.execute(delete(t.message).where(of.run == run, of.round.between(1, ended), ~kept))
        db.execute(delete(t.closed).where(t.closed.c.run == run, t.closed.c.round.between(1, ended)))
        here = and_(t.applied.c.run == run, t.applied.c.gone == 0)
        least = db.scalar(select(func.min(t.applied.c.round)).where(here))
        latest = db.scalar(select(func.max(t.total.c.round)).where(t.total.c.run == run))
        if vouching is not None:
            least = vouching - 1
        if least is not None and latest is not None:  # the latest one also says whose metrics come next
            old = and_(t.total.c.run == run, t.total.c.round <= least, t.total.c.round < latest)
            db.execute(delete(t.total).where(old))
        self._bulk.forget(db)

    def _put_messages(self, db: Connection, place: Address, kind: str, messages: Mapping[str, Envelope]) -> None:
        bulk = self._bulk.put(db, [e.chunks for e in messages.values()])
        rows = [
            {**_columns(place), "site": site, "kind": kind, "header": e.header, "signature": e.signature,
             "body": e.body, "chunks": chunks}
            for (site, e), chunks in zip(messages.items(), bulk, strict=True)
        ]  # fmt: skip
        if rows:
            db.execute(_PUT_MESSAGE, rows)

    def _messages(self, place: Address, kind: str) -> dict[str, Envelope]:
        with self._transaction() as db:
            rows = db.execute(_MESSAGES, _at(place) | {"of_kind": kind}).all()
            bulk = self._bulk.get(db, [row.chunks for row in rows])
        return {
            row.site: Envelope(row.header, row.signature, row.body, chunks)
            for row, chunks in zip(rows, bulk, strict=True)
        }


def _columns(place: Address) -> dict[str, Any]:
    found = place.run, place.key_epoch, place.round, place.step, place.attempt
    return dict(zip(_PLACE, found, strict=True))


def _at(place: Address) -> dict[str, Any]:
    return {f"of_{name}": value for name, value in _columns(place).items()}


def _key(record: audit.Record) -> tuple[str, int, int] | None:
    """What an entry is found by, of those that there is one of each; rounds that no entry names are the last."""
    if not isinstance(record, _ONCE):
        return None
    return record.KIND, getattr(record, "round", 1 << 30), getattr(record, "attempt", 0)
