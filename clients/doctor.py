"""Is a site ready? One finding a line, each with what to do. Reads only; what it says names and numbers no person.

How many consenting subjects there are is told against the policy's `min_subjects` only, as the site itself would act.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import math
import shutil
import socket
import ssl
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from confide.clients.assembly import SiteFolder, read_records
from confide.clients.data.records import SiteRecords
from confide.clients.data.source import read_source
from confide.clients.enrolment import AUTHORITY, CONFIG, site_keys
from confide.clients.membership import KEYS, MEMBERSHIP, Membership
from confide.clients.past import replies, shortest_wait
from confide.clients.policy import SitePolicy
from confide.clients.training.trainer import require_device
from confide.config import NumberFeature
from confide.config.site import REPLY_SECONDS
from confide.errors import (
    BudgetError,
    ConfideError,
    ConfigError,
    ConsentError,
    DataError,
    PeerError,
    PolicyError,
    StorageError,
)
from confide.privacy.consent import Registry, SiteKey, now_micros
from confide.privacy.consent.storage import holds_registry, shown_address
from confide.privacy.dp import Ledger, Role
from confide.protocol.keyfiles import is_encrypted, site_key
from confide.protocol.provisioning import certificate_digest

__all__ = ["Finding", "examine"]

_OTHERS = 0o077
_GIB = 2**30
_LITTLE, _TOO_LITTLE = 5 * _GIB, _GIB // 2
#: Share of a column's values outside its bounds from which the bounds look wrong.
_CLIPPED = 0.05
#: Flower refuses a node whose clock is further from the link's (seconds: ahead, behind).
_AHEAD, _BEHIND, _NOTICEABLE = 5.0, 300.0, 2.0
_CONNECT_SECONDS = 5.0
_NEARLY = 0.8
#: Replies that are looked at, and how many times a round's length a span hides most of it.
_REPLIES, _SPANS = 200, 3
#: Days before its end from which the coordinator's certificate is warned about.
_SERVER_DAYS = 30

State = Literal["ok", "warn", "fail"]
#: (state, what, what to do)
_Said = tuple[State, str, str]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look found.

    Attributes:
        check: What was looked at.
        state: `ok`, `warn`, `fail`.
        said: What is so.
        todo: What to do about it; empty where nothing.
        code: The exit code that goes with a failure; 0 otherwise.
    """

    check: str
    state: State
    said: str
    todo: str = ""
    code: int = 0


def examine(folder: Path, passphrase: str | None = None) -> Iterator[Finding]:
    """Every look, one after the other; a failure keeps none of the others from being made.

    Args:
        folder: The site's.
        passphrase: Of its keys.
    """
    try:
        place = SiteFolder.read(folder)
    except ConfideError as error:
        yield _failed("site.toml", error)
        return
    yield from _looked("policy", partial(_policy, place))
    yield from _looked("reply times", partial(_reply_times, place))
    yield from _looked("keys", partial(_keys, place, passphrase))
    yield from _looked("file modes", partial(_modes, place))
    yield from _looked("roster", partial(_roster, place))
    records = list[SiteRecords]()
    yield from _looked("data", partial(_data, place, records))
    for purpose in place.config.policy.purposes:
        yield from _looked(f"consent for {purpose}", partial(_consent, place, passphrase, purpose, records))
    if not place.config.policy.purposes:
        yield from _looked("consent registry", partial(_registry, place, passphrase))
    yield from _looked("ledger", partial(_ledger, place))
    yield from _looked("coordinator", partial(_coordinator, place))
    yield from _looked("device", partial(_device, place))
    yield from _looked("disk", partial(_disk, place))


def _looked(check: str, look: Callable[[], _Said]) -> Iterator[Finding]:
    try:
        state, said, todo = look()
    except ConfideError as error:
        yield _failed(check, error)
    else:
        yield Finding(check, state, said, todo)


def _failed(check: str, error: ConfideError) -> Finding:
    said = f"{error.where}: {error.what}" if error.where else error.what
    return Finding(check, "fail", said, error.hint, error.exit_code)


