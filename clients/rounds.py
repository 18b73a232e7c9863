"""What a site does in a round: train, seal, unlock, and at the end release. See `Site` for the invariants."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from confide.clients.agreement import agree, agree_to_release, agree_to_take_over, agree_to_unlock
from confide.clients.continuity import Continuity
from confide.clients.cutoff import compute_until_cut_off
from confide.clients.data.records import SiteRecords
from confide.clients.participants import Participants, ParticipantSource
from confide.clients.policy import SitePolicy
from confide.clients.run import SiteRun, model_digest
from confide.clients.snapshots import SnapshotStore
from confide.clients.store import ModelState, SiteStore
from confide.errors import ConfideError, PolicyError, SealingError
from confide.privacy.audit import records as audit
from confide.privacy.audit.log import Log
from confide.privacy.consent import RoundKeys
from confide.privacy.digest import digest
from confide.privacy.dp import Ledger, PrivacyEvent, Role
from confide.privacy.dp.events import event_to_json
from confide.privacy.sealing import Agreement
from confide.protocol import messages as m
from confide.protocol.envelope import Envelope, Header
from confide.protocol.manifest import Manifest

__all__ = ["NOT_AUTHENTIC", "Answer", "RoundSteps"]

Floats = NDArray[np.float64]
NOT_AUTHENTIC = "a sum was not authentic: this site has left the run for good"


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply before it is signed, and the effect that must be durable with it."""

    message: m.Message
    chunks: tuple[bytes, ...] = ()
    sealed: str | None = None
    unlocked: str | None = None
    control: bytes | None = None


