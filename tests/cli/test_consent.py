"""`confide consent`: what the officer sees, exit codes, and one JSON object with `--json`."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from confide.privacy.consent.desk import ConsentDesk
from confide.privacy.consent.receipt import verify_receipt
from tests.cli.command import Answer, confide, files_under
from tests.privacy.consent.imports.samples import FILES, csv_file

PURPOSE = "research/cardiology"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    assert confide("consent", "init", tmp_path / "site").code == 0
    return tmp_path / "site"


def consent(site: Path, command: str, *arguments: str | Path) -> Answer:
    return confide("consent", command, *arguments, "--registry", site)


def standing(site: Path, subject: str, purpose: str = PURPOSE) -> str:
    found = consent(site, "status", subject, "--json").last_line["standings"]
    return str(found[purpose]["status"]) if purpose in found else "none"


def test_init_makes_both_files_and_never_writes_over_them(tmp_path: Path) -> None:
    answer = confide("consent", "init", tmp_path / "a" / "site", "--json")
    assert answer.code == 0
    made = answer.last_line
    assert Path(made["registry"]).is_file()
    assert Path(made["key"]).stat().st_size == 32
    assert len(made["key_fingerprint"]) == 64
    before = files_under(tmp_path)
    again = confide("consent", "init", tmp_path / "a" / "site", "--json")
    assert (again.code, again.last_line["error"]["kind"]) == (4, "consent")
    assert files_under(tmp_path) == before


@pytest.mark.parametrize("form", sorted(set(FILES) - {"mapped"}))
def test_import_tells_the_format_and_adds_a_file_once(site: Path, tmp_path: Path, form: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(FILES[form])
    first, second = (consent(site, "import", path, "--json").last_line for _ in range(2))
    assert (first["format"], first["rejected"], first["known"]) == (form, 0, 0)
    assert first["added"] == first["events"] == sum(first["types"].values()) > 0
    assert (second["added"], second["known"]) == (0, first["events"])
    text = consent(site, "import", path)
    assert text.code == 0
    assert "known already" in text.words


def test_a_dry_run_adds_nothing(site: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(csv_file())
    assert "nothing: a dry run" in consent(site, "import", path, "--dry-run").words
    assert consent(site, "import", path, "--dry-run", "--json").last_line["dry_run"] is True
    assert consent(site, "status", "ann").code == 4
    consent(site, "import", path)
    assert consent(site, "status", "ann").code == 0


def test_every_fault_is_shown_to_people_and_programs_and_nothing_is_added(site: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(csv_file() + b"x\ne9,ann,research,perhaps,2026-01-01,,,,,,\n")
    answer = consent(site, "import", path)
    assert answer.code == 4
    assert "line 8, row: has 1 fields" in answer.err
    assert "line 9, type: 'perhaps' is none of" in answer.err
    assert "line 9, effective_at: has no time zone" in answer.err
    assert "nothing was imported" in answer.err
    as_json = consent(site, "import", path, "--json")
    assert as_json.code == 4
    found = as_json.last_line
    assert (found["rejected"], found["added"]) == (3, 0)
    assert [(r["line"], r["field"]) for r in found["rejections"]] == [(8, "row"), (9, "type"), (9, "effective_at")]
    assert all(set(r) == {"line", "pointer", "field", "reason"} for r in found["rejections"])
    with ConsentDesk(site) as desk:
        assert list(desk.events()) == []


def test_a_fault_in_a_document_is_told_by_its_pointer(site: Path, tmp_path: Path) -> None:
    path = tmp_path / "bundle.json"
    path.write_bytes(FILES["fhir"].replace(b'"active"', b'"maybe"', 1))
    (found,) = consent(site, "import", path, "--json").last_line["rejections"]
    assert (found["pointer"], found["field"]) == ("/entry/1/resource", "status")


@pytest.mark.parametrize("as_file", [True, False])
def test_unknown_purposes_are_answered_with_the_nearest(site: Path, tmp_path: Path, as_file: bool) -> None:
    path, known = tmp_path / "file", tmp_path / "purposes"
    path.write_bytes(csv_file())
    known.write_text("reserch\ncare\n")
    answer = consent(site, "import", path, "--purposes", known if as_file else "reserch,care")
    assert answer.code == 4
    assert "'research' is not a known purpose; did you mean 'reserch'?" in answer.err
    known.write_text("research\ncare\n")
    assert consent(site, "import", path, "--purposes", known if as_file else "research, care").code == 0


def test_a_mapped_file_needs_its_mapping(site: Path, tmp_path: Path) -> None:
    from tests.privacy.consent.imports.test_mapping import TOML

    path, mapping = tmp_path / "export.csv", tmp_path / "map.toml"
    path.write_bytes(FILES["mapped"])
    mapping.write_text(TOML)
    assert consent(site, "import", path, "--format", "mapped").code == 2
    assert consent(site, "import", path).code == 4
    answer = consent(site, "import", path, "--mapping", mapping, "--json")
    assert (answer.code, answer.last_line["format"]) == (0, "mapped")
    mapping.write_text(TOML.replace("[columns]", "[colums]"))
    wrong = consent(site, "import", path, "--mapping", mapping)
    assert wrong.code == 2
    assert "did you mean 'columns'?" in wrong.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [(("--format", "fihr"), 2, "did you mean 'fhir'?"), (("--purposes", ","), 2, "names no purpose"),
     (("--mapping", "absent.toml"), 2, "no such file"), (("--frobnicate",), 2, "frobnicate")],
)  # fmt: skip
def test_a_wrong_option_is_a_usage_error(
    site: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    (tmp_path / "file").write_bytes(csv_file())
    answer = consent(site, "import", tmp_path / "file", *arguments)
    assert answer.code == code
    assert words in answer.err


def test_a_registry_or_file_that_is_missing_is_named_and_not_made(site: Path, tmp_path: Path) -> None:
    assert "no such file" in consent(site, "import", tmp_path / "absent").err
    answer = consent(tmp_path / "nowhere", "status", "ann")
    assert answer.code == 4
    assert "confide consent init" in answer.err
    assert not (tmp_path / "nowhere").exists()


def test_the_key_may_lie_where_a_simulation_keeps_it(site: Path, tmp_path: Path) -> None:
    moved = tmp_path / "ledgers" / "ash" / "site.key"
    moved.parent.mkdir(parents=True)
    (site / "site.key").rename(moved)
    assert consent(site, "grant", "ann", "--purpose", PURPOSE).code == 4
    assert consent(site, "grant", "ann", "--purpose", PURPOSE, "--key", moved).code == 0
    assert consent(site, "status", "ann", "--key", moved).code == 0


def test_grant_and_withdraw_take_effect_at_once(site: Path, tmp_path: Path) -> None:
    notice = tmp_path / "notice.txt"
    notice.write_text("We would like to …")
    digest = hashlib.sha256(notice.read_bytes()).hexdigest()
    assert standing(site, "ann") == "none"
    answer = consent(
        site, "grant", "ann", "--purpose", PURPOSE, "--notice", notice, "--valid-until", "2999-01-01T00:00Z",
        "--lawful-basis", "GDPR-6-1-a", "--jurisdiction", "DE", "--evidence", "form 7", "--max-epsilon", "2.5",
        "--json",
    )  # fmt: skip
    assert answer.code == 0
    assert answer.last_line["notice_digest"] == f"sha256:{digest}"
    assert standing(site, "ann") == "given"
    status = consent(site, "status", "ann", "--json").last_line
    (held,) = status["history"]
    assert (held["max_epsilon"], held["lawful_basis"], held["evidence_ref"]) == (2.5, "GDPR-6-1-a", "form 7")
    assert len(bytes.fromhex(status["pseudonym"])) == 32
    assert "withdrawn by ann" in consent(site, "withdraw", "ann", "--purpose", PURPOSE).words
    assert standing(site, "ann") == "refused"
    assert consent(site, "grant", "ann", "--purpose", PURPOSE).code == 0
    assert standing(site, "ann") == "given"
    shown = consent(site, "status", "ann")
    assert shown.code == 0
    assert [word for word in shown.words.split() if word in ("given", "withdrawn")] == [
        "given", "given", "withdrawn", "given"
    ]  # fmt: skip


def test_a_withdrawal_ends_what_was_to_begin_later(site: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("event_id,subject,purpose,type,effective_at\n1,ann,research/cardiology,given,2998-01-01T00:00Z\n")
    consent(site, "import", path)
    answer = consent(site, "withdraw", "ann", "--purpose", PURPOSE, "--json")
    assert answer.last_line["events"] == 2
    assert consent(site, "snapshot", "--purpose", PURPOSE, "--at", "2999-01-01T00:00Z").code == 0
    with ConsentDesk(site) as desk:
        assert not desk.standings("ann", 32_472_144_000_000_000)[PURPOSE].may_participate


def test_a_withdrawal_for_another_purpose_is_questioned_and_can_be_insisted_on(site: Path) -> None:
    consent(site, "grant", "ann", "--purpose", PURPOSE)
    answer = consent(site, "withdraw", "ann", "--purpose", "research/cardiolgy")
    assert answer.code == 4
    assert f"did you mean '{PURPOSE}'?" in answer.err
    assert standing(site, "ann") == "given"
    unknown = consent(site, "withdraw", "bob", "--purpose", PURPOSE)
    assert unknown.code == 4
    assert consent(site, "status", "bob").code == 4
    assert consent(site, "withdraw", "bob", "--purpose", PURPOSE, "--anyway").code == 0
    assert standing(site, "bob") == "refused"


@pytest.mark.parametrize(
    ("arguments", "where"),
    [(("--valid-until", "2030-01-01"), "--valid-until"), (("--valid-until", "2020-01-01T00:00Z"), "--valid-until"),
     (("--valid-until", "soon"), "--valid-until"), (("--max-epsilon", "0"), "--max-epsilon"),
     (("--max-epsilon", "nan"), "--max-epsilon"), (("--notice", "absent.txt"), "--notice"),
     (("--notice", "ab" * 31), "--notice"), (("--jurisdiction", "x" * 60), "--jurisdiction"),
     (("--evidence", "a\tb"), "--evidence")],
)  # fmt: skip
def test_a_grant_that_leaves_a_doubt_is_refused(site: Path, arguments: tuple[str, ...], where: str) -> None:
    answer = consent(site, "grant", "ann", "--purpose", PURPOSE, *arguments, "--json")
    assert answer.code == 2
    assert where in answer.last_line["error"]["where"]
    assert standing(site, "ann") == "none"


def test_a_purpose_like_another_is_pointed_out(site: Path) -> None:
    consent(site, "grant", "ann", "--purpose", PURPOSE)
    assert PURPOSE in consent(site, "grant", "bob", "--purpose", "research/cardiolgy").err
    assert consent(site, "grant", "bob", "--purpose", "marketing").err == ""


def test_status_of_somebody_unknown_is_an_answer_with_its_own_exit_code(site: Path) -> None:
    answer = consent(site, "status", "eve", "--json")
    assert answer.code == 4
    assert (answer.last_line["known"], answer.last_line["history"]) == (False, [])
    assert "nothing about such a person" in consent(site, "status", "eve").err


def test_a_snapshot_says_a_number_only_from_the_threshold_on(site: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    rows = "".join(f"{n},p{n},{PURPOSE},given,2026-01-{n % 28 + 1:02}T00:00Z\n" for n in range(25))
    path.write_text("event_id,subject,purpose,type,effective_at\n" + rows)
    consent(site, "import", path)
    found = consent(site, "snapshot", "--purpose", PURPOSE, "--json").last_line
    assert (found["participants"], found["sequence"], found["threshold"]) == (25, 25, 20)
    early = consent(site, "snapshot", "--purpose", PURPOSE, "--at", "2026-01-05T00:00:00Z", "--json").last_line
    assert (early["participants"], early["sequence"]) == (None, 25)
    assert "fewer than 30" in consent(site, "snapshot", "--purpose", PURPOSE, "--threshold", "30").words
    assert consent(site, "snapshot", "--purpose", PURPOSE, "--threshold", "1").code == 2
    assert consent(site, "snapshot", "--purpose", PURPOSE, "--at", "2026-01-05").code == 2
    wrong = consent(site, "snapshot", "--purpose", "reserch/cardiology")
    assert wrong.code == 4
    assert f"did you mean '{PURPOSE}'?" in wrong.err


def _exported(site: Path, path: Path, *arguments: str | Path) -> dict[str, Any]:
    answer = consent(site, "export", "--out", path, *arguments, "--json")
    assert answer.code == 0, answer.err
    assert path.stat().st_mode & 0o777 == 0o600
    return answer.last_line


@pytest.mark.parametrize("form", ["csv", "27560"])
def test_what_is_exported_can_be_imported_elsewhere(site: Path, tmp_path: Path, form: str) -> None:
    (tmp_path / "file").write_bytes(csv_file())
    consent(site, "import", tmp_path / "file")
    people = tmp_path / "people.txt"
    people.write_text("ann\nbob\ncem\ndee\neve\nnobody\n")
    found = _exported(site, tmp_path / "out", "--format", form, "--subjects", people)
    assert (found["events"], found["named"], found["by_pseudonym"]) == (6, 5, 0)
    other = tmp_path / "other"
    confide("consent", "init", other)
    assert consent(other, "import", tmp_path / "out", "--json").last_line["added"] == 6
    for person, purpose in (("ann", "research"), ("bob", "care"), ("cem", "research"), ("eve", "research")):
        assert standing(other, person, purpose) == standing(site, person, purpose) != "none"


def test_an_export_without_names_says_so(site: Path, tmp_path: Path) -> None:
    consent(site, "grant", "ann", "--purpose", PURPOSE)
    answer = consent(site, "export", "--out", tmp_path / "a.csv")
    assert answer.code == 0
    assert "cannot be imported again" in answer.err
    assert "ann" not in (tmp_path / "a.csv").read_text()
    assert consent(site, "import", tmp_path / "a.csv").code == 4
    found = _exported(site, tmp_path / "b.csv", "--named-only")
    assert (found["events"], found["left_out"]) == (0, 1)


def test_names_may_come_from_the_sites_table(site: Path, tmp_path: Path) -> None:
    consent(site, "grant", "7", "--purpose", PURPOSE)
    table = tmp_path / "table.csv"
    with table.open("w") as stream:
        csv.writer(stream).writerows([("person", "age"), ("7", 50), ("7", 51), ("8", 52)])
    assert _exported(site, tmp_path / "a.csv", "--subjects", table, "--column", "person")["named"] == 1
    wrong = consent(site, "export", "--out", tmp_path / "b.csv", "--subjects", table, "--column", "persn")
    assert wrong.code == 3
    assert not (tmp_path / "b.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--format", "cvs"), "did you mean 'csv'?"), (("--subjects", "absent"), "no such file")],
)
def test_a_wrong_export_is_a_usage_error(site: Path, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    answer = consent(site, "export", "--out", tmp_path / "a.csv", *arguments)
    assert answer.code == 2
    assert words in answer.err
    assert not (tmp_path / "a.csv").exists()


def test_nothing_is_written_over(site: Path, tmp_path: Path) -> None:
    consent(site, "grant", "ann", "--purpose", PURPOSE)
    taken = tmp_path / "ann.html"
    taken.write_text("mine")
    assert consent(site, "export", "--out", taken).code == 2
    assert consent(site, "receipt", "ann", "--out", tmp_path / "ann").code == 2
    assert taken.read_text() == "mine"
    assert not (tmp_path / "ann.json").exists()


def test_a_receipt_is_written_twice_and_signed(site: Path, tmp_path: Path) -> None:
    consent(site, "grant", "ann", "--purpose", PURPOSE)
    key = Ed25519PrivateKey.generate()
    (tmp_path / "key").write_bytes(key.private_bytes_raw())
    answer = consent(
        site, "receipt", "ann", "--out", tmp_path / "ann.html", "--signing-key", tmp_path / "key",
        "--controller", "Ash Hospital", "--contact", "privacy@ash.example", "--json",
    )  # fmt: skip
    found = answer.last_line
    assert found["signed_by"] == key.public_key().public_bytes_raw().hex()
    data = Path(found["json"]).read_bytes()
    verify_receipt(data, bytes.fromhex(found["signed_by"]))
    assert json.loads(data)["dct:publisher"] == "Ash Hospital"
    assert found["pseudonym"] in Path(found["page"]).read_text()
    assert "privacy@ash.example" in Path(found["page"]).read_text()
    told = confide("consent", "verify-receipt", found["json"], "--signed-by", found["signed_by"], "--json").last_line
    assert (told["valid"], told["key_was_given"], told["signed_by"]) == (True, True, found["signed_by"])
    assert (told["pseudonym"], told["publisher"]) == (found["pseudonym"], "Ash Hospital")
    assert told["standings"] == {PURPOSE: "given"}
    assert "nobody (--signing-key)" in consent(site, "receipt", "ann", "--out", tmp_path / "b").words
    assert consent(site, "receipt", "eve", "--out", tmp_path / "eve").code == 4
    assert consent(site, "receipt", "ann", "--out", tmp_path / "c", "--signing-key", tmp_path / "ann.html").code == 2


def test_a_name_with_markup_is_shown_as_it_is(site: Path) -> None:
    consent(site, "grant", "[red]x[/]", "--purpose", "[b]y")
    assert "[red]x[/]" in consent(site, "status", "[red]x[/]").words
    assert "[b]y" in consent(site, "status", "[red]x[/]").words


def test_an_erasure_asks_says_what_it_does_and_is_final(site: Path, tmp_path: Path, monkeypatch: Any) -> None:
    for person in ("ann", "bob"):
        consent(site, "grant", person, "--purpose", PURPOSE)
    for typed in ("", "\n", "an\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        asked = consent(site, "erase", "ann")
        assert asked.code == 4
        assert "cannot be undone" in asked.err
        assert "tombstone" in asked.err
        assert standing(site, "ann") == "given"
    assert consent(site, "erase", "ann", "--json").code == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("ann\n"))
    done = consent(site, "erase", "ann")
    assert done.code == 0
    for word in ("destroyed", "personal key", "stays", "tombstone", "personal.db", "left to you", "backups"):
        assert word in done.words
    assert consent(site, "erase", "ann", "--yes", "--json").last_line == {
        "subject": "ann",
        "events": 0,
        "already": True,
    }
    assert consent(site, "erase", "eve", "--yes").code == 4
    path = tmp_path / "again.csv"
    path.write_text(f"event_id,subject,purpose,type,effective_at\n1,ann,{PURPOSE},given,2026-01-01T00:00Z\n"
                    f"2,cem,{PURPOSE},given,2026-01-01T00:00Z\n")  # fmt: skip
    refused = [
        consent(site, "status", "ann"), consent(site, "grant", "ann", "--purpose", PURPOSE),
        consent(site, "withdraw", "ann", "--purpose", PURPOSE, "--anyway"),
        consent(site, "receipt", "ann", "--out", tmp_path / "ann"), consent(site, "import", path),
    ]  # fmt: skip
    for answer in refused:
        assert answer.code == 4
        assert "erased" in answer.err
    assert not (tmp_path / "ann.json").exists()
    assert consent(site, "status", "ann", "--json").last_line["erased"] is True
    assert consent(site, "status", "cem").code == 4
    found = consent(site, "import", path, "--leave-out-erased", "--json").last_line
    assert (found["added"], found["known"], found["erased"]) == (1, 0, 1)
    assert (standing(site, "bob"), standing(site, "cem")) == ("given", "given")


def test_a_notice_says_what_a_grant_covers(site: Path, tmp_path: Path) -> None:
    wide, other = tmp_path / "wide.txt", tmp_path / "other.txt"
    wide.write_text("All our research …")
    other.write_text("Marketing …")
    notice = ("consent", "notice")
    assert "No notice" in confide(*notice, "list", "--registry", site).out
    add = (*notice, "add", wide, "--purpose", "research", "--covers-beneath", "--registry", site)
    first = confide(*add, "--json").last_line
    assert first == {"digest": "sha256:" + hashlib.sha256(wide.read_bytes()).hexdigest(), "purposes": ["research"],
                     "covers_beneath": True, "sequence": first["sequence"]}  # fmt: skip
    assert confide(*add, "--json").last_line == first
    assert confide(*notice, "add", wide, "--purpose", "care", "--registry", site).code == 4
    assert confide(*notice, "add", wide, "--purpose", "", "--registry", site).code == 2
    confide(*notice, "add", other, "--purpose", "marketing", "--registry", site)
    (one, two) = confide(*notice, "list", "--registry", site, "--json").last_line["notices"]
    assert (one["digest"], two["purposes"]) == (first["digest"], ["marketing"])
    assert "research and all beneath" in confide(*notice, "list", "--registry", site).words
    consent(site, "grant", "eve", "--purpose", PURPOSE)
    consent(site, "grant", "ann", "--purpose", "research", "--notice", wide)
    consent(site, "grant", "bob", "--purpose", "research", "--notice", other)
    assert (standing(site, "ann"), standing(site, "ann", "research")) == ("given", "given")
    assert (standing(site, "bob"), standing(site, "bob", "research")) == ("none", "not-covered")


def test_what_somebody_changed_behind_the_registrys_back_is_found_and_mended(site: Path) -> None:
    consent(site, "grant", "ann", "--purpose", PURPOSE)
    consent(site, "withdraw", "ann", "--purpose", PURPOSE)
    assert consent(site, "check").code == 0
    with closing(sqlite3.connect(site / "consent.db")) as db:
        db.execute("UPDATE consent_current SET denied_at = NULL")
        db.commit()
    assert standing(site, "ann") == "given"  # the control: unchecked it would count
    found = consent(site, "check", "--json")
    assert found.code == 4
    ((difference,), rebuilt) = (found.last_line["differences"], found.last_line["rebuilt"])
    assert (difference["purpose"], difference["kind"], rebuilt) == (PURPOSE, "different", False)
    refused = consent(site, "status", "ann")
    assert refused.code == 4
    assert "confide consent check --rebuild" in refused.err
    assert consent(site, "check", "--rebuild").code == 0
    assert standing(site, "ann") == "refused"
    assert "says what its events say" in consent(site, "check").out


@pytest.fixture
def receipt(site: Path, tmp_path: Path) -> tuple[Path, Ed25519PrivateKey]:
    consent(site, "grant", "ann", "--purpose", PURPOSE)
    key = Ed25519PrivateKey.generate()
    (tmp_path / "key").write_bytes(key.private_bytes_raw())
    answer = consent(site, "receipt", "ann", "--out", tmp_path / "ann", "--signing-key", tmp_path / "key", "--json")
    return Path(answer.last_line["json"]), key


def test_a_receipt_is_checked_with_the_key_it_names_or_the_one_that_is_given(
    receipt: tuple[Path, Ed25519PrivateKey], tmp_path: Path
) -> None:
    file, key = receipt
    pem = tmp_path / "public.pem"
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    pem.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
    assert "compare it with the site’s" in confide("consent", "verify-receipt", file).words
    assert confide("consent", "verify-receipt", file, "--signed-by", pem).code == 0
    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    answer = confide("consent", "verify-receipt", file, "--signed-by", other, "--json")
    assert (answer.code, answer.last_line["error"]["kind"]) == (4, "consent")
    assert "does not hold" in answer.err


@pytest.mark.parametrize("change", ["standing", "publisher", "own key", "no signature", "cut", "not a receipt"])
def test_a_receipt_that_was_changed_is_refused(
    receipt: tuple[Path, Ed25519PrivateKey], tmp_path: Path, change: str
) -> None:
    file, key = receipt
    public = key.public_key().public_bytes_raw().hex()
    assert confide("consent", "verify-receipt", file, "--signed-by", public).code == 0  # the control
    tree = json.loads(file.read_bytes())
    mark = tree["urn:confide:consent:signature"]
    if change == "standing":
        tree["dpv:hasRecordOfActivity"][0]["urn:confide:consent:standing"] = "refused"
    elif change == "publisher":
        tree["dct:publisher"] = "Elm Hospital"
    elif change == "own key":
        mark["publicKey"] = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    elif change == "no signature":
        del tree["urn:confide:consent:signature"]
    data = json.dumps(tree).encode()
    made = {"cut": data[:-20], "not a receipt": b"[1]"}.get(change, data)
    (tmp_path / "other.json").write_bytes(made)
    for signed_by in (["--signed-by", public] if change != "own key" else [], []):
        assert confide("consent", "verify-receipt", tmp_path / "other.json", *signed_by).code == 4


@pytest.mark.parametrize(
    ("arguments", "code"), [(("absent.json",), 2), ((".",), 2), (("FILE", "--signed-by", "nonsense"), 2),
                            (("FILE", "--signed-by", "FILE"), 2)],
)  # fmt: skip
def test_what_is_no_receipt_or_no_key_is_a_usage_error(
    receipt: tuple[Path, Ed25519PrivateKey], arguments: tuple[str, ...], code: int
) -> None:
    file, _ = receipt
    found = confide("consent", "verify-receipt", *(str(file) if a == "FILE" else a for a in arguments))
    assert found.code == code, found.err