def _policy(place: SiteFolder) -> _Said:
    policy = SitePolicy.of(place.config)
    nothing = [
        name
        for name, value in (("purposes", policy.purposes), ("profiles", policy.profiles), ("models", policy.models),
                            ("epsilon_limit", policy.epsilon_limit), ("local_steps_limit", policy.local_steps_limit))
        if not value
    ]  # fmt: skip
    if nothing:
        return "warn", f"allows no run: no {', '.join(nothing)}", f"write it into {CONFIG} [policy]"
    return "ok", f"ε ≤ {policy.epsilon_limit:g} a run, purposes {', '.join(sorted(policy.purposes))}", ""


def _reply_times(place: SiteFolder) -> _Said:
    """How long rounds took here, against the span in which they are answered, and what runs wait."""
    every = place.config.policy.reply_seconds
    if not every:
        return ("warn", "training is answered when it is done: how long it takes, and so that somebody has withdrawn, "
                "is to be seen", f"write reply_seconds = {REPLY_SECONDS:g} into {CONFIG} [policy]")  # fmt: skip
    latest, wait = replies(place.local_log, _REPLIES), shortest_wait(place.state)
    took = max((reply.took for reply in latest), default=0) / 1000
    left, late = max((reply.left for reply in latest), default=0) / 1000, sum(r.left > r.deadline for r in latest)
    if wait is not None and max(left, every) >= wait:
        return ("warn", f"training is answered up to {max(left, every):g} s after it was asked for; a run waits "
                f"{wait} s", "agree on a longer [sites] wait_seconds in the run file, or fewer steps")  # fmt: skip
    if late:
        return ("warn", f"{late} of the latest {len(latest)} replies left after their deadline, which is to be seen",
                f"reply_seconds = {_rounded(_SPANS * took)} hides more; rounds then take so long")  # fmt: skip
    most = f"; the longest of the latest {len(latest)} rounds took {took:.2g} s" if latest else ""
    return "ok", f"training is answered in multiples of {every:g} s{most}", ""


def _rounded(seconds: float) -> int:
    return max(1, math.ceil(seconds))


def _keys(place: SiteFolder, passphrase: str | None) -> _Said:
    site_keys(place.folder, passphrase)
    if not place.site_key.is_file():
        raise ConfigError("is not there", where=str(place.site_key), hint="restore it from the newest backup")
    if passphrase is None:
        return ("warn", "readable without a passphrase; a run does not survive a restart of this site",
                "confide site lock puts them under one")  # fmt: skip
    paths = [place.site_key, *(place.folder / KEYS).glob("*.key")]
    clear = sorted(str(path.relative_to(place.folder)) for path in paths if not is_encrypted(path))
    if clear:
        return "warn", f"in the clear: {', '.join(clear)}", "confide site lock puts them under the passphrase"
    site_key(place.site_key, passphrase)
    return "ok", "there, all of them encrypted, and those of the roster", ""


def _modes(place: SiteFolder) -> _Said:
    if place.site_key.is_file() and place.site_key.stat().st_mode & _OTHERS:
        raise ConfigError("may be read by others than its owner", where=str(place.site_key),
                          hint=f"chmod 600 {place.site_key}")  # fmt: skip
    if place.folder.stat().st_mode & _OTHERS:
        return "warn", "others may look into this folder", f"chmod 700 {place.folder}"
    return "ok", "for the owner only", ""


def _roster(place: SiteFolder) -> _Said:
    standing = Membership(place.folder / MEMBERSHIP).standing
    if standing.roster is None:
        raise PolicyError("none is accepted yet", hint="confide site confirm FOLDER KIT")
    me = standing.me
    if (place.config.name, place.config.policy.population) != (me.site, me.population):
        raise PolicyError(f"knows this site as {me.site}, population {me.population}", hint=f"mend {CONFIG}")
    ca = place.folder / AUTHORITY
    if not ca.is_file() or certificate_digest(ca.read_text()) != standing.roster.authority:
        raise ConfigError("is not the authority that the roster names", where=str(ca),
                          hint="confirm the newest kit again: confide site confirm FOLDER KIT")  # fmt: skip
    return "ok", f"version {standing.roster.version} with {len(standing.roster.members)} sites", ""


