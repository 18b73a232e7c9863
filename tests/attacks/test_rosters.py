"""A coordinator that tampers with the roster: what honest sites sign, accept, join. Every attack has its control."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from confide.clients.enrolment import Confirmation, make_site
from confide.clients.membership import MEMBERSHIP, Membership, SiteKeys
from confide.errors import ConfigError, PolicyError, SealingError
from confide.privacy.audit import records as audit
from confide.protocol.fingerprint import fingerprint
from confide.protocol.identity import Identity
from confide.protocol.manifest import Manifest
from confide.protocol.provisioning import Kit, SignedRequest, read_document, sign_kit, write_document
from confide.protocol.roster import NO_AUTHORITY, Roster, SignedRoster, first_roster
from confide.protocol.standing import Standing
from tests.attacks.federation import Federation, is_refusal, open_federation, refusal_of
from tests.cli.command import confide
from tests.rosters import FEDERATION, POPULATION, Cast, Chain

NAMES = ("ash", "birch", "cedar")


def refused_by_all(cast: Cast, chain: Chain, match: str) -> None:
    """No honest site accepts it."""
    for name in NAMES:
        with pytest.raises(SealingError, match=match):
            cast.sites[name].accept(chain)


def test_a_coordinator_that_adds_a_site_of_its_own_is_refused_by_every_honest_site() -> None:
    cast = Cast(*NAMES, "sybil")
    chain = cast.founded(*NAMES)
    roster = cast.adding(chain, "sybil")
    refused_by_all(cast, (*chain, cast.signed(roster, "sybil")), "is not signed by ash, birch, cedar")
    for honest in NAMES:
        others = [n for n in NAMES if n != honest]
        refused_by_all(cast, (*chain, cast.signed(roster, "sybil", *others)), f"is not signed by {honest}")
    cast.confirmed(chain, roster, *NAMES, "sybil")
    assert all(cast.sites[n].standing.roster == roster for n in NAMES), "the control: they confirm it"


def test_an_older_version_is_refused_for_ever(tmp_path: Path) -> None:
    cast = Cast(*NAMES, "doum")
    path = tmp_path / MEMBERSHIP
    cast.sites["ash"] = Membership(path, cast.sites["ash"].standing)
    old = cast.founded(*NAMES)
    new = cast.confirmed(old, cast.adding(old, "doum"), *NAMES, "doum")
    for site in (cast.sites["ash"], Membership(path)):
        with pytest.raises(SealingError, match="is older than version 2"):
            site.accept(old)
        site.accept(new)
    assert Membership(path).standing.roster == new[-1].roster, "the control: also over a restart, the newest holds"


def test_of_two_versions_of_one_number_a_site_signs_one() -> None:
    cast = Cast(*NAMES, "doum", "elm")
    chain = cast.founded(*NAMES)
    one, two = (cast.signed(cast.adding(chain, new), new) for new in ("doum", "elm"))
    site, keys = cast.sites["ash"], cast.keys["ash"]
    first = site.countersign((*chain, one), keys)
    with pytest.raises(SealingError, match="showed two versions"):
        site.countersign((*chain, two), keys)
    assert site.countersign((*chain, one), keys) == first, "the control: the same one may be signed again"


def test_a_fork_that_all_the_others_have_signed_is_refused_by_who_accepted_the_other() -> None:
    cast = Cast(*NAMES, "doum", "elm")
    chain = cast.founded(*NAMES)
    cast.confirmed(chain, cast.adding(chain, "doum"), *NAMES, "doum")
    fork = cast.signed(cast.adding(chain, "elm", version=3), *NAMES, "elm")  # stolen signatures, say
    refused_by_all(cast, (*chain, fork), "is a fork")
    fresh = Cast(*NAMES)
    fresh.keys, fresh.coordinator = cast.keys, cast.coordinator
    fresh.sites = {n: Membership(None, Standing(federation=FEDERATION, me=cast.member(n))) for n in NAMES}
    fresh.sites["ash"].accept((*chain, fork))
    assert fresh.sites["ash"].standing.roster == fork.roster, "the control: who remembers nothing is deceived"


def test_a_proposal_that_was_given_up_is_never_accepted() -> None:
    cast = Cast(*NAMES, "doum", "elm")
    chain = cast.founded(*NAMES)
    given_up = cast.signed(cast.adding(chain, "doum"), *NAMES, "doum")
    for name in NAMES:
        cast.sites[name].countersign((*chain, given_up), cast.keys[name])
    cast.sites["cedar"].accept((*chain, given_up))  # the control: until then it would have counted
    later = cast.signed(cast.adding(chain, "elm", version=3), "elm")
    for name in ("ash", "birch"):
        cast.sites[name].countersign((*chain, later), cast.keys[name])
        with pytest.raises(SealingError, match="was given up here"):
            cast.sites[name].accept((*chain, given_up))
    with pytest.raises(SealingError, match="is a fork"):
        cast.sites["cedar"].countersign((*chain, later), cast.keys["cedar"])


def exchanged(chain: Chain, name: str, keys: SiteKeys) -> list[Any]:
    """The members, one of them under other keys."""
    return [*(m for m in chain[-1].roster.members if m.site != name), keys.member(POPULATION)]


def test_a_members_keys_do_not_change_without_its_old_key() -> None:
    cast = Cast(*NAMES)
    chain, new = cast.founded(), SiteKeys.generate(Identity.generate("cedar"))
    roster = cast.next(chain, "rotate", "cedar", members=exchanged(chain, "cedar", new))
    stolen = (*chain, cast.signed(roster, "ash", "birch", others=[new.identity]))
    for name in ("ash", "birch"):
        with pytest.raises(SealingError, match="is not signed by cedar"):
            cast.sites[name].accept(stolen)
        cast.sites[name].accept((*chain, cast.signed(roster, *NAMES, others=[new.identity])))  # the control
    with pytest.raises(SealingError, match="other keys"):
        cast.sites["cedar"].countersign(stolen, cast.keys["cedar"])


def test_new_keys_after_a_loss_need_everybody_else() -> None:
    cast = Cast(*NAMES)
    chain, new = cast.founded(), SiteKeys.generate(Identity.generate("cedar"))
    roster = cast.next(chain, "replace", "cedar", members=exchanged(chain, "cedar", new))
    for signers in (("ash",), ("birch",), ()):
        with pytest.raises(SealingError, match="is not signed by"):
            cast.sites["ash"].accept((*chain, cast.signed(roster, *signers, others=[new.identity])))
    with pytest.raises(SealingError, match="is not signed by cedar"):
        cast.sites["ash"].accept((*chain, cast.signed(roster, "ash", "birch")))
    cast.sites["ash"].accept((*chain, cast.signed(roster, "ash", "birch", others=[new.identity])))  # the control


def test_nobody_is_put_out_together_with_another_change() -> None:
    """Otherwise the word of one operator would be enough to exchange everybody else."""
    cast = Cast(*NAMES, "sybil")
    chain = cast.founded(*NAMES)
    ash = cast.member("ash")
    for kind, sites, members in (
        ("remove", ("birch", "cedar"), [ash]),
        ("remove", ("birch",), [ash, cast.member("cedar"), cast.member("sybil")]),
        ("remove", ("birch",), [ash, SiteKeys.generate(Identity.generate("cedar")).member(POPULATION)]),
    ):
        with pytest.raises(SealingError, match="changes something else"):
            cast.next(chain, kind, *sites, members=members)
    assert cast.next(chain, "remove", "birch", members=[ash, cast.member("cedar")]), "the control"


@pytest.mark.parametrize("kind", ["add", "rotate", "replace", "remove"])
def test_no_change_edits_a_population(kind: str) -> None:
    cast = Cast(*NAMES, "doum")
    chain = cast.founded(*NAMES)
    edited = [m.model_copy(update={"population": 900}) if m.site == "ash" else m for m in chain[-1].roster.members]
    extra = [cast.member("doum")] if kind == "add" else []
    site = "doum" if kind == "add" else "ash"
    with pytest.raises(SealingError, match="changes something else"):
        cast.next(chain, kind, site, members=[*edited, *extra])


def test_a_roster_of_another_federation_is_refused() -> None:
    cast = Cast(*NAMES)
    key = cast.coordinator.public_key.hex()
    other = first_roster("lung", key, NO_AUTHORITY, [cast.member(n) for n in NAMES])
    with pytest.raises(SealingError, match="is not of heart"):
        cast.sites["ash"].countersign((cast.signed(other),), cast.keys["ash"])
    with pytest.raises(SealingError, match="is not of heart"):
        cast.sites["ash"].accept((cast.signed(other, *NAMES),))
    cast.founded()  # the control


def test_a_founding_roster_with_a_forged_neighbour_has_another_fingerprint() -> None:
    """The coordinator in the middle: each half of the members is shown the other half under invented keys."""
    cast = Cast(*NAMES)
    key, invented = cast.coordinator.public_key.hex(), Cast(*NAMES)
    shown = {}
    for me in NAMES:
        members = [cast.member(n) if n == me else invented.member(n) for n in NAMES]
        roster = first_roster(FEDERATION, key, NO_AUTHORITY, members)
        signed = cast.signed(roster, others=[invented.keys[n].identity for n in NAMES if n != me])
        given = cast.sites[me].countersign((signed,), cast.keys[me])
        cast.sites[me].accept((signed.with_signatures(given.signatures),))  # software alone is deceived
        shown[me] = fingerprint(roster)
    assert len(set(shown.values())) == len(NAMES), "and people are not: no two of them read the same"
    honest = Cast(*NAMES)
    honest.founded()
    read = {fingerprint(s.standing.accepted[-1].roster) for s in honest.sites.values()}
    assert len(read) == 1, "the control"


# --- with files, as operators meet it ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A new site's folder."""
    make_site(tmp_path / "ash", "ash", FEDERATION, POPULATION)
    return tmp_path / "ash"


