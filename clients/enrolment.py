"""How a site comes into a federation, stays in it, and changes its keys: the steps that its operator takes, one a
function, over the site's folder. What is checked in them is said in `confide.protocol.standing`."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from confide.clients.membership import KEYS, MEMBERSHIP, NEXT_KEYS, Membership, SiteKeys
from confide.config.site import load_site, site_template
from confide.errors import ConfideError, ConfigError, PolicyError, SealingError, StorageError
from confide.privacy.consent import Registry, SiteKey
from confide.privacy.files import write_atomically
from confide.protocol.fingerprint import same_fingerprint
from confide.protocol.identity import Identity
from confide.protocol.keyfiles import SiteKeyBox, encrypt_key
from confide.protocol.provisioning import (
    Kit,
    Request,
    SignedKit,
    check_kit,
    read_document,
    sign_request,
    write_document,
)
from confide.protocol.roster import Roster
from confide.protocol.standing import Standing

__all__ = [
    "AUTHORITY",
    "CONFIG",
    "REQUEST",
    "Confirmation",
    "Outcome",
    "change_keys",
    "encrypt_keys",
    "make_site",
    "site_keys",
]

CONFIG, REQUEST, AUTHORITY = "site.toml", "request.json", "ca.crt"
_OLD_KEYS = "keys.old"
_SITE_KEY, _CONSENT = "site.key", "consent.db"


def make_site(folder: Path, name: str, federation: str, population: int, passphrase: str | None = None) -> Path:
    """Make a site's keys, its empty consent registry, a `site.toml` that allows nothing, and its request.

    Args:
        folder: Must not hold a site yet.
        name: As the federation shall know it.
        federation: Its name.
        population: Declared number of subjects: a public constant, not a count of the data.
        passphrase: Encrypts the signing, exchange and node keys, and the site key.

    Returns:
        The request, which goes to the coordinator.

    Raises:
        ConfigError: There is a site already, or the names are no names.
        StorageError: It cannot be written.
    """
    held = next((p for p in (MEMBERSHIP, KEYS, CONFIG) if (folder / p).exists()), None)
    if held is not None:
        raise ConfigError(f"holds a site already ({held})", where=str(folder),
                          hint="choose another folder; a site that has lost its keys makes a new folder")  # fmt: skip
    try:
        keys = SiteKeys.generate(Identity.generate(name))
        request = Request(federation=federation, member=keys.member(population))
        first = Standing(federation=federation, me=request.member)
    except ValidationError as error:
        wrong = str(error.errors()[0]["loc"][-1])
        option = {"site": "--name", "federation": "--federation", "population": "--population"}.get(wrong, wrong)
        raise ConfigError("is not allowed", where=option,
                          hint="names: ASCII letters, digits, dots, dashes, at most 64; population: 1 or more"
                          ) from None  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        keys.save(folder / KEYS, passphrase)
        Membership(folder / MEMBERSHIP, first)
        Registry(folder / _CONSENT, SiteKey.load_or_create(folder / _SITE_KEY, box=SiteKeyBox(passphrase))).close()
        write_document(folder / REQUEST, sign_request(request, keys.identity))
        write_atomically(folder / CONFIG, site_template(name, federation, population).encode())
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(folder)) from None
    return folder / REQUEST


def site_keys(folder: Path, passphrase: str | None = None) -> SiteKeys:
    """The keys under which a site stands in its roster. Where a change of keys was cut short, it is completed.

    Raises:
        ConfigError: They are missing, or not those of the roster.
        SealingError: A wrong passphrase.
    """
    me = Membership(folder / MEMBERSHIP).standing.me
    keys = SiteKeys.load(folder / KEYS, me.site, passphrase)
    if keys.member(me.population) == me:
        return keys
    if (folder / NEXT_KEYS).is_dir():
        keys = SiteKeys.load(folder / NEXT_KEYS, me.site, passphrase)
        if keys.member(me.population) == me:
            shutil.rmtree(folder / _OLD_KEYS, ignore_errors=True)
            os.replace(folder / KEYS, folder / _OLD_KEYS)
            os.replace(folder / NEXT_KEYS, folder / KEYS)
            return keys
    raise ConfigError("are not the keys under which this site stands in its roster", where=str(folder / KEYS),
                      hint="restore them from the newest backup of the whole folder")  # fmt: skip


def encrypt_keys(folder: Path, passphrase: str) -> list[str]:
    """Put every private key of a site that lies in the clear under a passphrase; their names.

    Raises:
        ConfigError: There is no site, or a key is under another passphrase.
        SealingError: The same.
        StorageError: One cannot be written; those before it are done, and doing it again does the rest.
    """
    config = load_site(folder / CONFIG)
    site_keys(folder, passphrase)
    site = folder / config.folders.site_key
    SiteKey.load_or_create(site, box=SiteKeyBox(passphrase))
    found = [p for part in (KEYS, NEXT_KEYS, _OLD_KEYS) for p in sorted((folder / part).glob("*.key"))]
    done = [path for path in found if encrypt_key(path, passphrase)]
    done += [site] if encrypt_key(site, passphrase, _SITE_KEY) else []
    return [str(path.relative_to(folder)) for path in done]


def change_keys(folder: Path, passphrase: str | None = None) -> Path:
    """Make new keys beside the present ones, which stay in force until everybody has confirmed the new ones.

    Returns:
        The request, signed under both.

    Raises:
        PolicyError: The site is in no roster yet.
        ConfigError: The present keys cannot be read.
    """
    membership = Membership(folder / MEMBERSHIP)
    standing = membership.standing
    if standing.roster is None:
        raise PolicyError("is in no roster yet, so there is nothing to change", where=str(folder))
    old = site_keys(folder, passphrase)
    shutil.rmtree(folder / NEXT_KEYS, ignore_errors=True)
    new = SiteKeys.generate(Identity.generate(standing.me.site))
    new.save(folder / NEXT_KEYS, passphrase)
    member = new.member(standing.me.population)
    membership.change_to(member)
    request = Request(federation=standing.federation, member=member, replaces=old.identity.public_key.hex())
    write_document(folder / REQUEST, sign_request(request, new.identity, old.identity))
    return folder / REQUEST


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a confirmation came to.

    Attributes:
        state: `countersigned`: a file is to go back to the coordinator. `accepted`: the version holds here.
        roster: The version.
        file: The countersignature.
        missing: Who has not signed yet.
        to_write: Lines that the operator has to put into an edited `site.toml`.
    """

    state: str
    roster: Roster
    file: Path | None = None
    missing: tuple[str, ...] = ()
    to_write: tuple[str, ...] = field(default=())


