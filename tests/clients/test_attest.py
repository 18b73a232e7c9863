"""One person's part in one round, shown to an auditor: from a run's own files, checked without them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import confide as product
from confide.clients.data.source import read_table
from confide.clients.snapshots import SnapshotStore
from confide.privacy.consent import RoundKeys, SiteKey
from confide.privacy.dp import Ledger, Role
from tests.cli.command import confide
from tests.clients.test_exposure import GRANT, HEAD
from tests.support import experiment_tree, write_people

PURPOSE = "research/test"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds; ash-0 has a limit that nothing fits, ash-1 refused, birch-0 is on no record."""
    base = tmp_path_factory.mktemp("run")
    path, rows = write_people(base), []
    for number, person in enumerate(sorted(set(read_table(path)["person"]))):
        if person != "birch-0":
            kind, limit = ("refused", "") if person == "ash-1" else ("given", "0.001" if person == "ash-0" else "")
            rows.append(GRANT.format(id=number, person=person, type=kind, limit=limit))
    (base / "consent.csv").write_text(HEAD + "".join(rows))
    tree = experiment_tree(str(path), run={"rounds": 2}, sealing={"profile": "sealed"})
    tree["consent"] = {"file": str(base / "consent.csv")}
    product.simulate(tree, out=base / "out")
    return base / "out"


def prove(run: Path, person: str, round_: int, out: Path, site: str = "") -> Any:
    return confide(
        "audit", "prove", run, "--party", site or person.partition("-")[0], "--person", person, "--round", round_,
        "--out", out, "--json",
    )  # fmt: skip


def shown(run: Path, person: str, round_: int, folder: Path) -> dict[str, Any]:
    """Made at the site; checked elsewhere, from the file alone."""
    made = folder / f"{person}-{round_}.json"
    assert prove(run, person, round_, made).code == 0
    told = confide("audit", "verify", made, "--json")
    assert told.code == 0
    return dict(told.last_line)


def test_of_everybody_it_can_be_shown_whether_she_was_in_the_snapshot(finished: Path, tmp_path: Path) -> None:
    key = SiteKey.load_or_create(finished / "ledgers" / "ash" / "site.key")
    ledger = Ledger.open(finished / "ledgers" / "ash" / "ledger.db")
    held_out = ledger.held_out
    ledger.close()
    for person in [f"ash-{n}" for n in range(12)]:
        role = "held_out" if key.role_share(person) < held_out else "train"
        for round_ in (1, 3):
            told = shown(finished, person, round_, tmp_path)
            expected = None if person in ("ash-0", "ash-1") else role
            assert (told["person"]["role"], told["person"]["round"], told["party"]) == (expected, round_, "ash")


def test_also_of_somebody_who_was_never_asked(finished: Path, tmp_path: Path) -> None:
    assert shown(finished, "birch-0", 1, tmp_path)["person"]["role"] is None


def test_a_file_names_the_person_by_pseudonym_only_and_the_others_not_at_all(finished: Path, tmp_path: Path) -> None:
    made = tmp_path / "proof.json"
    prove(finished, "ash-5", 1, made)
    text = made.read_text()
    store = SnapshotStore(finished / "sites" / "ash" / "snapshots.db", read_only=True)
    assert "ash-5" not in text
    others = [p.hex() for p in store._places if p.hex() != json.loads(text)["pseudonym"]]
    assert len(others) > 5
    assert not [p for p in others if p in text]


