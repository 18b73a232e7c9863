"""The run store: what it refuses, what it forgets, and that it does not grow with the rounds."""

from __future__ import annotations

import gc
import itertools
import json
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message as FlowerMessage
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

from confide.errors import AuditError, ConfigError, StorageError
from confide.privacy.sealing import Payload
from confide.protocol.envelope import Address, Envelope
from confide.protocol.identity import Identity
from confide.protocol.messages import Refusal
from confide.server import tables as t
from confide.server.coordinator import Coordinator
from confide.server.journal import Journal
from confide.server.runs import RunStore
from confide.server.totals import RoundOutcome, Total
from tests.attacks.federation import Federation, open_federation
from tests.privacy import postgres

MANIFEST, INITIAL = b'{"run": "r"}', b"first weights"
_numbers = itertools.count()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database in a file, and one on a real PostgreSQL server."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'runs.db'}"
    return postgres.new_database(request.getfixturevalue("postgres_folder"), f"runs_{next(_numbers)}")


@pytest.fixture(scope="module")
def postgres_folder() -> Iterator[str]:
    """One server for the tests of this file."""
    with postgres.server() as folder:
        yield folder


@pytest.fixture(autouse=True)
def closed_stores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test opens is closed at its end: a connection that is left behind is a warning."""
    made, real = list[RunStore](), RunStore.__init__

    def noted(store: RunStore, *arguments: Any) -> None:
        real(store, *arguments)
        made.append(store)

    monkeypatch.setattr(RunStore, "__init__", noted)
    yield
    for store in made:
        store.close()


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Any]:
    """A coordinator's log."""
    made = Identity.generate("coordinator").open_log(tmp_path / "log.db", "coordinator", "f")
    yield made
    made.close()


def at(step: str, round_: int = 0, attempt: int = 0, run: str = "r") -> Address:
    return Address(
        federation="f", roster_version=1, run=run, manifest="0" * 64, key_epoch=0, round=round_, step=step,
        attempt=attempt,
    )  # fmt: skip


def message(text: bytes, *chunks: bytes) -> Envelope:
    return Envelope(b"header " + text, b"signature", b"body", chunks)


# --- opening ----------------------------------------------------------------------------------------------------------


def test_what_was_stored_is_there_for_the_next_process(url: str, log: Any) -> None:
    first = RunStore(url).open("r", MANIFEST, INITIAL, log)
    first.put_requests(at("join"), {"*": message(b"join", b"bulk", b"more")})
    first.put_reply(at("join"), "ash", message(b"yes", b"bulk"))
    first.close(at("join"))
    store = RunStore(url)
    again = store.open("r", MANIFEST, INITIAL, log)
    assert again.requests(at("join")) == {"*": message(b"join", b"bulk", b"more")}
    assert again.replies(at("join")) == {"ash": message(b"yes", b"bulk")}
    assert again.closed(at("join"))
    assert not again.closed(at("keys"))
    assert store.runs() == {"r": "running"}
    assert store.load("r") == (MANIFEST, INITIAL)
    assert store.load("another") is None


def test_whoever_opens_a_run_takes_it_over(url: str, log: Any) -> None:
    """Two coordinators of one run would contradict each other: the first one cannot store, and so sends nothing."""
    first = RunStore(url).open("r", MANIFEST, INITIAL, log)
    first.put_requests(at("join"), {"*": message(b"join")})
    second = RunStore(url).open("r", MANIFEST, INITIAL, log)
    with pytest.raises(StorageError, match="taken this run over"):
        first.put_requests(at("train", 1), {"ash": message(b"mine")})
    assert second.requests(at("train", 1)) == {}, "and nothing of it is there"
    second.put_requests(at("train", 1), {"ash": message(b"yours")})


