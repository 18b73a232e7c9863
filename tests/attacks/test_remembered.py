"""What a process remembers between the sites of a simulation, or between two messages: nothing that was not verified
comes to count by it, and nothing is taken for something else."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from confide.clients.data.records import SiteRecords
from confide.errors import AuditError, ConfideError, SealingError
from confide.privacy.audit import log as log_module
from confide.privacy.audit.checkpoint import sign_note
from confide.privacy.audit.log import Log
from confide.privacy.audit.records import RunEnded
from confide.protocol import messages as m
from confide.protocol import standing as standing_module
from confide.protocol import statements as statements_module
from confide.protocol.envelope import Address
from confide.protocol.identity import Identity
from confide.protocol.statements import signed_replies
from tests.attacks.federation import Federation, header_of, is_refusal, open_federation, refusal_of, resign

ASH = "ash"


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """Sites that have not joined yet."""
    with open_federation(tmp_path / "f") as made:
        yield made


def counting(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    """How often a function of a module is called from now on."""
    calls, real = [0], getattr(module, name)

    def counted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        return real(*args, **options)

    monkeypatch.setattr(module, name, counted)
    return calls


# --- lists of signed replies ------------------------------------------------------------------------------------------


def shown(federation: Federation) -> tuple[tuple[m.Statement, ...], Address]:
    """A cohort's `train` replies of round 1 as a coordinator passes them on, and where they belong."""
    committed = federation.agree().train(1)
    return federation.seal_request(federation.names, committed).statements, federation.address("train", 1)


