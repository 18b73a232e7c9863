"""What a log may hold: one frozen type a kind. No identity, no exact count, no metric outside differential privacy in
a *federated* record; a *local* record never leaves its site.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

__all__ = [
    "KINDS",
    "AttackResult",
    "Charged",
    "Cohort",
    "ConsentRead",
    "Fault",
    "Joined",
    "KeysAgreed",
    "KeysDestroyed",
    "LocalFault",
    "LocalRefusal",
    "LocalReply",
    "LocalSnapshot",
    "MetricsReleased",
    "ModelReleased",
    "Opened",
    "Record",
    "Refused",
    "Rejected",
    "RoundAbandoned",
    "RunCreated",
    "RunEnded",
    "RunStopped",
    "Sealed",
    "Settled",
    "SnapshotTaken",
    "TakenOver",
    "ToldEnded",
    "Unlocked",
    "UpdateCommitted",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """An entry; `run` names the run it belongs to."""

    KIND: ClassVar[str] = ""
    run: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCreated(Record):
    """Coordinator: the run, whole. `manifest` is its exact text; `software` lists versions."""

    KIND = "run_created"
    manifest: str
    software: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined(Record):
    """Site: its policy admits the run, whose members stand in the roster that it has accepted (named by its digest);
    `coordinator` is the checkpoint the coordinator showed."""

    KIND = "joined"
    manifest: str
    roster: str
    coordinator: str


@dataclass(frozen=True, kw_only=True, slots=True)
class KeysAgreed(Record):
    """Site: the run secret (by digest), who made it, and its number among those made for the run."""

    KIND = "keys_agreed"
    epoch: int
    maker: str
    secret: str


@dataclass(frozen=True, kw_only=True, slots=True)
class KeysDestroyed(Record):
    """Site: its part of the run is over; the run secret, named by its digest, and all ephemeral keys are gone."""

    KIND = "keys_destroyed"
    secret: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Charged(Record):
    """Site: a reservation in its privacy ledger, made before any record was read for the round."""

    KIND = "charged"
    round: int
    charge: str
    event: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled(Record):
    """Site: a reservation shrunk because nothing computed under it left."""

    KIND = "settled"
    charge: str
    steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotTaken(Record):
    """Site: whose consent stood at the round's cut-off, as a salted commitment of constant size."""

    KIND = "snapshot_taken"
    round: int
    commitment: str


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateCommitted(Record):
    """Site: a commitment to its update; the model and state it computed from, named under a key of the sites."""

    KIND = "update_committed"
    round: int
    commitment: str
    model: str
    state: str
    coordinator: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sealed(Record):
    """Site: its payload of a round, for exactly this cohort; the only one, but where the run retries."""

    KIND = "sealed"
    round: int
    attempt: int
    cohort: list[str]
    transcript: str
    coordinator: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Unlocked(Record):
    """Site: the one attempt of a round whose own mask it gave away."""

    KIND = "unlocked"
    round: int
    attempt: int
    transcript: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened(Record):
    """Site: an authenticated sum applied; the model it gives, named under a key of the sites, and the share of the
    cohort's noised coordinates that were clipped to the public range, as decimal text."""

    KIND = "opened"
    round: int
    transcript: str
    model: str
    saturated: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TakenOver(Record):
    """Site: it had missed rounds, and took over the model that all of a round's cohort began it with."""

    KIND = "taken_over"
    round: int
    model: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused(Record):
    """A request refused (site), or a refusal received (coordinator). Only public reasons are named."""

    KIND = "refused"
    round: int
    step: str
    party: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected(Record):
    """Coordinator: something from a site that was not authentic or not of the right form, and so counts for nothing."""

    KIND = "rejected"
    round: int
    step: str
    party: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStopped(Record):
    """Site: it has left the run for good; its keys are destroyed."""

    KIND = "run_stopped"
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ToldEnded(Record):
    """Site: the coordinator's signed word that the run is over (`stopped`, `failed`); its keys are destroyed.
    `coordinator` is the checkpoint that came with it."""

    KIND = "told_ended"
    status: str
    coordinator: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cohort(Record):
    """Coordinator: whose updates are about to be summed; `statements` are the digests of their signed replies and
    `checkpoints` the states of their logs that these replies carried."""

    KIND = "cohort"
    round: int
    attempt: int
    key_epoch: int
    cohort: list[str]
    statements: list[str]
    checkpoints: list[str]
    transcript: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundAbandoned(Record):
    """Coordinator: no sum for this round; charges stand."""

    KIND = "round_abandoned"
    round: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsReleased(Record):
    """Coordinator: noised, charged metric coordinates of a round's sum, as decimal text."""

    KIND = "metrics_released"
    round: int
    cohort_size: int
    values: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelReleased(Record):
    """Site or coordinator: a model handed out, by digest, and the key under which the sites' logs name it. The
    coordinator adds who gave it, and the states of their logs that their replies carried."""

    KIND = "model_released"
    model: str
    key: str
    sites: list[str]
    checkpoints: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnded(Record):
    """Coordinator: how it ended."""

    KIND = "run_ended"
    status: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AttackResult(Record):
    """Auditor: invented persons whom an attack told apart, and what that shows of ε, beside what the manifest claims.
    No real person's record was read for it. ε, δ and the confidence are decimal text."""

    KIND = "attack_result"
    manifest: str
    attack: str
    site: str
    canaries: int
    guesses: int
    correct: int
    confidence: str
    shown: str
    claimed: str
    delta: str
    software: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault(Record):
    """Coordinator: a party that gave no answer, or whose program failed. What failed is known at that party only."""

    KIND = "fault"
    round: int
    step: str
    party: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalFault(Record):
    """Local: a step of this site that failed though nothing refused it, by the type of the error only."""

    KIND = "local_fault"
    round: int
    step: str
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsentRead(Record):
    """Local: the registry was asked who may take part, as of an instant (microseconds UTC) and a sequence number;
    `outcome` is `answered`, or the kind of the error after which the site abstained."""

    KIND = "consent_read"
    round: int
    purpose: str
    as_of: int
    sequence: int
    outcome: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalSnapshot(Record):
    """Local: the exact numbers behind a snapshot."""

    KIND = "local_snapshot"
    round: int
    persons: int
    training: int
    held_out: int
    attempts: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalReply(Record):
    """Local: when a round's `train` reply was done, how much of that something was computed again for, when it was due
    and when it left: milliseconds since its request. `left` after `deadline`: it was late, which is to be seen."""

    KIND = "local_reply"
    round: int
    took: int
    again: int
    deadline: int
    left: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalRefusal(Record):
    """Local: a refusal with its whole reason."""

    KIND = "local_refusal"
    step: str
    reason: str


#: Every kind, by the name that it has in an entry.
KINDS: dict[str, type[Record]] = {kind.KIND: kind for kind in Record.__subclasses__()}
