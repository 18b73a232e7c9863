"""What a site keeps for itself: how the registry was asked, and what failed. None of it travels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from confide.clients.run import SiteRun
from confide.privacy.audit import records as r
from confide.privacy.audit.log import stored_entries
from tests.attacks.federation import Federation, open_federation, refusal_of

SITE = "birch"


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    with open_federation(tmp_path / "f") as made:
        made.join()
        yield made.agree()


def entries(federation: Federation, kind: type[r.Record], *, local: bool = True) -> list[Any]:
    site = federation.sites[SITE]
    return [e for e, _ in stored_entries((site.local_log if local else site.log).path) if isinstance(e, kind)]


def test_every_question_to_the_registry_is_on_record_with_what_it_was_about(federation: Federation) -> None:
    federation.train(1)
    reads, registry = entries(federation, r.ConsentRead), federation.sites[SITE]._registry
    assert len(reads) == 2  # before it computes, and at the cut-off
    for read in reads:
        assert (read.round, read.purpose, read.outcome) == (1, "research/test", "answered")
        again = registry.snapshot(read.purpose, read.as_of, read.sequence)
        assert len(again.participants) > 0
    (taken,) = entries(federation, r.LocalSnapshot)
    last = registry.snapshot(reads[-1].purpose, reads[-1].as_of, reads[-1].sequence)
    assert taken.training + taken.held_out == len(last.participants)
    assert not entries(federation, r.ConsentRead, local=False)


def test_a_registry_that_does_not_answer_is_on_record_and_nobody_takes_part(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = federation.sites[SITE]._registry
    registry.close()
    for path in (federation.folder / "sites" / SITE).glob("consent.db*"):
        path.unlink()
    assert refusal_of(federation.train(1)[SITE]).reason == "abstains"
    assert [read.outcome for read in entries(federation, r.ConsentRead)] == ["consent"]
    assert not entries(federation, r.UpdateCommitted, local=False)


def test_a_fault_is_on_record_by_its_type_only_and_stays_at_the_site(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(list(stored_entries(federation.sites[SITE].log.path)))
    real = SiteRun.compute

    def compute(run: SiteRun, *rest: Any) -> Any:
        if run.site == SITE:
            raise ValueError("birch-7 has a cholesterol of 4711")
        return real(run, *rest)

    monkeypatch.setattr(SiteRun, "compute", compute)
    with pytest.raises(ValueError, match="4711"):
        federation.train(1, sites=[SITE])
    assert [(e.round, e.step, e.error) for e in entries(federation, r.LocalFault)] == [(1, "train", "ValueError")]
    travels = [e.KIND for e, _ in stored_entries(federation.sites[SITE].log.path)][before:]
    assert travels == ["charged"]  # as for anybody else up to there
    for path in federation.folder.rglob("*.db*"):
        assert b"cholesterol" not in path.read_bytes()
    federation.train(1, sites=["ash"])  # the control: the others are not concerned
    assert federation.sites["ash"].log.checkpoint().size > before