@pytest.mark.parametrize(("manifest", "initial"), [(b"another", INITIAL), (MANIFEST, b"other weights")])
def test_a_run_is_resumed_as_it_was_begun(url: str, log: Any, manifest: bytes, initial: bytes) -> None:
    RunStore(url).open("r", MANIFEST, INITIAL, log)
    with pytest.raises(ConfigError, match="another manifest or first model"):
        RunStore(url).open("r", manifest, initial, log)
    RunStore(url).open("r", MANIFEST, INITIAL, log)


def test_a_log_that_was_put_back_is_noticed(tmp_path: Path) -> None:
    with open_federation(tmp_path / "f") as federation:
        url = f"sqlite:///{tmp_path / 'runs.db'}"
        store, grid = RunStore(url), federation.grid()
        coordinator = federation.coordinator(grid, store=store, before_round=_die_in(2))
        with pytest.raises(_Died):
            coordinator.run()
        other = federation.world.coordinator.open_log(tmp_path / "fresh.db", "coordinator", "simulation")
        world = federation.world
        with pytest.raises(AuditError, match="does not hold what it held"):
            Coordinator(grid, world.coordinator, world.manifest, world.initial, other, store=RunStore(url))
        other.close()
        federation.coordinator(grid, store=RunStore(url)).run()


@pytest.mark.parametrize("url", ["nonsense", "nosuchdatabase://host/x", "sqlite:////no/such/folder/runs.db"])
def test_a_database_that_cannot_be_used_is_said_so(url: str) -> None:
    with pytest.raises((ConfigError, StorageError)) as caught:
        RunStore(url)
    assert caught.value.hint


def test_no_password_is_shown() -> None:
    with pytest.raises((ConfigError, StorageError)) as caught:
        RunStore("nosuchdatabase://user:secret-word@host/x")
    assert "secret-word" not in str(caught.value)


def test_another_version_is_refused(url: str) -> None:
    store = RunStore(url)
    with store.transaction() as db:
        db.execute(t.schema.update().values(version=99))
    with pytest.raises(StorageError, match="version 99"):
        RunStore(url)


def test_processes_that_open_a_new_store_at_once_make_it_once(url: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: RunStore(url), range(8)))
    stores[0].submit("r", MANIFEST, INITIAL)
    assert {tuple(store.runs()) for store in stores} == {("r",)}
    for store in stores:
        store.close()


def test_of_those_who_put_a_run_there_under_one_name_one_does(url: str) -> None:
    stores = [RunStore(url) for _ in range(6)]

    def put(number: int) -> bool:
        try:
            stores[number].submit("r", b"manifest %d" % number, INITIAL)
        except ConfigError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        won = [number for number, done in enumerate(pool.map(put, range(6))) if done]
    assert len(won) == 1
    assert RunStore(url).load("r") == (b"manifest %d" % won[0], INITIAL)


def test_of_two_owners_that_write_at_once_only_the_last_one_is_taken(url: str, tmp_path: Path) -> None:
    """Whatever the interleaving: once a take-over is through, nothing of an earlier owner is."""
    key = Identity.generate("c").key
    Identity("c", key).open_log(tmp_path / "log.db", "coordinator", "f").close()
    RunStore(url).submit("r", MANIFEST, INITIAL)

    def drive(number: int) -> tuple[str, int]:
        store, written = RunStore(url), 0
        log = Identity("c", key).open_log(tmp_path / "log.db", "coordinator", "f")
        journal = store.open("r", MANIFEST, INITIAL, log)
        try:
            for round_ in range(1, 40):
                journal.put_requests(at("train", round_, attempt=number), {"ash": message(b"%d" % number)})
                written += 1
        except StorageError as error:
            return (journal._owner, written) if "taken this run over" in str(error) else ("", -1)
        finally:
            log.close()
        return journal._owner, written

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(drive, range(4)))
    with RunStore(url).transaction() as db:
        last = db.scalar(select(t.run.c.owner))
        rows = dict(db.execute(select(t.message.c.attempt, func.count()).group_by(t.message.c.attempt)).all())  # type: ignore[arg-type]
    assert [written for owner, written in found if owner == last] == [39], "who came last was never disturbed"
    assert rows == {number: written for number, (_, written) in enumerate(found) if written}