def _data(place: SiteFolder, found: list[SiteRecords]) -> _Said:
    found.append(read_records(place))
    schema = place.config.schema_
    table = read_source(place.config.data, place.folder)
    for name, feature in schema.features.items() if schema is not None else ():
        if isinstance(feature, NumberFeature) and feature.bounds is not None:
            values = np.asarray(pd.to_numeric(table[name], errors="coerce"), dtype=np.float64)
            low, high = feature.bounds
            if float(np.mean((values < low) | (values > high))) > _CLIPPED:
                return ("warn", f"more than {_CLIPPED:.0%} of column {name} lie outside its bounds",
                        "are the bounds in [schema] those that were agreed on?")  # fmt: skip
    unknown = schema.unknown_bounds if schema is not None else ()
    if unknown:
        allowed = "" if place.config.policy.statistics else f"; {CONFIG} [policy] statistics does not allow even that"
        return ("warn", f"readable; no bounds of {', '.join(unknown[:5])} yet: good for the run that learns them only"
                f"{allowed}", "write them into [schema] when that run has ended: its result says them")  # fmt: skip
    return "ok", "readable, and fits schema and bounds", ""


def _open_registry(place: SiteFolder, passphrase: str | None) -> tuple[Registry, SiteKey]:
    named = place.registry
    if not holds_registry(named):
        raise ConsentError("there is no registry", where=shown_address(named),
                           hint="restore it, or: confide consent init")  # fmt: skip
    key = site_key(place.site_key, passphrase)
    return Registry(named, key), key


def _registry(place: SiteFolder, passphrase: str | None) -> _Said:
    registry, _ = _open_registry(place, passphrase)
    registry.close()
    return "ok", "can be read", ""


def _consent(place: SiteFolder, passphrase: str | None, purpose: str, found: list[SiteRecords]) -> _Said:
    registry, key = _open_registry(place, passphrase)
    try:
        snapshot = registry.snapshot(purpose, now_micros())
        if not found:
            return "warn", "the registry can be read, the data cannot", "see data"
        persons, held_out = found[0].persons, place.config.policy.held_out
        names = registry.pseudonyms(persons)
    finally:
        registry.close()
    train = sum(names.get(p) in snapshot.participants and key.role_share(p) >= held_out for p in persons)
    fewest = place.config.policy.min_subjects
    if train < fewest:
        raise DataError(f"fewer than {fewest} consenting subjects to train on",
                        hint="import or renew consent; until then this site takes no part")  # fmt: skip
    return "ok", f"at least {fewest} consenting subjects to train on", ""


def _ledger(place: SiteFolder) -> _Said:
    path = place.ledger / "ledger.db"
    if not path.is_file():
        if place.federated_log.is_file():
            raise BudgetError("is gone, and this site has taken part in runs", where=str(path),
                              hint="restore the newest copy: docs/runbooks/lost-key.md")  # fmt: skip
        return "ok", "none yet: made at the first start", ""
    ledger = Ledger.open(path)
    try:
        used, limit = max(ledger.epsilon(role) for role in Role), ledger.budget.epsilon_limit
    finally:
        ledger.close()
    if limit != place.config.policy.ledger_epsilon_limit:
        raise BudgetError(f"was made for ε = {limit:g}, {CONFIG} says {place.config.policy.ledger_epsilon_limit:g}",
                          where=str(path), hint="a ledger's limit is for ever: write down the ledger's")  # fmt: skip
    state: State = "warn" if used > _NEARLY * limit else "ok"
    return state, f"ε ≤ {used:.2f} of {limit:g} used (RDP filter)", "what is left admits little" if used > limit else ""


