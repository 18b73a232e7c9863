"""The site: answers a coordinator's signed requests, and decides by itself whether it does.

Invariants (DESIGN's promises, as kept here):
1. *No consent, no gradient*: a snapshot is taken for every round and again at the cut-off, just before the site
   commits to its update; if anybody used has lost consent meanwhile, the update is computed anew.
2. *No budget, no update*: the round's charges are durable before a record is read for it.
3. *At most one cohort a round*, durably; only for a cohort of the run's size whose digests all agree.
4. *Nothing unsaid leaves*: only the messages of `confide.protocol.messages`; a refusal whose reason is not public is
   the uniform `abstains`.
5. The same request gets the stored answer; nothing is trained or charged twice.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from pydantic import ValidationError

from confide.clients.agreement import agree, agree_to_release
from confide.clients.cutoff import compute_until_cut_off
from confide.clients.data.records import SiteRecords
from confide.clients.participants import Participants, ParticipantSource
from confide.clients.policy import SitePolicy
from confide.clients.run import SiteRun, model_digest, state_digest
from confide.clients.store import ModelState, SiteStore, Update
from confide.errors import ConfideError, DataError, PolicyError, SealingError, StorageError
from confide.privacy.audit import records as audit
from confide.privacy.audit.log import Log
from confide.privacy.consent import Registry, SiteKey
from confide.privacy.digest import digest
from confide.privacy.dp import Ledger, SecureRandom
from confide.privacy.dp.events import event_to_json
from confide.privacy.sealing import Agreement
from confide.protocol import messages as m
from confide.protocol.envelope import EVERYBODY, Address, Envelope, Header, expect, seal_envelope, verify
from confide.protocol.identity import Identity
from confide.protocol.manifest import Manifest

__all__ = ["Site"]

_log = logging.getLogger(__name__)
_NOT_AUTHENTIC = "a sum was not authentic: this site has left the run for good"


@dataclass(frozen=True, slots=True)
class _Answer:
    """A reply before it is signed, and the effect that must be durable with it."""

    message: m.Message
    chunks: tuple[bytes, ...] = ()
    update: Update | None = None
    sealed: str | None = None


class Site:
    """One site with its data, registry, ledger and policy.

    Args:
        identity: The site's name and signing key.
        policy: What it allows.
        records: Its encoded data.
        registry: Its consent registry.
        ledger: Its privacy ledger.
        key: Its site-lifetime key.
        store: Its durable state.
        log: Its federated log: nothing in it depends on one person, and it may travel.
        local_log: Its local log: exact numbers and full reasons; never leaves.
        device: `auto`, `cpu`, `cuda:N`.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        policy: SitePolicy,
        records: SiteRecords,
        registry: Registry,
        ledger: Ledger,
        key: SiteKey,
        store: SiteStore,
        log: Log,
        local_log: Log,
        device: str = "auto",
    ) -> None:
        self.identity, self.policy, self.records, self.ledger = identity, policy, records, ledger
        self._registry, self._key, self._store, self._device = registry, key, store, device
        self.log, self._local_log = log, local_log
        self._rng = SecureRandom()
        self._runs: dict[str, SiteRun] = {}
        self._sources: dict[tuple[str, float], ParticipantSource] = {}
        #: The latest refusal with its full reason, for the operator; only shareable reasons are sent.
        self.last_refusal: ConfideError | None = None

    @property
    def name(self) -> str:
        """The site's name in the roster."""
        return self.identity.name

    def check(self, manifest: Manifest) -> None:
        """Everything that is decided once, before joining: policy, model, budget, data.

        Raises:
            ConfideError: The site does not take part; says why, to its operator.
        """
        self.policy.check(manifest, self.name)
        run = self._run(manifest)
        if manifest.privacy.is_private:
            self.ledger.check(manifest.all_charges())
        if not self.records.persons:
            raise DataError("holds no records", where=f"site {self.name}", hint="check data.site, or drop the site")
        present = self.participants(run.manifest)
        if int(present.train.sum()) < self.policy.min_subjects:
            raise DataError(
                f"fewer than {self.policy.min_subjects} consenting subjects to train on",
                where=f"site {self.name}",
                hint="lower sites.min_subjects if this is intended, or leave the site out",
            )

    def current_model(self, run: str) -> ModelState:
        """The replicated model of a run, for this site's own use."""
        return self._store.model(run)

    def participants(self, manifest: Manifest) -> Participants:
        """Who may take part right now. For the site's own use: it never leaves."""
        place = (manifest.purpose, manifest.held_out)
        source = self._sources.get(place)
        if source is None:
            source = self._sources[place] = ParticipantSource(self._registry, self._key, self.records, *place)
        return source.take(self.ledger if manifest.privacy.is_private else None)

    def close(self) -> None:
        """Release the site's files."""
        self._registry.close()
        self.ledger.close()
        self._store.close()
        self.log.close()
        self._local_log.close()

    def handle(self, step: str, request: Envelope) -> Envelope:
        """Answer one request.

        Args:
            step: Which handler Flower's message type names.
            request: The unverified envelope.

        Returns:
            A signed reply; a refusal is one too.

        Raises:
            SealingError: The request is not authentic, so there is nobody to answer to.
        """
        header = verify(request, self.policy.coordinator_key, sender=self.policy.coordinator)
        if header.step != step:
            raise SealingError("was sent as another step than it was signed for", where=f"site {self.name}")
        try:
            stored = self._store.stored_reply(header.run, header.round, header.step, request.digest)
            if stored is not None:
                return stored
            if self._store.stopped(header.run) is not None:
                raise SealingError(_NOT_AUTHENTIC, where=f"run {header.run}")
            run = self._joining(header, request) if step == "join" else self._joined(header)
            address = run.address(header.round, header.step)
            recipient = EVERYBODY if step == "join" else self.name
            expect(header, address, sender=self.policy.coordinator, recipient=recipient, request="")
            if step in ("join", "secret", "keys") and header.round != 0:
                raise SealingError("keys are agreed on before the first round only", where=f"run {header.run}")
            handler: Callable[[SiteRun, Header, Envelope], _Answer] = getattr(self, f"_{step}")
            return self._commit(run, address, request, handler(run, header, request))
        except ConfideError as error:
            return self._refuse(header, request, error)
        except (sqlite3.Error, OSError) as error:
            lost = StorageError(f"does not take this site's state ({type(error).__name__})", where="disk",
                                hint="free space, then start again: what was durable is kept")  # fmt: skip
            return self._refuse(header, request, lost)

    # --- steps -------------------------------------------------------------------------------------------------

    def _join(self, run: SiteRun, header: Header, request: Envelope) -> _Answer:
        m.decode(m.JoinRequest, header.type, request.body)
        if len(request.chunks[1]) != 4 * run.manifest.layout.size:
            raise SealingError("the initial model is not the manifest's", where=f"run {run.manifest.run}")
        weights = np.frombuffer(request.chunks[1], dtype="<f4").astype(np.float32)
        model = ModelState(0, weights, run.strategy.initial_state(len(weights)), None)
        if model_digest(model) != run.manifest.initial_model:
            raise SealingError("the initial model is not the manifest's", where=f"run {run.manifest.run}")
        self.check(run.manifest)
        self._store.add_run(run.manifest.run, run.manifest.to_bytes(), model)
        self.log.append(audit.Joined(run=run.manifest.run, manifest=run.manifest.digest, coordinator=header.checkpoint))
        return _Answer(m.JoinReply(ephemeral=run.keys.public.hex()))

    def _secret(self, run: SiteRun, header: Header, request: Envelope) -> _Answer:
        message = m.decode(m.SecretRequest, header.type, request.body)
        return _Answer(m.SecretReply(), run.keys.make_secret(run.address(0, "secret"), message.statements))

    def _keys(self, run: SiteRun, header: Header, request: Envelope) -> _Answer:
        message = m.decode(m.KeysRequest, header.type, request.body)
        if len(request.chunks) != 1:
            raise SealingError("a keys request holds one wrapped secret", where=f"site {self.name}")
        made = message.made
        digest_ = run.keys.accept(run.address(0, "keys"), message.statements, made, made.site, request.chunks[0])
        self.log.append(audit.KeysAgreed(run=run.manifest.run, maker=made.site, secret=digest_))
        return _Answer(m.KeysReply(secret=digest_))

    def _train(self, run: SiteRun, header: Header, request: Envelope) -> _Answer:
        message, round_ = m.decode(m.TrainRequest, header.type, request.body), header.round
        # Rounds only go forward; the release counts as the last.
        if not self._store.latest_round(run.manifest.run) < round_ <= run.manifest.rounds + 1:
            raise SealingError(f"there is no round {round_} to come", where=f"run {run.manifest.run}")
        secret = run.keys.session.secret_digest  # without keys there is nothing to charge for
        model = self._apply(run, message.sums, request.chunks, before=round_)
        self._settle_unsent(run, round_)
        for event in run.manifest.charges(round_):
            charge = f"{run.manifest.run}/{round_}/{event.role.value}"
            self.ledger.reserve(charge, event)
            self.log.append(
                audit.Charged(run=run.manifest.run, round=round_, charge=charge, event=event_to_json(event))
            )
        vector, used, attempts = compute_until_cut_off(
            run, round_, model, self.records, lambda: self.participants(run.manifest)
        )
        self._log_snapshot(run, round_, used, attempts)
        commitment = digest("commitment", secrets.token_bytes(32), vector.tobytes()).hex()
        reply = m.TrainReply(
            commitment=commitment, model=model_digest(model), state=state_digest(model),
            secret=secret,
        )  # fmt: skip
        self.log.append(
            audit.UpdateCommitted(
                run=run.manifest.run, round=round_, commitment=commitment, model=reply.model, state=reply.state,
                coordinator=header.checkpoint,
            )
        )  # fmt: skip
        return _Answer(reply, model.metric_chunks, update=Update(round_, vector))

    def _seal(self, run: SiteRun, header: Header, request: Envelope) -> _Answer:
        message, round_ = m.decode(m.SealRequest, header.type, request.body), header.round
        agreed = agree(
            run, round_, message, model=self.current_model(run.manifest.run), min_sites=self.policy.min_sites,
            own_reply=self._store.reply_digest(run.manifest.run, round_, "train"), coordinator=self.policy.coordinator,
        )  # fmt: skip
        update = self._store.pending(run.manifest.run, round_)
        if update is None:
            raise SealingError(f"there is no update of round {round_} left to seal", where=f"run {run.manifest.run}")
        payload = run.keys.session.seal(update.vector, run.segments(round_), Agreement(message.cohort, agreed))
        self.log.append(
            audit.Sealed(
                run=run.manifest.run, round=round_, cohort=list(message.cohort), transcript=agreed,
                coordinator=header.checkpoint,
            )
        )  # fmt: skip
        tags = tuple(f"{tag:x}" for tag in payload.tags)
        return _Answer(m.SealReply(transcript=agreed, tags=tags), payload.chunks, sealed=agreed)

    def _release(self, run: SiteRun, header: Header, request: Envelope) -> _Answer:
        message = m.decode(m.ReleaseRequest, header.type, request.body)
        if header.round != run.manifest.rounds + 2:
            raise SealingError("a model is released after the last round", where=f"run {run.manifest.run}")
        if not self.policy.release:
            raise PolicyError("release is not allowed", where=f"policy of site {self.name}")
        model = self._apply(run, message.sums, request.chunks, before=header.round)
        self._settle_unsent(run, header.round)
        agree_to_release(
            run, message, model=model, min_sites=self.policy.min_sites, coordinator=self.policy.coordinator
        )
        weights = model.weights.astype("<f4").tobytes()
        self.log.append(audit.ModelReleased(run=run.manifest.run, model=model_digest(model), sites=[], checkpoints=[]))
        return _Answer(m.ReleaseReply(model=model_digest(model)), (weights, *model.metric_chunks))

    def _log_snapshot(self, run: SiteRun, round_: int, used: Participants, attempts: int) -> None:
        """A commitment of constant size in the federated log, the numbers in the local one."""
        self._local_log.append(
            audit.LocalSnapshot(
                run=run.manifest.run, round=round_, persons=len(self.records.persons), attempts=attempts,
                training=int(used.train.sum()), held_out=int(used.held_out.sum()),
            )
        )  # fmt: skip
        self.log.append(audit.SnapshotTaken(run=run.manifest.run, round=round_, commitment=used.commitment()))

    def _apply(
        self, run: SiteRun, sums: tuple[m.SumReference, ...], chunks: tuple[bytes, ...], *, before: int
    ) -> ModelState:
        model, offset = self.current_model(run.manifest.run), 0
        for reference in sums:
            part = chunks[offset : offset + reference.chunks]
            offset += reference.chunks
            if reference.round <= model.round:
                continue
            sealed = self._store.sealed_transcript(run.manifest.run, reference.round)
            if reference.round >= before or (sealed is not None and sealed != reference.transcript):
                raise SealingError("a sum that this site did not agree to", where=f"round {reference.round}")
            try:
                model = run.apply(model, reference, part)
            except SealingError as error:
                # A second look at a forged sum would be an oracle: the keys go, and the run ends here, for good.
                # Which check failed stays at the site, for the same reason.
                run.keys.destroy()
                self._store.stop_run(run.manifest.run, error.what)
                self._local_log.append(audit.LocalRefusal(run=run.manifest.run, step="open", reason=str(error)))
                self.log.append(audit.RunStopped(run=run.manifest.run, reason=_NOT_AUTHENTIC))
                raise SealingError(_NOT_AUTHENTIC, where=f"round {reference.round}") from error
            self.log.append(
                audit.Opened(
                    run=run.manifest.run, round=reference.round, transcript=reference.transcript,
                    model=model_digest(model),
                )
            )  # fmt: skip
            self._store.put_model(run.manifest.run, model)
        if offset != len(chunks):
            raise SealingError("chunks that no sum names", where=f"run {run.manifest.run}")
        return model

    def _settle_unsent(self, run: SiteRun, round_: int) -> None:
        """An update that was never sealed is destroyed; as nothing of it left, its charge shrinks to nothing."""
        for unsent in self._store.drop_pending(run.manifest.run, round_):
            for charge in self.ledger.open_charges(f"{run.manifest.run}/{unsent}/"):
                self.ledger.settle(charge, 0)
                self.log.append(audit.Settled(run=run.manifest.run, charge=charge, steps=0))

    def _commit(self, run: SiteRun, address: Address, request: Envelope, answer: _Answer) -> Envelope:
        reply = self._sign(address, request, answer.message, answer.chunks)
        self._store.commit_reply(
            run.manifest.run, address.round, address.step, request.digest, reply,
            update=answer.update, sealed=answer.sealed,
        )  # fmt: skip
        return reply

    def _sign(
        self, address: Address, request: Envelope, message: m.Message, chunks: tuple[bytes, ...] = ()
    ) -> Envelope:
        """A signed reply to the coordinator, with the state of the log as it is now."""
        return seal_envelope(
            self.identity,
            address,
            recipient=self.policy.coordinator,
            type_=message.TYPE,
            body=message.to_bytes(),
            checkpoint=self.log.checkpoint().short,
            chunks=chunks,
            request=request.digest,
        )

    def _refuse(self, header: Header, request: Envelope, error: ConfideError) -> Envelope:
        self.last_refusal = error
        _log.warning("site %s refuses a %s request: %s", self.name, header.step, type(error).__name__)
        answer = (
            m.Refusal(kind=error.kind, reason=error.what)
            if error.shareable
            else m.Refusal(kind="abstains", reason="abstains")
        )
        try:
            self._note_refusal(header, error, answer)
        except StorageError as lost:
            self.last_refusal = lost
            raise
        return self._sign(Address(**{f: getattr(header, f) for f in Address.model_fields}), request, answer)

    def _note_refusal(self, header: Header, error: ConfideError, answer: m.Refusal) -> None:
        self._local_log.append(audit.LocalRefusal(run=header.run, step=header.step, reason=str(error)))
        self.log.append(
            audit.Refused(run=header.run, round=header.round, step=header.step, party=self.name, reason=answer.reason)
        )

    def _joining(self, header: Header, request: Envelope) -> SiteRun:
        if len(request.chunks) != 2:
            raise SealingError("a join request holds a manifest and a model", where=f"site {self.name}")
        try:
            manifest = Manifest.from_bytes(request.chunks[0])
        except ValidationError:
            raise SealingError("the manifest cannot be read", where=f"site {self.name}") from None
        if manifest.digest != header.manifest:
            raise SealingError("the manifest is not the one signed for", where=f"site {self.name}")
        self.policy.check(manifest, self.name)
        member = manifest.member(self.name)
        if member is None or member.public_key != self.identity.public_key.hex():
            raise PolicyError("the roster names another key for this site", where=f"policy of site {self.name}")
        return self._run(manifest)

    def _joined(self, header: Header) -> SiteRun:
        if header.run not in self._runs:
            data = self._store.manifest(header.run)
            if data is None:
                raise SealingError(f"this site has not joined run {header.run[:64]}", where=f"site {self.name}")
            self._run(Manifest.from_bytes(data))
        return self._runs[header.run]

    def _run(self, manifest: Manifest) -> SiteRun:
        known = self._runs.get(manifest.run)
        if known is None or known.manifest.digest != manifest.digest:
            stored = self._store.manifest(manifest.run)
            if stored is not None and stored != manifest.to_bytes():
                raise SealingError(f"run {manifest.run} was joined with another manifest", where=f"site {self.name}")
            known = SiteRun(manifest, self.name, self.records, self._rng, self._device, self.policy.coordinator)
            self._runs[manifest.run] = known
        return known