def test_one_list_is_looked_at_once_and_every_other_one_again(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    statements, place = shown(federation)
    looked = counting(monkeypatch, statements_module, "signed_reply")

    def ask(of: tuple[m.Statement, ...]) -> Any:
        return signed_replies(federation.manifest, of, place, "coordinator", m.TrainReply)

    first = ask(statements)
    assert (ask(statements), looked[0]) == (first, len(statements))
    assert first.sites == tuple(federation.names)
    equal = tuple(statements[i] for i in range(len(statements)))
    assert equal is not statements
    assert (ask(equal), looked[0]) == (first, 2 * len(statements)), "the control: another object is looked at"


def test_a_list_that_can_change_is_never_remembered(federation: Federation) -> None:
    statements, place = shown(federation)
    listed: Any = list(statements)
    signed_replies(federation.manifest, listed, place, "coordinator", m.TrainReply)  # the control: it holds
    listed[0] = listed[0].model_copy(update={"signature": "00" * 64})
    with pytest.raises(SealingError, match="signature"):
        signed_replies(federation.manifest, listed, place, "coordinator", m.TrainReply)


@pytest.mark.parametrize("other", ["round", "run", "coordinator", "kind"])
def test_what_was_found_of_a_list_does_not_count_elsewhere(federation: Federation, other: str) -> None:
    statements, place = shown(federation)
    manifest, whom, kind = federation.manifest, "coordinator", m.TrainReply
    assert len(signed_replies(manifest, statements, place, whom, kind).names) == 4, "the control"
    asked: dict[str, tuple[Any, ...]] = {
        "round": (manifest, statements, place.model_copy(update={"round": 2}), whom, kind),
        "run": (
            # The same names under other keys: whoever made another run with them is somebody else.
            manifest.model_copy(
                update={"members": tuple(x.model_copy(update={"public_key": "cd" * 32}) for x in manifest.members)}
            ),
            statements, place, whom, kind,
        ),
        "coordinator": (manifest, statements, place, "another", kind),
        "kind": (manifest, statements, place, whom, m.SealReply),
    }  # fmt: skip
    for _ in range(2):  # what does not hold is not remembered either
        with pytest.raises(SealingError):
            signed_replies(*asked[other])


def test_a_forged_reply_among_remembered_ones_is_refused_at_every_site(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sites that ask after one that was shown the honest list are shown another: each looks at its own."""
    committed = federation.agree().train(1)
    honest = federation.seal_request(federation.names, committed)
    assert not is_refusal(federation.ask(ASH, "seal", 1, honest)), "the control: this list is remembered now"
    header = header_of(committed["birch"]).model_copy(update={"checkpoint": "9:" + "ab" * 32})
    forged = committed | {"birch": replace(committed["birch"], header=header.model_dump_json().encode())}
    request = federation.seal_request(federation.names, forged)
    for site in ("cedar", "doum"):
        assert "signature" in refusal_of(federation.ask(site, "seal", 1, request)).reason
    monkeypatch.setattr("confide.protocol.envelope.verify_signature", lambda *_: True)
    assert not is_refusal(federation.ask("cedar", "seal", 1, request)), "the control: only the signature stops it"


def test_a_site_compares_a_remembered_list_with_what_it_holds_itself(federation: Federation) -> None:
    """That the replies are authentic is what is remembered, not that a site agrees with them."""
    committed = federation.agree().train(1)
    other = {s: resign(federation.sites[s], committed[s], state="00" * 32) for s in ("birch", "cedar", "doum")}
    request = federation.seal_request(federation.names, committed | other)
    for site in federation.names:
        assert is_refusal(federation.ask(site, "seal", 1, request)), site
    honest = federation.seal_request(federation.names, committed)
    assert not is_refusal(federation.ask(ASH, "seal", 1, honest)), "the control"


# --- rosters ----------------------------------------------------------------------------------------------------------


def test_members_that_stand_in_a_roster_vouch_for_no_others(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = counting(monkeypatch, federation.world.roster[-1].roster.__class__, "member")
    assert not is_refusal(federation.join([ASH])[ASH]), "the control: this run's members are remembered now"
    first = looked[0]
    assert not is_refusal(federation.join(["birch"])["birch"])
    assert looked[0] - first < len(federation.manifest.members), "the second site finds them"
    honest = federation.manifest
    for fields in ({"population": 41}, {"public_key": "cd" * 32}, {"site": "elm"}):
        members = tuple(x.model_copy(update=fields) if x.site == "cedar" else x for x in honest.members)
        run = honest.model_copy(update={"run": f"other-{next(iter(fields))}", "members": members})
        for site in (ASH, "birch"):
            assert "does not stand in the roster" in refusal_of(federation.join([site], run)[site]).reason
        standing_module._STAND[federation.world.roster[-1].roster.digest, run.digest] = None
        assert "roster" not in getattr(refused(federation, run), "reason", ""), "the control: were it remembered"
        del standing_module._STAND[federation.world.roster[-1].roster.digest, run.digest]


def refused(federation: Federation, run: Any) -> m.Refusal | None:
    """Why a site does not join; None where it does."""
    answer = federation.join([ASH], run)[ASH]
    return refusal_of(answer) if is_refusal(answer) else None


# --- a log's checkpoint -----------------------------------------------------------------------------------------------


OURS, THEIRS = Identity.generate(ASH), Identity.generate(ASH)


def entry(number: int) -> RunEnded:
    """An entry."""
    return RunEnded(run=f"r{number}", status="finished")


def put(path: Path, note: str) -> None:
    """Another note behind the back of whoever has the log open."""
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE head SET note = ?", (note,))


def test_a_log_verifies_its_checkpoint_once_while_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.db"
    with closing(OURS.open_log(path, "federated", "f")) as log, closing(OURS.open_log(path, "federated", "f")) as other:
        verified = counting(monkeypatch, log_module, "parse_note")
        log.append(entry(0))
        log.append(entry(1))
        assert verified[0] == 0, "its own ones"
        other.append(entry(2))
        assert verified[0] == 1, "the control: what another process has signed is verified"
        log.append(entry(3))
        assert (verified[0], log.size) == (2, 4)


FORGERIES: dict[str, Callable[[Log], str]] = {
    "under another key": lambda log: sign_note(log.checkpoint(), ASH, THEIRS.public_key, THEIRS.sign),
    "under another name": lambda log: sign_note(log.checkpoint(), "birch", OURS.public_key, OURS.sign),
    "with another's signature": lambda log: sign_note(log.checkpoint(), ASH, OURS.public_key, THEIRS.sign),
    "with a space": lambda log: log.note() + " ",
    "of an earlier day": lambda log: sign_note(
        replace(log.checkpoint(), size=1, root=log._tree.root(1)), ASH, OURS.public_key, OURS.sign
    ),
    "of another log": lambda log: sign_note(replace(log.checkpoint(), origin="o"), ASH, OURS.public_key, OURS.sign),
}


@pytest.mark.parametrize("forged", FORGERIES)
def test_another_note_in_the_place_of_a_remembered_one_is_refused(tmp_path: Path, forged: str) -> None:
    path = tmp_path / "log.db"
    with closing(OURS.open_log(path, "federated", "f")) as log:
        for number in range(3):
            log.append(entry(number))
        honest = log.note()
        put(path, FORGERIES[forged](log))
        for _ in range(2):
            with pytest.raises(AuditError):
                log.append(entry(3))
        put(path, honest)
        log.append(entry(3))  # the control
        assert log.size == 4


def test_the_remembered_note_of_an_earlier_day_is_refused(tmp_path: Path) -> None:
    """A note that this very process has signed, and that was right then."""
    path = tmp_path / "log.db"
    with closing(OURS.open_log(path, "federated", "f")) as log:
        log.append(entry(0))
        old = log.note()
        log.append(entry(1))
        put(path, old)
        with pytest.raises(AuditError):
            log.append(entry(2))
        assert log._known is not None
        assert log._known[0] == old, "it was looked at, and remembered"
        with pytest.raises(AuditError):
            log.append(entry(2))


def test_a_log_whose_disk_refused_an_entry_remembers_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.db"
    with closing(OURS.open_log(path, "federated", "f")) as log:
        log.append(entry(0))
        with monkeypatch.context() as broken:
            broken.setattr(log_module, "sign_note", lambda *_: (_ for _ in ()).throw(ConfideError("x", where="y")))
            with pytest.raises(ConfideError):
                log.append(entry(1))
        log.append(entry(2))
        assert [e.run for e in log.entries()] == ["r0", "r2"]


# --- what records are encoded with ------------------------------------------------------------------------------------


def test_records_that_fit_one_run_fit_no_other_schema(federation: Federation) -> None:
    manifest, records = federation.manifest, federation.sites[ASH].records
    assert isinstance(records, SiteRecords)
    assert records.encoded_as is not None
    schema, label = manifest.schema_, manifest.label
    for _ in range(2):
        assert records.fits(schema, label), "the control"
    assert records.fits(schema.model_copy(), label.model_copy()), "the control: equal is enough"
    less = dict(list(schema.features.items())[:-1])
    for _ in range(2):
        assert not records.fits(schema.model_copy(update={"features": less}), label)
        assert not records.fits(schema, label.model_copy(update={"column": "another"}))