def _coordinator(place: SiteFolder) -> _Said:
    endpoint = place.config.endpoint
    if endpoint is None:
        raise ConfigError("no endpoint", where=CONFIG, hint="it stands in the coordinator's kit")
    host, _, port = endpoint.rpartition(":")
    host = host.strip("[]")
    try:
        trusted = ssl.create_default_context(cafile=str(place.folder / AUTHORITY))
        through = _proxy(place, host)
        connection = _connection(host, int(port), through, trusted)
        connection.connect()
        shown = connection.sock.getpeercert() if isinstance(connection.sock, ssl.SSLSocket) else None
        before = time.time()
        connection.request("GET", "/")
        date, after = connection.getresponse().getheader("Date"), time.time()
        connection.close()
    except ssl.SSLCertVerificationError as error:
        raise PeerError(f"shows another certificate ({error.verify_message})", where=endpoint,
                        hint="is this the coordinator? do not go on before it has told you why") from None  # fmt: skip
    except (OSError, http.client.HTTPException, ValueError, socket.gaierror) as error:
        by = f" through the proxy {through.hostname}" if through is not None else ""
        raise PeerError(f"cannot be reached{by} ({type(error).__name__})", where=endpoint,
                        hint="is confide server run running there, and the port open from here?") from None  # fmt: skip
    # What is certain, whatever the answer took, and as the date tells whole seconds that may be a second old.
    there = email.utils.parsedate_to_datetime(date).timestamp() if date else before
    ahead = max(0.0, before - there - 2.0) or min(0.0, after - there)
    if ahead > _AHEAD or ahead < -_BEHIND:
        raise PeerError(f"this clock is {abs(ahead):,.0f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator's",
                        hint="set the clock right (NTP)")  # fmt: skip
    if abs(ahead) > _NOTICEABLE:
        return "warn", "reachable; the clocks differ by some seconds", "set the clock right (NTP)"
    left = (ssl.cert_time_to_seconds(str(shown["notAfter"])) - after) / 86_400 if shown else 0.0
    if left < _SERVER_DAYS:
        return ("warn", f"reachable; its certificate ends in {left:.0f} days", "tell the coordinator's operator: "
                "confide federation renew; sites need do nothing")  # fmt: skip
    by = "" if through is None else f" through the proxy {through.hostname}"
    return "ok", f"reachable{by}, with the federation's certificate; the clocks agree", ""


def _proxy(place: SiteFolder, host: str) -> urllib.parse.SplitResult | None:
    """The proxy on the way to the coordinator, chosen as the agent chooses it."""
    named = place.config.proxy
    if named is None and not urllib.request.proxy_bypass(host):
        found = urllib.request.getproxies()
        named = found.get("https") or found.get("all")
    return urllib.parse.urlsplit(named) if named else None


def _connection(
    host: str, port: int, through: urllib.parse.SplitResult | None, trusted: ssl.SSLContext
) -> http.client.HTTPSConnection:
    """TLS is with the coordinator itself, also through a proxy."""
    if through is None:
        return http.client.HTTPSConnection(host, port, timeout=_CONNECT_SECONDS, context=trusted)
    connection = http.client.HTTPSConnection(
        through.hostname or "", through.port or 80, timeout=_CONNECT_SECONDS, context=trusted
    )
    who = {}
    if through.username is not None:
        pair = ":".join(urllib.parse.unquote(part or "") for part in (through.username, through.password))
        who["Proxy-Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    connection.set_tunnel(host, port, who)
    return connection


def _device(place: SiteFolder) -> _Said:
    kind = place.config.device.kind
    chosen = require_device(kind, f"{CONFIG} [device]")
    return "ok", str(chosen), ""


def _disk(place: SiteFolder) -> _Said:
    free = shutil.disk_usage(place.folder).free
    if free < _TOO_LITTLE:
        raise StorageError("less than 0.5 GiB are free", where=str(place.folder), hint="free space before a run")
    if free < _LITTLE:
        return "warn", "less than 5 GiB are free", "free space"
    return "ok", f"{free / _GIB:,.0f} GiB free", ""
