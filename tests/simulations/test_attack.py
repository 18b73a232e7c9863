"""`confide audit attack`: an honest run withstands it, too little noise does not, and results are evidence."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import confide as product
from confide.clients.data.records import SiteRecords
from confide.errors import AuditError, ConfigError
from confide.privacy.audit import attacks
from confide.privacy.audit.checkpoint import Checkpoint, sign_note
from confide.privacy.audit.entries import encode
from confide.privacy.audit.evidence import load_evidence
from confide.privacy.audit.log import parse_line
from confide.privacy.audit.merkle import Tree, leaf_hash
from confide.privacy.audit.records import AttackResult
from confide.privacy.audit.verify import verify
from confide.privacy.dp import SecureRandom
from confide.simulations import attack
from tests.privacy.audit.command import confide
from tests.support import experiment_tree, write_people

CANARIES = 120


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on data that are not public."""
    base = tmp_path_factory.mktemp("attacked")
    tree = experiment_tree(
        str(write_people(base)), run={"rounds": 2, "report_metrics_every": 2}, data={"public": False},
        training={"local_steps": 4, "learning_rate": 0.5}, privacy={"epsilon": 1.0, "sample_rate": 0.5},
        sealing={"profile": "sealed"},
    )  # fmt: skip
    product.simulate(tree, out=base / "out")
    return base / "out"


@pytest.fixture
def clean(run: Path) -> Iterator[Path]:
    """The run without results of attacks."""
    yield run
    for path in (run / "attacks").glob("*"):
        path.unlink()


def quiet(rng: SecureRandom, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A planted fault: a sixteenth of the noise that is charged for."""
    return _normal(rng, count) / 16


_normal = SecureRandom.normal


def test_an_honest_run_withstands_and_the_result_is_signed(clean: Path) -> None:
    done: list[int] = []
    found = attack.attack_run(clean, canaries=CANARIES, progress=lambda n, _: done.append(n))
    record = found.record
    assert done == list(range(1, CANARIES + 1))
    assert (record.canaries, record.guesses) == (CANARIES, 40)
    assert 0 <= record.correct <= record.guesses
    assert float(record.shown) <= float(record.claimed) <= 1.0
    evidence = verify(clean)
    assert evidence.findings == []
    assert record.manifest == evidence.manifest_digest
    assert attacks.read_attacks(clean, evidence)[0] == [found]
    assert not [p for p in (clean / "attacks").iterdir() if p.suffix not in {".log", ".checkpoint", ".pub"}]


def test_too_little_noise_is_found_and_named(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SecureRandom, "normal", quiet)
    answer = confide("audit", "attack", clean, "--canaries", CANARIES * 2, "--json")
    assert answer.code == 7, answer.err
    tree = json.loads(answer.out)
    assert tree["refuted"]
    assert tree["correct"] >= 0.9 * tree["guesses"] == 72
    monkeypatch.undo()
    checked = confide("audit", "verify", clean, "--json")
    assert checked.code == 7
    (finding,) = json.loads(checked.out)["findings"]
    assert (finding["party"], finding["severity"]) == ("attacks/0001", "high")
    assert "loses at least" in finding["what"]
    assert confide("audit", "report", clean).code == 0
    assert "the claim is refuted" in (clean / "report.html").read_text()


def test_no_record_of_a_person_is_read(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported logs are enough: neither the data, nor a registry, nor a ledger is there."""
    copy = tmp_path / "exported"
    os.makedirs(copy)
    for path in (clean / "logs").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    persons: set[str] = set()
    build = SiteRecords.build

    def seen(*args: Any, **kwargs: Any) -> SiteRecords:
        made = build(*args, **kwargs)
        persons.update(made.persons)
        return made

    monkeypatch.setattr(SiteRecords, "build", seen)
    answer = confide("audit", "attack", copy, "--canaries", attack.FEWEST)
    assert answer.code == 0, answer.err
    assert persons
    assert all(p.startswith("invented") for p in persons)


def _forge(folder: Path, record: AttackResult) -> None:
    """Somebody's own statement, signed with a key of her own."""
    evidence = load_evidence(folder)
    key, salt, data = Ed25519PrivateKey.generate(), bytes(16), encode(record, 1)
    tree = Tree([leaf_hash(salt + data)])
    public = key.public_key().public_bytes_raw()
    note = sign_note(Checkpoint(attacks._origin(evidence), 1, tree.root()), attacks.AUDITOR, public, key.sign)
    place = folder / "attacks"
    place.mkdir(exist_ok=True)
    (place / "9999.log").write_bytes(salt.hex().encode() + b" " + data + b"\n")
    (place / "9999.checkpoint").write_text(note)
    (place / "9999.pub").write_text(public.hex())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"shown": "0.0000", "correct": 20, "guesses": 20, "canaries": 20}, "another ε"),
        ({"claimed": "9.0000"}, "another ε"),
        ({"manifest": "0" * 64}, "another manifest"),
        ({"correct": 30}, "more right guesses"),
        ({"confidence": "certain"}, "more right guesses"),
        ({"canaries": 2**62, "guesses": 2**62, "correct": 2**62}, "nobody can make"),
        ({"shown": "much"}, "not the result"),
        ({"claimed": "nan"}, "not the result"),
        ({"software": {}}, "another version"),
    ],
)
def test_a_statement_that_does_not_hold_is_found_whoever_signed_it(
    clean: Path, change: dict[str, Any], what: str
) -> None:
    honest = attack.attack_run(clean, canaries=attack.FEWEST).record
    _forge(clean, honest)
    assert verify(clean).findings == []  # the control: her own copy of an honest statement
    _forge(clean, replace(honest, **change))
    (finding,) = verify(clean).findings
    assert finding.party == "attacks/9999"
    assert what in finding.what
    assert confide("audit", "report", clean).code == 0