def kit_with(folder: Path, cast: Cast, roster: Roster, *, site: str = "ash") -> Path:
    """A kit for the site, signed by the coordinator."""
    kit = Kit(site=site, endpoint="localhost:1", certificate="", chain=(cast.signed(roster),))
    path = folder.parent / f"{site}-{roster.digest[:8]}.json"
    write_document(path, sign_kit(kit, cast.coordinator))
    return path


def test_a_kit_with_forged_keys_of_this_site_shows_no_fingerprint_that_it_could_read_to_others(folder: Path) -> None:
    """Whoever adds a site listens to that site's operator: he must never read out what deceives them both."""
    cast = Cast("ash", "birch")  # invented keys in ash's name
    asked = read_document(folder / "request.json", SignedRequest).request.member
    key = cast.coordinator.public_key.hex()
    forged = kit_with(folder, cast, cast.first())
    honest = kit_with(folder, cast, first_roster(FEDERATION, key, NO_AUTHORITY, [asked, cast.member("birch")]))
    for arguments in ((forged,), (folder, "--kit", forged)):
        shown = confide("federation", "show", *arguments, "--json")
        assert not shown.last_line.get("fingerprint")
    refused = confide("federation", "show", folder, "--kit", forged)
    assert refused.code == 6
    assert "other keys" in refused.err
    assert confide("federation", "show", folder, "--kit", honest, "--json").last_line["fingerprint"], "the control"


