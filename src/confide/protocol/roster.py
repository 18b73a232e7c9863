"""The roster: who belongs to a federation, as a chain of versions that every member has signed. Pure: no I/O.

A *version* is complete when every key that it needs has signed it (`required_keys`). Until then it is a *proposal*.

Invariants:
1. A version names its federation, its coordinator's key and the digest of the version before it: a chain has one past.
2. What changes from one version to the next is exactly the one change that it states; nobody's population ever changes.
3. Everybody signs: the coordinator, every member of the version before, every key that is new. One member may be
   missing, once a version: the one who is removed, or whose lost key is replaced. No two at once, and nothing else
   beside it: otherwise one confused operator would be enough to exchange everybody else.
4. Names differ for a reader, not only for a computer; no key stands twice, and a key that has left never comes back.
5. A site signs rising version numbers only, and never accepts a version below the highest that it has signed. So of two
   proposals that follow one version at most one is ever accepted by its honest members: whoever signs the second has
   given up the first (`Standing`).
6. What a site has accepted is only ever continued: no older version, no other version of the same number.

Numbers may have gaps: a proposal that was given up keeps its own for ever.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Literal

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from pydantic import Field, ValidationError, field_validator, model_validator

from confide.errors import SealingError
from confide.privacy.digest import digest, framed
from confide.protocol.frozen import Frozen
from confide.protocol.identity import Hex32, Identity, verify_signature

__all__ = [
    "COORDINATOR",
    "NO_AUTHORITY",
    "Change",
    "FederationName",
    "Roster",
    "RosterMember",
    "Signature",
    "SignedRoster",
    "SiteName",
    "first_roster",
    "given_up_keys",
    "look",
    "next_roster",
    "required_keys",
    "sign_roster",
    "verify_chain",
]

#: The coordinator's name in every federation: no site may be taken for it.
COORDINATOR = "coordinator"
#: Digest of the version before the first, and of the certificate of a federation that has none (a simulation).
NOTHING = NO_AUTHORITY = "0" * 64
_DOMAIN = b"confide/roster/1"
_MOST_MEMBERS = 16_384
_MOST_VERSIONS = 10_000
#: Chains that were found to hold, by content.
_HELD: dict[bytes, None] = {}
_MOST_HELD = 64

#: ASCII only: what cannot be typed on every keyboard cannot be compared over the phone.
SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,63}$")]
FederationName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
Version = Annotated[int, Field(ge=1, le=1_000_000)]


def look(name: str) -> str:
    """What a name looks like: two with one look are taken for each other (the skeleton of Unicode TR 39, for ASCII)."""
    text = re.sub(r"[ ._-]+", "-", name.lower()).strip("-").translate(str.maketrans("01i", "oll"))
    return text.replace("rn", "m").replace("vv", "w")


class RosterMember(Frozen):
    """A site as the federation knows it.

    Attributes:
        site: Its name.
        signing_key: Ed25519, signs everything that it sends.
        exchange_key: X25519, for what is encrypted to it outside a run.
        node_key: ECDSA P-384 in OpenSSH's form, without a comment: its SuperNode's.
        population: Its declared number of subjects: a public constant.
    """

    site: SiteName
    signing_key: Hex32
    exchange_key: Hex32
    node_key: Annotated[str, Field(max_length=400)]
    population: Annotated[int, Field(ge=1, lt=2**53)]

    @field_validator("node_key")
    @classmethod
    def _one_spelling(cls, value: str) -> str:
        try:
            key = load_ssh_public_key(value.encode())
            if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
                raise ValueError
            if key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() != value:
                raise ValueError
        except (ValueError, UnsupportedAlgorithm):
            raise ValueError("is not a P-384 key in OpenSSH's form, without a comment") from None
        return value

    @property
    def keys(self) -> tuple[str, str, str]:
        """All that may stand only once in a roster."""
        return self.signing_key, self.exchange_key, self.node_key


class Change(Frozen):
    """What a version changes.

    `found`: the first version. `add`: these sites are new. `remove`: this site leaves, and is not asked. `rotate`: this
    site has new keys, and signs with old and new. `replace`: this site has lost its old key, which is not asked for.
    `authority`: a new certificate authority, no site.
    """

    kind: Literal["found", "add", "remove", "rotate", "replace", "authority"]
    sites: Annotated[tuple[SiteName, ...], Field(max_length=_MOST_MEMBERS)]


class Roster(Frozen):
    """One version. `authority` is the SHA-256 of the certificate authority's certificate (DER)."""

    format: Literal[1] = 1
    federation: FederationName
    version: Version
    previous: Hex32
    coordinator_key: Hex32
    authority: Hex32
    members: Annotated[tuple[RosterMember, ...], Field(min_length=1, max_length=_MOST_MEMBERS)]
    change: Change

    @model_validator(mode="after")
    def _everybody_once(self) -> Roster:
        names = [m.site for m in self.members]
        if names != sorted(names):
            raise ValueError("members are sorted by name")
        looks = {look(COORDINATOR): COORDINATOR}
        for name in names:
            if look(name) in looks:
                raise ValueError(f"{name!r} looks like {looks[look(name)]!r}: they would be taken for each other")
            looks[look(name)] = name
        keys = [self.coordinator_key, *(key for m in self.members for key in m.keys)]
        if len(set(keys)) != len(keys):
            raise ValueError("a key stands in the roster twice")
        return self

    @cached_property
    def digest(self) -> str:
        """Names this version and, through `previous`, all before it. Hex."""
        return digest("roster", self.model_dump_json().encode()).hex()

    def member(self, site: str) -> RosterMember | None:
        """A site's entry."""
        return self._by_name.get(site)

    @cached_property
    def _by_name(self) -> dict[str, RosterMember]:
        return {m.site: m for m in self.members}

    @property
    def where(self) -> str:
        """For errors."""
        return f"roster version {self.version} of {self.federation}"


