"""The coordinator's round loop over any Flower `Grid`: join, then train and seal per round, then release.

Invariants:
1. It never computes with a single site's update except to add it to the round's one accumulator, as it arrives.
   (Where a strategy needs single updates, under profile `open` only, they are kept and passed on as they were signed.)
2. A cohort is sealed once: a site that fails while sealing abandons the round, unless the run retries.
3. All sites must hold the same model after every round; otherwise the run stops.
4. It holds no data and no key but its own signing key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray

from confide.errors import ConfideError, PeerError, SealingError
from confide.privacy.audit import records as audit
from confide.privacy.audit.log import Log
from confide.privacy.digest import digest, keyed_digest
from confide.privacy.sealing import Payload, make_profile
from confide.privacy.sealing.transcript import transcript
from confide.privacy.sealing.wrapping import usable
from confide.protocol import messages as m
from confide.protocol.envelope import EVERYBODY, MAX_REPLY_BODY, Envelope, Header, verify
from confide.protocol.identity import Identity
from confide.protocol.manifest import Manifest
from confide.protocol.sightings import unpack_sightings
from confide.server.exchange import Exchange
from confide.server.keys import distribute_keys
from confide.server.software import software_versions

__all__ = ["Coordinator", "Released", "RoundOutcome"]

Floats = NDArray[np.float64]
#: How often a round is sealed where the run retries.
_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """What the coordinator knows after a round; `metrics` are those opened from an earlier round's sum."""

    round: int
    cohort: tuple[str, ...]
    abandoned: bool
    uplink_bytes: int
    metrics_round: int | None = None
    metrics: Floats | None = None


@dataclass(frozen=True, slots=True)
class Released:
    """The end of a run."""

    weights: NDArray[np.float32]
    model: str
    outcomes: tuple[RoundOutcome, ...]
    metrics_round: int | None
    metrics: Floats | None
    bytes_per_parameter: float


@dataclass(slots=True)
class _Sum:
    """A completed round's sum, kept for sites that still have to apply it."""

    round: int
    cohort: tuple[str, ...]
    statements: tuple[str, ...]
    transcript: str
    attempt: int
    payload: Payload
    unlocked: tuple[m.Statement, ...] = ()
    #: Where single updates are passed on: who signed which chunks, in their order.
    sealed: tuple[m.Statement, ...] = ()

    @property
    def chunks(self) -> tuple[bytes, ...]:
        return self.payload.chunks

    @property
    def reference(self) -> m.SumReference:
        return m.SumReference(
            round=self.round, cohort=self.cohort, statements=self.statements, transcript=self.transcript,
            attempt=self.attempt, chunks=len(self.chunks), tags=tuple(f"{tag:x}" for tag in self.payload.tags),
            unlocked=self.unlocked, sealed=self.sealed,
        )  # fmt: skip


@dataclass(slots=True)
class _Progress:
    sums: list[_Sum] = field(default_factory=list)
    applied: dict[str, int] = field(default_factory=dict)
    joined: dict[str, Envelope] = field(default_factory=dict)
    outcomes: list[RoundOutcome] = field(default_factory=list)
    update_bytes: list[float] = field(default_factory=list)
    metrics_logged: int = 0
    model: str = ""
    #: Signed `train` replies of the latest round: at the end they show that enough sites are there.
    last: dict[str, Envelope] = field(default_factory=dict)


