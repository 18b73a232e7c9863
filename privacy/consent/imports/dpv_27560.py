"""ISO/IEC TS 27560 consent records as JSON-LD with the W3C Data Privacy Vocabulary: a record, a receipt around
records, a list, an `@graph`, or one document a line.

Every entry of `dpv:hasConsentStatus` becomes one event per purpose. Read are, of the record: `dct:identifier`,
`dpv:hasDataSubject`, `dpv:hasPurpose` (there or in `dpv:hasProcess`), `dpv:hasNotice`, `dpv:hasLegalBasis`,
`dpv:hasJurisdiction`; of a status: its type, `dpv:isIndicatedAtTime` (with an offset), `dpv:hasDuration`,
`dct:identifier` (the event's id; else it is derived). What only describes (controllers, recipients, categories of data)
is passed over; anything else is rejected, because it might narrow what was agreed to.

Nothing is ever fetched: a context may only give prefixes and `@vocab`, inline, and the known ones their known meaning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from confide.privacy.consent.dpv import EXPRESSED, MAX_EPSILON, NAMESPACES, STATUS_TERMS
from confide.privacy.consent.imports.event import EventBuilder, ImportedEvent, Options, Rejection
from confide.privacy.consent.imports.records import DoubtError, Draft, end_of, only_keys, read_records, text_of

__all__ = ["read_27560"]

_ABOUT = (
    "@id", "@type", "dct:title", "dct:description", "dct:date", "dct:created", "dct:modified", "dct:issued",
    "dct:creator", "dct:publisher", "dct:language", "dct:conformsTo", "dct:hasVersion",
)  # fmt: skip
_DESCRIBES = (
    "dpv:hasDataController", "dpv:hasDataProcessor", "dpv:hasRecipient", "dpv:hasThirdParty", "dpv:hasEntity",
    "dpv:hasAuthority", "dpv:hasApplicableLaw", "dpv:hasPersonalData", "dpv:hasProcessing", "dpv:hasStorageCondition",
    "dpv:hasDataSource", "dpv:hasRight", "dpv:hasConsentControl", "dpv:hasWithdrawalMethod", "dpv:hasLocation",
)  # fmt: skip
_MEANS = ("dpv:hasPurpose", "dpv:hasLegalBasis", "dpv:hasJurisdiction", "dpv:hasNotice")
_RECORD = (
    *_ABOUT, *_DESCRIBES, *_MEANS, "dct:identifier", "dpv:hasIdentifier", "dpv:hasDataSubject", "dpv:hasProcess",
    "dpv:hasConsentStatus",
)  # fmt: skip
_PROCESS = (*_ABOUT, *_DESCRIBES, *_MEANS)
_STATUS = (
    *_ABOUT, "dct:identifier", "dct:source", "dpv:isIndicatedAtTime", "dpv:isIndicatedBy", "dpv:hasIndicationMethod",
    "dpv:isImplementedByEntity", "dpv:hasDuration", "dpv:hasNotice", "dpv:hasLegalBasis", "dpv:hasJurisdiction",
    MAX_EPSILON,
)  # fmt: skip
_SUBJECT = (*_ABOUT, "dct:identifier", "dpv:hasIdentifier", "skos:broader")
#: What only a record or a wrapper around records has: a node that has it and is none may be a record misread.
_DECIDES = frozenset(
    ("@graph", "dpv:hasConsentStatus", "dpv:hasDataSubject", "dpv:hasProcess", "dpv:hasRecordOfActivity",
     "dpv:isIndicatedAtTime")
)  # fmt: skip
_GRANTS = ("given", "renewed")  # names of `EventType`, which are text


def read_27560(stream: BinaryIO, options: Options) -> Iterator[ImportedEvent | Rejection]:
    """Events of all consent records."""
    return read_records(stream, options, "27560", _find, _interpret)


def _find(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every record, with what its document says about the nodes it points to."""
    if isinstance(tree, list):
        for place, node in enumerate(tree):
            yield from ((f"/{place}{pointer}", record) for pointer, record in _find_in(node))
    else:
        yield from _find_in(tree)


