"""What a registry of a million persons costs: import, snapshot, snapshot after changes, the commitment to a snapshot,
the check of one person.

Import is what `confide consent import` does: a CSV file is checked whole, read again, its persons enrolled, its events
appended in one transaction. The snapshot is the first one of a registry that was just opened; the second follows 1,000
new events. The commitment is what a site does in a round: who is in the snapshot is stored, durably, and the root of
the tree over as many leaves as the declared population has is computed. A site's first round, which stands apart,
stores all pseudonyms, once for all its runs; every other stores marks. Each event is of the kind that the person's
story allows; about half of all persons end up with a consent that stands.

Seconds are wall-clock time; beside them stand the seconds of processor time of this process (`…_cpu_…`). Where the two
differ much, something else was using the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from confide.privacy.consent import ConsentEvent, EventType, Registry, SiteKey, from_micros, now_micros
from confide.privacy.consent.desk import KEY, REGISTRY, ConsentDesk
from confide.privacy.consent.imports import check_file, read_checked

if TYPE_CHECKING:
    from confide.clients.snapshots import SnapshotStore

PURPOSE = "research/benchmark"
HEADER = "event_id,subject,purpose,type,effective_at,valid_until,notice_digest,lawful_basis,jurisdiction,evidence_ref"
SECOND = 1_000_000
YEAR = 365 * 86_400 * SECOND
CHECKS = 2_000
CHANGES = 1_000
HELD_OUT = 0.2


def write_csv(path: Path, subjects: int, events: int, draw: random.Random, start: int) -> None:
    """Events in the order of time, of persons in no order."""
    given = bytearray(subjects)
    with path.open("w", encoding="utf-8") as file:
        file.write(HEADER + "\n")
        for number in range(events):
            # Everybody first, in no order either: 7919 is prime.
            person = number * 7919 % subjects if number < subjects else draw.randrange(subjects)
            kind = "withdrawn" if given[person] and draw.random() < 0.6 else "renewed" if given[person] else "given"
            given[person] = kind != "withdrawn"
            at = start + number * (YEAR // events)
            until = from_micros(at + 2 * YEAR).isoformat() if given[person] else ""
            file.write(
                f"event-{number:012d},person-{person:08d},{PURPOSE},{kind},{from_micros(at).isoformat()},{until},"
                f"{'ab' * 32 if given[person] else ''},GDPR-6-1-a,DE,archive/{number:010d}\n"
            )


def timed(action: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, seconds of processor time, and what came out."""
    started, worked = time.perf_counter(), time.process_time()
    found = action()
    return time.perf_counter() - started, time.process_time() - worked, found


def import_file(desk: ConsentDesk, source: Path) -> int:
    """What `confide consent import` does."""

    def progress(_position: int, _size: int, records: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{records:,} records")

    checked = check_file(source, progress=progress)
    return desk.apply(read_checked(checked, progress))


def commit(store: SnapshotStore, round_: int, names: list[bytes], key: SiteKey, population: int) -> str:
    """What a site does with a round's snapshot before it trains; see `confide.clients.rounds`."""
    from confide.privacy.dp import Role

    split = int(len(names) * HELD_OUT)
    members = {Role.TRAIN: names[split:], Role.HELD_OUT: names[:split]}
    return store.put("benchmark", round_, members, population, key.round_keys("benchmark", round_))


def changes(registry: Registry, subjects: int, draw: random.Random) -> list[ConsentEvent]:
    """New decisions of persons at random."""
    people = [f"person-{draw.randrange(subjects):08d}" for _ in range(CHANGES)]
    names, kinds = registry.enrol(people), (EventType.GIVEN, EventType.WITHDRAWN)
    return [
        ConsentEvent(
            event_id=f"new-{i}", pseudonym=names[p], purpose=PURPOSE, type=kinds[i % 2], effective_at=now_micros()
        )
        for i, p in enumerate(people)
    ]  # fmt: skip


def measure(events: int, subjects: int, address: str | None) -> dict[str, Any]:
    """All figures, on one registry."""
    draw = random.Random(1)  # noqa: S311  # whose consent is invented is no secret
    with tempfile.TemporaryDirectory() as scratch:
        folder, source = Path(scratch), Path(scratch) / "consent.csv"
        write_csv(source, subjects, events, draw, now_micros() - YEAR)
        with ConsentDesk.create(address or folder, folder / KEY) as desk:
            imported, import_cpu, added = timed(lambda: import_file(desk, source))
        assert added == events
        key = SiteKey.load_or_create(folder / KEY)
        registry = Registry(address or folder / REGISTRY, key)
        full, full_cpu, snapshot = timed(lambda: registry.snapshot(PURPOSE, now_micros()))
        registry.append(changes(registry, subjects, draw))
        after, after_cpu, later = timed(lambda: registry.snapshot(PURPOSE, now_micros()))
        assert later.participants != snapshot.participants
        people = [f"person-{draw.randrange(subjects):08d}" for _ in range(CHECKS)]
        checks = [timed(lambda p=person: registry.state(p, PURPOSE)) for person in people]
        registry.close()
        from confide.clients.snapshots import SnapshotStore  # torch comes with it, and is no part of what was measured

        names, store = list(later.participants), SnapshotStore(folder / "snapshots.db")
        del snapshot, later
        first, first_cpu, root = timed(lambda: commit(store, 1, names, key, subjects))
        second, second_cpu, other = timed(lambda: commit(store, 2, names, key, subjects))
        assert root != other
        store.close()
    return {
        "events": events,
        "subjects": subjects,
        "import_events_per_second": round(events / imported),
        "import_events_per_cpu_second": round(events / import_cpu),
        "snapshot_seconds": round(full, 3),
        "snapshot_cpu_seconds": round(full_cpu, 3),
        "snapshot_after_1000_seconds": round(after, 3),
        "snapshot_after_1000_cpu_seconds": round(after_cpu, 3),
        "participants": len(names),
        "commit_seconds": round(second, 3),
        "commit_cpu_seconds": round(second_cpu, 3),
        "commit_first_round_seconds": round(first, 3),
        "commit_first_round_cpu_seconds": round(first_cpu, 3),
        "single_check_p99_ms": p99(check[0] for check in checks),
        "single_check_p99_cpu_ms": p99(check[1] for check in checks),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def p99(seconds: Iterable[float]) -> float:
    """The 99th percentile, in milliseconds."""
    return round(1000 * statistics.quantiles(seconds, n=100)[98], 3)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object (the only output there is)")
    parser.add_argument("--events", type=int, default=5_000_000)
    parser.add_argument("--subjects", type=int, default=1_000_000)
    parser.add_argument("--database", help="an empty PostgreSQL database, by URL (default: SQLite in a new folder)")
    arguments = parser.parse_args()
    if arguments.events < arguments.subjects:
        parser.error("everybody decides at least once: --events is at least --subjects")
    print(json.dumps(measure(arguments.events, arguments.subjects, arguments.database)))


if __name__ == "__main__":
    main()
