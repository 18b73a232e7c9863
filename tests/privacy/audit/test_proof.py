"""Proof files: one entry, checked by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from confide.errors import AuditError
from confide.privacy.audit import records as r
from confide.privacy.audit.evidence import load_evidence
from confide.privacy.audit.proof import find_charge, fingerprint, make_proof, read_proof
from confide.privacy.audit.verify import verify
from tests.privacy.audit.command import confide
from tests.privacy.audit.logbook import COORDINATOR, Logbook, Run


def proof_of(run: Run, party: str, number: int, path: Path) -> Path:
    path.write_bytes(make_proof(verify(run.folder), party, number))
    return path


def test_every_entry_of_every_log_can_be_proved_alone(finished: Run, tmp_path: Path) -> None:
    evidence = verify(finished.folder)
    for log in (evidence.coordinator, *evidence.sites.values()):
        for number, record in enumerate(log.entries):
            path = tmp_path / "alone" / f"{log.party}-{number}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(make_proof(evidence, log.party, number))
            proved = read_proof(path)
            assert (proved.record, proved.number, proved.party) == (record, number, log.party)
            assert proved.at == log.times[number]
            assert proved.fingerprint == fingerprint(finished.keys[log.party].public_key)


def test_a_charge_is_found_by_its_name(finished: Run, tmp_path: Path) -> None:
    evidence = load_evidence(finished.folder)
    charge = f"{evidence.run}/1/train"
    number = find_charge(evidence, "ash", charge)
    record = read_proof(proof_of(finished, "ash", number, tmp_path / "p.json")).record
    assert isinstance(record, r.Charged)
    assert record.charge == charge
    for party, name in (("ash", f"{evidence.run}/99/train"), ("nobody", charge), (COORDINATOR, charge)):
        with pytest.raises(AuditError, match="there is no charge"):
            find_charge(evidence, party, name)


def changes(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Proofs that lie, each in one place."""
    entry = json.loads(tree["entry"])
    path = tree["path"]
    return {
        "another entry": tree | {"entry": json.dumps(entry | {"round": 7}, sort_keys=True, separators=(",", ":"))},
        "another time": tree | {"entry": json.dumps(entry | {"at": 1}, sort_keys=True, separators=(",", ":"))},
        "not canonical": tree | {"entry": json.dumps(entry)},
        "another salt": tree | {"salt": "00" * 16},
        "another number": tree | {"number": tree["number"] + 1},
        "no number that there is": tree | {"number": 10**9},
        "a shorter path": tree | {"path": path[:-1]},
        "a longer path": tree | {"path": [*path, "00" * 32]},
        "no path": tree | {"path": []},
        "a turned path": tree | {"path": path[::-1]},
        "a flipped path": tree | {"path": ["ff" * 32, *path[1:]]},
        "another party": tree | {"party": "birch"},
        "another log": tree | {"origin": tree["origin"].replace("ash", "birch")},
        "another key": tree | {"public_key": "11" * 32},
        "another checkpoint": tree | {"checkpoint": tree["checkpoint"].replace("\n", "\n1", 1)},
        "one field more": tree | {"note": "x"},
        "a path that never ends": tree | {"path": path * 40},
        "another version": tree | {"version": 2},
    }


@pytest.mark.parametrize("name", changes({"entry": "{}", "path": [], "number": 0, "origin": "", "checkpoint": ""}))
def test_a_proof_that_was_changed_does_not_hold(finished: Run, tmp_path: Path, name: str) -> None:
    evidence = verify(finished.folder)
    number = next(n for n, e in evidence.sites["ash"].of(r.Sealed))
    honest = json.loads(make_proof(evidence, "ash", number))
    path = tmp_path / "proof.json"
    path.write_text(json.dumps(honest))
    assert read_proof(path).number == number, "the control"
    path.write_text(json.dumps(changes(honest)[name]))
    with pytest.raises(AuditError):
        read_proof(path)


def test_a_proof_from_another_tree_does_not_hold(run: Run, tmp_path: Path) -> None:
    """Right entry, right key, right number; the path is of the log as it was before another entry was changed."""
    before = json.loads(proof_of(run, "ash", 3, tmp_path / "before.json").read_bytes())
    book = Logbook(run)
    book.change("ash", book.index("ash", r.SnapshotTaken, round=1), commitment="ab" * 32)
    book.write("ash")
    checkpoint = run.log("ash").with_suffix(".checkpoint").read_text()
    (tmp_path / "mixed.json").write_text(json.dumps(before | {"checkpoint": checkpoint}))
    with pytest.raises(AuditError, match="does not lie where"):
        read_proof(tmp_path / "mixed.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b"null", b"[" * 100_000, b"{" + b" " * 2**21])
def test_what_is_no_proof_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "proof.json").write_bytes(content)
    with pytest.raises(AuditError, match="is not a proof"):
        read_proof(tmp_path / "proof.json")


def test_nothing_is_proved_from_a_log_that_does_not_hold_together(run: Run) -> None:
    evidence = verify(run.folder)
    assert make_proof(evidence, "ash", 0), "the control"
    for party, number in (("ash", -1), ("ash", 10**6), ("nobody", 0)):
        with pytest.raises(AuditError, match="there is no"):
            make_proof(evidence, party, number)
    lines = run.log("ash").read_bytes().splitlines(keepends=True)
    run.log("ash").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(AuditError, match="nothing can be proved"):
        make_proof(verify(run.folder), "ash", 0)


def test_the_commands_write_a_proof_and_check_it_where_nothing_else_is(run: Run, tmp_path: Path) -> None:
    charge = f"{load_evidence(run.folder).run}/1/train"
    file = tmp_path / "elsewhere" / "proof.json"
    file.parent.mkdir()
    made = confide("audit", "prove", run.folder, "--party", "ash", "--charge", charge, "--out", file, "--json")
    assert made.code == 0
    assert json.loads(made.out)["bytes"] == len(file.read_bytes()) < 4096
    told = confide("audit", "verify", file, "--json")
    assert told.code == 0
    found = json.loads(told.out)
    assert found["record"]["charge"] == charge
    assert found["key_fingerprint"] == fingerprint(run.keys["ash"].public_key)
    shown = confide("audit", "verify", file)
    assert fingerprint(run.keys["ash"].public_key)[:9] in shown.out
    file.write_bytes(file.read_bytes().replace(b'"number": ', b'"number": 1'))
    assert confide("audit", "verify", file).code == 7
    for arguments in ((), ("--entry", "1", "--charge", charge)):
        assert confide("audit", "prove", run.folder, "--party", "ash", *arguments).code == 2
    assert confide("audit", "prove", run.folder, "--party", "ash", "--entry", "999").code == 7
