"""Messages replayed, moved, changed or made up: a site answers none of them, and says nothing about why."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.app import Message as FlowerMessage
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import confide.clients.site as site_module
from confide.clients.app import make_client_app
from confide.errors import ConfideError, SealingError
from confide.privacy.digest import framed
from confide.protocol import messages as m
from confide.protocol.envelope import _DOMAIN, EVERYBODY, MAX_BODY, Address, Envelope, Header
from confide.protocol.flower import from_records, to_records
from confide.protocol.identity import Identity
from tests.attacks.federation import Federation, header_of, is_refusal, open_federation, resign

TRAIN = m.TrainRequest(sums=())


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """Sites that share keys."""
    with open_federation(tmp_path / "f") as made:
        yield made.agree()


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """One federation for all examples that are refused and so leave no trace."""
    with open_federation(tmp_path_factory.mktemp("f") / "f") as made:
        yield made.agree()


def answered(federation: Federation, step: str, request: Envelope, site: str = "ash") -> bool:
    """Did the site do what was asked? Any exception but the two kinds of no fails the test."""
    try:
        return not is_refusal(federation.sites[site].handle(step, request))
    except SealingError:
        return False


def honest(federation: Federation, round_: int = 1) -> Envelope:
    """A request that is right in everything."""
    return federation.sign("train", round_, "ash", TRAIN)


def test_the_honest_request_is_answered(federation: Federation) -> None:
    """The control of the whole file."""
    assert answered(federation, "train", honest(federation))


Change = Callable[[Federation], Envelope]
MOVED: dict[str, Change] = {
    "for another site": lambda f: f.sign("train", 1, "birch", TRAIN),
    "for everybody": lambda f: f.sign("train", 1, EVERYBODY, TRAIN),
    "of another step": lambda f: f.sign("seal", 1, "ash", TRAIN),
    "of a round that is none": lambda f: f.sign("train", 9, "ash", TRAIN),
    "of another run": lambda f: _elsewhere(f, run="another-run"),
    "of another manifest": lambda f: _elsewhere(f, manifest="00" * 32),
    "of another federation": lambda f: _elsewhere(f, federation="another"),
    "of another roster": lambda f: _elsewhere(f, roster_version=2),
    "of another key epoch": lambda f: _elsewhere(f, key_epoch=1),
    "of another attempt": lambda f: _elsewhere(f, attempt=1),
    "as an answer": lambda f: f.sign("train", 1, "ash", TRAIN, request="00" * 32),
    "by a member": lambda f: f.sign("train", 1, "ash", TRAIN, identity=f.sites["birch"].identity),
    "by the site itself": lambda f: f.sign("train", 1, "ash", TRAIN, identity=f.sites["ash"].identity),
    "by a stranger of the same name": lambda f: f.sign(
        "train", 1, "ash", TRAIN, identity=Identity.generate("coordinator")
    ),
    "by the coordinator under another name": lambda f: f.sign(
        "train", 1, "ash", TRAIN, identity=Identity("mallory", f.world.coordinator.key)
    ),
    "of another type": lambda f: f.sign("train", 1, "ash", m.JoinRequest()),
    "with chunks that nobody named": lambda f: f.sign("train", 1, "ash", TRAIN, (b"x",)),
}  # fmt: skip


def _elsewhere(of: Federation, **fields: Any) -> Envelope:
    address = of.address("train", 1).model_copy(update=fields)
    return of.sign("train", 1, "ash", TRAIN, address=address)


@pytest.mark.parametrize("change", MOVED)
def test_a_message_that_belongs_elsewhere_is_not_answered(standing: Federation, change: str) -> None:
    before = standing.charges("ash", 1)
    assert not answered(standing, "train", MOVED[change](standing))
    assert standing.charges("ash", 1) == before


@pytest.mark.parametrize(
    "change", ["for another site", "for everybody", "as an answer", "of another key epoch", "of another attempt"]
)
def test_without_the_check_of_the_address_it_would_be_answered(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(site_module, "expect", lambda *_a, **_k: None)
    assert answered(federation, "train", MOVED[change](federation))


@pytest.mark.parametrize("change", ["by a member", "by a stranger of the same name"])
def test_without_the_check_of_the_signature_it_would_be_answered(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr("confide.protocol.envelope.verify_signature", lambda *_: True)
    monkeypatch.setattr(site_module, "expect", lambda *_a, **_k: None)
    assert answered(federation, "train", MOVED[change](federation))


TAMPERED: dict[str, Callable[[Envelope], Envelope]] = {
    "body": lambda e: replace(e, body=b'{"sums":[] }'),
    "empty body": lambda e: replace(e, body=b""),
    "long body": lambda e: replace(e, body=b" " * (MAX_BODY + 1)),
    "chunk": lambda e: replace(e, chunks=(b"x",)),
    "header": lambda e: replace(e, header=e.header.replace(b'"round":1', b'"round":2')),
    "padded header": lambda e: replace(e, header=e.header + b" "),
    "empty header": lambda e: replace(e, header=b""),
    "header that is no text": lambda e: replace(e, header=b"\xff\xfe" + e.header),
    "long header": lambda e: replace(e, header=b"{" * (9 * 2**20)),
    "signature": lambda e: replace(e, signature=bytes([e.signature[0] ^ 1]) + e.signature[1:]),
    "empty signature": lambda e: replace(e, signature=b""),
    "long signature": lambda e: replace(e, signature=e.signature + b"\0"),
    "truncated": lambda e: replace(e, header=e.header[:-1]),
}


@pytest.mark.parametrize("change", TAMPERED)
def test_a_changed_message_is_not_answered_and_not_even_refused(standing: Federation, change: str) -> None:
    request = TAMPERED[change](honest(standing))
    with pytest.raises(SealingError):
        standing.sites["ash"].handle("train", request)


def test_chunks_in_another_order_are_not_accepted(standing: Federation) -> None:
    request = standing.sign("train", 1, "ash", TRAIN, (b"first", b"second"))
    for chunks in ((b"second", b"first"), (b"first",), (b"first", b"second", b"third"), (b"firstsecond",)):
        with pytest.raises(SealingError, match="chunk"):
            standing.sites["ash"].handle("train", replace(request, chunks=chunks))


def test_the_signature_of_one_message_does_not_fit_another(standing: Federation) -> None:
    one, two = honest(standing, 1), honest(standing, 2)
    for mixed in (replace(one, signature=two.signature), replace(two, header=one.header)):
        with pytest.raises(SealingError, match="signature"):
            standing.sites["ash"].handle("train", mixed)


@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_of_any_byte_is_noticed(standing: Federation, data: st.DataObject) -> None:
    request = honest(standing)
    part = data.draw(st.sampled_from(["header", "signature", "body"]))
    content = bytearray(getattr(request, part))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    if bytes(content) != getattr(request, part):
        with pytest.raises(SealingError):
            standing.sites["ash"].handle("train", replace(request, **{part: bytes(content)}))


def open_place(federation: Federation, step: str) -> Address:
    """A place of a step where nothing was answered yet, so that the site looks at the content."""
    if step in ("secret", "keys"):
        return federation.address(step, 0).model_copy(update={"key_epoch": 1})
    return federation.address(step, 1)


def test_at_an_open_place_the_site_looks_at_the_content(federation: Federation) -> None:
    """The control of what comes below: an honest secret of another epoch is made."""
    body = m.SecretRequest(statements=federation.statements())
    request = federation.sign("secret", 0, "ash", body, address=open_place(federation, "secret"))
    assert answered(federation, "secret", request)


def signed_by_the_coordinator(federation: Federation, header: bytes, body: bytes = TRAIN.to_bytes()) -> Envelope:
    """Any header at all under the coordinator's own key."""
    return Envelope(header, federation.world.coordinator.sign(framed((_DOMAIN, header))), body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@given(data=st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_coordinator_signs_as_a_header_is_no_exception_of_another_kind(
    standing: Federation, data: st.DataObject
) -> None:
    fields = json.loads(honest(standing).header)
    for name in data.draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3)):
        fields[name] = data.draw(JSON)
    assume(fields != json.loads(honest(standing).header))  # the same statement may be answered
    header = json.dumps(fields).encode()
    step = data.draw(st.sampled_from(["join", "secret", "keys", "train", "seal", "unlock", "release", "end"]))
    assert not answered(standing, step, signed_by_the_coordinator(standing, header))