def test_another_fingerprint_than_the_kits_signs_nothing(folder: Path) -> None:
    cast = Cast("birch")
    asked = read_document(folder / "request.json", SignedRequest).request.member
    key = cast.coordinator.public_key.hex()
    roster = first_roster(FEDERATION, key, NO_AUTHORITY, [asked, cast.member("birch")])
    looked = Confirmation(folder, kit_with(folder, cast, roster))
    for typed, error in (("0" * 60, SealingError), (None, ConfigError), ("", ConfigError)):
        with pytest.raises(error):
            looked.confirm(typed)
    assert Membership(folder / MEMBERSHIP).standing.promised == 0
    assert looked.confirm(fingerprint(roster)).state == "countersigned", "the control"


def test_a_kit_that_somebody_else_signed_or_for_somebody_else_is_refused(folder: Path) -> None:
    cast = Cast("birch")
    asked = read_document(folder / "request.json", SignedRequest).request.member
    roster = first_roster(FEDERATION, cast.coordinator.public_key.hex(), NO_AUTHORITY, [asked, cast.member("birch")])
    path = kit_with(folder, cast, roster)
    Confirmation(folder, path)  # the control
    text = path.read_text()
    for changed in (text.replace("localhost:1", "evil.example:1"), text.replace('"site": "ash"', '"site": "birch"', 1)):
        assert changed != text
        path.write_text(changed)
        with pytest.raises(SealingError, match="not signed by the coordinator"):
            Confirmation(folder, path)
    with pytest.raises(SealingError, match="is for site birch"):
        Confirmation(folder, kit_with(folder, cast, roster, site="birch"))


