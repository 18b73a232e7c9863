"""Whom an erased person's record was about: matched by the rounds that held her, from all of a site's files.

The attacker has the site key, her identifier, and the registry, the record of losses and the record of snapshots.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from confide.clients.data.records import SiteRecords
from confide.clients.exposure import describe_person
from confide.clients.participants import ParticipantSource
from confide.clients.sitefiles import SiteFiles
from confide.clients.snapshots import SnapshotStore
from confide.privacy.consent import ConsentEvent, EventType, Registry, SiteKey, now_micros
from confide.privacy.dp import Ledger, PrivacyEvent, RenyiBudget, Role
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


@pytest.mark.parametrize(
    "arguments", [lambda _: (), lambda site: ("--ledger", site.folder)], ids=["by default", "where the ledger is named"]
)
def test_an_erased_person_is_not_matched_by_the_rounds_that_held_her(
    site: Site, arguments: Callable[[Site], tuple[str | Path, ...]]
) -> None:
    erase(site, *arguments(site))
    everybody = {site.pseudonyms[p] for p in GONE}
    assert all(set(matches(site, p)) == everybody for p in GONE), "nothing but that she is one of the erased"
    # What is left of those who were not erased, the control: their patterns are still there.
    assert all(charged_rounds(site, p) == HELD[p] for p in PEOPLE if p not in GONE)


def test_the_control_where_the_rounds_are_kept_every_one_is_matched(site: Site) -> None:
    erase(site, "--keep-rounds")
    assert all(matches(site, p) == [site.pseudonyms[p]] for p in GONE)


def test_a_site_finishes_what_was_erased_where_its_ledger_was_not_at_hand(site: Site) -> None:
    """As in a registry that several sites of a hospital share: it is erased there, and the site starts later."""
    with closing(Registry(site.folder / "consent.db", site.key)) as registry:
        for person in GONE:
            registry.erase(person)
    assert all(matches(site, p) == [site.pseudonyms[p]] for p in GONE), "the control: until the site starts"
    kept = GONE[-1]
    assert confide("consent", "erase", kept, "--registry", site.folder, "--keep-rounds", "--json").code == 0
    each, none = np.arange(len(PEOPLE)), np.zeros(len(PEOPLE), dtype=np.float32)
    records = SiteRecords(none[:, None], none, each, each, PEOPLE)
    for _ in range(2):
        with (
            closing(Registry(site.folder / "consent.db", site.key)) as registry,
            closing(PersonalLosses(site.folder / "personal.db")) as losses,
        ):
            ParticipantSource(registry, site.key, records, losses, "research", 0.2, now_micros)
            places = losses.enrol([site.key.locator(p) for p in PEOPLE])
        assert [p for p, place in zip(PEOPLE, places, strict=True) if place == -1] == GONE[:-1]
    assert all(charged_rounds(site, p) is None for p in GONE[:-1])
    assert matches(site, kept) == [site.pseudonyms[kept]], "whoever asked that it be kept"
    for path in site.folder.glob("personal.db*"):
        assert all(path.read_bytes().count(site.key.locator(p)) <= 1 for p in GONE[:-1]), path.name


def test_what_the_site_itself_says_of_the_erased_is_the_same_for_all_of_them(site: Site) -> None:
    """ε is what the ledger, which anybody can check against the log, says at most; and no run is named."""
    with closing(Ledger(site.folder / "ledger.db", RenyiBudget.for_limit(16.0, DELTA), "subject", 0.25)) as ledger:
        for charge, event in CHARGES.items():
            ledger.reserve(charge, event)
        most = ledger.epsilon(Role.TRAIN)
    files = SiteFiles.of("ash", site.folder, site.folder)
    before = {p: describe_person(p, files) for p in PEOPLE}
    assert {p: {r for run in before[p].runs for r in run.rounds} for p in PEOPLE} == HELD
    erase(site)
    after = {p: describe_person(p, files) for p in PEOPLE}
    said = [replace(after[p], subject="", role="") for p in GONE]  # her role follows from the site key, for ever
    assert all(one == said[0] for one in said)
    assert (after[GONE[0]].runs, after[GONE[0]].forgotten) == ([], True)
    assert after[GONE[0]].epsilon == pytest.approx(most)
    assert all(after[p] == before[p] for p in PEOPLE if p not in GONE), "what others are told is what it was"


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


def test_erasing_again_finishes_what_an_erasure_that_kept_the_rounds_left(site: Site) -> None:
    erase(site, "--keep-rounds")
    erase(site, "--ledger", site.folder)
    again = confide("consent", "erase", GONE[0], "--registry", site.folder, "--ledger", site.folder, "--json")
    assert again.last_line == {"subject": GONE[0], "events": 0, "already": True, "forgotten": True}
    kept = confide("consent", "erase", GONE[0], "--registry", site.folder, "--keep-rounds", "--json")
    assert kept.last_line == again.last_line, "what is destroyed cannot be kept"
    assert all(charged_rounds(site, p) is None for p in GONE)
    answer = confide("consent", "erase", PEOPLE[4], "--registry", site.folder, "--yes", "--ledger", site.folder / "no")
    assert answer.code == 2
    assert "personal.db" in answer.err
    with closing(Registry(site.folder / "consent.db", site.key)) as registry:
        assert not registry.erased([PEOPLE[4]]), "a wrong folder erases nobody"