class SignedRoster(Frozen):
    """A version with the signatures that it has so far: public key → signature."""

    roster: Roster
    signatures: Annotated[dict[Hex32, Signature], Field(max_length=2 * _MOST_MEMBERS + 1)]

    def with_signatures(self, signatures: Mapping[str, str]) -> SignedRoster:
        """The same with more of them."""
        return SignedRoster(roster=self.roster, signatures={**self.signatures, **signatures})

    @cached_property
    def content(self) -> tuple[bytes, bytes]:
        """What `verify_chain` looks at: names the version, and its signatures in their order."""
        pairs = (bytes.fromhex(k + v) for k, v in self.signatures.items())
        return bytes.fromhex(self.roster.digest), digest("signatures", *pairs)

    def missing(self, previous: Roster | None) -> dict[str, str]:
        """Keys that have not signed yet, with whose they are."""
        return {k: who for k, who in required_keys(self.roster, previous).items() if k not in self.signatures}


def next_roster(
    previous: Roster, change: Change, members: Iterable[RosterMember], version: int, authority: str | None = None
) -> Roster:
    """The version that would follow, with everything that nobody may change taken over.

    Raises:
        SealingError: The change is not one that a version may make.
    """
    try:
        roster = Roster(
            federation=previous.federation, version=version, previous=previous.digest,
            coordinator_key=previous.coordinator_key, authority=authority or previous.authority,
            members=tuple(sorted(members, key=lambda m: m.site)), change=change,
        )  # fmt: skip
    except ValidationError as error:
        raise SealingError(_reasons(error), where=f"roster of {previous.federation}") from None
    check_step(roster, previous)
    return roster


def first_roster(
    federation: str, coordinator_key: str, authority: str, members: Iterable[RosterMember], version: int = 1
) -> Roster:
    """The version that founds a federation.

    Raises:
        SealingError: Two of its members are one, or look like it.
    """
    ordered = tuple(sorted(members, key=lambda m: m.site))
    try:
        return Roster(
            federation=federation, version=version, previous=NOTHING, coordinator_key=coordinator_key,
            authority=authority, members=ordered, change=Change(kind="found", sites=tuple(m.site for m in ordered)),
        )  # fmt: skip
    except ValidationError as error:
        raise SealingError(_reasons(error), where=f"roster of {federation}") from None


def sign_roster(roster: Roster, identity: Identity) -> dict[str, str]:
    """A signature over everything that the version says, by public key."""
    return {identity.public_key.hex(): identity.sign(_signed(roster)).hex()}


def required_keys(roster: Roster, previous: Roster | None) -> dict[str, str]:
    """Every key that must sign a version, with whose it is (invariant 3)."""
    excused = roster.change.sites if roster.change.kind in ("remove", "replace") else ()
    before = {m.signing_key: m.site for m in previous.members if m.site not in excused} if previous else {}
    now = {m.signing_key: m.site for m in roster.members}
    return {roster.coordinator_key: COORDINATOR, **before, **now}


def given_up_keys(chain: Sequence[SignedRoster], site: str) -> tuple[bytes, ...]:
    """The signing keys that a member has changed from, the newest first, as far back as each one has signed the change:
    a key that was lost, and whatever was signed with it, may be anybody's."""
    found = []
    for newer, older in zip(reversed(chain), list(reversed(chain))[1:], strict=False):
        now, before, change = newer.roster.member(site), older.roster.member(site), newer.roster.change
        if now is None or before is None or (site in change.sites and change.kind != "rotate"):
            break
        if now.signing_key != before.signing_key:
            found.append(bytes.fromhex(before.signing_key))
    return tuple(found)


