"""The coordinator's round loop over any Flower `Grid`: join, then train and seal per round, then release.

Invariants:
1. It never computes with a single site's update except to add it to the round's one accumulator, as it arrives.
   (Where a strategy needs single updates, under profile `open` only, they are kept and passed on as they were signed.)
2. A cohort is sealed once: a site that fails while sealing abandons the round, unless the run retries.
3. All sites must hold the same model after every round; otherwise the run stops.
4. It holds no data and no key but its own signing key.
5. Killed at any point, it goes on from its store (`server/journal.py`): it comes by the same steps again, and each is
   as it ended, or its very same requests go out once more. An entry of its log is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from flwr.serverapp import Grid
from numpy.typing import NDArray

from confide.errors import ConfideError, PeerError, SealingError
from confide.privacy.audit import records as audit
from confide.privacy.audit.log import Log
from confide.privacy.digest import digest, keyed_digest
from confide.privacy.sealing import Payload, make_profile
from confide.privacy.sealing.transcript import transcript
from confide.protocol import messages as m
from confide.protocol.envelope import Address, Envelope, Header
from confide.protocol.identity import Identity
from confide.protocol.manifest import Manifest
from confide.server.catchup import CatchUp
from confide.server.exchange import Exchange
from confide.server.joining import Members
from confide.server.journal import Journal
from confide.server.keys import distribute_keys
from confide.server.runs import RunStore
from confide.server.totals import RoundOutcome, Total

__all__ = ["Coordinator", "Released", "RoundOutcome"]

Floats = NDArray[np.float64]
#: How often a round is sealed where the run retries.
_ATTEMPTS = 4


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
class _Progress:
    metrics_logged: int = 0
    model: str = ""
    #: Signed `train` replies of the latest round: at the end they show that enough sites are there.
    last: dict[str, Envelope] = field(default_factory=dict)
    #: The round that an earlier process was in the middle of.
    interrupted: int = 0


class Coordinator:
    """One run.

    Args:
        grid: Flower's way to the nodes.
        identity: The coordinator's name and signing key.
        manifest: The run.
        initial_model: The first weights.
        log: The coordinator's log.
        before_round: Called with the round's number before its messages go out.
        after_round: Called with each round's outcome; a resumed run tells the latest one again.
        timeout: Seconds to wait for replies, where the manifest does not say; None waits for ever.
        store: Where the run lies, from which another process goes on; None: in this one's memory only.
        between: Called again and again while replies are waited for; what it raises ends `run`, as a kill would.

    Raises:
        ConfigError: The store holds this run with another manifest.
        AuditError: The log is not the one that the run was stored with.
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
        store: RunStore | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self.manifest = manifest
        self._before_round, self._after_round = before_round, after_round
        self._profile = make_profile(manifest.sealing, len(manifest.members), gather=manifest.single_updates)
        self._progress = _Progress()
        self.log = log
        first = initial_model.astype("<f4").tobytes()
        self._journal: Journal = (store or RunStore()).open(manifest.run, manifest.to_bytes(), first, log)
        wait = timeout if manifest.wait_seconds is None else float(manifest.wait_seconds)
        self._exchange = Exchange(grid, identity, manifest, log, self._journal, wait, between)
        self._catch_up = CatchUp(self._exchange, self._journal, manifest)
        self._members = Members(grid, self._exchange, self._journal, manifest, initial_model)

    @property
    def refusals(self) -> dict[str, m.Refusal]:
        """Why sites did not take part, by site: public reasons only."""
        return self._exchange.refusals

    @property
    def outcomes(self) -> Iterator[RoundOutcome]:
        """How each round ended, oldest first; those of earlier processes, too."""
        return self._journal.outcomes()

    def run(self) -> Released:
        """Run to the end, from wherever an earlier process of the run has come to.

        Raises:
            PeerError: Fewer than `min_sites` sites joined.
            SealingError: Sites disagree, or a reply is not authentic.
        """
        at, journal = self._journal.position(), self._journal
        self._progress.model = at.model
        if at.finished:
            self._exchange.key_epoch = at.epoch
            return self._release()
        self._join()
        if journal.position().members is None:
            if self._profile.keyed:
                self._distribute_keys()
            journal.agree(self._exchange.key_epoch, sorted(self._exchange.nodes))
        self._exchange.key_epoch = journal.position().epoch
        for outcome in journal.outcomes():
            self._progress.metrics_logged = outcome.metrics_round or self._progress.metrics_logged
        if (latest := journal.outcome(at.next - 1)) is not None:
            self._after_round(latest)
        if journal.asked(self._exchange.address("train", at.next)):
            self._progress.interrupted = at.next
        for round_ in range(at.next, self.manifest.rounds + 2):
            self._before_round(round_)
            self._find(round_)
            outcome = self._round(round_)
            journal.end_round(outcome, self._progress.last, self._progress.model, self._vouching(round_))
            self._after_round(outcome)
        return self._release()

    # --- steps -------------------------------------------------------------------------------------------------

    def _join(self) -> None:
        only = self.manifest.drawn(self._journal.position().next) if self._catch_up.drawn else None
        if self._members.invite(only) < self.manifest.min_sites:
            raise self._too_few("joined")
        if not self._catch_up.drawn:
            self._members.close()

    def _find(self, round_: int) -> None:
        """The members that the round is for."""
        if not self._catch_up.drawn:
            self._members.find()
            return
        self._members.find(self.manifest.drawn(round_))
        self._journal.admit(self._exchange.nodes)

    def _vouching(self, round_: int) -> int | None:
        """The latest round whose cohort can vouch for the model that it began with."""
        if not self._catch_up.drawn:
            return None
        return round_ if len(self._progress.last) >= self.manifest.min_sites else self._journal.vouched(round_)[0]

    def _distribute_keys(self) -> None:
        agreed = distribute_keys(self._exchange, self.manifest, self._members.joined)
        self._exchange.nodes = {s: n for s, n in self._exchange.nodes.items() if s in agreed}
        if len(self._exchange.nodes) < self.manifest.min_sites:
            raise self._too_few("agreed on keys")

    def _round(self, round_: int) -> RoundOutcome:
        committed = self._train(round_)
        metrics_round, metrics = self._opened_metrics(self._progress.last, before=round_)
        if len(committed) < self.manifest.min_sites:
            nobody = not self._progress.last and set(self._exchange.refusals) >= set(self._exchange.nodes)
            if nobody and round_ != self._progress.interrupted:  # sites that died in a round miss that one only
                raise self._too_few(f"took part in round {round_}")
            self._log_abandoned(round_, "too few sites trained")
            return RoundOutcome(round_, (), True, 0, metrics_round, metrics)
        self._journal.close(self._exchange.address("train", round_))
        total = self._sum(round_, committed)
        if total is None:
            self._log_abandoned(round_, "a site of the cohort did not seal")
            return RoundOutcome(round_, tuple(sorted(committed)), True, 0, metrics_round, metrics)
        sent = total.uplink / len(total.cohort) / self.manifest.layout.size if self.manifest.trains_in(round_) else None
        return RoundOutcome(round_, total.cohort, False, total.uplink, metrics_round, metrics, sent)

    def _train(self, round_: int) -> dict[str, Envelope]:
        place = self._exchange.address("train", round_)
        replies = self._exchange.ask(place, partial(self._catch_up.requests, place, m.TrainRequest), m.TrainReply)
        models = {(reply.model, reply.state) for _, reply in replies.values()}
        if len(models) > 1:
            raise SealingError(
                "the sites' models are not bit-identical",
                where=f"round {round_}",
                hint="install one version of confide and numpy at all sites; nothing was applied",
            )
        if models:
            self._progress.model = next(iter(models))[0]
        self._progress.last = {site: envelope for site, (envelope, _) in replies.items()}
        return {site: envelope for site, (envelope, reply) in replies.items() if reply.commitment != m.NO_UPDATE}

    def _sum(self, round_: int, replies: Mapping[str, Envelope]) -> Total | None:
        """The sum over everybody who trained; where the run retries, without those who then did not seal."""
        retry = self.manifest.sealing.retry
        total = next(iter(self._journal.totals(round_, round_)), None)
        places = [self._exchange.address("seal", round_, attempt=a) for a in range(_ATTEMPTS if retry else 1)]
        asked = [names for place in places if (names := self._journal.asked(place))]
        cohort = asked[-1] if asked else tuple(sorted(replies))
        for place in places[max(0, len(asked) - 1) :] if total is None else ():
            total, uplink, sealed = self._seal(round_, place.attempt, {s: replies[s] for s in cohort})
            if total is not None:
                total = replace(total, uplink=uplink, sealed=sealed)
                self._journal.put_total(total)
                break
            cohort = tuple(sorted(sealed))
            if len(cohort) < self._quorum(len(replies)):
                break
        return self._unlock(total) if retry and total is not None else total

    def _quorum(self, committed: int) -> int:
        """The smallest cohort that a round is sealed for, where so many sites have trained for it: what two thirds of
        them paid for is not thrown away for the sake of a few, nor is a sum made of a few."""
        return max(self.manifest.min_sites, -(-2 * committed // 3))

    def _seal(
        self, round_: int, attempt: int, replies: Mapping[str, Envelope]
    ) -> tuple[Total | None, int, dict[str, Envelope]]:
        """One attempt: (the sum if everybody sealed, bytes that arrived, who sealed and with which signed reply)."""
        cohort, place = tuple(sorted(replies)), self._exchange.address("seal", round_, attempt=attempt)
        digests = {s: replies[s].digest for s in cohort}
        agreed = transcript(
            self.manifest.digest, self.manifest.roster_version, place.key_epoch, round_, digests, attempt
        )
        accumulator, uplink = self._profile.accumulator(self.manifest.vector_size(round_)), 0
        sealed: dict[str, Envelope] = {}
        # A payload is added as it arrives and then forgotten: memory is that of one sum and one payload.
        asking = self._exchange.each(place, partial(self._seal_requests, place, replies, agreed), m.SealReply)
        for site, envelope, reply in asking:
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
        total = Total(round_, cohort, tuple(digests.values()), agreed, attempt, accumulator.total())
        if self.manifest.single_updates:
            total = replace(total, signed=tuple(m.Statement.of(site, reply) for site, reply in sealed.items()))
        return total, uplink, sealed

    def _seal_requests(self, place: Address, replies: Mapping[str, Envelope], agreed: str) -> dict[str, Envelope]:
        """Requests to seal for a cohort, which is logged first: the requests show that it was."""
        cohort = sorted(replies)
        headers = {s: Header.model_validate_json(replies[s].header) for s in cohort}
        self._journal.append_once(
            audit.Cohort(
                run=self.manifest.run, round=place.round, attempt=place.attempt, key_epoch=place.key_epoch,
                cohort=cohort, transcript=agreed, statements=[replies[s].digest for s in cohort],
                checkpoints=[headers[s].checkpoint for s in cohort],
            )
        )  # fmt: skip
        body = m.SealRequest(cohort=tuple(cohort), statements=tuple(m.Statement.of(s, replies[s]) for s in cohort))
        return {s: self._exchange.sign(place, s, body) for s in cohort}

    def _unlock(self, total: Total) -> Total | None:
        """Every member's own mask of this attempt, against the proof that all of them sealed it."""
        place = self._exchange.address("unlock", total.round, attempt=total.attempt)
        body = m.UnlockRequest(statements=tuple(m.Statement.of(s, total.sealed[s]) for s in total.cohort))
        unlocked = self._exchange.ask(
            place, lambda: {s: self._exchange.sign(place, s, body) for s in total.cohort}, m.UnlockReply
        )
        if set(unlocked) != set(total.cohort):
            return None
        statements = tuple(m.Statement.of(s, unlocked[s][0]) for s in total.cohort)
        opened = replace(total, unlocked=statements)
        self._journal.put_total(opened)
        return opened

    def _release(self) -> Released:
        place, journal = self._exchange.address("release", self.manifest.rounds + 2), self._journal
        last = journal.replies(self._exchange.address("train", self.manifest.rounds + 1))
        statements = tuple(m.Statement.of(s, e) for s, e in sorted(last.items()))
        asking = partial(self._catch_up.requests, place, m.ReleaseRequest, statements=statements)
        replies = self._exchange.ask(place, asking, m.ReleaseReply)
        if not replies:
            raise self._too_few("released the model")
        journal.close(place)
        if len({(reply.model, reply.key, envelope.chunks[:1]) for envelope, reply in replies.values()}) != 1:
            raise SealingError("the sites released different models", where="release", hint="nothing was written")
        metrics_round, metrics = self._opened_metrics(
            {s: e for s, (e, _) in replies.items()}, before=place.round, skip=1
        )
        envelope, reply = next(iter(replies.values()))
        # The last sum changes no weights, so all of the last cohort have signed this digest already.
        named = keyed_digest(bytes.fromhex(reply.key), "model", envelope.chunks[0]).hex()
        if named != self._progress.model or digest("model", envelope.chunks[0]).hex() != reply.model:
            raise SealingError("the released model is not the one that the sites signed", where="release",
                               hint="nothing was written")  # fmt: skip

        journal.append_once(
            audit.ModelReleased(
                run=self.manifest.run, model=reply.model, key=reply.key, sites=sorted(replies),
                checkpoints=[Header.model_validate_json(replies[s][0].header).checkpoint for s in sorted(replies)],
            )
        )  # fmt: skip
        journal.append_once(audit.RunEnded(run=self.manifest.run, status="finished"))
        journal.finish()
        outcomes = tuple(journal.outcomes())
        sent = [o.update_bytes for o in outcomes if o.update_bytes is not None]
        return Released(
            weights=np.frombuffer(envelope.chunks[0], dtype="<f4").astype(np.float32),
            model=reply.model,
            outcomes=outcomes,
            metrics_round=metrics_round,
            metrics=metrics,
            bytes_per_parameter=float(np.mean(sent)) if sent else 0.0,
        )

    # --- parts -------------------------------------------------------------------------------------------------

    def _log_abandoned(self, round_: int, reason: str) -> None:
        self._journal.append_once(audit.RoundAbandoned(run=self.manifest.run, round=round_, reason=reason))

    def _opened_metrics(
        self, replies: Mapping[str, Envelope], *, before: int, skip: int = 0
    ) -> tuple[int | None, Floats | None]:
        """The metric coordinates that the sites opened from the latest sum before a round; all of them must agree."""
        latest, cohort = self._journal.latest(before)
        if latest not in self.manifest.metric_rounds or not replies:
            return None, None
        opened = {(e.chunks if skip else self._catch_up.metrics(s, e, before))[skip:] for s, e in replies.items()}
        if self._catch_up.drawn and len(opened) > 1:
            opened.discard(())  # of those that took the model over: they have not opened that sum themselves
        if len(opened) != 1 or len(next(iter(opened))) != 1:
            raise SealingError("the sites report different metrics", where=f"round {latest}")
        values = np.frombuffer(next(iter(opened))[0], dtype="<f8").astype(np.float64)
        if latest != self._progress.metrics_logged:
            self._journal.append_once(
                audit.MetricsReleased(
                    run=self.manifest.run, round=latest, cohort_size=len(cohort),
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
