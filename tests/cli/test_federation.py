"""`confide federation` and `confide site init | confirm | rotate`, as operators use them: files go by hand."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from confide.clients.enrolment import site_keys
from confide.clients.membership import Membership
from confide.config.site import load_site
from confide.privacy.consent import SiteKey
from confide.privacy.sealing import vault
from confide.protocol.keyfiles import PASSPHRASE
from tests.cli.command import Answer, confide, files_under

SITES = ("north", "south", "west")
WORDS = "four small honest words"


def ok(*arguments: str | Path) -> Answer:
    """A command that must succeed."""
    done = confide(*arguments)
    assert done.code == 0, done.err
    return done


class Town:
    """A coordinator's folder and sites' folders beside each other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fed = folder, folder / "fed"

    def init(self, *names: str) -> None:
        ok("federation", "init", self.fed, "--name", "heart", "--endpoint", "127.0.0.1:9092")
        for name in names:
            self.site(name)

    def site(self, name: str) -> Path:
        ok("site", "init", self.folder / name, "--name", name, "--federation", "heart", "--population", "800")
        return self.folder / name / "request.json"

    def kits(self) -> dict[str, str]:
        return dict(ok("federation", "kit", self.fed, "--json").last_line["kits"])

    def read(self, name: str, kit: str) -> str:
        """What a site's operator reads to the others."""
        shown = ok("federation", "show", self.folder / name, "--kit", kit, "--json").last_line
        return str(shown["fingerprint"])

    def confirm(self, *names: str) -> dict[str, object]:
        """Everybody compares, signs, sends back, and accepts; the last state of the version."""
        kits = self.kits()
        read = {self.read(n, kits[n]) for n in names}
        assert len(read) == 1
        files = []
        for name in names:
            done = ok("site", "confirm", self.folder / name, kits[name], "--fingerprint", read.copy().pop(), "--json")
            assert done.last_line["state"] == "countersigned"
            files.append(done.last_line["file"])
        assert ok("federation", "collect", self.fed, *files, "--json").last_line["complete"]
        for name, kit in self.kits().items():
            done = ok("federation", "confirm", self.folder / name, kit, "--json")
            assert done.last_line["state"] == "accepted"
        return ok("federation", "show", self.fed, "--json").last_line

    def accepted(self, name: str) -> int:
        roster = Membership(self.folder / name / "membership.json").standing.roster
        return roster.version if roster else 0


@pytest.fixture
def town(tmp_path: Path) -> Town:
    """Three sites that have founded a federation."""
    made = Town(tmp_path)
    made.init(*SITES)
    ok("federation", "add-site", made.fed, *(made.folder / n / "request.json" for n in SITES))
    made.confirm(*SITES)
    return made


def test_three_sites_found_a_federation_and_know_how_to_connect(town: Town) -> None:
    shown = ok("federation", "show", town.fed, "--json").last_line
    assert (shown["version"], shown["state"], shown["missing"]) == (1, "complete", [])
    assert [(m["site"], m["population"], m["confirmed"]) for m in shown["members"]] == [(n, 800, True) for n in SITES]
    for name in SITES:
        config = load_site(town.folder / name / "site.toml")
        assert config.endpoint == "127.0.0.1:9092"
        assert config.policy.coordinator_key is not None
        assert (town.folder / name / "ca.crt").read_bytes() == (town.fed / "ca.crt").read_bytes()
        assert ok("federation", "show", town.folder / name, "--json").last_line["fingerprint"] == shown["fingerprint"]
    assert "founds the federation with north, south, west" in ok("federation", "show", town.fed).words


