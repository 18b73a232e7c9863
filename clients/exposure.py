"""The answer to one person who asks what became of her data (GDPR Art. 15), from this site's own files.

Invariants:
1. Nothing but what concerns this one person, and what is public of the runs she took part in.
2. It stays at the site, for the person who asked: it names her.
3. Nothing is written to the files that it is made from.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from confide.clients.past import manifests_of, released_models, was_used
from confide.clients.sitefiles import SiteFiles
from confide.clients.snapshots import SnapshotStore
from confide.privacy.audit.page import write_page
from confide.privacy.consent import ConsentEvent, Registry, canonical_subject, from_micros
from confide.privacy.dp import LEDGER_LABEL, Ledger, PrivacyEvent, Role, person_epsilon, run_epsilon, run_label
from confide.privacy.dp.events import merge_events
from confide.privacy.dp.personal import PersonalLosses
from confide.protocol.manifest import Manifest

__all__ = [
    "ConsentOnRecord",
    "Decision",
    "PersonExposure",
    "RunOfPerson",
    "describe_person",
    "write_person",
]

HOW_TO_WITHDRAW = (
    "Tell this site’s consent officer. From the moment the withdrawal is on record no gradient, metric or statistic is "
    "computed from your records; a round in progress is computed again without them. What was released before is "
    "differentially private: it cannot be taken back, and ε bounds what it says about you."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsentOnRecord:
    """One event of the registry; times in ISO 8601, UTC."""

    at: str
    type: str
    purpose: str
    valid_until: str | None
    lawful_basis: str
    jurisdiction: str
    notice_digest: str
    evidence_ref: str
    max_epsilon: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What the events of a purpose amount to now."""

    purpose: str
    status: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOfPerson:
    """A run whose snapshots held the person.

    Attributes:
        rounds: Rounds in which her records could be drawn or evaluated.
        epsilon: What these rounds cost her, PRV: this run alone. None where its charges differ in σ or q; infinity
            where nothing in the run protects her.
        purpose, recipients: From the run's manifest; None and empty where it lies in another run's folder.
        model: Digest of the released model; None where none was released from here.
        released: When, ISO 8601.
    """

    run: str
    rounds: list[int]
    epsilon: float | None
    purpose: str | None
    recipients: list[str]
    model: str | None
    released: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PersonExposure:
    """The whole answer.

    Attributes:
        known: False where this site holds nothing about such a person.
        erased: Her consent record cannot be found any more; what charges held her is still known, by her locator.
        forgotten: That is not known any more either: ε is what she has lost at most, and no run is listed.
        epsilon: Her loss over all runs; infinity where one of them protected nobody.
        charged_epsilon: The part of it that the ledger accounts for.
        sites: At how many sites a person may lie, as the runs assumed; each charge here counts that many times.
    """

    site: str
    subject: str
    known: bool
    erased: bool
    forgotten: bool
    role: str
    consent: list[ConsentOnRecord]
    decisions: list[Decision]
    runs: list[RunOfPerson]
    epsilon: float
    charged_epsilon: float
    delta: float
    unit: str
    unnoted_charges: int
    sites: int
    how_to_withdraw: str = HOW_TO_WITHDRAW


def describe_person(subject: str, files: SiteFiles) -> PersonExposure:
    """Everything this site can say to one person.

    Args:
        subject: Her identifier, as in the site's table.
        files: The site's files.

    Raises:
        ConsentError: The site key or the registry cannot be read.
        BudgetError: The ledger cannot be read.
    """
    person = canonical_subject(subject)
    registry, key = files.open_registry()
    with closing(registry), closing(Ledger.open(files.ledger)) as ledger:
        history = [event for _, event in registry.history(person)]
        personal = PersonalLosses.open(files.personal)
        try:
            held, charges = personal.charges_of(key.locator(person)), ledger.charges()
            place, forgotten = personal.place_of(key.locator(person)), personal.is_forgotten(key.locator(person))
            epsilon = float(personal.epsilons(charges, ledger.budget.delta)[place]) if place is not None else 0.0
            unnoted = len(personal.unnoted(charges))
        finally:
            personal.close()
        held_out, erased = key.role_share(person) < ledger.held_out, bool(registry.erased([person]))
        pseudonym = registry.pseudonyms([person]).get(person)
        runs = _runs(held or [], charges, ledger.budget.delta, files)
        runs += _unprotected(pseudonym, {run.run for run in runs}, files)
        protected = all(run.epsilon is None or math.isfinite(run.epsilon) for run in runs)
        return PersonExposure(
            site=files.site, subject=person, known=bool(history) or held is not None or erased or forgotten,
            erased=erased, forgotten=forgotten,
            role=(Role.HELD_OUT if held_out else Role.TRAIN).value,
            consent=[_on_record(event) for event in history],
            decisions=_decisions(registry, person, history),
            runs=runs, epsilon=epsilon if protected else math.inf, charged_epsilon=epsilon,
            delta=ledger.budget.delta, unit=ledger.unit, unnoted_charges=unnoted,
            sites=max((event.sites for event in charges.values()), default=1),
        )  # fmt: skip