def test_a_run_is_stopped_while_its_owner_writes(url: str, log: Any) -> None:
    """Two processes, one row: neither's change is lost."""
    store, other = RunStore(url), RunStore(url)
    journal = store.open("r", MANIFEST, INITIAL, log)
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(lambda: [other.mark("r", "stopping", only=("running",)) for _ in range(30)])
        for number in range(1, 31):
            journal.end_round(_outcome(number), [], "")
        assert sum(stopped.result()) == 1
    assert (other.status("r"), journal.position().next) == ("stopping", 31)


def test_a_run_dies_and_goes_on_from_either_database_to_the_same_end(url: str, tmp_path: Path) -> None:
    with open_federation(tmp_path / "f", privacy={"epsilon": float("inf"), "unsafe_noise_seed": 5},
                         sealing={"profile": "masked"}) as federation:  # fmt: skip
        with pytest.raises(_Died):
            federation.coordinator(store=RunStore(url), before_round=_die_in(2)).run()
        store = RunStore(url)
        assert store.next_round(federation.manifest.run) == 2
        assert store.untold() == []
        released = federation.coordinator(store=store).run()
        assert store.runs() == {federation.manifest.run: "finished"}
        assert [o.abandoned for o in released.outcomes] == [False] * 4
        again = federation.coordinator(
            federation.grid(lambda *_: pytest.fail("asked again")), store=RunStore(url)
        ).run()
        assert again.weights.tobytes() == released.weights.tobytes()


def test_a_large_round_and_a_hostile_sites_words_are_taken_by_every_database(url: str, log: Any) -> None:
    """More bytes than 32 bits count; and text that PostgreSQL does not take must not end a run."""
    journal = RunStore(url).open("r", MANIFEST, INITIAL, log)
    journal.agree(0, ["ash"])
    journal.end_round(replace(_outcome(1), uplink_bytes=2**40), ["ash"], "")
    assert [o.uplink_bytes for o in journal.outcomes()] == [2**40]
    hostile = json.loads('{"kind": "a\\u0000b", "reason": "no\\u0000\\n\\u202e \\u00e9"}')
    journal.refuse("ash", Refusal(**hostile))
    assert journal.refusals() == {"ash": Refusal(kind="a\ufffdb", reason="no\ufffd\ufffd\ufffd é")}


# --- what a run holds -------------------------------------------------------------------------------------------------


def _total(round_: int, size: int = 1000) -> Total:
    return Total(round_, ("ash", "birch"), ("0" * 64,) * 2, "1" * 64, 0, Payload((bytes([round_ % 256]) * size,), (7,)))


def _outcome(round_: int, *, abandoned: bool = False) -> RoundOutcome:
    return RoundOutcome(round_, ("ash", "birch"), abandoned, 10)


def _kept(journal: Journal) -> list[int]:
    return [total.round for total in journal.totals(0, 10_000)]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sets(st.sampled_from(["ash", "birch", "cedar"])), st.booleans(), st.sampled_from(["", "cedar"])),
        max_size=12,
    )
)
def test_a_sum_is_kept_exactly_as_long_as_a_member_may_ask_for_it(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[tuple[set[str], bool, str]]
) -> None:
    """A model of it: each round some are present (and apply what came before), it is abandoned or not, and somebody may
    leave for good."""
    log = Identity.generate("c").open_log(tmp_path_factory.mktemp("log") / "log.db", "coordinator", "f")
    journal = RunStore().open("r", MANIFEST, INITIAL, log)
    journal.agree(0, ["ash", "birch", "cedar"])
    applied, sums = dict.fromkeys(["ash", "birch", "cedar"], 0), list[int]()
    for number, (present, abandoned, leaves) in enumerate(rounds, start=1):
        journal.put_total(_total(number))
        journal.put_requests(at("train", number), {"ash": message(b"train", b"bulk of its own" * number)})
        if leaves:
            journal.refuse(leaves, Refusal(kind="left", reason="gone"))
            applied.pop(leaves, None)
        journal.end_round(_outcome(number, abandoned=abandoned), present, "")
        applied |= {s: sums[-1] for s in present & applied.keys() if sums}
        sums += [] if abandoned else [number]
        needed = [s for s in sums if s > min(applied.values()) or s == sums[-1]]
        assert _kept(journal) == needed
        assert journal.applied() == applied
        assert _blobs(journal) == {b"first weights", *(bytes([s % 256]) * 1000 for s in needed)}, "and no other bulk"
        assert journal.position().next == number + 1
    assert [o.round for o in journal.outcomes()] == list(range(1, len(rounds) + 1))
    log.close()