def test_a_file_that_was_changed_or_lost_is_found(clean: Path) -> None:
    attack.attack_run(clean, canaries=attack.FEWEST)
    log = clean / "attacks" / "0001.log"
    good = log.read_bytes()
    assert isinstance(parse_line(good.strip())[1], AttackResult)
    for bad in (good.replace(b'"correct":', b'"correct":1'), good * 2, b"", good[:-1], b"\xff" * 9, b"x" * 70_000):
        log.write_bytes(bad)
        assert [f.party for f in verify(clean).findings] == ["attacks/0001"], bad[:40]
    log.write_bytes(good)
    assert verify(clean).findings == []
    for suffix in (".pub", ".checkpoint"):
        kept = log.with_suffix(suffix).read_bytes()
        for bad in (b"", b"\xff", kept[:-8], bytes(32).hex().encode()):
            log.with_suffix(suffix).write_bytes(bad)
            assert [f.party for f in verify(clean).findings] == ["attacks/0001"], (suffix, bad)
        log.with_suffix(suffix).write_bytes(kept)
    assert verify(clean).findings == []


def test_what_cannot_be_attacked_is_said(clean: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no site"):
        attack.attack_run(clean, site="nowhere")
    with pytest.raises(ConfigError, match="too few"):
        attack.attack_run(clean, canaries=attack.FEWEST - 1)
    with pytest.raises(ConfigError, match="'nonsense' is no device"):
        attack.attack_run(clean, device="nonsense")
    with pytest.raises(ConfigError, match="cuda:99 is not there"):
        attack.attack_run(clean, device="cuda:99")
    with pytest.raises(AuditError, match="no run"):
        attack.attack_run(clean, run="another")
    with pytest.raises(AuditError, match="no coordinator"):
        attack.attack_run(tmp_path)
    tree = experiment_tree(str(write_people(tmp_path)), run={"rounds": 1}, privacy={"epsilon": "inf"})
    product.simulate(tree, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="no differential privacy"):
        attack.attack_run(tmp_path / "out")


def test_a_damaged_run_is_not_attacked(clean: Path) -> None:
    path = next((clean / "logs").glob("[!c]*.log"))
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    try:
        with pytest.raises(AuditError, match="do not hold together"):
            attack.attack_run(clean)
    finally:
        path.write_bytes(good)