@given(st.binary(max_size=400))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_signed_bytes_that_are_no_header_are_not_answered(standing: Federation, header: bytes) -> None:
    with pytest.raises(SealingError):
        standing.sites["ash"].handle("train", signed_by_the_coordinator(standing, header))


@pytest.mark.parametrize("step", ["train", "seal", "unlock", "release", "secret", "keys", "end"])
def test_a_round_that_no_run_has_is_refused_by_name(standing: Federation, step: str) -> None:
    for round_ in (2**31, 2**63, 2**64, 2**200, -1):
        fields = json.loads(standing.sign(step, 1, "ash", TRAIN).header) | {"round": round_}
        assert not answered(standing, step, signed_by_the_coordinator(standing, json.dumps(fields).encode()))


@given(body=st.binary(max_size=300) | JSON.map(lambda tree: json.dumps(tree).encode()))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_coordinator_signs_as_a_body_is_no_exception_of_another_kind(
    standing: Federation, body: bytes
) -> None:
    for kind, step in (
        (m.SecretRequest, "secret"), (m.KeysRequest, "keys"), (m.SealRequest, "seal"), (m.UnlockRequest, "unlock"),
    ):  # fmt: skip
        fields = json.loads(standing.sign(step, 1, "ash", TRAIN, address=open_place(standing, step)).header)
        header = fields | {"type": kind.TYPE, "body": hashlib.sha256(body).hexdigest()}
        assert not answered(standing, step, signed_by_the_coordinator(standing, json.dumps(header).encode(), body))


