"""Receipts: what stands, how to withdraw, a pseudonym to ask with, a signature that breaks, a page that reads well."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from playwright.sync_api import sync_playwright

from confide.errors import ConfigError, ConsentError
from confide.privacy.consent import EventType, ImportedEvent, now_micros
from confide.privacy.consent.desk import ConsentDesk
from confide.privacy.consent.imports import check_file
from confide.privacy.consent.receipt import (
    SIGNATURE,
    STANDING,
    Receipt,
    load_signing_key,
    make_receipt,
    verify_receipt,
    write_receipt,
)
from tests.privacy.audit.test_report import CONTRAST

YEAR = 365 * 86_400_000_000
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()
NOTICE = "sha256:" + "ab" * 32


def event(name: str, purpose: str, kind: EventType, at: int, until: int | None = None) -> ImportedEvent:
    limit = 2.5 if kind is EventType.GIVEN else None
    notice = NOTICE if kind is EventType.GIVEN else ""
    return ImportedEvent(name, "ann <b>", purpose, kind, at, until, notice, "GDPR-6-1-a", "DE", "form 7", limit)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsentDesk]:
    now = now_micros()
    with ConsentDesk.create(tmp_path_factory.mktemp("receipts") / "site") as made:
        made.apply([
            event("1", "research/häuslich", EventType.GIVEN, now - YEAR, now + YEAR),
            event("2", "care", EventType.GIVEN, now - YEAR),
            event("3", "care", EventType.WITHDRAWN, now - YEAR // 2),
            event("4", "trials", EventType.REQUESTED, now - YEAR),
            event("5", "registry", EventType.GIVEN, now - YEAR, now - 1),
            event("6", "future", EventType.GIVEN, now + YEAR),
            ImportedEvent("7", "bob", "research", EventType.GIVEN, now, None, "", "", "", "bobs-form", None),
        ])  # fmt: skip
        yield made


@pytest.fixture(scope="module")
def receipt(desk: ConsentDesk) -> Receipt:
    return make_receipt(desk, "ann <b>", controller="Ash Hospital", contact="privacy@ash.example", key=KEY)


def test_it_says_what_stands_for_each_purpose(receipt: Receipt) -> None:
    tree = json.loads(receipt.data)
    assert tree["@type"] == "dpv:ConsentReceipt"
    records = {r["dpv:hasPurpose"]["dct:identifier"]: r for r in tree["dpv:hasRecordOfActivity"]}
    assert {purpose: r[STANDING] for purpose, r in records.items()} == {
        "research/häuslich": "given", "care": "refused", "trials": "unknown", "registry": "expired",
        "future": "unknown",
    }  # fmt: skip
    given = records["research/häuslich"]["dpv:hasConsentStatus"][0]
    assert given["dpv:hasNotice"]["dct:identifier"] == NOTICE
    assert given["dpv:hasDuration"]["@type"] == "dpv:UntilTimeDuration"
    assert records["care"]["dpv:hasConsentControl"]["dpv:isExercisedAt"] == "privacy@ash.example"


def test_it_names_her_by_her_pseudonym_and_nobody_else(desk: ConsentDesk, receipt: Receipt) -> None:
    pseudonym = desk.pseudonym("ann <b>")
    assert pseudonym is not None
    assert receipt.pseudonym == pseudonym.hex()
    assert pseudonym.hex().encode() in receipt.data
    assert b"ann" not in receipt.data
    other = desk.pseudonym("bob")
    assert other is not None
    assert other.hex().encode() not in receipt.data
    assert b"bobs-form" not in receipt.data


def test_the_signature_is_over_the_canonical_form_and_any_change_breaks_it(receipt: Receipt) -> None:
    verify_receipt(receipt.data, PUBLIC)
    tree = json.loads(receipt.data)
    bare = {k: v for k, v in tree.items() if k != SIGNATURE}
    import base64

    KEY.public_key().verify(base64.b64decode(tree[SIGNATURE]["value"]), rfc8785.dumps(bare))
    tree["dpv:hasRecordOfActivity"][0][STANDING] = "given"
    with pytest.raises(ConsentError, match="does not hold"):
        verify_receipt(json.dumps(tree).encode(), PUBLIC)
    with pytest.raises(ConsentError, match="does not hold"):
        verify_receipt(receipt.data, Ed25519PrivateKey.generate().public_key().public_bytes_raw())


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"urn:confide:consent:signature":{"value":"x"}}',
                                  b'{"urn:confide:consent:signature":7}'])  # fmt: skip
def test_what_is_no_signed_receipt_is_refused(data: bytes) -> None:
    with pytest.raises(ConsentError, match="not a signed receipt"):
        verify_receipt(data, PUBLIC)


def test_an_unsigned_receipt_says_so(desk: ConsentDesk, tmp_path: Path) -> None:
    made = make_receipt(desk, "ann <b>", controller="Ash", contact="us")
    assert SIGNATURE not in json.loads(made.data)
    _, page = write_receipt(made, tmp_path / "r")
    assert "It is not signed" in page.read_text()


def test_a_receipt_is_not_imported_as_if_the_pseudonym_were_a_name(receipt: Receipt, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(receipt.data)
    assert check_file(tmp_path / "r.json", name="27560").rejected > 0


def test_whoever_is_unknown_gets_none(desk: ConsentDesk) -> None:
    with pytest.raises(ConsentError, match="nothing about such a person"):
        make_receipt(desk, "eve", controller="Ash", contact="us")
    assert desk.pseudonym("eve") is None  # and is not put on record by asking


def test_keys_are_pem_or_bytes(tmp_path: Path) -> None:
    path = tmp_path / "key"
    for data in (KEY.private_bytes_raw(), KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())):
        path.write_bytes(data)
        assert load_signing_key(path).public_key().public_bytes_raw() == PUBLIC
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    other = X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for data in (b"", b"x" * 33, other):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match="not an Ed25519 key"):
            load_signing_key(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_signing_key(tmp_path / "absent")


@pytest.fixture(scope="module")
def page_file(receipt: Receipt, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_receipt(receipt, tmp_path_factory.mktemp("page") / "ann.receipt")[1]


def test_both_files_are_the_owners_only(page_file: Path) -> None:
    assert {p.name: p.stat().st_mode & 0o777 for p in page_file.parent.iterdir()} == {
        "ann.receipt.json": 0o600, "ann.receipt.html": 0o600
    }  # fmt: skip


class _Outline(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_whole_for_a_screen_reader_and_escapes_what_it_is_given(page_file: Path) -> None:
    text = page_file.read_text()
    outline = _Outline()
    outline.feed(text)
    tags = [tag for tag, _ in outline.tags]
    assert ("html", {"lang": "en"}) in outline.tags
    assert tags.count("title") == tags.count("h1") == tags.count("main") == tags.count("caption") == 1
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in outline.tags if tag == "th")
    assert "ann &lt;b&gt;" in text
    assert "ann <b>" not in text
    addresses = [v for _, attrs in outline.tags for k, v in attrs.items() if k in ("href", "src")]
    assert addresses == ["#main"]
    assert "script" not in tags


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("no Chromium: apt-get install -y chromium", pytrace=False)
    with sync_playwright() as started:
        running = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1000])
def test_the_page_can_be_read_on_any_screen(browser: Any, page_file: Path, scheme: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(page_file.as_uri())
    found = page.evaluate(CONTRAST)
    assert len(found) > 40
    assert [x for x in found if x[0] < 4.5] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.close()
