"""The chain of rosters beside exported logs (`roster.json`): whose keys the logs' are, for a stranger to check.

A manifest names members and keys, and whoever writes a manifest can invent them. The chain cannot be invented: each
version is signed by every member of the version before it and by every new key (`confide.protocol.roster`). What it
cannot show is that these keys are those people's: for that, somebody compares the version's fingerprint with a site's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from confide.errors import AuditError, SealingError, StorageError
from confide.privacy.audit.evidence import COORDINATOR, ROSTER, Evidence, Finding, PartyLog
from confide.privacy.files import write_atomically
from confide.protocol.roster import Roster, SignedRoster, verify_chain

__all__ = ["ROSTERS", "RosterBook", "add_rosters", "write_rosters"]

#: The file's name, beside the logs.
ROSTERS = "roster.json"
_MOST_BYTES = 64 * 2**20


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int = Field(default=1, ge=1, le=1)
    chain: tuple[SignedRoster, ...] = Field(min_length=1, max_length=10_000)


def write_rosters(logs: Path, chain: Sequence[SignedRoster]) -> Path:
    """Write a chain of complete versions into a folder of logs, in the place of whatever is there.

    Raises:
        StorageError: It cannot be written.
    """
    path = logs / ROSTERS
    try:
        write_atomically(path, _Document(chain=tuple(chain)).model_dump_json(indent=1).encode() + b"\n")
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(path)) from None
    return path


def add_rosters(logs: Path, chain: Sequence[SignedRoster]) -> Path:
    """The same where others may have put their chain already: the longer one stays, if it goes on from the shorter.

    Raises:
        AuditError: They are two histories: somebody was shown another roster.
        StorageError: It cannot be written.
    """
    path = logs / ROSTERS
    if path.is_file():
        there, mine = RosterBook.read(logs), [signed.roster.digest for signed in chain]
        held = [signed.roster.digest for signed in there.chain]
        if there.problem is None and held[: len(mine)] == mine:
            return path
        if there.problem is None and mine[: len(held)] != held:
            raise AuditError(
                "is another history of the federation's roster than the one known here", where=str(path),
                hint="compare fingerprints (confide federation show); somebody was shown another roster",
            )  # fmt: skip
    return write_rosters(logs, chain)


class RosterBook:
    """What lies beside the logs. Nothing of it is believed where anything of it does not hold.

    Args:
        chain: All versions, the first one first; empty where they do not hold.
        problem: What is wrong with the file; None: its signatures hold.
    """

    def __init__(self, chain: Sequence[SignedRoster], problem: str | None = None) -> None:
        self.chain, self.problem = tuple(chain), problem

    @classmethod
    def read(cls, folder: Path) -> RosterBook:
        """From a run's output folder, or a folder of exported logs."""
        path = (folder / "logs" if (folder / "logs").is_dir() else folder) / ROSTERS
        try:
            if path.stat().st_size > _MOST_BYTES:
                return cls((), "is larger than any honest one")
            chain = _Document.model_validate_json(path.read_bytes()).chain
            verify_chain(chain)
        except FileNotFoundError:
            return cls((), f"is missing ({ROSTERS}): nothing shows whose keys these are")
        except OSError as error:
            return cls((), f"cannot be read ({error.strerror})")
        except ValidationError as error:
            first: Any = error.errors()[0]
            return cls((), f"is not one ({first['msg'].removeprefix('Value error, ')})")
        except SealingError as error:
            return cls((), f"does not hold: {error.where} {error.what}")
        return cls(chain)

    @property
    def latest(self) -> Roster | None:
        """The newest version."""
        return self.chain[-1].roster if self.chain else None

    def keys(self, party: str) -> tuple[bytes, ...]:
        """Every signing key that a party has had, the newest first."""
        found: dict[str, None] = {}
        for signed in reversed(self.chain):
            member = signed.roster.member(party)
            key = signed.roster.coordinator_key if party == COORDINATOR else member.signing_key if member else None
            if key is not None:
                found.setdefault(key)
        return tuple(bytes.fromhex(key) for key in found)

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """Is the run one of this federation's, and is every log signed by whom it is said to be?"""
        if self.problem is not None:
            yield Finding(ROSTER, None, self.problem)
            return
        yield from self._members(evidence.manifest)
        yield from self._signer(evidence.coordinator, COORDINATOR)
        for site, log in evidence.sites.items():
            yield from self._signer(log, site)

    def _members(self, manifest: dict[str, Any]) -> Iterator[Finding]:
        versions = {(signed.roster.version, signed.roster.digest): signed.roster for signed in self.chain}
        roster = versions.get((manifest.get("roster_version"), manifest.get("roster")))  # type: ignore[arg-type]
        if roster is None:
            yield Finding(ROSTER, None, f"holds no version {json.dumps(manifest.get('roster_version'))} as the run's "
                          "manifest names it")  # fmt: skip
            return
        if (manifest["federation"], manifest["coordinator_key"]) != (roster.federation, roster.coordinator_key):
            yield Finding(ROSTER, None, "is of another federation or coordinator than the run")
        for named in manifest["members"]:
            known = roster.member(named["site"])
            if known is None:
                yield Finding(str(named["site"]), None, f"stands in the manifest, not in the {roster.where}: a member "
                              "that nobody has confirmed")  # fmt: skip
            elif (known.signing_key, known.population) != (named["public_key"], named["population"]):
                yield Finding(known.site, None, f"stands in the {roster.where} with another key or population")

    def _signer(self, log: PartyLog, party: str) -> Iterator[Finding]:
        keys = self.keys(party)
        if log.public_key and log.public_key not in keys:
            yield Finding(log.party, None, "is signed by a key that stands in no version of the roster")
        elif log.public_key and log.public_key != keys[0]:
            yield Finding(log.party, None, "is signed by a key that was given up since: export it again", "low")