class RoundSteps:
    """One site's steps; requests are verified before they come here.

    Args:
        policy: What the operator allows right now.
        records: The site's encoded data.
        participants: Where a run's snapshots come from.
        ledger: The site's privacy ledger.
        store: Its durable state.
        log: Its federated log.
        local_log: Its local log.
        continuity: What it keeps of its peers' logs.
        snapshots: Where it keeps who was in each round.
        round_keys: Keys of the commitment to a round's snapshot, by run and round.
    """

    def __init__(
        self,
        *,
        policy: Callable[[], SitePolicy],
        records: SiteRecords,
        participants: Callable[[Manifest], ParticipantSource],
        ledger: Ledger,
        store: SiteStore,
        log: Log,
        local_log: Log,
        continuity: Continuity,
        snapshots: SnapshotStore,
        round_keys: Callable[[str, int], RoundKeys],
    ) -> None:
        self._continuity, self._snapshots, self._round_keys = continuity, snapshots, round_keys
        self._policy, self._records, self._participants = policy, records, participants
        self._ledger, self._store, self._log, self._local_log = ledger, store, log, local_log

    def train(self, run: SiteRun, header: Header, request: Envelope) -> Answer:
        """Apply earlier sums, charge, compute, commit to the update."""
        kind: type[m.TrainRequest] | type[m.LateTrainRequest] = m.TrainRequest
        if header.type == m.LateTrainRequest.TYPE:
            kind = m.LateTrainRequest
        message, round_ = m.decode(kind, header.type, request.body), header.round
        # Rounds only go forward; the release counts as the last.
        if not self._store.latest_round(run.manifest.run) < round_ <= run.manifest.rounds + 1:
            raise SealingError(f"there is no round {round_} to come", where=f"run {run.manifest.run}")
        if run.site not in run.manifest.drawn(round_):
            raise SealingError(f"round {round_} was not drawn for this site", where=f"run {run.manifest.run}")
        secret = run.keys.session.secret_digest  # without keys there is nothing to charge for
        chunks, held = request.chunks, self._model(run)
        if isinstance(message, m.LateTrainRequest):
            held, chunks = self._take_over(run, message.handover, chunks, held, before=round_)
        model, tag = self._apply(run, message.sums, chunks, held, before=round_)
        self._settle_unsent(run, round_)
        charged = self._ledger.stands(f"{run.manifest.run}/{round_}/")
        if charged and not run.reproducible and round_ > run.manifest.rounds:
            nothing = m.TrainReply(
                commitment=m.NO_UPDATE, model=tag, state=run.state_tag(model), secret=secret,
                coordinator=header.checkpoint,
            )  # fmt: skip
            return _with_model(run, round_, nothing, model)
        if charged and not run.reproducible:
            # What was computed under them may have left before this site's state was lost or put back.
            raise SealingError(f"round {round_} was charged before and is not computed again", where=f"site {run.site}")
        # A seed gives the same update again, byte for byte: that is no second release.
        entries = self._log.entries() if charged else ()
        logged = {e.charge for e in entries if isinstance(e, audit.Charged)}
        for charge, event in self._charges(run, round_).values():
            self._ledger.reserve(charge, event)
            if charge not in logged:
                self._log.append(
                    audit.Charged(run=run.manifest.run, round=round_, charge=charge, event=event_to_json(event))
                )
        vector = self._compute(run, round_, model)
        commitment = digest("commitment", secrets.token_bytes(32), vector.tobytes()).hex()
        reply = m.TrainReply(
            commitment=commitment, model=tag, state=run.state_tag(model), secret=secret, coordinator=header.checkpoint,
        )  # fmt: skip
        self._log.append(
            audit.UpdateCommitted(
                run=run.manifest.run, round=round_, commitment=commitment, model=reply.model, state=reply.state,
                coordinator=header.checkpoint,
            )
        )  # fmt: skip
        run.pending, run.attempts = (round_, vector), {}
        return _with_model(run, round_, reply, model)

    def seal(self, run: SiteRun, header: Header, request: Envelope) -> Answer:
        """Seal the update for a cohort whose members all agree."""
        message, round_, attempt = m.decode(m.SealRequest, header.type, request.body), header.round, header.attempt
        name, retries = run.manifest.run, run.manifest.sealing.retry
        if attempt and not retries:
            raise SealingError("this run seals each round for one cohort", where=f"run {name}")
        agreed = agree(
            run, round_, message, model=self._model(run), min_sites=self._policy().min_sites,
            own_reply=self._store.reply_digest(run.address(round_, "train")), coordinator=self._policy().coordinator,
            attempt=attempt,
        )  # fmt: skip
        self._continuity.note(run.manifest, message.statements)
        unlocked, told = self._store.unlocked_transcript(name, round_) is not None, False
        if run.reproducible and not unlocked and (run.pending is None or run.pending[0] != round_):
            run.pending, run.attempts = (round_, self._compute(run, round_, self._model(run))), {}
            entries = (e for e in self._log.entries() if isinstance(e, audit.Sealed) and e.run == name)
            told = any((e.round, e.attempt, e.transcript) == (round_, attempt, agreed) for e in entries)
        if run.pending is None or run.pending[0] != round_ or unlocked:
            raise SealingError(f"there is no update of round {round_} left to seal", where=f"run {name}")
        agreement = Agreement(message.cohort, agreed, self_masked=retries)
        rounding = run.rounding(round_)
        payload = run.keys.session.seal(run.pending[1], run.segments(round_), agreement, rounding).payload()
        control = run.next_control(round_, run.pending[1])
        boxed = None if control is None else self._store.box_control(name, round_, control, run.keys.storage)
        if not told:
            self._log.append(
                audit.Sealed(
                    run=name, round=round_, attempt=attempt, cohort=list(message.cohort), transcript=agreed,
                    coordinator=header.checkpoint,
                )
            )  # fmt: skip
        if retries:
            run.attempts[attempt] = agreement
        else:
            run.pending = None
        tags = tuple(f"{tag:016x}" for tag in payload.tags)  # of one length: sizes tell nothing
        return Answer(m.SealReply(transcript=agreed, tags=tags), payload.chunks, sealed=agreed, control=boxed)

    def unlock(self, run: SiteRun, header: Header, request: Envelope) -> Answer:
        """Give away the seed of this site's own mask in one attempt."""
        message, round_, attempt = m.decode(m.UnlockRequest, header.type, request.body), header.round, header.attempt
        name = run.manifest.run
        # Own masks live in the process that sealed: a later one would give away the seed of another mask.
        here = run.pending is not None and run.pending[0] == round_
        sealed = run.attempts.get(attempt) if here else None
        if sealed is None or self._store.unlocked_transcript(name, round_) is not None:
            raise SealingError(f"round {round_} has no attempt left to unlock", where=f"run {name}")
        agree_to_unlock(run, round_, attempt, message, sealed=sealed, coordinator=self._policy().coordinator)
        seed = run.keys.session.unlock(sealed)
        run.pending = None
        self._log.append(audit.Unlocked(run=name, round=round_, attempt=attempt, transcript=sealed.transcript))
        reply = m.UnlockReply(transcript=sealed.transcript, seed=seed.hex())
        return Answer(reply, unlocked=sealed.transcript)

    def release(self, run: SiteRun, header: Header, request: Envelope) -> Answer:
        """Hand out the trained model, once enough sites have reached the end with it."""
        message = m.decode(m.ReleaseRequest, header.type, request.body)
        if header.round != run.manifest.rounds + 2:
            raise SealingError("a model is released after the last round", where=f"run {run.manifest.run}")
        model, tag = self._apply(run, message.sums, request.chunks, self._model(run), before=header.round)
        self._settle_unsent(run, header.round)
        policy = self._policy()
        agree_to_release(run, message, model=model, tag=tag, min_sites=policy.min_sites, coordinator=policy.coordinator)
        self._continuity.note(run.manifest, message.statements)
        if not policy.release and not run.manifest.statistics:  # there is no trained model in a statistics run
            self.end(run)  # its part is over all the same
            raise PolicyError("release is not allowed", where=f"policy of site {run.site}")
        weights = model.weights.astype("<f4").tobytes()
        named, key = model_digest(model), run.keys.model_key(model.trained).hex()
        released = audit.ModelReleased(run=run.manifest.run, model=named, key=key, sites=[], checkpoints=[])
        if released not in self._log.entries():  # a process that died before it answered has logged it already
            self._log.append(released)
        return Answer(m.ReleaseReply(model=named, key=key), (weights, *model.metric_chunks))

    def _charges(self, run: SiteRun, round_: int) -> dict[Role, tuple[str, PrivacyEvent]]:
        """What a round costs each role, and what the charge is called."""
        name = run.manifest.run
        return {e.role: (f"{name}/{round_}/{e.role.value}", e) for e in run.manifest.charges(round_)}

    def _compute(self, run: SiteRun, round_: int, model: ModelState) -> Floats:
        """The round's vector under the charges that were made for it, with whose consent it rests on noted."""
        charges = {role: charge for role, (charge, _) in self._charges(run, round_).items()}
        if run.manifest.control_variates:
            own = self._store.control(run.manifest.run, run.keys.storage)
            run.control = run.control if own is None else own
        source, ledger = self._participants(run.manifest), self._ledger if charges else None
        source.reads()  # from here on they are this round's
        try:
            take = partial(source.take, ledger)
            vector, used, attempts = compute_until_cut_off(run, round_, model, self._records, take)
        except ConfideError:
            self._local_log.append(*_reads(run, round_, source))
            raise
        source.hold(used, charges)
        self._log_snapshot(run, round_, used, source, attempts)
        return vector

    def _log_snapshot(
        self, run: SiteRun, round_: int, used: Participants, source: ParticipantSource, attempts: int
    ) -> None:
        """A commitment of constant size in the federated log; what opens it, and the numbers, stay here."""
        member = run.manifest.member(run.site)
        population = member.population if member is not None else 0
        keys = self._round_keys(run.manifest.run, round_)
        root = self._snapshots.put(run.manifest.run, round_, source.members(used), population, keys)
        self._local_log.append(
            audit.LocalSnapshot(
                run=run.manifest.run, round=round_, persons=len(self._records.persons), attempts=attempts,
                training=int(used.train.sum()), held_out=int(used.held_out.sum()),
            ),
            *_reads(run, round_, source),
        )  # fmt: skip
        self._log.append(audit.SnapshotTaken(run=run.manifest.run, round=round_, commitment=root))

    def _take_over(
        self, run: SiteRun, handover: m.Handover, chunks: tuple[bytes, ...], held: ModelState, *, before: int
    ) -> tuple[ModelState, tuple[bytes, ...]]:
        """Take a newer model over; it, and the chunks that are left, which are those of the sums."""
        if handover.round >= before:
            raise SealingError("a model of a round to come", where=f"run {run.manifest.run}")
        own, rest = chunks[: handover.chunks], chunks[handover.chunks :]
        coordinator = self._policy().coordinator
        model, tag = agree_to_take_over(run, handover, own, model=held, coordinator=coordinator)
        self._log.append(audit.TakenOver(run=run.manifest.run, round=handover.round, model=tag))
        self._store.put_model(run.manifest.run, model, run.keys.storage)
        return model, rest

    def _apply(
        self, run: SiteRun, sums: tuple[m.SumReference, ...], chunks: tuple[bytes, ...], model: ModelState, *,
        before: int,
    ) -> tuple[ModelState, str]:  # fmt: skip
        """The model with these sums applied, as it is stored then, and its tag."""
        tag, offset = "", 0
        for reference in sums:
            part = chunks[offset : offset + reference.chunks]
            offset += reference.chunks
            if reference.round <= model.round:
                continue
            if reference.round >= before or not self._agreed_to(run, reference):
                raise SealingError("a sum that this site did not agree to", where=f"round {reference.round}")
            try:
                model = run.apply(model, reference, part)
            except SealingError as error:
                # A second look at a forged sum would be an oracle: the keys go, and the run ends here, for good.
                # Which check failed stays at the site, for the same reason.
                self._store.stop_run(run.manifest.run, error.what)
                run.destroy()
                self._local_log.append(audit.LocalRefusal(run=run.manifest.run, step="open", reason=str(error)))
                self._log.append(audit.RunStopped(run=run.manifest.run, reason=NOT_AUTHENTIC))
                raise SealingError(NOT_AUTHENTIC, where=f"round {reference.round}") from error
            tag = run.model_tag(model)
            self._log.append(
                audit.Opened(
                    run=run.manifest.run, round=reference.round, transcript=reference.transcript,
                    model=tag, saturated=f"{model.saturated:.6f}",
                )
            )  # fmt: skip
            keep = self._store.put_model
            if run.manifest.control_variates:
                keep = partial(self._store.put_model_and_control, counted=run.site in reference.cohort)
            keep(run.manifest.run, model, run.keys.storage)
        if offset != len(chunks):
            raise SealingError("chunks that no sum names", where=f"run {run.manifest.run}")
        return model, tag or run.model_tag(model)

    def _agreed_to(self, run: SiteRun, reference: m.SumReference) -> bool:
        """Is a sum the one that this site took part in, where it took part? One that counts this site though it has
        sealed nothing for it is the sum of another day: this site's state was put back."""
        name, retries = run.manifest.run, run.manifest.sealing.retry
        sealed = self._store.sealed_transcript(name, reference.round, reference.attempt)
        if retries:
            sealed = self._store.unlocked_transcript(name, reference.round) or sealed
        if sealed is None:
            return (retries or not reference.attempt) and run.site not in reference.cohort
        return (retries or not reference.attempt) and sealed == reference.transcript

    def _settle_unsent(self, run: SiteRun, round_: int) -> None:
        """An update that was never sealed is destroyed; as nothing of it left, its charge shrinks to nothing.

        Only this process knows that: after a restart a charge stands, whatever the disk (a restored one, too) says.
        """
        if run.pending is None or run.pending[0] >= round_:
            return
        name, unsent = run.manifest.run, run.pending[0]
        run.pending = None
        if run.attempts:
            return
        for charge in self._ledger.open_charges(f"{name}/{unsent}/"):
            # The log first: a ledger that gives back more than its log says was edited (`confide.clients.continuity`).
            self._log.append(audit.Settled(run=name, charge=charge, steps=0))
            self._ledger.settle(charge, 0)

    def end(self, run: SiteRun) -> None:
        """The run is over here: every key of it goes, and with them whatever was recorded under them. What it was
        charged and not given back stands whole from now on."""
        self.expire(run.manifest.run)
        if not run.keys.destroyed:
            secret = run.keys.session.secret_digest
            run.destroy()
            self._log.append(audit.KeysDestroyed(run=run.manifest.run, secret=secret))

    def drop(self, run: SiteRun) -> None:
        """The run is over without a release: an update that was not sealed goes unsent, and every key goes."""
        self._settle_unsent(run, run.manifest.rounds + 2)
        run.destroy()

    def expire(self, run: str) -> None:
        """What a run was charged and not given back stands whole from now on."""
        self._ledger.expire(f"{run}/")

    def _model(self, run: SiteRun) -> ModelState:
        return self._store.model(run.manifest.run, run.keys.storage)


def _with_model(run: SiteRun, round_: int, reply: m.TrainReply, model: ModelState) -> Answer:
    """A `train` reply; of the first that the round was drawn for, with the model, for those of the next one."""
    drawn, chunks = run.manifest.drawn(round_), model.metric_chunks
    if run.manifest.sites_per_round is None or run.site not in drawn[: m.HANDING_OVER]:
        return Answer(reply, chunks)
    return Answer(reply, (*chunks, *model.chunks))


def _reads(run: SiteRun, round_: int, source: ParticipantSource) -> list[audit.Record]:
    """How the registry was asked for a round: for the local log."""
    name, purpose = run.manifest.run, run.manifest.purpose
    return [
        audit.ConsentRead(
            run=name, round=round_, purpose=purpose, as_of=read.as_of, sequence=read.sequence, outcome=read.outcome
        )
        for read in source.reads()
    ]  # fmt: skip