def _tampered(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    entry = json.loads(tree["entry"]["entry"])
    plain = {"sort_keys": True, "separators": (",", ":")}
    return {
        "said to have been absent": tree | {"train": tree["held_out"]},
        "said to have been in both": tree | {"held_out": tree["train"]},
        "another person": tree | {"pseudonym": "ab" * 32},
        "another key": tree | {"opening": "cd" * 32},
        "another commitment": tree
        | {"entry": tree["entry"] | {"entry": json.dumps(entry | {"commitment": "00" * 32}, **plain)}},
        "no commitment": tree | {"entry": tree["entry"] | {"entry": json.dumps(entry | {"commitment": "x"}, **plain)}},
        "absent, and no path": tree | {"train": {"present": False, "other": None, "siblings": []}},
        "one field more": tree | {"note": ""},
        "another version": tree | {"version": 2},
        "no hash": tree | {"pseudonym": "ash-5"},
    }


@pytest.mark.parametrize("name", _tampered({"entry": {"entry": "{}"}, "train": 0, "held_out": 0}))
def test_a_file_that_was_changed_does_not_hold(finished: Path, tmp_path: Path, name: str) -> None:
    made = tmp_path / "proof.json"
    roles = ((f"ash-{n}", shown(finished, f"ash-{n}", 1, tmp_path)["person"]["role"]) for n in range(2, 12))
    person = next(person for person, role in roles if role == "train")
    prove(finished, person, 1, made)
    made.write_text(json.dumps(_tampered(json.loads(made.read_text()))[name]))
    assert confide("audit", "verify", made, "--json").code == 7


def test_a_path_from_another_round_does_not_fit(finished: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "1.json", tmp_path / "2.json"
    prove(finished, "ash-5", 1, one)
    prove(finished, "ash-5", 2, two)
    mixed = json.loads(one.read_text()) | {"entry": json.loads(two.read_text())["entry"]}
    one.write_text(json.dumps(mixed))
    assert confide("audit", "verify", one, "--json").code == 7


def test_a_site_cannot_show_another_snapshot_than_it_has_committed_to(finished: Path, tmp_path: Path) -> None:
    """The site strikes somebody off its own record, and would now swear that she was never in."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    run = json.loads((copy / "result.json").read_text())["run_id"]
    store = SnapshotStore(copy / "sites" / "ash" / "snapshots.db")
    key = SiteKey.load_or_create(copy / "ledgers" / "ash" / "site.key")
    names = sorted(store._places)
    store.put(run, 1, {Role.TRAIN: names[:3]}, 20, key.round_keys(run, 1))
    store.close()
    told = prove(copy, "ash-5", 1, tmp_path / "proof.json")
    assert (told.code, (tmp_path / "proof.json").exists()) == (7, False)
    assert "not what its log commits to" in told.err
    assert prove(copy, "ash-5", 2, tmp_path / "proof.json").code == 0


def test_without_the_sites_key_nothing_is_opened(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "ledgers" / "ash" / "site.key").write_bytes(b"k" * 32)
    assert prove(copy, "ash-5", 1, tmp_path / "proof.json").code != 0
    (copy / "ledgers" / "ash" / "site.key").unlink()
    assert prove(copy, "ash-5", 1, tmp_path / "proof.json").code == 4


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--person", "nobody", "--round", 1], 4),
        (["--person", "ash-5", "--round", 9], 7),
        (["--person", "ash-5"], 2),
        (["--round", 1], 2),
        (["--person", "ash-5", "--round", 1, "--entry", 3], 2),
    ],
)
def test_a_question_that_has_no_answer_is_refused(
    finished: Path, tmp_path: Path, arguments: list[Any], code: int
) -> None:
    out = tmp_path / "proof.json"
    told = confide("audit", "prove", finished, "--party", "ash", *arguments, "--out", out, "--json")
    assert (told.code, out.exists()) == (code, False)


def test_a_snapshot_that_the_disk_does_not_take_stops_the_site(tmp_path: Path) -> None:
    from confide.errors import StorageError

    store = SnapshotStore(tmp_path / "snapshots.db")
    store._db.execute("PRAGMA query_only = ON")
    with pytest.raises(StorageError, match="nothing may leave"):
        store.put("run", 1, {Role.TRAIN: [b"p" * 32]}, 20, RoundKeys(b"o" * 32, b"f" * 32))


def test_whoever_was_in_is_listed_with_her_rounds(finished: Path) -> None:
    store = SnapshotStore(finished / "sites" / "ash" / "snapshots.db", read_only=True)
    run = json.loads((finished / "result.json").read_text())["run_id"]
    key = SiteKey.load_or_create(finished / "ledgers" / "ash" / "site.key")
    found = {p: store.rounds_of(p) for p in store._places}
    assert len(found) > 10
    for rounds in found.values():
        assert [(r, n) for r, n, _ in rounds] == [(run, 1), (run, 2), (run, 3)]
        assert len({role for _, _, role in rounds}) == 1
    assert store.rounds_of(b"nobody") == []
    assert key.round_keys(run, 1).opening != key.round_keys(run, 2).opening