def _blobs(journal: Journal) -> set[bytes]:
    with journal._transaction() as db:
        return set(db.scalars(select(t.blob.c.data)))


def test_bulk_that_many_messages_carry_lies_there_once(log: Any) -> None:
    journal = RunStore().open("r", MANIFEST, INITIAL, log)
    bulk = b"x" * 5000
    journal.put_requests(at("train", 1), {f"site-{i}": message(str(i).encode(), bulk) for i in range(50)})
    assert _blobs(journal) == {INITIAL, bulk}
    found = journal.requests(at("train", 1))
    assert len(found) == 50
    assert len({id(e.chunks[0]) for e in found.values()}) == 1, "in memory, too"


# --- growth -----------------------------------------------------------------------------------------------------------


class _Died(Exception):
    pass


def _die_in(round_: int) -> Callable[[int], None]:
    def before(number: int) -> None:
        if number == round_:
            raise _Died

    return before


@pytest.fixture
def long_run(tmp_path: Path) -> Iterator[Federation]:
    """Two hundred rounds of a tiny model without noise, so that no ledger and no accountant takes time."""
    with open_federation(
        tmp_path / "f", people={"people": 4, "sites": ("ash", "birch", "cedar")},
        run={"rounds": 200, "report_metrics_every": 1000}, training={"local_steps": 1},
        sites={"min_sites": 3, "min_subjects": 1, "population": {"default": 4}},
        privacy={"epsilon": float("inf")}, sealing={"profile": "masked"},
    ) as federation:  # fmt: skip
        yield federation


@pytest.mark.parametrize(
    ("keep", "rounds"),
    [(False, 60), (False, 200), (True, 40)],
    ids=["sixty", "two hundred", "the control: nothing is forgotten"],
)
@pytest.mark.long
def test_over_many_rounds_the_coordinator_takes_no_more_memory_and_the_store_hardly_grows(
    long_run: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool, rounds: int
) -> None:
    """Memory that is allocated in the coordinator's own modules and for its messages and sums; and the store's file.
    One short row stays of a round: how it ended."""
    url, held, sizes = f"sqlite:///{tmp_path / 'runs.db'}", dict[int, int](), dict[int, int]()
    if keep:
        monkeypatch.setattr(Journal, "_prune", lambda *_: None)
        kept: list[Any] = []
        put = Journal.put_total
        monkeypatch.setattr(Journal, "put_total", lambda j, total: [put(j, total), kept.append(bytearray(3000))])
    own = [tracemalloc.Filter(True, f"*/server/{name}.py") for name in ("coordinator", "exchange", "journal", "keys")]
    own += [
        tracemalloc.Filter(True, f"*/{name}.py") for name in ("protocol/*", "sealing/accumulate", "server/test_runs")
    ]
    store = RunStore(url)

    def look(outcome: RoundOutcome) -> None:
        if outcome.round in (20, rounds):
            gc.collect()
            traces = tracemalloc.take_snapshot().filter_traces(own).statistics("filename")
            held[outcome.round] = sum(trace.size for trace in traces)
            sizes[outcome.round] = _used(store)
        if outcome.round == rounds:
            raise _Died

    tracemalloc.start()
    try:
        with pytest.raises(_Died):
            long_run.coordinator(after_round=look, store=store).run()
    finally:
        tracemalloc.stop()
    grown, stored = held[rounds] - held[20], (sizes[rounds] - sizes[20]) / (rounds - 20)
    if keep:
        assert grown > 20_000
        assert stored > 1000
        return
    assert grown < 20_000 * min(1.0, (rounds - 20) / 60), "bytes, over all rounds but the first twenty"
    assert stored < 200, "bytes a round"


