"""What a site checks before it seals: that everybody in the cohort, itself included, agrees on the same things.

A site seals only for a sorted cohort of at least `min_sites` of the roster, each with its own signed `train` reply of
this round, all holding the same model, strategy state and run secret as itself.
"""

from __future__ import annotations

from confide.clients.run import SiteRun, model_digest, state_digest
from confide.clients.store import ModelState
from confide.errors import SealingError
from confide.privacy.sealing.transcript import transcript
from confide.protocol.envelope import expect, verify
from confide.protocol.messages import SealRequest, TrainReply, decode

__all__ = ["agree"]


def agree(
    run: SiteRun,
    round_: int,
    message: SealRequest,
    *,
    model: ModelState,
    own_reply: str | None,
    min_sites: int,
    coordinator: str,
) -> str:
    """The transcript X.

    Args:
        run: The run at this site.
        round_: The round to seal.
        message: The verified request.
        model: The replicated model that this site holds.
        own_reply: Digest of this site's own `train` reply of the round; None where it gave none.
        min_sites: The site's own policy; the manifest's threshold holds as well.
        coordinator: Whom the replies were addressed to.

    Raises:
        SealingError: The cohort is too small, not this site's, or its members disagree.
    """
    manifest, cohort = run.manifest, message.cohort
    where = f"run {manifest.run}, round {round_}"
    if list(cohort) != sorted(set(cohort)) or len(message.statements) != len(cohort):
        raise SealingError("the cohort is not a sorted list of different sites, each with its reply", where=where)
    if len(cohort) < max(manifest.min_sites, min_sites):
        raise SealingError(f"a cohort below min_sites = {max(manifest.min_sites, min_sites)}", where=where)
    held = (model_digest(model), state_digest(model), run.keys.session.secret_digest)
    digests: dict[str, str] = {}
    for site, statement in zip(cohort, message.statements, strict=True):
        member = manifest.member(site)
        if member is None or statement.site != site:
            raise SealingError(f"{site} is not in the roster, or its reply is somebody else's", where=where)
        envelope = statement.envelope()
        signed = verify(envelope, bytes.fromhex(member.public_key), sender=site, with_chunks=False)
        expect(signed, run.address(round_, "train"), sender=site, recipient=coordinator)
        reply = decode(TrainReply, signed.type, envelope.body)
        if (reply.model, reply.state, reply.secret) != held:
            raise SealingError(f"{site} holds another model or run secret than this site", where=where)
        digests[site] = envelope.digest
    if own_reply is None or digests.get(run.site) != own_reply:
        raise SealingError("the cohort does not hold this site's own reply", where=where)
    return transcript(manifest.digest, manifest.roster_version, 0, round_, digests)
