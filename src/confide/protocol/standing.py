"""What a site remembers of its federation's roster, and what it may sign or accept next. Pure: no I/O.

It is a promise in two steps, as in any agreement with a coordinator that cannot be trusted. `promise`: the site signs a
proposal and, by that, gives up every lower number. `accept`: the version is complete. The state is made durable
before a signature leaves (`confide.clients.membership`); see invariants 5 and 6 of `confide.protocol.roster`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from confide.errors import PolicyError, SealingError
from confide.protocol.roster import FederationName, Roster, RosterMember, SignedRoster, verify_chain

if TYPE_CHECKING:
    from confide.protocol.manifest import Manifest

__all__ = ["Standing"]

#: Rosters and manifests, by their digests, where all members of the run stand in the roster.
_STAND: dict[tuple[str, str], None] = {}
_MOST_STAND = 64


class Standing(BaseModel):
    """A site's memory.

    Attributes:
        federation: The only federation that it belongs to.
        me: Its own entry: name, keys, population.
        next_me: Its entry under the keys that it is changing to.
        accepted: The chain up to the version that it has accepted; empty before the first.
        promised: The highest version number that it has signed; 0 before the first.
        promised_digest: That version's digest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    federation: FederationName
    me: RosterMember
    next_me: RosterMember | None = None
    accepted: tuple[SignedRoster, ...] = ()
    promised: Annotated[int, Field(ge=0)] = 0
    promised_digest: str = ""

    @property
    def roster(self) -> Roster | None:
        """The version that holds."""
        return self.accepted[-1].roster if self.accepted else None

    def review(self, chain: Sequence[SignedRoster]) -> Roster:
        """May the last version of a chain be signed here?

        Returns:
            It.

        Raises:
            SealingError: It may not: not authentic, older, a fork, somebody else's keys for this site.
        """
        verify_chain(chain, proposal=True)
        roster = chain[-1].roster
        self._about_me(roster)
        self._continues(chain)
        if roster.version < self.promised or (
            roster.version == self.promised and roster.digest != self.promised_digest
        ):
            raise SealingError(
                f"is not above version {self.promised}, which this site has signed", where=roster.where,
                hint="the coordinator showed two versions, or an old one: ask the other sites what they were shown",
            )  # fmt: skip
        return roster

    def promise(self, chain: Sequence[SignedRoster]) -> Standing:
        """The state in which the last version of a chain has been signed.

        Raises:
            SealingError: As `review`; or versions before it are complete and not accepted yet.
        """
        roster = self.review(chain)
        if self.roster is not None and self.roster.digest == roster.digest:
            return self  # signed and accepted before; the signature may be asked for again
        last = chain[-2].roster.digest if len(chain) > 1 else None
        if self.roster is not None and self.roster.digest != last:
            raise SealingError("follows a version that this site has not accepted", where=roster.where)
        return self.model_copy(update={"promised": roster.version, "promised_digest": roster.digest})

    def accept(self, chain: Sequence[SignedRoster]) -> Standing:
        """The state in which the last version of a chain holds.

        Raises:
            SealingError: It is not complete, older than what holds, a fork of it, or given up here.
        """
        verify_chain(chain)
        roster = chain[-1].roster
        self._about_me(roster)
        self._continues(chain)
        if roster.version < self.promised or (
            roster.version == self.promised and roster.digest != self.promised_digest
        ):
            raise SealingError(f"was given up here: this site has signed version {self.promised} since",
                               where=roster.where)  # fmt: skip
        mine = roster.member(self.me.site)
        changed = {"me": mine, "next_me": None} if mine == self.next_me else {}
        return self.model_copy(update={"accepted": tuple(chain), **changed})

    def admit(self, manifest: Manifest) -> None:
        """Is this run's roster the one that holds here, and are its members in it?

        Raises:
            PolicyError: They are not; the text names public things only.
        """
        roster, where = self.roster, f"roster of site {self.me.site}"
        if roster is None:
            raise PolicyError("no roster has been accepted here yet", where=where,
                              hint="confirm the roster with: confide site confirm")  # fmt: skip
        if (manifest.roster_version, manifest.roster) != (roster.version, roster.digest):
            raise PolicyError(
                f"the run was made for another roster than version {roster.version}, which this site has accepted",
                where=where, hint="bring the site's roster up to date, or start the run under the present one",
            )  # fmt: skip
        if (manifest.federation, manifest.coordinator_key) != (roster.federation, roster.coordinator_key):
            raise PolicyError("the roster is of another federation or coordinator", where=where)
        # Both digests are of the whole content, so that the answer follows from them: the sites of a simulation, each
        # of which asks, are answered together. Only that all of them stand there is remembered.
        both = (roster.digest, manifest.digest)
        if both in _STAND:
            return
        for member in manifest.members:
            known = roster.member(member.site)
            if known is None or (known.signing_key, known.population) != (member.public_key, member.population):
                raise PolicyError(f"{member.site[:64]} does not stand in the roster with this key and population",
                                  where=where)  # fmt: skip
        _STAND[both] = None
        if len(_STAND) > _MOST_STAND:
            _STAND.pop(next(iter(tuple(_STAND)), both), None)  # another thread may be doing the same

    def _about_me(self, roster: Roster) -> None:
        if roster.federation != self.federation:
            raise SealingError(f"is not of {self.federation}, this site's federation", where=roster.where)
        mine = roster.member(self.me.site)
        if mine is None:
            raise SealingError(f"does not hold this site ({self.me.site})", where=roster.where,
                               hint="a site that is removed is not asked")  # fmt: skip
        if mine != self.me and mine != self.next_me:
            raise SealingError("holds other keys or another population for this site than it has", where=roster.where,
                               hint="do not confirm it: somebody would speak in this site's name")  # fmt: skip

    def _continues(self, chain: Sequence[SignedRoster]) -> None:
        held = self.roster
        if held is None:
            return
        digests = {signed.roster.version: signed.roster.digest for signed in chain}
        last = chain[-1].roster
        if last.version < held.version:
            raise SealingError(f"is older than version {held.version}, which this site has accepted", where=last.where,
                               hint="ask the coordinator for the newest kit")  # fmt: skip
        if digests.get(held.version) != held.digest:
            raise SealingError(f"is a fork: its past is not version {held.version} as this site has accepted it",
                               where=last.where, hint="compare fingerprints with the other sites")  # fmt: skip