@given(
    site=st.text(max_size=10), header=st.text(max_size=30), signature=st.text(max_size=30), body=st.text(max_size=30)
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_statements_of_any_text_are_refused(
    standing: Federation, site: str, header: str, signature: str, body: str
) -> None:
    of_any_text = (m.Statement(site=site, header=header, signature=signature, body=body),) * 3
    requests: tuple[tuple[str, m.Message, tuple[bytes, ...]], ...] = (
        ("seal", m.SealRequest(cohort=("ash", "birch", "cedar"), statements=of_any_text), ()),
        ("unlock", m.UnlockRequest(statements=of_any_text), ()),
        ("keys", m.KeysRequest(statements=of_any_text, made=of_any_text[0], wraps=()), (b"x",)),
        ("keys", m.KeysRequest(statements=standing.statements(), made=of_any_text[0], wraps=()), (b"x",)),
        ("secret", m.SecretRequest(statements=of_any_text), ()),
    )
    for step, message, chunks in requests:
        request = standing.sign(step, 1, "ash", message, chunks, address=open_place(standing, step))
        assert is_refusal(standing.sites["ash"].handle(step, request))


# --- replays ----------------------------------------------------------------------------------------------------------


def test_a_request_replayed_gets_the_stored_answer_and_costs_nothing(federation: Federation) -> None:
    request = honest(federation)
    first = federation.sites["ash"].handle("train", request)
    charged = federation.charges("ash", 1)
    assert sum(charged.values()) == federation.manifest.training.local_steps
    assert federation.sites["ash"].handle("train", request) == first
    assert federation.restart("ash").handle("train", request) == first
    assert federation.charges("ash", 1) == charged


def test_another_request_for_an_answered_step_is_an_equivocation(federation: Federation) -> None:
    federation.train(1)
    charged = federation.charges("ash", 1)
    other = federation.ask("ash", "train", 1, TRAIN.model_copy(update={"sums": (_empty_sum(),)}))
    assert m.Refusal.model_validate_json(other.body).kind == "sealing"
    assert "answered already" in m.Refusal.model_validate_json(other.body).reason
    assert federation.charges("ash", 1) == charged


def _empty_sum() -> m.SumReference:
    return m.SumReference(
        round=1,
        cohort=("ash",),
        statements=(),
        transcript="00" * 32,
        attempt=0,
        chunks=0,
        tags=(),
        unlocked=(),
        sealed=(),
    )


def test_a_reply_cannot_be_moved_to_another_place(federation: Federation) -> None:
    """What a site signed for round 1 does not count in round 2, nor what it signed for another step or request."""
    committed = federation.train(1)
    later = federation.train(2)
    for swapped in (later | {"birch": committed["birch"]}, later | {"birch": federation.joined["birch"]}):
        answers = federation.seal(2, swapped)
        assert all(map(is_refusal, answers.values()))
    assert not any(map(is_refusal, federation.seal(2, later).values()))


def test_the_coordinator_takes_no_reply_to_another_request(tmp_path: Path) -> None:
    for swap in (False, True):
        with open_federation(tmp_path / f"{swap}") as federation:
            seen: dict[str, Envelope] = {}

            def replay(
                site: str, request: Envelope, reply: Envelope, seen: dict[str, Envelope] = seen, swap: bool = swap
            ) -> Envelope:
                header = header_of(reply)
                if header.step == "train" and site == "ash":
                    old = seen.setdefault(site, reply)
                    return old if swap and header.round == 2 else reply
                return reply

            outcome: list[Any] = []
            federation.coordinator(federation.grid(tamper=replay), after_round=outcome.append).run()
            assert ("ash" in outcome[1].cohort) is not swap


# --- Flower's side ----------------------------------------------------------------------------------------------------


def deliver(federation: Federation, records: RecordDict, find: Any = None) -> FlowerMessage:
    """Hand records to the client app as Flower would."""
    federation.grid()  # sets Flower's process-wide identity
    app = make_client_app(find or (lambda _context: federation.sites["ash"]))
    message = FlowerMessage(records, 7, "train.train")
    message.metadata.__dict__["_message_id"] = "1"
    return app(message, Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config={}))


