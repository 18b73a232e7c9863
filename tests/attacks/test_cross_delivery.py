"""Two runs of one federation: what belongs to one is delivered into the other, by whoever has the network between."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from confide.errors import ConfideError
from confide.privacy.audit import records as audit
from confide.protocol.envelope import Envelope
from confide.server import exchange
from confide.server.coordinator import Coordinator
from confide.server.runs import RunStore
from tests.attacks.federation import Federation, header_of, open_federation

VICTIM = "ash"
_Place = tuple[str, str, int]


def place_of(site: str, request: Envelope) -> _Place:
    """Where in a run a request belongs."""
    header = header_of(request)
    return site, header.step, header.round


def first_run(federation: Federation) -> tuple[dict[_Place, Envelope], dict[_Place, Envelope]]:
    """All requests and replies of a run that ends as it should."""
    requests, replies = dict[_Place, Envelope](), dict[_Place, Envelope]()

    def record(site: str, request: Envelope, reply: Envelope) -> Envelope:
        place = place_of(site, request)
        requests[place], replies[place] = request, reply
        return reply

    federation.coordinator(federation.grid(tamper=record)).run()
    return requests, replies


def second_run(federation: Federation, tamper: Any) -> tuple[str, bool]:
    """Another one by the same sites; its name, and whether it released a model."""
    world = federation.world
    manifest = federation.manifest.model_copy(update={"run": federation.manifest.run + "-2"})
    grid = federation.grid(tamper=tamper)
    with suppress(ConfideError):
        Coordinator(grid, world.coordinator, manifest, world.initial, world.log, store=RunStore()).run()
        return manifest.run, True
    return manifest.run, False


def rejected(federation: Federation, run: str) -> list[tuple[str, str]]:
    """(site, step) of what the coordinator did not take."""
    entries = federation.world.log.entries()
    return [(e.party, e.step) for e in entries if isinstance(e, audit.Rejected) and e.run == run]


@pytest.mark.parametrize("step", ["join", "train"])
@pytest.mark.parametrize("checked", [True, False])
def test_a_reply_of_one_run_is_none_in_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, checked: bool
) -> None:
    with open_federation(tmp_path / "f") as federation:
        _, earlier = first_run(federation)
        if not checked:  # the control
            monkeypatch.setattr(exchange, "expect", lambda *_args, **_rest: None)
        wanted = (VICTIM, step, int(step == "train"))

        def swap(site: str, request: Envelope, reply: Envelope) -> Envelope:
            return earlier[wanted] if place_of(site, request) == wanted else reply

        run, released = second_run(federation, swap)
        assert ((VICTIM, step) in rejected(federation, run)) == checked
        assert released == checked, "it costs the run that site; taken, it would cost it everything"
        cohorts = [e.cohort for e in federation.world.log.entries() if isinstance(e, audit.Cohort) and e.run == run]
        assert not any(VICTIM in cohort for cohort in cohorts[:1])


def test_a_request_of_one_run_that_is_delivered_in_another_makes_no_site_work_or_pay_again(tmp_path: Path) -> None:
    """The site gives the answer that it gave, and the run that waits for another takes it for none."""
    with open_federation(tmp_path / "f") as federation:
        requests, earlier = first_run(federation)
        site = federation.sites[VICTIM]
        wanted = (VICTIM, "train", 1)
        answers = list[Envelope]()

        def swap(name: str, request: Envelope, reply: Envelope) -> Envelope:
            if place_of(name, request) != wanted:
                return reply
            before = site.ledger.reservations()
            answers.append(site.handle("train", requests[wanted]))
            assert site.ledger.reservations() == before
            return answers[0]

        run, _ = second_run(federation, swap)
        assert answers == [earlier[wanted]]
        assert (VICTIM, "train") in rejected(federation, run)
        trained = [e.round for e in site.log.entries() if isinstance(e, audit.UpdateCommitted) and e.run != run]
        assert len(trained) == len(set(trained))