def _used(store: RunStore) -> int:
    """Bytes of the pages that hold something."""
    with store._engine.connect() as db:
        numbers = [
            db.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("page_count", "freelist_count", "page_size")
        ]
    pages, free, size = (int(n or 0) for n in numbers)
    return (pages - free) * size


def test_a_run_that_has_ended_leaves_its_model_and_how_its_rounds_ended(tmp_path: Path) -> None:
    with open_federation(tmp_path / "f") as federation:
        url = f"sqlite:///{tmp_path / 'runs.db'}"
        released = federation.coordinator(store=RunStore(url)).run()
        size, store = federation.world.log.size, RunStore(url)
        assert store.runs() == {federation.manifest.run: "finished"}
        with store._engine.connect() as db:
            steps = {tuple(row) for row in db.execute(select(t.message.c.step, t.message.c.kind))}
            assert steps == {("release", "reply")}
            assert db.scalar(select(func.count()).select_from(t.applied)) == 0
        asked: list[FlowerMessage] = []
        again = federation.coordinator(federation.grid(lambda m, _: bool(asked.append(m))), store=store).run()
        assert asked == [], "nobody is asked again"
        assert again.weights.tobytes() == released.weights.tobytes()
        assert (again.model, again.metrics_round, again.bytes_per_parameter) == (
            released.model, released.metrics_round, released.bytes_per_parameter,
        )  # fmt: skip
        assert [replace(o, metrics=None) for o in again.outcomes] == [
            replace(o, metrics=None) for o in released.outcomes
        ]
        assert federation.world.log.size == size, "and nothing is logged again"


# --- runs that wait ---------------------------------------------------------------------------------------------------


def test_runs_are_kept_in_the_order_in_which_they_were_put_there(url: str) -> None:
    store = RunStore(url)
    for name in ("zebra", "ant", "moth"):
        store.submit(name, MANIFEST, INITIAL)
    with pytest.raises(ConfigError, match="a run of this name"):
        store.submit("ant", MANIFEST, INITIAL)
    again = RunStore(url)
    assert list(again.runs().items()) == [("zebra", "waiting"), ("ant", "waiting"), ("moth", "waiting")]
    assert again.load("moth") == (MANIFEST, INITIAL)
    assert (again.next_round("moth"), again.status("bee")) == (1, None)


def test_a_waiting_run_begins_with_the_manifest_that_was_put_there_and_no_other(url: str, log: Any) -> None:
    store = RunStore(url)
    store.submit("r", MANIFEST, INITIAL)
    for manifest, initial in ((b"another", INITIAL), (MANIFEST, b"another")):
        with pytest.raises(ConfigError, match="another manifest or first model"):
            store.open("r", manifest, initial, log)
    assert store.status("r") == "waiting"
    journal = store.open("r", MANIFEST, INITIAL, log)
    assert (store.status("r"), journal.position().next) == ("running", 1)
    store.open("r", MANIFEST, INITIAL, log)
    with pytest.raises(StorageError, match="another process has taken"):
        journal.agree(0, ("a", "b", "c"))


def test_a_status_changes_only_from_what_it_was_seen_to_be(url: str, log: Any) -> None:
    store = RunStore(url)
    store.submit("r", MANIFEST, INITIAL)
    assert not store.mark("r", "stopping", only=("running",))
    assert store.status("r") == "waiting"
    store.open("r", MANIFEST, INITIAL, log)
    assert store.mark("r", "stopping", only=("running",))
    assert not store.mark("r", "stopped", only=("waiting",))
    assert store.runs() == {"r": "stopping"}
