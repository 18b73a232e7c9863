"""What a registry of a million persons costs: import, snapshot, snapshot after changes, the check of one person.

Import is end to end: a CSV file is read, validated, its persons enrolled, its events appended in one transaction. The
snapshot is the first one of a registry that was just opened; the second follows 1,000 new events. Each event is of the
kind that the person's story allows; about half of all persons end up with a consent that stands.
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
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from confide.privacy.consent import ConsentEvent, EventType, Registry, SiteKey, from_micros, now_micros, parse_csv
from confide.privacy.consent.imports.event import ImportedEvent

PURPOSE = "research/benchmark"
HEADER = "event_id,subject,purpose,type,effective_at,valid_until,notice_digest,lawful_basis,jurisdiction,evidence_ref"
SECOND = 1_000_000
YEAR = 365 * 86_400 * SECOND
LINES = 50_000
CHECKS = 2_000
CHANGES = 1_000


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


def read_in_portions(path: Path) -> Iterator[list[ImportedEvent]]:
    """Validated rows, a portion at a time: a file of any length in bounded memory."""
    with path.open(encoding="utf-8") as file:
        header = next(file)
        while lines := list(islice(file, LINES)):
            events, rejections = parse_csv(header + "".join(lines))
            if rejections:
                raise SystemExit(str(rejections[0]))
            yield events


def identified(registry: Registry, path: Path) -> Iterator[ConsentEvent]:
    """Events under pseudonyms."""
    for portion in read_in_portions(path):
        names = registry.enrol({event.subject for event in portion})
        for e in portion:
            yield ConsentEvent(
                event_id=e.event_id, pseudonym=names[e.subject], purpose=e.purpose, type=e.type,
                effective_at=e.effective_at, valid_until=e.valid_until, notice_digest=e.notice_digest,
                lawful_basis=e.lawful_basis, jurisdiction=e.jurisdiction, evidence_ref=e.evidence_ref,
                max_epsilon=e.max_epsilon,
            )  # fmt: skip


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came out."""
    started = time.perf_counter()
    found = action()
    return time.perf_counter() - started, found


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
    key = SiteKey(b"k" * 32)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "consent.csv"
        write_csv(source, subjects, events, draw, now_micros() - YEAR)
        place = address or Path(scratch) / "consent.db"
        registry = Registry(place, key)

        def progress(taken: int) -> None:
            if sys.stderr.isatty():
                sys.stderr.write(f"\r{taken:,} events")

        imported, added = timed(lambda: registry.append_all(identified(registry, source), progress))
        assert added == events
        registry.close()

        registry = Registry(place, key)
        full, snapshot = timed(lambda: registry.snapshot(PURPOSE, now_micros()))
        registry.append(changes(registry, subjects, draw))
        after, later = timed(lambda: registry.snapshot(PURPOSE, now_micros()))
        assert later.participants != snapshot.participants
        people = [f"person-{draw.randrange(subjects):08d}" for _ in range(CHECKS)]
        checks = [timed(lambda p=person: registry.state(p, PURPOSE))[0] for person in people]
        registry.close()
    return {
        "events": events,
        "subjects": subjects,
        "import_events_per_second": round(events / imported),
        "snapshot_seconds": round(full, 3),
        "snapshot_after_1000_seconds": round(after, 3),
        "commit_seconds": None,
        "single_check_p99_ms": round(1000 * statistics.quantiles(checks, n=100)[98], 3),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


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