@pytest.mark.parametrize(
    "records",
    [
        RecordDict(),
        RecordDict({"envelope": ConfigRecord()}),
        RecordDict({"envelope": ConfigRecord({"header": "text", "signature": b"s", "body": b"b"})}),
        RecordDict({"envelope": ConfigRecord({"header": b"h", "signature": b"s", "body": b"b"})}),
        RecordDict({"envelope": ConfigRecord({"header": b"h", "signature": b"s", "body": b"b", "more": b"m"})}),
        RecordDict({"envelope": ConfigRecord({"header": 1, "signature": 2.0, "body": [1, 2]})}),
        RecordDict({"envelope": ArrayRecord()}),
        RecordDict({"other": ConfigRecord({"header": b"h", "signature": b"s", "body": b"b"})}),
    ],
    ids=range(8),
)
def test_records_of_another_shape_are_dropped_without_a_word(standing: Federation, records: RecordDict) -> None:
    reply = deliver(standing, records)
    assert reply.has_error()
    assert reply.error.reason == "not authentic"


def test_an_honest_message_passes_through_flower(federation: Federation) -> None:
    reply = deliver(federation, to_records(honest(federation)))
    assert not reply.has_error()
    assert header_of(from_records(reply.content)).type == m.TrainReply.TYPE


SECRET = "patient Jane Roe, ward 7, label 1"


@pytest.mark.parametrize(
    "error", [ValueError(SECRET), KeyError(SECRET), ConfideError(SECRET), MemoryError(SECRET), RuntimeError(SECRET)]
)
def test_no_text_of_an_exception_leaves_or_reaches_a_log(
    standing: Federation, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def handle(self, step: str, request: Envelope) -> Envelope:
            raise error

    reply = deliver(standing, to_records(honest(standing)), lambda _context: Broken())
    assert reply.has_error()
    assert reply.error.reason == "fault at the site"
    assert SECRET not in caplog.text
    assert SECRET in str(error), "the control: the exception does hold it"


@pytest.mark.parametrize("kind", ["data", "consent", "storage", "bug"])
def test_a_reason_that_is_not_public_becomes_the_uniform_abstention(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = {c.kind: c for c in (ConfideError, *ConfideError.__subclasses__())}
    assert not kinds[kind].shareable

    def fail(*_: Any, **__: Any) -> None:
        raise kinds[kind](SECRET, where=SECRET, hint=SECRET)

    monkeypatch.setitem(federation.sites["ash"]._steps, "train", fail)
    reply = federation.sites["ash"].handle("train", honest(federation))
    assert json.loads(reply.body) == {"kind": "abstains", "reason": "abstains"}
    assert SECRET not in caplog.text
    assert SECRET.encode() not in reply.header + reply.body
    assert SECRET.encode() not in federation.exported("ash"), "nor the log that travels"
    local = federation.folder / "sites" / "ash" / "local.log"
    assert SECRET.encode() in local.read_bytes(), "the control: the local one tells the operator"


def test_a_reason_that_is_public_is_told(federation: Federation) -> None:
    """The control of the one above."""
    reply = federation.ask("ash", "train", 99, TRAIN)
    assert "no round 99" in m.Refusal.model_validate_json(reply.body).reason


def test_hostile_replies_are_what_they_say(federation: Federation) -> None:
    """`resign`, which other files use, makes envelopes that pass every check but the content's."""
    reply = federation.train(1)["ash"]
    again = resign(federation.sites["ash"], reply, model="00" * 32)
    assert header_of(again).body != header_of(reply).body
    assert Address(**{n: getattr(header_of(again), n) for n in Address.model_fields}) == federation.address("train", 1)
    assert isinstance(header_of(again), Header)