def test_private_keys_are_for_their_owner_and_in_no_file_that_travels(town: Town) -> None:
    held = [p for f in (town.fed, *(town.folder / n for n in SITES)) for p in f.rglob("*.key")]
    assert len(held) == 3 + 3 * 4
    for path in held:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    travels = [
        *(town.fed / "kits").iterdir(),
        *town.folder.glob("*/request.json"),
        *town.folder.glob("*/counter*.json"),
    ]
    assert len(travels) == 9
    for path in travels:
        text = path.read_text()
        assert "PRIVATE" not in text
        for key in held:
            data = key.read_bytes()
            middle = data[len(data) // 2 - 8 : len(data) // 2 + 8]
            assert middle not in text.encode()
            assert data.hex() not in text
    node = load_ssh_private_key((town.folder / "north" / "keys" / "node.key").read_bytes(), None)
    assert isinstance(node, ec.EllipticCurvePrivateKey), "as Flower reads it"
    assert node.curve.name == "secp384r1"


def test_a_later_site_is_confirmed_by_everybody_and_by_itself(town: Town) -> None:
    town.site("east")
    ok("federation", "add-site", town.fed, town.folder / "east" / "request.json")
    shown = ok("federation", "show", town.fed, "--json").last_line
    assert (shown["state"], shown["missing"]) == ("proposal", ["east", *SITES])
    town.confirm("east", *SITES)
    assert {town.accepted(n) for n in ("east", *SITES)} == {2}


def test_a_wrong_or_missing_fingerprint_signs_nothing(town: Town) -> None:
    town.site("east")
    ok("federation", "add-site", town.fed, town.folder / "east" / "request.json")
    kit, before = town.kits()["north"], files_under(town.folder / "north")
    wrong = confide("site", "confirm", town.folder / "north", kit, "--fingerprint", "12345 " * 12, "--json")
    assert (wrong.code, wrong.last_line["error"]["kind"]) == (6, "sealing")
    assert town.read("north", kit) not in wrong.out + wrong.err, "the right one is not given away"
    missing = confide("site", "confirm", town.folder / "north", kit, "--json")
    assert missing.code == 2
    assert "call the operators of east" in missing.err, "whose keys are new, and nobody else's can vouch for them"
    assert files_under(town.folder / "north") == before


def test_a_site_changes_its_keys_with_everybodys_word(town: Town) -> None:
    before = site_keys(town.folder / "north")
    ok("site", "rotate", town.folder / "north")
    ok("federation", "rotate", town.fed, town.folder / "north" / "request.json")
    town.confirm(*SITES)
    after = site_keys(town.folder / "north")
    assert after.identity.public_key != before.identity.public_key
    assert not (town.folder / "north" / "keys.next").exists()
    assert {town.accepted(n) for n in SITES} == {2}


def test_a_site_that_lost_its_keys_comes_back_with_the_others_word(town: Town) -> None:
    (town.folder / "north").rename(town.folder / "lost")
    request = town.site("north")
    plain = confide("federation", "rotate", town.fed, request)
    assert plain.code == 6
    assert "--lost" in plain.err
    ok("federation", "rotate", town.fed, request, "--lost")
    town.confirm(*SITES)
    shown = ok("federation", "show", town.fed, "--json").last_line
    assert shown["change"] == {"kind": "replace", "sites": ["north"]}


def test_a_removed_site_is_not_asked_and_stays_where_it_was(town: Town) -> None:
    ok("federation", "remove-site", town.fed, "west")
    assert sorted(town.kits()) == ["north", "south"]
    town.confirm("north", "south")
    assert [town.accepted(n) for n in SITES] == [2, 2, 1]


def test_one_change_at_a_time_and_a_given_up_one_frees_the_way(town: Town) -> None:
    ok("federation", "remove-site", town.fed, "west")
    kit = town.kits()["north"]
    town.site("east")
    busy = confide("federation", "add-site", town.fed, town.folder / "east" / "request.json")
    assert busy.code == 9
    assert "confide federation drop" in busy.err
    fingerprint = town.read("north", kit)
    ok("site", "confirm", town.folder / "north", kit, "--fingerprint", fingerprint)
    ok("federation", "drop", town.fed)
    ok("federation", "add-site", town.fed, town.folder / "east" / "request.json")
    assert ok("federation", "show", town.fed, "--json").last_line["version"] == 3, "2 was shown, and signed by north"
    late = confide("federation", "collect", town.fed, town.folder / "north" / "countersignature-2.json")
    assert late.code == 6
    town.confirm("east", *SITES)
    assert {town.accepted(n) for n in ("east", *SITES)} == {3}


def test_a_new_authority_is_confirmed_by_everybody_and_in_use_only_then(town: Town) -> None:
    old = (town.fed / "ca.crt").read_bytes()
    ok("federation", "renew", town.fed, "--authority")
    assert (town.fed / "ca.crt").read_bytes() == old
    town.confirm(*SITES)
    assert (town.fed / "ca.crt").read_bytes() != old
    assert (town.folder / "north" / "ca.crt").read_bytes() == (town.fed / "ca.crt").read_bytes()
    assert handshake(town)


def handshake(town: Town, name: str = "127.0.0.1") -> bool:
    """Does a site that trusts its ca.crt, and nothing else, reach the coordinator's server by this name?"""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(town.fed / "server.crt", town.fed / "server.key")
    client = ssl.create_default_context(cafile=str(town.folder / "north" / "ca.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            try:
                server.wrap_socket(connection, server_side=True).close()
            except OSError:
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with socket.create_connection(listening.getsockname()) as plain:
                client.wrap_socket(plain, server_hostname=name).close()
            return True
        except ssl.SSLCertVerificationError:
            return False
        finally:
            thread.join()


def test_a_site_trusts_the_coordinators_server_and_no_other_name(town: Town) -> None:
    assert handshake(town)
    assert not handshake(town, "localhost"), "the control: it is not the endpoint's name"
    first = (town.fed / "server.crt").read_bytes()
    ok("federation", "renew", town.fed)
    assert (town.fed / "server.crt").read_bytes() != first
    assert handshake(town), "and a renewed certificate needs nobody's word"


def test_keys_under_a_passphrase_open_with_it_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, cheap in (("_MEMORY", 64), ("_ITERATIONS", 1), ("_LANES", 1)):
        monkeypatch.setattr(vault, name, cheap)
    (tmp_path / "words").write_text(WORDS + "\n")
    options = ("--name", "north", "--federation", "heart", "--population", "8", "--passphrase-file", tmp_path / "words")
    assert ok("site", "init", tmp_path / "north", *options, "--json").last_line["encrypted"]
    for path in (tmp_path / "north" / "keys").iterdir():
        assert b"PRIVATE" not in path.read_bytes()
    ok("federation", "init", tmp_path / "fed", "--name", "heart", "--endpoint", "h:1", *options[-2:])
    request = tmp_path / "north" / "request.json"
    closed = confide("federation", "add-site", tmp_path / "fed", request)
    assert closed.code == 2
    assert PASSPHRASE in closed.err
    monkeypatch.setenv(PASSPHRASE, "another passphrase")
    assert confide("federation", "add-site", tmp_path / "fed", request).code == 6
    monkeypatch.setenv(PASSPHRASE, WORDS)
    ok("federation", "add-site", tmp_path / "fed", request)
    monkeypatch.setenv(PASSPHRASE, "short")
    assert confide("federation", "kit", tmp_path / "fed").code == 2


def test_a_key_that_others_may_read_is_not_used(town: Town) -> None:
    (town.fed / "coordinator.key").chmod(0o644)
    refused = confide("federation", "kit", town.fed)
    assert refused.code == 2
    assert "chmod 600" in refused.err


def test_what_the_operator_wrote_is_not_written_over(town: Town) -> None:
    path = town.folder / "north" / "site.toml"
    path.write_text(path.read_text().replace("127.0.0.1:9092", "old.example:1") + "# mine\n")
    kit = town.kits()["north"]
    done = ok("site", "confirm", town.folder / "north", kit, "--json").last_line
    assert done["to_write"] == ['endpoint = "127.0.0.1:9092"']
    assert path.read_text().endswith("# mine\n")


def test_a_new_site_has_an_empty_registry_under_its_own_key(town: Town) -> None:
    keys = {SiteKey.load_or_create(town.folder / n / "site.key").fingerprint for n in SITES}
    assert len(keys) == len(SITES)
    assert all((town.folder / n / "consent.db").is_file() for n in SITES)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("federation", "init", "fed", "--name", "x", "--endpoint", "h:1"), 2),
        (("federation", "init", "new", "--name", "härz", "--endpoint", "h:1"), 2),
        (("federation", "init", "new", "--name", "x", "--endpoint", "h"), 2),
        (("federation", "init", "new", "--name", "x", "--endpoint", "h:99999"), 2),
        (("federation", "add-site", "fed", "north/site.toml"), 2),
        (("federation", "add-site", "fed", "nothing.json"), 2),
        (("federation", "add-site", "fed", "north/request.json"), 6),
        (("federation", "add-site", "north", "north/request.json"), 2),
        (("federation", "kit", "fed", "nobody"), 2),
        (("federation", "remove-site", "fed", "nobody"), 2),
        (("federation", "drop", "fed"), 2),
        (("federation", "collect", "fed", "north/request.json"), 2),
        (("federation", "show", "nothing"), 2),
        (("federation", "show", "."), 2),
        (("site", "init", "north", "--name", "north", "--federation", "heart", "--population", "8"), 2),
        (("site", "init", "new", "--name", "nörth", "--federation", "heart", "--population", "8"), 2),
        (("site", "init", "new", "--name", "n", "--federation", "heart", "--population", "0"), 2),
        (("site", "init", "new", "--name", "n", "--federation", "../heart", "--population", "8"), 2),
        (("site", "confirm", "north", "fed/kits/south.kit.json"), 6),
        (("site", "confirm", "north", "north/request.json"), 2),
        (("site", "confirm", "nothing", "fed/kits/north.kit.json"), 2),
        (("site", "rotate", "nothing"), 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    founded: Town, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int
) -> None:
    monkeypatch.chdir(founded.folder)
    before = files_under(founded.folder)
    for form in ((), ("--json",)):
        done = confide(*arguments, *form)
        assert done.code == code, done.err
        assert "Traceback" not in done.err
    assert done.last_line["error"]["exit_code"] == code
    assert files_under(founded.folder) == before


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Town:
    """One federation for all that changes nothing."""
    made = Town(tmp_path_factory.mktemp("founded"))
    made.init(*SITES)
    ok("federation", "add-site", made.fed, *(made.folder / n / "request.json" for n in SITES))
    made.confirm(*SITES)
    return made
