"""Each person's own loss: composed over exactly the charges whose snapshot held that person.

Invariants:
1. *Individual filter* (Feldman, Zrnic 2021): a person with a limit takes part in a release only while her own summed
   Rényi divergence, this release included, fits the budget that her limit stands for, at the one order fixed by it.
2. Whether a person takes part depends on her own events and on public parameters, never on anybody else; so nobody's
   limit changes σ, q or the number of steps.
3. Who was held by a charge is durable before anything computed under that charge leaves, in rows chained like the
   ledger's. It stays at the site.
4. A charge that nobody was noted for (this file is newer than the ledger, or was lost) counts for everybody of its
   role. Where the role matters and is not given, it is the one of the charges that held the person, which she holds
   for ever; for a person whom no charge held, or charges of both roles, it is whichever costs more.

5. Of a person who is *forgotten* nothing tells any more which charges held her: her name is taken off her place, and
   she counts as held by every charge that there is or will be. So her loss is never below what it was, nor starts anew.
   Whoever is erased is forgotten, unless she has asked that it be *kept* which charges held her.

Persons are known by a keyed digest; equal releases are counted together, so the work of a round is one pass over the
persons for each kind of release, not for each charge.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from confide.errors import BudgetError
from confide.privacy.database import full_disk, open_durable, open_read_only
from confide.privacy.dp.accounting import ORDERS, conversion, rdp, rdp_epsilon, sampled_gaussian_rdp
from confide.privacy.dp.budget import RenyiBudget
from confide.privacy.dp.events import PrivacyEvent, Role, merge_events

__all__ = ["PersonalLosses"]

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]
_SCHEMA = """
CREATE TABLE IF NOT EXISTS person (place INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS held (
  entry INTEGER PRIMARY KEY, charge TEXT NOT NULL, persons BLOB NOT NULL, chain BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS forgotten (name BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS forgotten_no_update BEFORE UPDATE ON forgotten BEGIN SELECT RAISE(ABORT, 'for ever'); END;
CREATE TRIGGER IF NOT EXISTS forgotten_no_delete BEFORE DELETE ON forgotten BEGIN SELECT RAISE(ABORT, 'for ever'); END;
CREATE TRIGGER IF NOT EXISTS person_no_return BEFORE INSERT ON person
  WHEN EXISTS (SELECT 1 FROM forgotten WHERE name = NEW.name) BEGIN SELECT RAISE(ABORT, 'was forgotten'); END;
CREATE TRIGGER IF NOT EXISTS person_no_rename BEFORE UPDATE ON person
  WHEN EXISTS (SELECT 1 FROM forgotten WHERE name = NEW.name) BEGIN SELECT RAISE(ABORT, 'was forgotten'); END;
CREATE TABLE IF NOT EXISTS kept (name BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TRIGGER IF NOT EXISTS held_no_update BEFORE UPDATE ON held BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS held_no_delete BEFORE DELETE ON held BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""
#: What two releases must share to be counted together: σ and q.
_Kind = tuple[float, float]
#: The place of everybody who was forgotten: at the end of every array over persons, where there is such a one.
_FORGOTTEN = -1
_PATIENCE = 30.0


class PersonalLosses:
    """Which persons each charge held, in one SQLite file beside the ledger.

    Args:
        path: The file; made where it does not exist.

    Raises:
        BudgetError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._load(path, lambda: open_durable(path, _SCHEMA))

    @classmethod
    def open(cls, path: Path) -> PersonalLosses:
        """An existing file, to be read: nothing is made, nothing is changed, and what was opened so takes no note.

        Raises:
            BudgetError: There is no such file, or it cannot be read.
        """
        losses = cls.__new__(cls)
        losses._load(path, lambda: open_read_only(path))
        return losses

    def _load(self, path: Path, connect: Callable[[], sqlite3.Connection]) -> None:
        self._path = path
        try:
            self._db = connect()
            self._counts: dict[_Kind, NDArray[np.int64]] = {}
            self._counted: dict[str, PrivacyEvent] = {}
            self._places: dict[bytes, int] = {n: p for p, n in self._db.execute("SELECT place, name FROM person")}
            # A file that an earlier version made, and that is only read, has no such table.
            there = self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'forgotten'").fetchone()
            gone = self._db.execute("SELECT name FROM forgotten") if there else ()
            self._forgotten: set[bytes] = {name for (name,) in gone}
            self._held: dict[str, Mask] = {}
            self._entry, self._tip = 0, b""
            self._load_new()
        except (sqlite3.Error, FileNotFoundError) as error:
            if (full := full_disk(error, str(path))) is not None:
                raise full from None
            raise BudgetError(
                f"is not a readable record of personal losses ({type(error).__name__})", where=str(path),
                hint="restore the file: without it nobody with a limit of her own may take part",
            ) from None  # fmt: skip

    def enrol(self, names: Sequence[bytes]) -> NDArray[np.int64]:
        """Places of these persons, new ones included; shape of `names`."""
        if any(name not in self._places and name not in self._forgotten for name in names):
            try:
                self._db.execute("BEGIN IMMEDIATE")
                # Another run on the same ledger may have enrolled persons since: places are numbered under the lock.
                self._places = {n: p for p, n in self._db.execute("SELECT place, name FROM person")}
                self._forgotten |= {name for (name,) in self._db.execute("SELECT name FROM forgotten")}
                known = self._places.keys() | self._forgotten
                new = [name for name in dict.fromkeys(names) if name not in known]
                start = len(self._places)
                self._db.executemany("INSERT INTO person VALUES (?, ?)", ((start + i, n) for i, n in enumerate(new)))
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise self._unwritable(error) from None
            self._places |= {name: start + i for i, name in enumerate(new)}
        places = (_FORGOTTEN if name in self._forgotten else self._places[name] for name in names)
        return np.fromiter(places, dtype=np.int64, count=len(names))

    def forget(self, names: Sequence[bytes]) -> None:
        """Destroy, for ever, which charges held these persons; they count as held by all of them (invariant 5).

        Raises:
            BudgetError: The disk does not take it, or another program is in the way: asking again finishes it.
        """
        self._rename(names)
        deadline = time.monotonic() + _PATIENCE
        while not self._tidy():
            if time.monotonic() > deadline:
                raise BudgetError("a copy of a person's name may still lie in the write-ahead log",
                                  where=str(self._path), hint="stop the programs that use the ledger, and erase "
                                  "again to finish")  # fmt: skip
            time.sleep(0.05)

    def forget_erased(self, names: Sequence[bytes]) -> None:
        """The same for those of these erased persons who were erased where this file was not at hand. Whatever else
        reads the file is not waited for: a later call tidies up after it.

        Raises:
            BudgetError: The disk does not take it.
        """
        kept = {name for (name,) in self._db.execute("SELECT name FROM kept")}
        if new := [name for name in names if name not in kept and name not in self._forgotten]:
            self._rename(new)
            self._tidy()

    def keep(self, name: bytes) -> None:
        """Note an erased person's wish that it be kept which charges held her.

        Raises:
            BudgetError: The disk does not take it.
        """
        try:
            self._db.execute("INSERT OR IGNORE INTO kept VALUES (?)", (name,))
        except sqlite3.Error as error:
            raise self._unwritable(error) from None

    def _rename(self, names: Sequence[bytes]) -> None:
        try:
            self._db.execute("PRAGMA secure_delete=ON")
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR IGNORE INTO forgotten VALUES (?)", ((name,) for name in sorted(names)))
            # The place keeps its marks under a name that is nobody's: the chain over all marks holds.
            fresh = ((secrets.token_bytes(32), name) for name in names)
            self._db.executemany("UPDATE person SET name = ? WHERE name = ?", fresh)
            self._db.executemany("DELETE FROM kept WHERE name = ?", ((name,) for name in names))
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise self._unwritable(error) from None
        self._places = {n: p for p, n in self._db.execute("SELECT place, name FROM person")}
        self._forgotten |= set(names)

    def _tidy(self) -> bool:
        """Empty the write-ahead log, where nobody else reads at this instant."""
        try:
            self._db.execute("PRAGMA busy_timeout=0")
            return not self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                return False
            raise self._unwritable(error) from None
        finally:
            self._db.execute(f"PRAGMA busy_timeout={1000 * _PATIENCE:.0f}")

    def hold(self, charge: str, places: NDArray[np.int64]) -> None:
        """Note, durably, whom a charge held. Where it is computed again, everybody it ever held counts.

        Raises:
            BudgetError: The disk does not take it.
        """
        mask = np.zeros(len(self._places), dtype=np.bool_)
        mask[places[places != _FORGOTTEN]] = True  # who is forgotten counts as held anyway
        persons = np.packbits(mask).tobytes()
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._load_new()  # what another run on the same ledger noted
            entry, chain = self._entry + 1, _link(self._tip, self._entry + 1, charge, persons)
            self._db.execute("INSERT INTO held VALUES (?, ?, ?, ?)", (entry, charge, persons, chain))
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise self._unwritable(error) from None
            raise
        self._entry, self._tip = entry, chain
        self._add(charge, mask)

    def divergence(self, charges: Mapping[str, PrivacyEvent], order: float) -> Floats:
        """Each enrolled person's summed Rényi divergence of an order; shape [persons], and one more where somebody is
        forgotten.

        Args:
            charges: The ledger's charges as they stand now (settled ones at what is left of them).
            order: Rényi order.
        """
        self._count(charges)
        total = np.zeros(len(self._places), dtype=np.float64)
        for (sigma, rate), counts in self._counts.items():
            total += counts * sampled_gaussian_rdp(sigma, rate, order)
        if not self._forgotten:
            return total
        return np.append(total, max(rdp(_of_role(charges, role), order) for role in Role))

    def epsilons(self, charges: Mapping[str, PrivacyEvent], delta: float) -> Floats:
        """Each enrolled person's own ε at δ: the best conversion over all orders; shape [persons], and one more where
        somebody is forgotten: what she has lost at most. For reports.

        Charges that nobody was noted for count as `admits` counts them (invariant 4), so no person's ε is below what
        the site decides by.
        """
        unnoted = self.unnoted(charges)
        certain = {role: merge_events(e for e in unnoted.values() if e.role is role) for role in Role}
        best = {role: np.full(len(self._places), np.inf) for role in Role}
        for order in ORDERS:
            own = self.divergence(charges, order)[: len(self._places)] + conversion(order, delta)
            for role in Role:
                np.minimum(best[role], own + rdp(certain[role], order), out=best[role])
        spent = np.zeros(len(self._places), dtype=np.bool_)
        for counts in self._counts.values():
            spent |= counts > 0
        held, found = self._held_as(charges), np.zeros(len(self._places), dtype=np.float64)
        for role, other in ((Role.TRAIN, Role.HELD_OUT), (Role.HELD_OUT, Role.TRAIN)):
            may = held[role] | ~held[other]
            here = may & (spent | bool(certain[role]))
            np.maximum(found, best[role], out=found, where=here)
        if not self._forgotten:
            return found
        return np.append(found, max(rdp_epsilon(_of_role(charges, role), delta) for role in Role))

    def unnoted(self, charges: Mapping[str, PrivacyEvent]) -> dict[str, PrivacyEvent]:
        """Those charges that nobody was noted for."""
        return {charge: event for charge, event in charges.items() if charge not in self._held}

    def uncharged(self, charges: Mapping[str, PrivacyEvent]) -> int:
        """How many charges are noted here and not in the ledger, as when an older copy of the ledger was restored."""
        return sum(charge not in charges for charge in self._held)

    def admits(
        self,
        places: NDArray[np.int64],
        limits: Floats,
        role: Role,
        charges: Mapping[str, PrivacyEvent],
        upcoming: Sequence[PrivacyEvent],
        delta: float,
    ) -> Mask:
        """May each of these persons take part in what comes next?

        Args:
            places: Persons, from `enrol`.
            limits: Each person's own limit of ε at `delta`; infinity where there is none.
            role: The role that these persons hold.
            charges: The ledger's charges as they stand now; those of the next release may be among them already.
            upcoming: Releases that are about to be made and not charged yet.
            delta: The ledger's δ.
        """
        allowed = np.isinf(limits) & (limits > 0)
        certain = merge_events(e for e in (*self.unnoted(charges).values(), *upcoming) if e.role is role)
        for limit in np.unique(limits[np.isfinite(limits) & (limits > 0)]):
            budget = RenyiBudget.for_limit(float(limit), delta)
            (order,), (most,) = budget.orders, budget.limits
            more = sum(e.releases * sampled_gaussian_rdp(e.noise_multiplier, e.sample_rate, order) for e in certain)
            here = limits == limit
            allowed[here] = self.divergence(charges, order)[places[here]] + more <= most
        return allowed

    def place_of(self, name: bytes) -> int | None:
        """A person's place; None for an unknown one."""
        return _FORGOTTEN if name in self._forgotten else self._places.get(name)

    def is_forgotten(self, name: bytes) -> bool:
        """Was it destroyed which charges held this person?"""
        return name in self._forgotten

    @property
    def persons(self) -> int:
        """How many places there are, those of the forgotten among them."""
        return len(self._places)

    def charges_of(self, name: bytes) -> list[str] | None:
        """Names of the charges that held a person, in the order in which they were noted; None for an unknown one, and
        for one who is forgotten."""
        place = self._places.get(name)
        if place is None:
            return None
        return [charge for charge, mask in self._held.items() if place < len(mask) and mask[place]]

    def charges_held(self) -> frozenset[str]:
        """Names of the charges that somebody was noted for."""
        return frozenset(self._held)

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def _held_as(self, charges: Mapping[str, PrivacyEvent]) -> dict[Role, Mask]:
        """By role: whom a charge of it held; shape [persons]."""
        found = {role: np.zeros(len(self._places), dtype=np.bool_) for role in Role}
        for charge, event in charges.items():
            mask = self._held.get(charge, np.zeros(0, dtype=np.bool_))[: len(self._places)]
            found[event.role][: len(mask)] |= mask
        return found

    def _load_new(self) -> None:
        query = "SELECT entry, charge, persons, chain FROM held WHERE entry > ? ORDER BY entry"
        for entry, charge, persons, chain in self._db.execute(query, (self._entry,)).fetchall():
            if entry != self._entry + 1 or chain != _link(self._tip, entry, charge, persons):
                raise BudgetError(
                    f"entry {entry} does not follow from the one before: the record of who was held was edited",
                    where=str(self._path), hint="restore the file from the site's backup",
                )  # fmt: skip
            self._entry, self._tip = entry, chain
            self._add(charge, np.unpackbits(np.frombuffer(persons, dtype=np.uint8)).astype(np.bool_))

    def _unwritable(self, error: sqlite3.Error) -> BudgetError:
        return BudgetError(f"cannot be written ({type(error).__name__}): nothing may leave",
                           where=str(self._path), hint="check the disk")  # fmt: skip

    def _count(self, charges: Mapping[str, PrivacyEvent]) -> None:
        """Bring the counts up to what the ledger holds now; only what changed is looked at."""
        size = len(self._places)
        for kind, counts in self._counts.items():
            if len(counts) < size:
                self._counts[kind] = np.concatenate([counts, np.zeros(size - len(counts), dtype=np.int64)])
        for charge, event in charges.items():
            known = self._counted.get(charge)
            if charge not in self._held or known == event:
                continue
            kind = (event.noise_multiplier, event.sample_rate)
            counts = self._counts.setdefault(kind, np.zeros(size, dtype=np.int64))
            mask = self._held[charge][:size]
            counts[: len(mask)] += mask * (event.releases - (known.releases if known is not None else 0))
            self._counted[charge] = event

    def _add(self, charge: str, mask: Mask) -> None:
        held = self._held.get(charge, np.zeros(0, dtype=np.bool_))
        both = np.zeros(max(len(held), len(mask)), dtype=np.bool_)
        both[: len(held)] |= held
        both[: len(mask)] |= mask
        counted = self._counted.pop(charge, None)
        if counted is not None:  # taken out of the counts with whom it held before; it is counted anew
            counts = self._counts[(counted.noise_multiplier, counted.sample_rate)]
            here = held[: len(counts)]
            counts[: len(here)] -= here * counted.releases
        self._held[charge] = both


def _of_role(charges: Mapping[str, PrivacyEvent], role: Role) -> list[PrivacyEvent]:
    return merge_events(event for event in charges.values() if event.role is role)


def _link(tip: bytes, entry: int, charge: str, persons: bytes) -> bytes:
    return hashlib.sha256(tip + f"{entry}\n{charge}\n".encode() + persons).digest()