def _find_in(tree: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        raise DoubtError("@type", "is not dpv:ConsentRecord: the document is no object")
    prefixes = _prefixes(tree.get("@context"))
    document = _expand({key: value for key, value in tree.items() if key != "@context"}, prefixes)
    if "@graph" not in document:
        yield from _unwrap(document, "", {})
        return
    only_keys(document, ("@graph", "@id"), "document")
    nodes = document["@graph"]
    if not isinstance(nodes, list) or not all(isinstance(node, dict) for node in nodes):
        raise DoubtError("@graph", "is not a list of objects")
    known: dict[str, Any] = {}
    for node in nodes:
        name = node.get("@id")
        if isinstance(name, str) and known.setdefault(name, node) is not node:
            raise DoubtError("@graph", f"describes {name[:60]!r} twice")
    found = False
    for place, node in enumerate(nodes):
        if {"dpv:ConsentRecord", "dpv:ConsentReceipt"} & set(_types(node)):
            found = True
            yield from _unwrap(node, f"/@graph/{place}", known)
        elif "@id" not in node or not _DECIDES.isdisjoint(node):
            raise DoubtError(f"@graph[{place}]", "is no dpv:ConsentRecord, and nothing that a record could point to")
    if not found:
        raise DoubtError("@graph", "holds no dpv:ConsentRecord")


def _unwrap(node: dict[str, Any], pointer: str, known: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A receipt is a wrapper around records."""
    if "dpv:ConsentReceipt" not in _types(node):
        yield pointer, (node, known)
        return
    inside = _list(node.get("dpv:hasRecordOfActivity"))
    if not inside:
        raise DoubtError("dpv:hasRecordOfActivity", "is missing: the receipt holds no record")
    for place, record in enumerate(inside):
        if _follow(record, known) is not record and isinstance(_follow(record, known), dict):
            continue  # it stands in the graph itself
        yield f"{pointer}/dpv:hasRecordOfActivity/{place}", (record, known)


def _interpret(found: Any, builder: EventBuilder, options: Options) -> Iterator[Draft]:
    node, known = found
    if not isinstance(node, dict) or "dpv:ConsentRecord" not in _types(node):
        raise DoubtError("@type", "is not dpv:ConsentRecord")
    only_keys(node, _RECORD, "record")
    name = (
        _name(node, "record") if "dct:identifier" in node or "dpv:hasIdentifier" in node else str(node.get("@id", ""))
    )
    subject = _only(node, "dpv:hasDataSubject", known)
    if isinstance(subject, dict):
        only_keys(subject, _SUBJECT, "dpv:hasDataSubject")
    person = _label(subject, "dpv:hasDataSubject")
    processes = [only_keys(_follow(p, known), _PROCESS, "dpv:hasProcess") for p in _list(node.get("dpv:hasProcess"))]
    scopes = [scope for scope in (node, *processes) if "dpv:hasPurpose" in scope]
    if not scopes:
        raise DoubtError("dpv:hasPurpose", "is missing")
    statuses = _list(node.get("dpv:hasConsentStatus"))
    if not statuses:
        raise DoubtError("dpv:hasConsentStatus", "is missing")
    for scope in scopes:
        for purpose in _list(scope["dpv:hasPurpose"]):
            purpose_name = _label(_follow(purpose, known), "dpv:hasPurpose")
            for status in statuses:
                common = {"subject": person, "purpose": purpose_name}
                draft = _draft(_status(status, node, len(statuses)), (scope, node), known, builder)
                several = len(scopes) > 1 or len(_list(scope["dpv:hasPurpose"])) > 1
                yield Draft(
                    # One id cannot name an event of each purpose.
                    fields={**common, **{k: v for k, v in draft.fields.items() if not (several and k == "event_id")}},
                    record=name, effective=draft.effective, until=draft.until,
                )  # fmt: skip


def _status(status: Any, record: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The status as an object. Where there is one only, the record's date may be its time."""
    node: dict[str, Any] = {"@type": status} if isinstance(status, str) else dict(only_keys(status, _STATUS, "status"))
    if "@id" in node and "@type" not in node:
        node["@type"] = node.pop("@id")
    if count == 1 and "dpv:isIndicatedAtTime" not in node and "dct:date" in record:
        node["dpv:isIndicatedAtTime"] = record["dct:date"]
    return node


def _draft(
    status: dict[str, Any], above: tuple[Mapping[str, Any], ...], known: Mapping[str, Any], builder: EventBuilder
) -> Draft:
    terms = [term for term in _types(status) if term not in EXPRESSED]
    if len(terms) != 1 or terms[0] not in STATUS_TERMS:
        said = repr(", ".join(terms)[:80]) if terms else "nothing"
        raise DoubtError("dpv:hasConsentStatus", f"{said} is no status that can be evaluated")
    kind = STATUS_TERMS[terms[0]]
    start = builder.instant(text_of(_value(status.get("dpv:isIndicatedAtTime")), "dpv:isIndicatedAtTime"))
    if isinstance(start, str):
        raise DoubtError("dpv:isIndicatedAtTime", start)
    fields = {
        "type": str(kind),
        "notice_digest": _joined("dpv:hasNotice", (status, *above), known),
        "lawful_basis": _joined("dpv:hasLegalBasis", (status, *above), known),
        "jurisdiction": _joined("dpv:hasJurisdiction", (status, *above), known),
        "evidence_ref": _joined("dct:source", (status,), known),
    }
    if "dct:identifier" in status:
        fields["event_id"] = text_of(_value(status["dct:identifier"]), "dct:identifier")
    if MAX_EPSILON in status:
        fields["max_epsilon"] = text_of(_value(status[MAX_EPSILON]), MAX_EPSILON)
    until = None
    if "dpv:hasDuration" in status and kind in _GRANTS:
        until = _end(status["dpv:hasDuration"], start, builder)
    return Draft(fields=fields, effective=start, until=until)


def _end(duration: Any, start: int, builder: EventBuilder) -> int | None:
    what = "dpv:hasDuration"
    if isinstance(duration, dict) and "@value" not in duration:
        only_keys(duration, ("@id", "@type", "rdf:value"), what)
        kind = _types(duration)
        if set(duration) == {"@id"}:
            duration = duration["@id"]
        elif kind == ["dpv:EndlessDuration"] and "rdf:value" not in duration:
            duration = kind[0]
        elif kind in (["dpv:TemporalDuration"], ["dpv:UntilTimeDuration"]):
            duration = duration.get("rdf:value")
        else:
            raise DoubtError(what, "cannot be evaluated: it is no length of time and no instant")
    text = text_of(_value(duration), what)
    if text == "dpv:EndlessDuration":
        return None
    return end_of("no end" if text == "none" else text, start, builder, what)


def _only(node: Mapping[str, Any], key: str, known: Mapping[str, Any]) -> Any:
    values = _list(node.get(key))
    if len(values) != 1:
        raise DoubtError(key, "is missing" if not values else "names several")
    value = _follow(values[0], known)
    return _value(value) if not isinstance(value, dict) or "@value" in value else value


def _name(node: Mapping[str, Any], what: str) -> str:
    """An identifier, else the node's own address."""
    for key in ("dct:identifier", "dpv:hasIdentifier", "@id"):
        if key in node:
            return _lasting(text_of(_value(node[key]), f"{what}.{key}"), what)
    raise DoubtError(what, "has no identifier")


def _lasting(name: str, what: str) -> str:
    if name.startswith("_:"):
        raise DoubtError(what, "has no identifier: a blank node's name is another one in every document")
    return name


def _label(value: Any, what: str) -> str:
    if isinstance(value, dict) and "@value" not in value:
        only_keys(value, (*_SUBJECT, "skos:prefLabel"), what)
        return _name(value, what)
    return _lasting(text_of(_value(value), what), what)


def _joined(key: str, places: tuple[Mapping[str, Any], ...], known: Mapping[str, Any]) -> str:
    """What is said nearest to the status."""
    for place in places:
        if key in place:
            values = [_follow(value, known) for value in _list(place[key])]
            return " ".join(
                _name(v, key) if isinstance(v, dict) and "@value" not in v else text_of(_value(v), key) for v in values
            )
    return ""


def _follow(value: Any, known: Mapping[str, Any]) -> Any:
    """A bare reference becomes the node it points to, where the document holds it."""
    if isinstance(value, dict) and set(value) == {"@id"} and isinstance(value["@id"], str):
        return known.get(value["@id"], value["@id"])
    return value


def _value(value: Any) -> Any:
    if isinstance(value, dict) and "@value" in value:
        return only_keys(value, ("@value", "@type", "@language"), "@value")["@value"]
    return value


def _types(node: Mapping[str, Any]) -> list[str]:
    types = _list(node.get("@type"))
    if not all(isinstance(term, str) for term in types):
        raise DoubtError("@type", "is not text")
    return types


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _prefixes(context: Any) -> dict[str, str]:
    """Address → our prefix, for every prefix that the document may use."""
    found = dict(NAMESPACES)
    for part in _list(context):
        if not isinstance(part, dict):
            raise DoubtError("@context", "is an address, and nothing is ever fetched: write the prefixes inline")
        for name, address in part.items():
            if not isinstance(address, str) or (name.startswith("@") and name != "@vocab"):
                raise DoubtError("@context", f"{name[:40]!r} is more than a prefix, and cannot be evaluated")
            if name != "@vocab" and not (":" in address and address.endswith(("#", "/", ":"))):
                raise DoubtError("@context", f"{name[:40]!r} is more than a prefix, and cannot be evaluated")
            if name in NAMESPACES and address != NAMESPACES[name]:
                raise DoubtError("@context", f"gives {name!r} another meaning than {NAMESPACES[name]}")
            found[name] = address
    return found


def _expand(tree: Any, prefixes: Mapping[str, str]) -> Any:
    """The tree with its terms in our own prefixes. Depth is bounded by the parser."""
    short = {address: name for name, address in reversed(NAMESPACES.items())}
    vocabulary = short.get(prefixes.get("@vocab", ""))

    def term(text: str, *, bare: bool) -> str:
        name, colon, rest = text.partition(":")
        if colon and name in prefixes and not rest.startswith("//"):
            text = prefixes[name] + rest
        elif not colon and bare and vocabulary is not None and not text.startswith("@"):
            return f"{vocabulary}:{text}"
        for address, ours in short.items():
            if text.startswith(address):
                return f"{ours}:{text.removeprefix(address)}"
        return text

    def visit(node: Any, key: str = "") -> Any:
        if isinstance(node, list):
            return [visit(item, key) for item in node]
        if isinstance(node, str):
            return term(node, bare=key == "@type") if key in _TERMS else node
        if not isinstance(node, dict):
            return node
        found = {}
        for name, value in node.items():
            ours = name if name == "@context" else term(name, bare=True)
            if ours in found:
                raise DoubtError(ours[:60], "is named twice, by two of its names")
            found[ours] = value if name == "@context" else visit(value, ours)
        return found

    return visit(tree)


#: Where text is a term of a vocabulary and not words.
_TERMS = ("@type", "@id", "dpv:hasConsentStatus", "dpv:hasPurpose", "dpv:hasLegalBasis", "dpv:hasJurisdiction",
          "dpv:hasDuration", "dct:conformsTo")  # fmt: skip
