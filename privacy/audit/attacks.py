"""Results of attacks on a run, as files beside its logs: `attacks/NAME.log`, its checkpoint, the auditor's public key.

An attack is made after a run, when the run's own keys are gone, and by whoever likes: its record is signed by a key of
the auditor's own, made for this one statement and forgotten. Its fingerprint is what the auditor tells those who are to
believe it. Step 12 of `verify`: the file is whole and signed; it is about this run, under this manifest; the claim and
what the attack shows are recomputed; and what it shows is not more than what was claimed.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from confide.errors import AuditError, StorageError
from confide.privacy.audit.checkpoint import fingerprint, parse_note
from confide.privacy.audit.evidence import Evidence, Finding, broken
from confide.privacy.audit.log import CHECKPOINT_SUFFIX, LOG_SUFFIX, Log, read_lines
from confide.privacy.audit.merkle import Tree
from confide.privacy.audit.records import AttackResult
from confide.privacy.dp.accounting import run_epsilon
from confide.privacy.dp.empirical import epsilon_shown
from confide.privacy.dp.events import PrivacyEvent, Role
from confide.privacy.files import write_atomically

__all__ = ["FOLDER", "Attack", "check_attacks", "claimed_epsilon", "read_attacks", "write_attack"]

FOLDER, AUDITOR = "attacks", "auditor"
_KEY_SUFFIX, _LARGEST = ".pub", 2**16
#: Numbers in a record are decimal text of this many places.
PLACES = 4
_DECIMAL = re.compile(r"\d{1,9}\.\d{4}")


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack on a run, as its file tells it: when (microseconds UTC), and whose key signed it."""

    name: str
    record: AttackResult
    at: int
    fingerprint: str


def claimed_epsilon(manifest: dict[str, Any]) -> float:
    """ε that a run's manifest claims for a person it trains on; 0 where it does not train."""
    privacy, steps = manifest["privacy"], manifest["rounds"] * manifest["training"]["local_steps"]
    if manifest.get("statistics"):
        return 0.0
    event = PrivacyEvent(
        role=Role.TRAIN, unit=privacy["unit"], sample_rate=privacy["sample_rate"], steps=steps,
        noise_multiplier=manifest["noise_multiplier"], max_grad_norm=privacy["max_grad_norm"],
    )  # fmt: skip
    return run_epsilon(event, privacy["delta"])


def write_attack(folder: Path, evidence: Evidence, record: AttackResult) -> Attack:
    """Sign a result with a key made for it, and put it beside the run's logs.

    Args:
        folder: The run's folder, or a folder of exported logs.
        evidence: The run.
        record: What was found.

    Raises:
        StorageError: It cannot be written.
    """
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()
    origin = _origin(evidence)
    try:
        place = folder / FOLDER
        place.mkdir(exist_ok=True)
        name = next(n for i in range(1, 100_000) if not (place / f"{(n := f'{i:04d}')}{LOG_SUFFIX}").exists())
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            log = Log(Path(scratch) / "log.db", origin=origin, name=AUDITOR, public_key=public, sign=key.sign)
            try:
                log.append(record)
                write_atomically(place / f"{name}{_KEY_SUFFIX}", public.hex().encode() + b"\n")
                log.export(place / f"{name}{LOG_SUFFIX}")
            finally:
                log.close()
    except OSError as error:
        raise StorageError(
            f"cannot be written: {error.strerror}", where=str(folder / FOLDER),
            hint="free space, or work on a copy of the folder that you may write to",
        ) from None  # fmt: skip
    return _read(place / f"{name}{LOG_SUFFIX}", evidence)


def read_attacks(folder: Path, evidence: Evidence) -> tuple[list[Attack], list[Finding]]:
    """The attacks on a run whose files lie beside its logs, and what is wrong with such files."""
    attacks, findings = list[Attack](), list[Finding]()
    for path in sorted((folder / FOLDER).glob(f"*{LOG_SUFFIX}")):
        party = f"{FOLDER}/{path.stem}"
        try:
            attack = _read(path, evidence)
        except AuditError as error:
            findings.append(Finding(party, None, error.what))
            continue
        if attack.record.run == evidence.run:
            attacks.append(attack)
    return attacks, findings


def check_attacks(evidence: Evidence, folder: Path) -> Iterator[Finding]:
    """Step 12 of `verify`."""
    attacks, findings = read_attacks(folder, evidence)
    yield from findings
    for attack in attacks:
        record, party = attack.record, f"{FOLDER}/{attack.name}"
        if record.manifest != evidence.manifest_digest:
            yield broken(party, 0, "is an attack on another manifest than the run's")
            continue
        claimed, delta = claimed_epsilon(evidence.manifest), evidence.manifest["privacy"]["delta"]
        try:
            shown = epsilon_shown(record.canaries, record.guesses, record.correct, delta, float(record.confidence))
        except ValueError:
            yield broken(party, 0, "tells of more right guesses than guesses, or of guesses that nobody can make")
            continue
        if record.shown != f"{shown:.{PLACES}f}" or record.claimed != f"{claimed:.{PLACES}f}":
            yield broken(party, 0, "names another ε than follows from its guesses, or from the manifest")
        elif shown > claimed:
            yield broken(
                party, 0, f"shows that a person loses at least ε = {shown:.2f}, at {float(record.confidence):.1%} "
                f"confidence, where the run claims at most {claimed:.2f}",
            )  # fmt: skip
        code = "confide_code_sha256"
        if record.software.get(code) != evidence.software.get(code):
            yield Finding(party, 0, "attacked another version of confide's code than the one that ran", "low")


def _read(path: Path, evidence: Evidence) -> Attack:
    """Steps: the key is one; the note is signed by it; the log is one entry, and what was signed."""
    try:
        public = bytes.fromhex(path.with_suffix(_KEY_SUFFIX).read_text(encoding="ascii").strip())
        note = path.with_suffix(CHECKPOINT_SUFFIX).read_bytes().decode("utf-8")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise AuditError(f"cannot be read with its checkpoint and key ({type(error).__name__})") from None
    if len(data) > _LARGEST:
        raise AuditError("is too long for the result of an attack")
    checkpoint = parse_note(note, _origin(evidence), AUDITOR, public)
    entries = list(read_lines(data, path.name))
    if len(entries) != 1 or checkpoint.size != 1 or Tree(leaf for _, leaf, _ in entries).root() != checkpoint.root:
        raise AuditError("is not what was signed")
    record, _, at = entries[0]
    if not isinstance(record, AttackResult) or not all(map(_DECIMAL.fullmatch, (record.shown, record.claimed))):
        raise AuditError("is not the result of an attack")
    return Attack(path.stem, record, at, fingerprint(public))


def _origin(evidence: Evidence) -> str:
    return f"confide/{evidence.manifest['federation']}/{AUDITOR}/attack"