class Confirmation:
    """A kit, looked at by a site before its operator says anything.

    Args:
        folder: The site's.
        kit: The file that the coordinator handed over.

    Raises:
        SealingError: It is not authentic, another site's, older than what is accepted, or a fork.
    """

    def __init__(self, folder: Path, kit: Path) -> None:
        self._folder, self._membership = folder, Membership(folder / MEMBERSHIP)
        standing = self._membership.standing
        self.kit: Kit = check_kit(read_document(kit, SignedKit))
        if self.kit.site != standing.me.site:
            raise SealingError(f"is for site {self.kit.site}, this is {standing.me.site}", where=str(kit))
        self.roster: Roster = self._membership.review(self.kit.chain)
        self._known = standing.roster
        #: Is there nothing left to be signed by anybody?
        self.complete = not self.kit.missing
        #: Must the operator compare fingerprints? Not for the very version that was compared before.
        self.compare = not self.complete or standing.promised_digest != self.roster.digest

    @property
    def call(self) -> tuple[str, ...]:
        """Whose operators must have read the fingerprint from their own kits: everybody whose keys are new to this
        site. Their software has checked that their own keys are the right ones; nobody else's can."""
        known = {m for m in self._known.members} if self._known is not None else set()
        new = {m.site for m in self.roster.members if m not in known} - {self.kit.site}
        return tuple(sorted(new or {m.site for m in self.roster.members} - {self.kit.site}))

    def confirm(self, typed: str | None, passphrase: str | None = None) -> Outcome:
        """Sign the version or, where it is complete, take it for the one that holds.

        Args:
            typed: The fingerprint that the operator was told by the others.
            passphrase: Of the site's keys.

        Raises:
            SealingError: It is another version's fingerprint.
            ConfigError: There is none, or the keys cannot be read.
        """
        if self.compare:
            if not typed:
                raise ConfigError("is missing", where="--fingerprint", hint=f"call {', '.join(self.call)}")
            if not same_fingerprint(typed, self.roster):
                raise SealingError(
                    "this is not the fingerprint of the version in this kit", where=self.roster.where,
                    hint="if it was typed as it was told, the coordinator shows different rosters to different sites: "
                    "do not confirm",
                )  # fmt: skip
        if self.complete:
            self._membership.accept(self.kit.chain)
            site_keys(self._folder, passphrase)
            return Outcome("accepted", self.roster, to_write=self._connect())
        new = self._folder / NEXT_KEYS
        name = self.kit.site
        signed = self._membership.countersign(
            self.kit.chain, site_keys(self._folder, passphrase),
            SiteKeys.load(new, name, passphrase) if new.is_dir() else None,
        )  # fmt: skip
        file = self._folder / f"countersignature-{self.roster.version}.json"
        write_document(file, signed)
        missing = {who for key, who in self.kit.missing.items() if key not in signed.signatures}
        return Outcome("countersigned", self.roster, file, tuple(sorted(missing)))

    def _connect(self) -> tuple[str, ...]:
        """Note down how to reach the coordinator; in a file that the operator has edited, say what to write."""
        me, kit, path = self._membership.standing.me, self.kit, self._folder / CONFIG
        if kit.certificate:
            write_atomically(self._folder / AUTHORITY, kit.certificate.encode())
        names = me.site, self.roster.federation, me.population
        filled = site_template(*names, endpoint=kit.endpoint, coordinator_key=self.roster.coordinator_key)
        if not path.exists() or path.read_text() == site_template(*names):
            write_atomically(path, filled.encode())
            return ()
        try:
            config = load_site(path)
            held = config.endpoint, config.policy.coordinator_key
        except ConfideError:
            held = None, None
        wanted = (("endpoint", kit.endpoint), ("[policy] coordinator_key", self.roster.coordinator_key))
        return tuple(f'{key} = "{value}"' for (key, value), has in zip(wanted, held, strict=True) if value != has)