class Coordinator:
    """One run.

    Args:
        grid: Flower's way to the nodes.
        identity: The coordinator's name and signing key.
        manifest: The run.
        initial_model: The first weights.
        log: The coordinator's log.
        before_round: Called with the round's number before its messages go out.
        after_round: Called with each round's outcome.
        timeout: Seconds to wait for replies; None waits for ever.
    """

    def __init__(
        self,
        grid: Grid,
        identity: Identity,
        manifest: Manifest,
        initial_model: NDArray[np.float32],
        log: Log,
        *,
        before_round: Callable[[int], None] = lambda _: None,
        after_round: Callable[[RoundOutcome], None] = lambda _: None,
        timeout: float | None = None,
    ) -> None:
        self._grid, self.manifest, self._initial = grid, manifest, initial_model
        self._before_round, self._after_round = before_round, after_round
        self._profile = make_profile(manifest.sealing, len(manifest.members), gather=manifest.single_updates)
        self._progress = _Progress()
        self.log = log
        self._exchange = Exchange(grid, identity, manifest, log, timeout)

    @property
    def refusals(self) -> dict[str, m.Refusal]:
        """Why sites did not take part, by site: public reasons only."""
        return self._exchange.refusals

    def run(self) -> Released:
        """Run to the end.

        Raises:
            PeerError: Fewer than `min_sites` sites joined.
            SealingError: Sites disagree, or a reply is not authentic.
        """
        self.log.append(
            audit.RunCreated(
                run=self.manifest.run, manifest=self.manifest.to_bytes().decode(), software=software_versions()
            )
        )
        self._join()
        if self._profile.keyed:
            self._distribute_keys()
        for round_ in range(1, self.manifest.rounds + 2):
            self._before_round(round_)
            outcome = self._round(round_)
            self._progress.outcomes.append(outcome)
            self._after_round(outcome)
        return self._release()

    # --- steps -------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        chunks = (self.manifest.to_bytes(), self._initial.astype("<f4").tobytes())
        request = self._exchange.sign(self._exchange.address("join"), EVERYBODY, m.JoinRequest(), chunks)
        for node, envelope in self._exchange.send("join", dict.fromkeys(self._grid.get_node_ids(), request)):
            if isinstance(envelope, SealingError):
                continue  # nobody knows yet which site lives on that node
            for member in self.manifest.members:
                try:
                    key = bytes.fromhex(member.public_key)
                    header = verify(envelope, key, sender=member.site, max_body=MAX_REPLY_BODY)
                except SealingError:
                    continue
                if self._joins(header, envelope, request, member.site):
                    self._exchange.nodes[member.site] = node
                    self._progress.applied[member.site] = 0
                    self._progress.joined[member.site] = envelope
        if len(self._exchange.nodes) < self.manifest.min_sites:
            raise self._too_few("joined")

    def _joins(self, header: Header, envelope: Envelope, request: Envelope, site: str) -> bool:
        """Is this a reply that every other site will accept too? One site's nonsense must not end the run."""
        place = self._exchange.address("join")
        try:
            reply = self._exchange.accept(header, envelope, request, place, site, m.JoinReply)
            if reply is not None and not (len(envelope.chunks) == 1 and usable(bytes.fromhex(reply.ephemeral))):
                raise SealingError("a join reply that no site can use", where=f"site {site}")
            if reply is not None:
                unpack_sightings(envelope.chunks[0])
        except SealingError as error:
            self._exchange.reject(place, site, error)
            return False
        return reply is not None

    def _distribute_keys(self) -> None:
        agreed = distribute_keys(self._exchange, self.manifest, self._progress.joined)
        self._exchange.nodes = {s: n for s, n in self._exchange.nodes.items() if s in agreed}
        if len(self._exchange.nodes) < self.manifest.min_sites:
            raise self._too_few("agreed on keys")

    def _round(self, round_: int) -> RoundOutcome:
        committed = self._train(round_)
        metrics_round, metrics = self._opened_metrics(committed)
        if len(committed) < self.manifest.min_sites:
            if not committed and set(self._exchange.refusals) >= set(self._exchange.nodes):
                raise self._too_few(f"took part in round {round_}")
            self._log_abandoned(round_, "too few sites trained")
            return RoundOutcome(round_, (), True, 0, metrics_round, metrics)
        cohort = tuple(sorted(committed))
        total = self._sum(round_, committed)
        if total is None:
            self._log_abandoned(round_, "a site of the cohort did not seal")
            return RoundOutcome(round_, cohort, True, 0, metrics_round, metrics)
        self._progress.sums.append(total[0])
        return RoundOutcome(round_, total[0].cohort, False, total[1], metrics_round, metrics)

    def _train(self, round_: int) -> dict[str, Envelope]:
        requests, place = {}, self._exchange.address("train", round_)
        for site in self._exchange.nodes:
            missing = [s for s in self._progress.sums if s.round > self._progress.applied[site]]
            body = m.TrainRequest(sums=tuple(s.reference for s in missing))
            requests[site] = self._exchange.sign(place, site, body, tuple(c for s in missing for c in s.chunks))
        replies = self._exchange.ask(place, requests, m.TrainReply)
        models = {(reply.model, reply.state) for _, reply in replies.values()}
        if len(models) > 1:
            raise SealingError(
                "the sites' models are not bit-identical",
                where=f"round {round_}",
                hint="install one version of confide and numpy at all sites; nothing was applied",
            )
        if models:
            self._progress.model = next(iter(models))[0]
        latest = self._progress.sums[-1].round if self._progress.sums else 0
        for site in replies:
            self._progress.applied[site] = latest
        self._progress.last = {site: envelope for site, (envelope, _) in replies.items()}
        return self._progress.last

    def _sum(self, round_: int, replies: Mapping[str, Envelope]) -> tuple[_Sum, int] | None:
        """The sum over everybody who trained; where the run retries, without those who then did not seal."""
        cohort = tuple(sorted(replies))
        for attempt in range(_ATTEMPTS if self.manifest.sealing.retry else 1):
            total, uplink, sealed = self._seal(round_, attempt, {s: replies[s] for s in cohort})
            if total is not None:
                if self.manifest.trains_in(round_):
                    self._progress.update_bytes.append(uplink / len(cohort) / self.manifest.layout.size)
                return (total, uplink) if not self.manifest.sealing.retry else self._unlock(total, sealed, uplink)
            cohort = tuple(sorted(sealed))
            if len(cohort) < self.manifest.min_sites:
                break
        return None

    def _seal(
        self, round_: int, attempt: int, replies: Mapping[str, Envelope]
    ) -> tuple[_Sum | None, int, dict[str, Envelope]]:
        """One attempt: (the sum if everybody sealed, bytes that arrived, who sealed and with which signed reply)."""
        cohort, place = tuple(sorted(replies)), self._exchange.address("seal", round_, attempt=attempt)
        body = m.SealRequest(cohort=cohort, statements=tuple(m.Statement.of(s, replies[s]) for s in cohort))
        digests = {s: replies[s].digest for s in cohort}
        agreed = transcript(
            self.manifest.digest, self.manifest.roster_version, place.key_epoch, round_, digests, attempt
        )
        headers = {s: Header.model_validate_json(replies[s].header) for s in cohort}
        self.log.append(
            audit.Cohort(
                run=self.manifest.run, round=round_, attempt=attempt, key_epoch=place.key_epoch, cohort=list(cohort),
                transcript=agreed, statements=list(digests.values()),
                checkpoints=[headers[s].checkpoint for s in cohort],
            )
        )  # fmt: skip
        accumulator, uplink = self._profile.accumulator(self.manifest.vector_size(round_)), 0
        sealed: dict[str, Envelope] = {}
        requests = {s: self._exchange.sign(place, s, body) for s in cohort}
        # A payload is added as it arrives and then forgotten: memory is that of one sum and one payload.
        for site, envelope, reply in self._exchange.each(place, requests, m.SealReply):
            uplink += sum(map(len, envelope.chunks))
            try:
                if reply.transcript != agreed:
                    raise SealingError("sealed for another cohort", where=f"site {site}")
                accumulator.add(Payload(envelope.chunks, tuple(int(tag, 16) for tag in reply.tags)))
            except SealingError as error:
                self._exchange.reject(place, site, error)
            else:
                sealed[site] = envelope.without_chunks()
            del envelope, reply
        if set(sealed) != set(cohort):
            return None, uplink, sealed
        total = _Sum(round_, cohort, tuple(digests.values()), agreed, attempt, accumulator.total())
        if self.manifest.single_updates:
            total.sealed = tuple(m.Statement.of(site, reply) for site, reply in sealed.items())
        return total, uplink, sealed

    def _unlock(self, total: _Sum, sealed: Mapping[str, Envelope], uplink: int) -> tuple[_Sum, int] | None:
        """Every member's own mask of this attempt, against the proof that all of them sealed it."""
        place = self._exchange.address("unlock", total.round, attempt=total.attempt)
        body = m.UnlockRequest(statements=tuple(m.Statement.of(s, sealed[s]) for s in total.cohort))
        requests = {s: self._exchange.sign(place, s, body) for s in total.cohort}
        unlocked = self._exchange.ask(place, requests, m.UnlockReply)
        if set(unlocked) != set(total.cohort):
            return None
        statements = tuple(m.Statement.of(s, unlocked[s][0]) for s in total.cohort)
        return replace(total, unlocked=statements), uplink

    def _release(self) -> Released:
        requests, place = {}, self._exchange.address("release", self.manifest.rounds + 2)
        statements = tuple(m.Statement.of(s, e) for s, e in sorted(self._progress.last.items()))
        for site in self._exchange.nodes:
            missing = [s for s in self._progress.sums if s.round > self._progress.applied[site]]
            body = m.ReleaseRequest(sums=tuple(s.reference for s in missing), statements=statements)
            requests[site] = self._exchange.sign(place, site, body, tuple(c for s in missing for c in s.chunks))
        replies = self._exchange.ask(place, requests, m.ReleaseReply)
        if not replies:
            raise self._too_few("released the model")
        if len({(reply.model, reply.key, envelope.chunks[:1]) for envelope, reply in replies.values()}) != 1:
            raise SealingError("the sites released different models", where="release", hint="nothing was written")
        metrics_round, metrics = self._opened_metrics({s: e for s, (e, _) in replies.items()}, skip=1)
        envelope, reply = next(iter(replies.values()))
        # The last sum changes no weights, so all of the last cohort have signed this digest already.
        named = keyed_digest(bytes.fromhex(reply.key), "model", envelope.chunks[0]).hex()
        if named != self._progress.model or digest("model", envelope.chunks[0]).hex() != reply.model:
            raise SealingError("the released model is not the one that the sites signed", where="release",
                               hint="nothing was written")  # fmt: skip
        self.log.append(
            audit.ModelReleased(
                run=self.manifest.run,
                model=reply.model,
                key=reply.key,
                sites=sorted(replies),
                checkpoints=[Header.model_validate_json(replies[s][0].header).checkpoint for s in sorted(replies)],
            ),
            audit.RunEnded(run=self.manifest.run, status="finished"),
        )
        return Released(
            weights=np.frombuffer(envelope.chunks[0], dtype="<f4").astype(np.float32),
            model=reply.model,
            outcomes=tuple(self._progress.outcomes),
            metrics_round=metrics_round,
            metrics=metrics,
            bytes_per_parameter=float(np.mean(self._progress.update_bytes)) if self._progress.update_bytes else 0.0,
        )

    # --- parts -------------------------------------------------------------------------------------------------

    def _log_abandoned(self, round_: int, reason: str) -> None:
        self.log.append(audit.RoundAbandoned(run=self.manifest.run, round=round_, reason=reason))

    def _opened_metrics(self, replies: Mapping[str, Envelope], skip: int = 0) -> tuple[int | None, Floats | None]:
        """The metric coordinates that the sites opened from the latest sum; all of them must agree."""
        latest = self._progress.sums[-1].round if self._progress.sums else 0
        if latest not in self.manifest.metric_rounds or not replies:
            return None, None
        opened = {e.chunks[skip:] for e in replies.values()}
        if len(opened) != 1 or len(next(iter(opened))) != 1:
            raise SealingError("the sites report different metrics", where=f"round {latest}")
        values = np.frombuffer(next(iter(opened))[0], dtype="<f8").astype(np.float64)
        if latest != self._progress.metrics_logged:
            self.log.append(
                audit.MetricsReleased(
                    run=self.manifest.run, round=latest, cohort_size=len(self._progress.sums[-1].cohort),
                    values=[repr(float(v)) for v in values],
                )
            )  # fmt: skip
            self._progress.metrics_logged = latest
        return latest, values

    def _too_few(self, what: str) -> ConfideError:
        reasons = "; ".join(f"{site}: {r.reason}" for site, r in sorted(self._exchange.refusals.items())) or "no reply"
        return PeerError(
            f"fewer than {self.manifest.min_sites} sites {what} ({reasons})",
            where=f"run {self.manifest.run}",
            hint="see each site's own log for its reasons",
        )
