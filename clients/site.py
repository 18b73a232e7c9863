"""The site: answers a coordinator's signed requests, and decides by itself whether it does.

Invariants (DESIGN's promises, as kept here):
1. *No consent, no gradient*: a snapshot is taken for every round and again at the cut-off, just before the site
   commits to its update; if anybody used has lost consent meanwhile, the update is computed anew.
2. *No budget, no update*: the round's charges are durable before a record is read for it.
3. *At most one cohort a round*, durably; only for a cohort of the run's size whose digests all agree. Where the run
   retries, one attempt a round is unlocked, ever. An update lives in memory only: nothing restored can seal it again.
4. *Nothing unsaid leaves*: only the messages of `confide.protocol.messages`; a refusal whose reason is not public is
   the uniform `abstains`.
5. The same request gets the stored answer; nothing is trained or charged twice.
6. A site whose ledger or log was put back to an earlier day does not start, or stops for good (`continuity`).
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from contextlib import suppress

import numpy as np
from pydantic import ValidationError

from confide.clients.continuity import Continuity, check_ledger
from confide.clients.cutoff import ReplyTime
from confide.clients.data.records import SiteRecords
from confide.clients.ending import OVER, Endings
from confide.clients.membership import Membership
from confide.clients.participants import Participants, ParticipantSource
from confide.clients.past import released_models
from confide.clients.policy import SitePolicy
from confide.clients.promised import check_beside_others
from confide.clients.rounds import NOT_AUTHENTIC, Answer, RoundSteps
from confide.clients.run import SiteRun, model_digest
from confide.clients.snapshots import SnapshotStore
from confide.clients.store import ModelState, SiteStore
from confide.errors import AuditError, ConfideError, DataError, PolicyError, SealingError, StorageError
from confide.privacy.audit import records as audit
from confide.privacy.audit.log import Log
from confide.privacy.consent import Registry, SiteKey
from confide.privacy.dp import Ledger, SecureRandom
from confide.privacy.dp.personal import PersonalLosses
from confide.privacy.sealing.vault import Vault
from confide.protocol import messages as m
from confide.protocol.envelope import EVERYBODY, MAX_BODY, Address, Envelope, Header, expect, seal_envelope, verify
from confide.protocol.identity import Identity
from confide.protocol.manifest import Manifest

__all__ = ["Site"]

_log = logging.getLogger(__name__)
#: Bytes of a request's body besides statements, and of a statement (a signed reply in JSON).
_REQUEST_BODY, _STATEMENT = 64 * 1024, 4096
_MANIFEST = 3 * 2**19  # some 10,000 members; a wrong one costs forty times its size to refuse


class Site:
    """One site with its data, registry, ledger and policy.

    Args:
        identity: The site's name and signing key.
        policy: What it allows.
        membership: Which roster of the federation it has accepted.
        records: Its encoded data.
        registry: Its consent registry.
        ledger: Its privacy ledger.
        personal: What each person has been exposed to; it lives beside the ledger.
        key: Its site-lifetime key.
        store: Its durable state.
        log: Its federated log: nothing in it depends on one person, and it may travel.
        local_log: Its local log: exact numbers and full reasons; never leaves.
        device: `auto`, `cpu`, `cuda:N`.
        vault: Where run keys are kept across restarts; None: in memory only.

    Raises:
        BudgetError: The ledger does not hold what this site's own log says was charged.
        AuditError: The clock was set back.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        policy: SitePolicy,
        membership: Membership,
        records: SiteRecords,
        registry: Registry,
        ledger: Ledger,
        personal: PersonalLosses,
        key: SiteKey,
        store: SiteStore,
        log: Log,
        local_log: Log,
        device: str = "auto",
        vault: Vault | None = None,
    ) -> None:
        self.identity, self.policy, self.records, self.ledger = identity, policy, records, ledger
        self._membership = membership
        self._registry, self._key, self._store, self._device = registry, key, store, device
        self.log, self.local_log, self._vault = log, local_log, vault
        self._rng, self._personal = SecureRandom(), personal
        self._runs: dict[str, SiteRun] = {}
        self._sources: dict[tuple[str, float], ParticipantSource] = {}
        ledger.bind(key.fingerprint)
        check_ledger(ledger, log, personal)
        for run in store.runs():  # what left under their charges, an earlier process knew
            ledger.expire(f"{run}/")
        log.now()  # refuses a clock that was set back
        self._continuity = Continuity(identity, log, store)
        self._snapshots = SnapshotStore(store.path.with_name("snapshots.db"))
        self._rounds = RoundSteps(
            policy=lambda: self.policy, records=records, participants=self.source, ledger=ledger, store=store,
            log=log, local_log=local_log, continuity=self._continuity, snapshots=self._snapshots,
            round_keys=key.round_keys,
        )  # fmt: skip
        self._steps: dict[str, Callable[[SiteRun, Header, Envelope], Answer]] = {
            "join": self._join, "secret": self._secret, "keys": self._keys, "train": self._rounds.train,
            "seal": self._rounds.seal, "unlock": self._rounds.unlock, "release": self._rounds.release,
        }  # fmt: skip
        self._endings = Endings(self.name, store, log, self._rounds, vault)
        self._endings.forget_ended_runs()
        #: The latest refusal with its full reason, for the operator; only shareable reasons are sent.
        self.last_refusal: ConfideError | None = None

    @property
    def name(self) -> str:
        """The site's name in the roster."""
        return self.identity.name

    def check(self, manifest: Manifest) -> None:
        """Everything that is decided once, before joining: policy, roster, model, budget, data.

        Raises:
            ConfideError: The site does not take part; says why, to its operator.
        """
        self._admit(manifest)
        if not self.records.fits(manifest.schema_, manifest.label):
            # A label with one class less would fail at the first person of that class, and so tell of her.
            raise PolicyError(
                "the run's schema or label is not the one that this site's records are encoded with",
                where=f"site {self.name}", hint="agree on one schema, then encode the table with it",
            )  # fmt: skip
        run = self._run(manifest)
        if manifest.privacy.is_private:
            self.ledger.check(manifest.all_charges())
            check_beside_others(manifest, self.ledger, self._store)
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
        """The replicated model of a run under way, for this site's own use.

        Raises:
            SealingError: The run is over for this site: its keys, and with them this copy, are gone.
        """
        return self._store.model(run, self._known(run).keys.storage)

    def source(self, manifest: Manifest) -> ParticipantSource:
        """Where a run's snapshots come from."""
        place = (manifest.purpose, manifest.held_out)
        if place not in self._sources:
            self._sources[place] = ParticipantSource(
                self._registry, self._key, self.records, self._personal, *place, self.log.now
            )
        return self._sources[place]

    def participants(self, manifest: Manifest, round_: int = 1) -> Participants:
        """Who may take part in a round, as of right now. For the site's own use: it never leaves."""
        private = manifest.privacy.is_private
        return self.source(manifest).take(self.ledger if private else None, manifest.charges(round_))

    def note_reply(self, reply: ReplyTime) -> None:
        """Note when a reply left, in the local log: it never leaves, and how long a round took may hang on a person."""
        took, again, deadline, left = (round(1000 * s) for s in (reply.took, reply.again, reply.deadline, reply.left))
        with suppress(ConfideError):  # a disk that is full has been told of already
            self.local_log.append(
                audit.LocalReply(
                    run=reply.run, round=reply.round, took=took, again=again, deadline=deadline, left=left
                )
            )  # fmt: skip

    def close(self) -> None:
        """Release the site's files."""
        self._registry.close()
        self.ledger.close()
        self._personal.close()
        self._store.close()
        self._snapshots.close()
        self.log.close()
        self.local_log.close()

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
            if len(request.body) > self._most_body(header.run):
                raise SealingError("is larger than any honest request", where=f"run {header.run[:64]}")
            stored = self._store.stored_reply(header.address, request.digest)
            if stored is not None:
                return stored
            if (why := self._store.halted()) is not None:
                raise AuditError(why, where=f"site {self.name}", hint="see this site's local log")
            if step == "end":
                held = self._runs.get(header.run)
                place, answer = self._endings.told(header, request, held, self.policy.coordinator)
                return self._commit(place, request, answer)
            if (over := self._store.stopped(header.run)) is not None:
                raise SealingError(OVER if over == OVER else NOT_AUTHENTIC, where=f"run {header.run}")
            if self.policy.hours and step in ("join", "train"):
                self.policy.check_hours(self.log.now(), self.name)
            run = self._joining(header, request) if step == "join" else self._known(header.run)
            making_keys = header.step in ("secret", "keys")
            address = run.address(
                header.round, header.step,
                epoch=header.key_epoch if making_keys else None,
                attempt=header.attempt if header.step in ("seal", "unlock") else 0,
            )  # fmt: skip
            recipient = EVERYBODY if step == "join" else self.name
            expect(header, address, sender=self.policy.coordinator, recipient=recipient, request="")
            if making_keys and self._store.latest_round(header.run) > 0:
                raise SealingError("keys are agreed on before the first round only", where=f"run {header.run}")
            if step in ("join", "secret", "keys") and header.round != 0:
                raise SealingError("keys are agreed on before the first round only", where=f"run {header.run}")
            reply = self._commit(address, request, self._steps[step](run, header, request))
            if step == "release":
                self._rounds.end(run)
            return reply
        except ConfideError as error:
            return self._refuse(header, request, error)
        except (sqlite3.Error, OSError) as error:
            lost = StorageError(f"does not take this site's state ({type(error).__name__})", where="disk",
                                hint="free space, then start again: what was durable is kept")  # fmt: skip
            return self._refuse(header, request, lost)
        except Exception as error:
            # Its text may hold data, and whether it happens may hang on one person: by type only, and here only.
            with suppress(ConfideError):
                self.local_log.append(
                    audit.LocalFault(run=header.run, round=header.round, step=step, error=type(error).__name__)
                )
            raise

    # --- steps -------------------------------------------------------------------------------------------------

    def _join(self, run: SiteRun, header: Header, request: Envelope) -> Answer:
        m.decode(m.JoinRequest, header.type, request.body)
        if len(request.chunks[1]) != 4 * run.manifest.layout.size:
            raise SealingError("the initial model is not the manifest's", where=f"run {run.manifest.run}")
        weights = np.frombuffer(request.chunks[1], dtype="<f4").astype(np.float32)
        model = ModelState(0, weights, run.strategy.initial_state(len(weights)), None)
        if model_digest(model) != run.manifest.initial_model:
            raise SealingError("the initial model is not the manifest's", where=f"run {run.manifest.run}")
        self._check_beginning(run.manifest)
        self.check(run.manifest)
        run.keys.save()
        self._store.add_run(run.manifest.run, run.manifest.to_bytes(), model, run.keys.storage)
        of = run.manifest
        self.log.append(audit.Joined(run=of.run, manifest=of.digest, roster=of.roster, coordinator=header.checkpoint))
        return Answer(m.JoinReply(ephemeral=run.keys.public.hex()), (self._continuity.sightings(run.manifest),))

    def _check_beginning(self, manifest: Manifest) -> None:
        """A run that says which earlier one it follows begins with a first or released model of that one, as far as
        this site took part in it."""
        if (earlier := manifest.begins_after) is None or (data := self._store.manifest(earlier)) is None:
            return
        released = released_models(self.log.path).get(earlier)
        if manifest.initial_model not in (Manifest.from_bytes(data).initial_model, released and released[0]):
            raise SealingError(f"does not begin with a model of run {earlier}", where=f"run {manifest.run}")

    def _secret(self, run: SiteRun, header: Header, request: Envelope) -> Answer:
        message = m.decode(m.SecretRequest, header.type, request.body)
        place = run.address(0, "secret", epoch=header.key_epoch)
        return Answer(m.SecretReply(), run.keys.make_secret(place, message.statements))

    def _keys(self, run: SiteRun, header: Header, request: Envelope) -> Answer:
        message = m.decode(m.KeysRequest, header.type, request.body)
        if not request.chunks:
            raise SealingError("a keys request holds a wrapped secret", where=f"site {self.name}")
        made = message.made
        place = run.address(0, "keys", epoch=header.key_epoch)
        # Before the secret is in force: a site whose state was put back never gets as far as training with it.
        self._continuity.check(run.manifest, message.statements, request.chunks[1:])
        digest_ = run.keys.accept(place, message.statements, made, message.wraps, request.chunks[0])
        self.log.append(audit.KeysAgreed(run=run.manifest.run, epoch=header.key_epoch, maker=made.site, secret=digest_))
        return Answer(m.KeysReply(secret=digest_))

    def _commit(self, address: Address, request: Envelope, answer: Answer) -> Envelope:
        reply = self._sign(address, request, answer.message, answer.chunks)
        self._store.commit_reply(
            address, request.digest, reply, sealed=answer.sealed, unlocked=answer.unlocked, control=answer.control
        )
        return reply

    def _sign(
        self, address: Address, request: Envelope, message: m.Message, chunks: tuple[bytes, ...] = ()
    ) -> Envelope:
        """A signed reply to the coordinator, with the state of the log as it is now."""
        return seal_envelope(
            self.identity, address, recipient=self.policy.coordinator, type_=message.TYPE, body=message.to_bytes(),
            checkpoint=self.log.checkpoint().short, chunks=chunks, request=request.digest,
        )  # fmt: skip

    def _refuse(self, header: Header, request: Envelope, error: ConfideError) -> Envelope:
        # Tracebacks would keep whatever was refused, which may be large.
        reason: BaseException | None = error
        while reason is not None:
            reason.__traceback__, reason = None, reason.__cause__ or reason.__context__
        self.last_refusal = error
        _log.warning("site %s refuses a %s request: %s", self.name, header.step, type(error).__name__)
        answer = (
            m.Refusal(kind=error.kind, reason=error.what[:500])
            if error.shareable
            else m.Refusal(kind="abstains", reason="abstains")
        )
        try:
            self._note_refusal(header, error, answer)
        except StorageError as lost:
            self.last_refusal = lost
            raise
        return self._sign(header.address, request, answer)

    def _note_refusal(self, header: Header, error: ConfideError, answer: m.Refusal) -> None:
        self.local_log.append(audit.LocalRefusal(run=header.run, step=header.step, reason=str(error)))
        self.log.append(
            audit.Refused(run=header.run, round=header.round, step=header.step, party=self.name, reason=answer.reason)
        )

    def _most_body(self, run: str) -> int:
        """A request holds signed replies of the roster, at most for each sum that this site may have missed."""
        if run in self._runs:  # thousands of members make a manifest of megabytes: it is not read for each request
            manifest = self._runs[run].manifest
        elif (data := self._store.manifest(run)) is not None:
            manifest = Manifest.from_bytes(data)
        else:
            return _REQUEST_BODY
        return min(MAX_BODY, _REQUEST_BODY + _STATEMENT * len(manifest.members) * (manifest.rounds + 2))

    def _joining(self, header: Header, request: Envelope) -> SiteRun:
        if len(request.chunks) != 2:
            raise SealingError("a join request holds a manifest and a model", where=f"site {self.name}")
        if len(request.chunks[0]) > _MANIFEST:
            raise SealingError("the manifest is larger than any honest one", where=f"site {self.name}")
        try:
            manifest = Manifest.from_bytes(request.chunks[0])
        except ValidationError:
            raise SealingError("the manifest cannot be read", where=f"site {self.name}") from None
        if manifest.digest != header.manifest:
            raise SealingError("the manifest is not the one signed for", where=f"site {self.name}")
        self._admit(manifest)
        return self._run(manifest)

    def _admit(self, manifest: Manifest) -> None:
        """The operator's policy, then the roster: membership is frozen for the run that is joined."""
        self.policy.check(manifest, self.name)
        self._membership.admit(manifest)
        member = manifest.member(self.name)
        if member is None or member.public_key != self.identity.public_key.hex():
            raise PolicyError("the roster names another key for this site", where=f"policy of site {self.name}")

    def _known(self, run: str) -> SiteRun:
        """A run that was joined, by this process or an earlier one."""
        if run not in self._runs:
            data = self._store.manifest(run)
            if data is None:
                raise SealingError(f"this site has not joined run {run[:64]}", where=f"site {self.name}")
            self._run(Manifest.from_bytes(data))
        return self._runs[run]

    def _run(self, manifest: Manifest) -> SiteRun:
        known = self._runs.get(manifest.run)
        if known is None or known.manifest.digest != manifest.digest:
            stored = self._store.manifest(manifest.run)
            if stored is not None and stored != manifest.to_bytes():
                raise SealingError(f"run {manifest.run} was joined with another manifest", where=f"site {self.name}")
            known = SiteRun(
                manifest, self.name, self.records, self._rng, self._device, self.policy.coordinator, self._vault
            )
            self._runs[manifest.run] = known
        return known
