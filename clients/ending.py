"""The end of a run at a site that is not a release: the coordinator's signed word for it, or a process that died first.

Invariants:
1. Only the coordinator's own signed word about this very run ends it; it is taken also by a site that could not go on
   with the run, or has left it: all it does is to destroy.
2. That the run is over is durable before its keys are destroyed, and the keys are gone before anybody is told so.
3. How many entries it makes in the log depends on the run's steps alone, never on anybody's data.
"""

from __future__ import annotations

from confide.clients.keys import vault_entry
from confide.clients.rounds import Answer, RoundSteps
from confide.clients.run import SiteRun
from confide.clients.store import SiteStore
from confide.errors import SealingError
from confide.privacy.audit import records as audit
from confide.privacy.audit.log import Log
from confide.privacy.sealing.vault import Vault
from confide.protocol import messages as m
from confide.protocol.envelope import Address, Envelope, Header, expect
from confide.protocol.manifest import Manifest

__all__ = ["OVER", "Endings"]

#: Why a site answers nothing more of a run, as it stands in its store: a public reason.
OVER = "the coordinator has ended this run"
_TELLS = audit.KeysDestroyed | audit.RunStopped | audit.ToldEnded


class Endings:
    """How runs end at one site.

    Args:
        site: Its name.
        store: Its durable state.
        log: Its federated log.
        rounds: Its steps, which hold a run's update.
        vault: Where run keys lie; None: in memory only.
    """

    def __init__(self, site: str, store: SiteStore, log: Log, rounds: RoundSteps, vault: Vault | None) -> None:
        self._site, self._store, self._log, self._rounds, self._vault = site, store, log, rounds, vault

    def forget_ended_runs(self) -> None:
        """Destroy what a process left in the vault that died between the end of a run and the end of its keys, and say
        so: what was in its memory has gone with it."""
        ended = [Manifest.from_bytes(data) for data in self._store.ended_runs()]
        if self._vault is not None:
            for manifest in ended:
                self._vault.destroy(vault_entry(manifest))
        entries = list(self._log.entries()) if ended else []
        secrets = {e.run: e.secret for e in entries if isinstance(e, audit.KeysAgreed)}
        told = {e.run for e in entries if isinstance(e, _TELLS)}
        for run in [manifest.run for manifest in ended]:
            if run in secrets and run not in told:
                self._log.append(audit.KeysDestroyed(run=run, secret=secrets[run]))

    def told(self, header: Header, request: Envelope, run: SiteRun | None, coordinator: str) -> tuple[Address, Answer]:
        """Take the coordinator's word that a run is over; its envelope is verified.

        Args:
            header: The request's.
            request: The request.
            run: What this process holds of the run; None: nothing.
            coordinator: Whose word it must be.

        Returns:
            Where the answer belongs, and the answer.

        Raises:
            SealingError: It is about a run that this site has not joined, or belongs somewhere else.
        """
        data = self._store.manifest(header.run)
        if data is None:
            raise SealingError(f"this site has not joined run {header.run[:64]}", where=f"site {self._site}")
        of = Manifest.from_bytes(data)
        place = Address(
            federation=of.federation, roster_version=of.roster_version, run=of.run, manifest=of.digest, key_epoch=0,
            round=0, step="end",
        )  # fmt: skip
        expect(header, place, sender=coordinator, recipient=self._site, request="")
        message = m.decode(m.EndRequest, header.type, request.body)
        if request.chunks:
            raise SealingError("chunks that no word names", where=f"run {of.run}")
        self._store.stop_run(of.run, OVER)
        if run is not None:
            self._rounds.drop(run)
        elif self._vault is not None:
            self._vault.destroy(vault_entry(of))
        self._rounds.expire(of.run)
        if not any(isinstance(e, audit.ToldEnded) and e.run == of.run for e in self._log.entries()):
            self._log.append(audit.ToldEnded(run=of.run, status=message.status, coordinator=header.checkpoint))
        return place, Answer(m.EndReply())