def write_person(exposure: PersonExposure, path: Path) -> None:
    """The same as one self-contained page.

    Raises:
        OSError: It cannot be written.
    """
    context = {"e": exposure, "ledger_label": LEDGER_LABEL, "run_label": run_label(exposure.sites)}
    write_page(Path(__file__).with_name("exposure.html.j2"), context, path)


def _on_record(event: ConsentEvent) -> ConsentOnRecord:
    return ConsentOnRecord(
        at=_iso(event.effective_at), type=event.type.value, purpose=event.purpose,
        valid_until=None if event.valid_until is None else _iso(event.valid_until), lawful_basis=event.lawful_basis,
        jurisdiction=event.jurisdiction, notice_digest=event.notice_digest, evidence_ref=event.evidence_ref,
        max_epsilon=event.max_epsilon,
    )  # fmt: skip


def _decisions(registry: Registry, person: str, history: Sequence[ConsentEvent]) -> list[Decision]:
    purposes = sorted({event.purpose for event in history})
    return [Decision(purpose=p, status=registry.state(person, p).status.value) for p in purposes]


def _runs(
    held: Sequence[str], charges: Mapping[str, PrivacyEvent], delta: float, files: SiteFiles
) -> list[RunOfPerson]:
    by_run: dict[str, list[str]] = {}
    for charge in held:
        if charge in charges and charges[charge].steps:
            by_run.setdefault(charge.partition("/")[0], []).append(charge)
    manifests, released = manifests_of(files.state, list(by_run)), released_models(files.log)
    found = []
    for run, names in by_run.items():
        merged, manifest = merge_events(charges[name] for name in names), manifests.get(run)
        epsilon = run_epsilon(merged[0], delta) if len(merged) == 1 else None
        if any(event.sites > 1 for event in merged):  # elsewhere she may hold the other role, in more rounds
            epsilon = None if manifest is None else person_epsilon(manifest.all_charges(), delta)
        if manifest is not None and not manifest.privacy.protects:  # its noise comes from a seed that was told
            epsilon = math.inf
        rounds = sorted({int(name.split("/")[1]) for name in names})
        found.append(_run(run, rounds, epsilon, manifest, released, files))
    return found


def _unprotected(pseudonym: bytes | None, listed: Collection[str], files: SiteFiles) -> list[RunOfPerson]:
    """Runs without noise, on public data: nothing is charged for them, so only their snapshots tell who was held."""
    if pseudonym is None or not files.snapshots.is_file():
        return []
    store = SnapshotStore(files.snapshots, read_only=True)
    try:
        held = store.rounds_of(pseudonym)
    finally:
        store.close()
    names = list(dict.fromkeys(run for run, _, _ in held if run not in listed))
    manifests, released, found = manifests_of(files.state, names), released_models(files.log), list[RunOfPerson]()
    for run, manifest in manifests.items():
        if manifest.privacy.is_private:  # what it charged is known, and nothing of these rounds left
            continue
        rounds = [
            round_ for name, round_, role in held if name == run and was_used(manifest, round_, role)
        ]  # fmt: skip
        if rounds:
            found.append(_run(run, sorted(rounds), math.inf, manifest, released, files))
    return found


def _run(
    run: str, rounds: list[int], epsilon: float | None, manifest: Manifest | None,
    released: Mapping[str, tuple[str, str]], files: SiteFiles,
) -> RunOfPerson:  # fmt: skip
    model, at = released.get(run, (None, None))
    return RunOfPerson(
        run=run, rounds=rounds, epsilon=epsilon, purpose=manifest.purpose if manifest is not None else None,
        recipients=_recipients(manifest, files.site) if manifest is not None else [], model=model, released=at,
    )  # fmt: skip


def _recipients(manifest: Manifest, site: str) -> list[str]:
    """Who got to see what, as the profile promises it."""
    others = ", ".join(member.site for member in manifest.members if member.site != site)
    coordinator = {
        "open": "every site’s noised update",
        "masked": "sums over the cohort, noised metrics, and what is released",
    }.get(manifest.sealing.profile, "noised metrics, and what is released")
    return [f"sites {others}: sums over the cohort", f"the coordinator: {coordinator}"]


def _iso(micros: int) -> str:
    return from_micros(micros).isoformat(timespec="seconds")
