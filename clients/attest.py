"""Shows an auditor one person's part in one round, from this site's own files. Run at the site, for that person."""

from __future__ import annotations

from confide.clients.sitefiles import SiteFiles
from confide.clients.snapshots import SnapshotStore
from confide.errors import ConsentError
from confide.privacy.audit.evidence import Evidence
from confide.privacy.audit.participation import find_snapshot, make_participation_proof
from confide.privacy.consent import canonical_subject

__all__ = ["attest"]


def attest(subject: str, round_: int, evidence: Evidence, files: SiteFiles) -> bytes:
    """The file that shows whether a person was in a round's snapshot, and in which role.

    Args:
        subject: Her identifier, as in the site's table.
        round_: The round.
        evidence: The run's logs.
        files: The site's files.

    Raises:
        ConsentError: The site key or the registry cannot be read, or the registry does not know the person: who was
            never on record has no pseudonym to look for, and was in no snapshot.
        AuditError: There is no such round, or what the site keeps does not fit its log.
    """
    if not files.snapshots.is_file():
        raise ConsentError("is missing", where=str(files.snapshots), hint="name the site's folder")
    number = find_snapshot(evidence, files.site, round_)
    person, (registry, key) = canonical_subject(subject), files.open_registry()
    try:
        pseudonym = registry.pseudonyms([person]).get(person)
    finally:
        registry.close()
    if pseudonym is None:
        raise ConsentError("the registry knows no such person, or has erased her", where=f"site {files.site}",
                           hint="who was never on record is in no snapshot, and there is no pseudonym to show it "
                           "with; check the identifier")  # fmt: skip
    keys, store = key.round_keys(evidence.run, round_), SnapshotStore(files.snapshots, read_only=True)
    try:
        tree = store.commitment(evidence.run, round_, keys)
    finally:
        store.close()
    if tree is None:
        raise ConsentError(f"keeps no snapshot of round {round_}", where=str(files.snapshots),
                           hint="restore the file from the site's backup")  # fmt: skip
    return make_participation_proof(evidence, files.site, number, tree, keys.opening, pseudonym)