def verify_chain(chain: Sequence[SignedRoster], *, proposal: bool = False) -> None:
    """Check a federation's whole past.

    Args:
        chain: All versions, the first one first.
        proposal: May the last one lack signatures of members? (The coordinator's is never missing.)

    Raises:
        SealingError: Says which version breaks which rule.
    """
    if not 1 <= len(chain) <= _MOST_VERSIONS:
        raise SealingError("a chain of rosters has a first version", where="roster")
    # Whether a chain holds is a function of its content: the sites of a simulation all ask about the same one.
    content = digest("chain", *(part for signed in chain for part in signed.content), bytes([proposal]))
    if content in _HELD:
        return
    _verify(chain, proposal)
    _HELD[content] = None
    if len(_HELD) > _MOST_HELD:
        _HELD.pop(next(iter(_HELD)))


def _verify(chain: Sequence[SignedRoster], proposal: bool) -> None:
    previous: Roster | None = None
    gone: set[str] = set()
    for signed in chain:
        roster = signed.roster
        check_step(roster, previous)
        if back := gone & {key for m in roster.members for key in m.keys}:
            raise SealingError(f"a key that left the federation is back ({min(back)[:16]}…)", where=roster.where)
        _check_signatures(signed, previous, complete=not (proposal and signed is chain[-1]))
        if previous is not None:
            gone |= {k for m in previous.members for k in m.keys} - {k for m in roster.members for k in m.keys}
        previous = roster


def check_step(roster: Roster, previous: Roster | None) -> None:
    """Invariants 1 and 2: does a version follow from the one before it?

    Raises:
        SealingError: It does not.
    """
    if previous is None:
        if roster.previous != NOTHING or roster.change != Change(kind="found", sites=_names(roster)):
            raise SealingError("a chain starts with the version that founds the federation", where=roster.where)
        return
    same = ("federation", "coordinator_key")
    for name in same:
        if getattr(roster, name) != getattr(previous, name):
            raise SealingError(f"has another {name.replace('_', ' ')} than the version before", where=roster.where)
    if roster.version <= previous.version:
        raise SealingError(f"does not come after version {previous.version}", where=roster.where)
    if roster.previous != previous.digest:
        raise SealingError(f"does not follow from version {previous.version} as it is known here", where=roster.where)
    if not _is_change(roster, previous):
        raise SealingError(f"changes something else than it says ({roster.change.kind} "
                           f"{', '.join(roster.change.sites) or 'authority'})", where=roster.where)  # fmt: skip


def _is_change(roster: Roster, previous: Roster) -> bool:
    """Is the stated change the difference, all of it and nothing else?"""
    old, new = {m.site: m for m in previous.members}, {m.site: m for m in roster.members}
    sites, kind = roster.change.sites, roster.change.kind
    stay = {s for s in old if s in new}
    touched = {s for s in stay if old[s] != new[s]}
    added, removed = tuple(sorted(new.keys() - old.keys())), tuple(sorted(old.keys() - new.keys()))
    if (roster.authority != previous.authority) != (kind == "authority"):
        return False
    if kind == "authority":
        return not sites and not (added or removed or touched)
    if kind == "add":
        return bool(added) and sites == added and not removed and not touched
    if kind == "remove":
        return len(removed) == 1 and sites == removed and not added and not touched
    if kind not in ("rotate", "replace") or added or removed or len(touched) != 1 or sites != tuple(touched):
        return False
    was, is_ = old[sites[0]], new[sites[0]]
    return was.population == is_.population and not set(was.keys) & set(is_.keys)


def _check_signatures(signed: SignedRoster, previous: Roster | None, *, complete: bool) -> None:
    roster, required = signed.roster, required_keys(signed.roster, previous)
    message = _signed(roster)
    for key, signature in signed.signatures.items():
        if key not in required:
            raise SealingError("is signed by a key that has no say in it", where=roster.where)
        if not verify_signature(bytes.fromhex(key), bytes.fromhex(signature), message):
            raise SealingError(f"the signature of {required[key]} does not hold", where=roster.where)
    missing = signed.missing(previous)
    if roster.coordinator_key in missing:
        raise SealingError("is not signed by the coordinator", where=roster.where)
    if complete and missing:
        raise SealingError(f"is not signed by {', '.join(sorted(set(missing.values())))}", where=roster.where,
                           hint="a version counts when every member has confirmed it")  # fmt: skip


def _reasons(error: ValidationError) -> str:
    return "; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())


def _names(roster: Roster) -> tuple[str, ...]:
    return tuple(m.site for m in roster.members)


def _signed(roster: Roster) -> bytes:
    return framed((_DOMAIN, bytes.fromhex(roster.digest)))
