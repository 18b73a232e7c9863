"""A site's privacy ledger: every charge, durable before anything computed from the data leaves.

Invariants:
1. *Charge before release*: `reserve` returns only after the charge is on the disk (fsync).
2. *Filter*: a charge is admitted only if history and charge together fit the budget fixed with the ledger
   (`confide.privacy.dp.budget`); the check and the write are one transaction.
3. *Append-only and chained*: rows are never changed; each holds the SHA-256 of its predecessor. A row that does not
   follow from the one before is refused on opening.
4. *Settle downwards only*: a reservation can shrink to what really left, never grow. What is not settled counts whole;
   once it has *expired* (its run is over, or the process that knew what left is gone) it does so for ever.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from confide.errors import BudgetError
from confide.privacy.database import full_disk, open_durable, open_read_only
from confide.privacy.dp.accounting import rdp_epsilon
from confide.privacy.dp.budget import RenyiBudget
from confide.privacy.dp.events import PrivacyEvent, Role, event_from_json, event_to_json, merge_events
from confide.privacy.dp.genesis import genesis_text, read_genesis

__all__ = ["Ledger"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS genesis (one INTEGER PRIMARY KEY CHECK (one = 1), content TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS entry (
  seq INTEGER PRIMARY KEY, charge TEXT NOT NULL, kind TEXT NOT NULL CHECK (kind IN ('reserve', 'settle', 'expire')),
  event TEXT NOT NULL, chain BLOB NOT NULL, UNIQUE (charge, kind));
CREATE TABLE IF NOT EXISTS roles (one INTEGER PRIMARY KEY CHECK (one = 1), key TEXT NOT NULL);
CREATE TRIGGER IF NOT EXISTS roles_no_update BEFORE UPDATE ON roles BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS roles_no_delete BEFORE DELETE ON roles BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS entry_no_update BEFORE UPDATE ON entry BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS entry_no_delete BEFORE DELETE ON entry BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS entry_no_replace BEFORE INSERT ON entry
  WHEN EXISTS (SELECT 1 FROM entry WHERE seq = NEW.seq) BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS genesis_no_update BEFORE UPDATE ON genesis BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS genesis_no_delete BEFORE DELETE ON genesis BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""


class Ledger:
    """One site's ledger in one SQLite file.

    Args:
        path: The file; made where it does not exist.
        budget: The budget to fix for a new ledger. An existing ledger keeps its own and refuses another.
        unit: The privacy unit, fixed with the ledger.
        held_out: Share of persons held out, fixed too: roles compose in parallel only if they are for ever.

    Raises:
        BudgetError: The file is damaged, or was made for another limit, δ or unit.
    """

    def __init__(self, path: Path, budget: RenyiBudget, unit: str = "subject", held_out: float = 0.2) -> None:
        self.path = path
        with self._readable():
            self._db = open_durable(path, _SCHEMA)
            wanted = genesis_text(budget, unit, held_out)
            self._db.execute("INSERT OR IGNORE INTO genesis VALUES (1, ?)", (wanted,))
            (found,) = self._db.execute("SELECT content FROM genesis").fetchone()
            if found != wanted:
                raise self._other_genesis(json.loads(found), json.loads(wanted))
            self._start(budget, unit, held_out, found)

    @classmethod
    def open(cls, path: Path) -> Ledger:
        """An existing ledger, to be read: budget, unit and share held out are what its own genesis says.

        Nothing is made and nothing is changed; a charge to what was opened so is refused.

        Raises:
            BudgetError: There is no such file, it is damaged, or its genesis is none that this version would have made.
        """
        ledger = cls.__new__(cls)
        ledger.path = path
        with ledger._readable():
            ledger._db = open_read_only(path)
            row = ledger._db.execute("SELECT content FROM genesis").fetchone()
            if row is None:
                raise ValueError("there is no genesis")
            ledger._start(*read_genesis(row[0]), row[0])
        return ledger

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise BudgetError(
                "there is no such privacy ledger", where=str(self.path), hint="name a site's ledger folder"
            ) from None
        except (sqlite3.Error, ValueError) as error:
            if (full := full_disk(error, str(self.path))) is not None:
                raise full from None
            raise BudgetError(
                f"is not a readable privacy ledger ({type(error).__name__})",
                where=str(self.path),
                hint="do not start a fresh one: restore this file, or account for what it held by hand",
            ) from None

    def _start(self, budget: RenyiBudget, unit: str, held_out: float, genesis: str) -> None:
        self.budget, self.unit, self.held_out = budget, unit, held_out
        self._tip = _link(b"", genesis)
        self._reserved: dict[str, PrivacyEvent] = {}
        self._settled: dict[str, PrivacyEvent] = {}
        self._expired: set[str] = set()
        self._seq = 0
        self._load_new()

    def bind(self, key: str) -> None:
        """Fix the key that gives persons their roles: with another one, roles would no longer be for ever.

        Args:
            key: The site key's fingerprint.

        Raises:
            BudgetError: The ledger was made under another key.
        """
        with self._exclusive():
            self._db.execute("INSERT OR IGNORE INTO roles VALUES (1, ?)", (key,))
            (found,) = self._db.execute("SELECT key FROM roles").fetchone()
        if found != key:
            raise BudgetError(
                "belongs to another site key: persons would change their roles, and what they were charged in one "
                "would be forgotten in the other", where=str(self.path), hint="restore site.key from the site's backup",
            )  # fmt: skip

    def events(self, role: Role) -> list[PrivacyEvent]:
        """What a person holding this role has been exposed to; equal releases are merged."""
        held = (self._settled.get(charge, reserved) for charge, reserved in self._reserved.items())
        return merge_events(e for e in held if e.role is role)

    def charges(self) -> dict[str, PrivacyEvent]:
        """Every charge as it stands: settled ones at what is left of them."""
        return {**self._reserved, **self._settled}

    def reservations(self) -> dict[str, PrivacyEvent]:
        """Every charge as it was reserved."""
        return dict(self._reserved)

    def epsilon(self, role: Role, more: Sequence[PrivacyEvent] = ()) -> float:
        """RDP ε of the charges of a role, with `more` on top; at the ledger's δ."""
        return rdp_epsilon([*self.events(role), *(e for e in more if e.role is role)], self.budget.delta)

    def used(self, more: Sequence[PrivacyEvent] = ()) -> float:
        """Used share of the budget of the more exposed role, with `more` on top; 1.0 is all of it."""
        return max(self.budget.used([*self.events(r), *(e for e in more if e.role is r)]) for r in Role)

    def check(self, events: Sequence[PrivacyEvent]) -> None:
        """Would these charges be admitted?

        Raises:
            BudgetError: They would not; says what is left and what was asked. Or a unit is not the ledger's.
        """
        for event in events:
            self._require_unit(event)
        for role in Role:
            asked = [e for e in events if e.role is role]
            history = self.events(role)
            if asked and not self.budget.admits([*history, *asked]):
                before, after = self.budget.used(history), self.budget.used([*history, *asked])
                raise BudgetError(
                    f"the privacy budget does not suffice: {max(0.0, 1 - before):.1%} of it is left, "
                    f"{after - before:.1%} was asked (RDP filter: limit ε = {self.budget.epsilon_limit:g} at "
                    f"δ = {self.budget.delta:g}; charged so far ε = {self.epsilon(role):.2f}, "
                    f"with this run {self.epsilon(role, asked):.2f})",
                    where=f"ledger {self.path}",
                    hint="lower privacy.epsilon or run.rounds; a site's budget is never refilled",
                )

    def reserve(self, charge: str, event: PrivacyEvent) -> None:
        """Charge, durably. Repeating a charge with the same event changes nothing.

        Raises:
            BudgetError: The budget does not admit it, the charge exists with another event, or the event's unit is not
                the ledger's: the losses of records do not add up to a person's.
        """
        self._require_unit(event)
        if event.steps < 1:
            raise BudgetError("a charge needs at least one step")
        with self._exclusive():
            known = self._reserved.get(charge)
            if known is not None:
                if known != event:
                    raise BudgetError(f"charge {charge} exists with other parameters", where=str(self.path))
                if self._settled.get(charge, event) != event:
                    raise BudgetError(f"charge {charge} was given back already", where=str(self.path))
                return
            self.check([event])
            self._append(charge, "reserve", event)

    def restore(self, charge: str, event: PrivacyEvent) -> None:
        """Append a charge that was made before and is missing here. It raises what was spent, whatever the budget says.

        Raises:
            BudgetError: The charge is here with another event, or the event's unit is not the ledger's.
        """
        self._require_unit(event)
        with self._exclusive():
            known = self._reserved.get(charge)
            if known is not None and known != event:
                raise BudgetError(f"charge {charge} exists with other parameters", where=str(self.path))
            if known is None:
                self._append(charge, "reserve", event)

    def settle(self, charge: str, steps: int) -> None:
        """Shrink a reservation to the steps whose result left the site. Once per charge."""
        with self._exclusive():
            reserved = self._reserved.get(charge)
            if reserved is None or not 0 <= steps <= reserved.steps:
                raise BudgetError(f"charge {charge} cannot be settled to {steps} steps", where=str(self.path))
            if charge in self._settled:
                if self._settled[charge].steps != steps:
                    raise BudgetError(f"charge {charge} is settled already", where=str(self.path))
                return
            if charge in self._expired:
                raise BudgetError(f"charge {charge} has expired: it stands whole", where=str(self.path))
            self._append(charge, "settle", replace(reserved, steps=steps))

    def expire(self, prefix: str) -> None:
        """Let the open charges whose name starts so stand whole, for ever."""
        with self._exclusive():
            for charge in self.open_charges(prefix):
                self._append(charge, "expire", self._reserved[charge])

    def _require_unit(self, event: PrivacyEvent) -> None:
        if event.unit != self.unit:
            raise BudgetError(
                f"a charge per {event.unit} does not fit a ledger per {self.unit}",
                where=str(self.path),
                hint="the unit is fixed with the ledger: keep it in [privacy], or name another --ledger folder",
            )

    def open_charges(self, prefix: str) -> Iterable[str]:
        """Charges whose name starts so and that may still be settled."""
        closed = self._settled.keys() | self._expired
        return [c for c in self._reserved if c.startswith(prefix) and c not in closed]

    def stands(self, prefix: str) -> bool:
        """Was anything charged under a name that starts so, and not given back whole?"""
        return any(e.steps for c, e in self.charges().items() if c.startswith(prefix))

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One writer at a time, also between processes; what another one appended is read first."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise self._unwritable(error) from None
        try:
            self._load_new()
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._reload()
            if isinstance(error, sqlite3.Error):
                raise self._unwritable(error) from None
            raise

    def _append(self, charge: str, kind: str, event: PrivacyEvent) -> None:
        text = event_to_json(event)
        chain = _link(self._tip, f"{self._seq + 1}\n{charge}\n{kind}\n{text}")
        self._db.execute("INSERT INTO entry VALUES (?, ?, ?, ?, ?)", (self._seq + 1, charge, kind, text, chain))
        self._take(self._seq + 1, charge, kind, text, chain)

    def _load_new(self) -> None:
        rows = self._db.execute(
            "SELECT seq, charge, kind, event, chain FROM entry WHERE seq > ? ORDER BY seq", (self._seq,)
        )
        for row in rows.fetchall():
            self._take(*row)

    def _take(self, seq: int, charge: str, kind: str, text: str, chain: bytes) -> None:
        expected = _link(self._tip, f"{seq}\n{charge}\n{kind}\n{text}")
        try:
            event = event_from_json(text)
        except BudgetError as error:
            raise BudgetError(error.what, where=f"{self.path}, entry {seq}", hint=error.hint) from None
        self._require_unit(event)
        reserved = self._reserved.get(charge)
        open_ = charge not in self._settled and charge not in self._expired
        if kind == "reserve":
            follows = reserved is None
        elif kind == "expire":
            follows = event == reserved and open_
        else:
            follows = (
                open_ and reserved is not None and event == replace(reserved, steps=min(event.steps, reserved.steps))
            )
        if seq != self._seq + 1 or chain != expected or not follows:
            raise BudgetError(
                f"entry {seq} does not follow from the one before: the ledger was edited",
                where=str(self.path),
                hint="restore the file from the site's backup; the site charges nothing until then",
            )
        if kind == "expire":
            self._expired.add(charge)
        else:
            (self._reserved if kind == "reserve" else self._settled)[charge] = event
        self._seq, self._tip = seq, chain

    def _reload(self) -> None:
        (found,) = self._db.execute("SELECT content FROM genesis").fetchone()
        self._reserved, self._settled, self._expired, self._seq, self._tip = {}, {}, set(), 0, _link(b"", found)
        self._load_new()

    def _unwritable(self, error: sqlite3.Error) -> BudgetError:
        return BudgetError(
            f"cannot be written ({type(error).__name__}), so nothing may leave",
            where=str(self.path),
            hint="check the disk and the file's permissions",
        )

    def _other_genesis(self, found: dict[str, object], wanted: dict[str, object]) -> BudgetError:
        changed = ", ".join(
            f"{k} = {found[k]} (asked: {wanted[k]})" for k in sorted(found) if found[k] != wanted.get(k)
        )
        return BudgetError(
            f"was made with {changed}; these are fixed for the ledger's lifetime",
            where=str(self.path),
            hint="keep the ledger's values in [privacy], or name another --ledger folder for unrelated data",
        )


def _link(tip: bytes, content: str) -> bytes:
    return hashlib.sha256(tip + content.encode()).digest()
