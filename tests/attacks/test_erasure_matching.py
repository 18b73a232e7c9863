"""Whom an erased person's record was about: matched by the rounds that held her, from all of a site's files.

The attacker has the site key, her identifier, and the registry, the record of losses and the record of snapshots.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from confide.clients.snapshots import SnapshotStore
from confide.privacy.consent import ConsentEvent, EventType, Registry, SiteKey
from confide.privacy.dp import PrivacyEvent, Role
from confide.privacy.dp.personal import PersonalLosses
from tests.cli.command import confide

PEOPLE = [f"person-{n}" for n in range(8)]
GONE = PEOPLE[:3]
ROUNDS = range(1, 9)
#: In which rounds each person was; no two the same.
HELD = {person: {r for r in ROUNDS if r <= 1 + n} for n, person in enumerate(PEOPLE)}
EVENT = PrivacyEvent(
    role=Role.TRAIN, unit="subject", noise_multiplier=2.0, sample_rate=0.5, steps=5, max_grad_norm=1.0
)  # fmt: skip
CHARGES = {f"run/{r}/train": EVENT for r in ROUNDS}
DELTA = 1e-5


@dataclass(frozen=True)
class Site:
    folder: Path
    key: SiteKey
    pseudonyms: dict[str, bytes]
    spent: dict[str, float]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    assert confide("consent", "init", tmp_path).code == 0
    key = SiteKey.load_or_create(tmp_path / "site.key")
    with (
        closing(Registry(tmp_path / "consent.db", key)) as registry,
        closing(PersonalLosses(tmp_path / "personal.db")) as losses,
        closing(SnapshotStore(tmp_path / "snapshots.db")) as snapshots,
    ):
        names = registry.enrol(PEOPLE)
        registry.append([
            ConsentEvent(event_id=f"e{n}", pseudonym=names[p], purpose="research", type=EventType.GIVEN, effective_at=n)
            for n, p in enumerate(PEOPLE)
        ])  # fmt: skip
        places = dict(zip(PEOPLE, losses.enrol([key.locator(p) for p in PEOPLE]).tolist(), strict=True))
        for round_ in ROUNDS:
            here = [p for p in PEOPLE if round_ in HELD[p]]
            losses.hold(f"run/{round_}/train", np.array([places[p] for p in here]))
            members = {Role.TRAIN: [names[p] for p in here]}
            snapshots.put("run", round_, members, len(PEOPLE), key.round_keys("run", round_))
        epsilons = losses.epsilons(CHARGES, DELTA)
        return Site(tmp_path, key, names, {p: float(epsilons[places[p]]) for p in PEOPLE})


def erase(site: Site, *arguments: str | Path) -> None:
    for person in GONE:
        assert confide("consent", "erase", person, "--registry", site.folder, "--yes", *arguments).code == 0


def charged_rounds(site: Site, subject: str) -> set[int] | None:
    """The rounds that the record of losses has under her locator."""
    with closing(sqlite3.connect(site.folder / "personal.db")) as db:
        row = db.execute("SELECT place FROM person WHERE name = ?", (site.key.locator(subject),)).fetchone()
        if row is None:
            return None
        marks = {
            c: np.unpackbits(np.frombuffer(p, np.uint8)) for c, p in db.execute("SELECT charge, persons FROM held")
        }
    return {int(charge.split("/")[1]) for charge, mask in marks.items() if row[0] < len(mask) and mask[row[0]]}


def matches(site: Site, subject: str) -> list[bytes]:
    """Pseudonyms of closed histories whose snapshots have the pattern of her charges; all of them where it has none."""
    wanted = charged_rounds(site, subject)
    with closing(SnapshotStore(site.folder / "snapshots.db", read_only=True)) as store:
        closed = [p for p in site.pseudonyms.values() if p in set(_closed(site))]
        return [p for p in closed if wanted is None or {r for _, r, _ in store.rounds_of(p)} == wanted]


def _closed(site: Site) -> Iterator[bytes]:
    with closing(sqlite3.connect(site.folder / "consent.db")) as db:
        yield from (p for (p,) in db.execute("SELECT pseudonym FROM consent_event WHERE type = 'erased'"))


def test_an_erased_person_is_not_matched_by_the_rounds_that_held_her(site: Site) -> None:
    erase(site, "--ledger", site.folder)
    everybody = {site.pseudonyms[p] for p in GONE}
    assert all(set(matches(site, p)) == everybody for p in GONE), "nothing but that she is one of the erased"
    # What is left of those who were not erased, the control: their patterns are still there.
    assert all(charged_rounds(site, p) == HELD[p] for p in PEOPLE if p not in GONE)


def test_the_control_without_the_ledger_every_one_is_matched(site: Site) -> None:
    erase(site)
    assert all(matches(site, p) == [site.pseudonyms[p]] for p in GONE)


def test_no_file_tells_in_which_order_or_under_which_place_she_was(site: Site) -> None:
    locators = [site.key.locator(p) for p in GONE]
    assert all(loc in (site.folder / "personal.db").read_bytes() for loc in locators)
    erase(site, "--ledger", site.folder)
    with closing(sqlite3.connect(site.folder / "personal.db")) as db:
        left = [name for (name,) in db.execute("SELECT name FROM forgotten")]
        assert left == sorted(locators)
        assert {row[1] for row in db.execute("PRAGMA table_info(forgotten)")} == {"name"}
        renamed = {name for (name,) in db.execute("SELECT name FROM person")} - {site.key.locator(p) for p in PEOPLE}
        assert len(renamed) == len(GONE)
    for path in site.folder.glob("personal.db*"):
        data = path.read_bytes()
        assert all(data.count(loc) <= 1 for loc in locators), path.name


def test_what_she_spent_never_shrinks_nor_starts_anew(site: Site) -> None:
    erase(site, "--ledger", site.folder)
    with closing(PersonalLosses(site.folder / "personal.db")) as losses:
        names = [site.key.locator(p) for p in PEOPLE]
        again = losses.enrol(names)
        bounds = losses.epsilons(CHARGES, DELTA)[again]
        for person, bound in zip(PEOPLE, bounds, strict=True):
            assert bound >= site.spent[person]
            assert person in GONE or bound == site.spent[person], "others keep their own"
        most = max(site.spent.values())
        assert bounds[0] == pytest.approx(most)
        limits = np.full(len(PEOPLE), site.spent[GONE[0]])
        admitted = losses.admits(again, limits, Role.TRAIN, CHARGES, [], DELTA)
        assert not admitted[: len(GONE)].any()
        # She takes part again, through a registry that knows nothing of her erasure: it counts, as everything does.
        losses.hold("run/9/train", again)
        more = CHARGES | {"run/9/train": EVENT}
        assert losses.epsilons(more, DELTA)[again][0] > bounds[0]
    with closing(PersonalLosses.open(site.folder / "personal.db")) as losses:
        assert losses.place_of(names[0]) == -1
        assert losses.charges_of(names[0]) is None


def test_neither_a_program_nor_a_hand_gives_her_a_fresh_place(site: Site) -> None:
    erase(site, "--ledger", site.folder)
    locator = site.key.locator(GONE[0])
    with closing(sqlite3.connect(site.folder / "personal.db", isolation_level=None)) as db:
        for statement, values in (
            ("INSERT INTO person VALUES (99, ?)", (locator,)),
            ("INSERT OR REPLACE INTO person VALUES (0, ?)", (locator,)),
            ("UPDATE person SET name = ? WHERE place = 0", (locator,)),
            ("DELETE FROM forgotten", ()), ("UPDATE forgotten SET name = x'00'", ()),
        ):  # fmt: skip
            with pytest.raises(sqlite3.IntegrityError):
                db.execute(statement, values)


def test_erasing_again_with_the_ledger_finishes_what_an_erasure_without_it_left(site: Site) -> None:
    erase(site)
    erase(site, "--ledger", site.folder)
    again = confide("consent", "erase", GONE[0], "--registry", site.folder, "--ledger", site.folder, "--json")
    assert again.last_line == {"subject": GONE[0], "events": 0, "already": True, "forgotten": True}
    assert all(charged_rounds(site, p) is None for p in GONE)
    answer = confide("consent", "erase", PEOPLE[4], "--registry", site.folder, "--yes", "--ledger", site.folder / "no")
    assert answer.code == 2
    assert "personal.db" in answer.err
    with closing(Registry(site.folder / "consent.db", site.key)) as registry:
        assert not registry.erased([PEOPLE[4]]), "a wrong folder erases nobody"