def test_an_edited_memory_is_not_believed(tmp_path: Path) -> None:
    cast = Cast(*NAMES)
    chain = cast.founded()
    path = tmp_path / MEMBERSHIP
    standing = cast.sites["ash"].standing
    Membership(path, standing)
    assert Membership(path).standing.roster == chain[-1].roster, "the control"
    stripped = SignedRoster(roster=chain[0].roster, signatures=dict(list(chain[0].signatures.items())[:2]))
    path.write_text(standing.model_copy(update={"accepted": (stripped,)}).model_dump_json())
    with pytest.raises(SealingError, match="is not signed by"):
        _ = Membership(path).standing


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    """Sites that have not joined yet."""
    with open_federation(tmp_path / "f") as made:
        yield made


def changed(manifest: Manifest, **fields: Any) -> Manifest:
    return manifest.model_copy(update={"run": "other"} | fields)


def test_a_run_under_another_roster_than_the_accepted_one_is_refused(federation: Federation) -> None:
    honest = federation.manifest
    first = honest.members[1]
    attacks = {
        "an older version": {"roster_version": 0},
        "a later version": {"roster_version": 2},
        "another of this number": {"roster": "ab" * 32},
        "an edited population": {
            "members": tuple(m.model_copy(update={"population": 41}) if m == first else m for m in honest.members)
        },
        "another key": {
            "members": tuple(
                m.model_copy(update={"public_key": "cd" * 32}) if m == first else m for m in honest.members
            )
        },
    }
    for what, fields in attacks.items():
        answer = federation.join(["ash"], changed(honest, **fields))["ash"]
        assert "roster" in refusal_of(answer).reason, what
        assert isinstance(federation.sites["ash"].last_refusal, PolicyError)
    subset = tuple(m for m in honest.members if m.site != "doum")
    for fields in ({}, {"members": subset}):
        made = honest.model_copy(update={"run": f"good-{len(fields)}", **fields})
        assert not is_refusal(federation.join(["ash"], made)["ash"]), "the control: all of the roster, or some"


def test_a_site_without_an_accepted_roster_joins_nothing(federation: Federation) -> None:
    member = federation.world.roster[-1].roster.member("ash")
    assert member is not None
    federation.sites["ash"]._membership = Membership(None, Standing(federation="simulation", me=member))
    answer = federation.join()
    assert "no roster has been accepted" in refusal_of(answer["ash"]).reason
    assert not is_refusal(answer["birch"]), "the control"


def test_a_sites_log_names_the_roster_under_which_it_joined(federation: Federation) -> None:
    federation.join()
    for site in federation.sites.values():
        entries = [e for e in site.log.entries() if isinstance(e, audit.Joined)]
        assert [e.roster for e in entries] == [federation.world.roster[-1].roster.digest]
