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
from confide.protocol.messages import ReleaseRequest, SealRequest, Statement, TrainReply, decode

__all__ = ["agree", "agree_to_release"]


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
        if statement.site != site:
            raise SealingError(f"the reply of {site} is somebody else's", where=where)
        reply, name = _train_reply(run, round_, statement, coordinator)
        if (reply.model, reply.state, reply.secret) != held:
            raise SealingError(f"{site} holds another model or run secret than this site", where=where)
        digests[site] = name
    if own_reply is None or digests.get(run.site) != own_reply:
        raise SealingError("the cohort does not hold this site's own reply", where=where)
    return transcript(manifest.digest, manifest.roster_version, 0, round_, digests)


def agree_to_release(
    run: SiteRun, message: ReleaseRequest, *, model: ModelState, min_sites: int, coordinator: str
) -> None:
    """Have enough sites reached the evaluation round with the model that this site is asked for?

    Raises:
        SealingError: They have not: this would be a model on the way, which `sealed` promises to keep.
    """
    manifest, where = run.manifest, f"run {run.manifest.run}, release"
    sites = {statement.site for statement in message.statements}
    if len(sites) < max(manifest.min_sites, min_sites) or len(sites) != len(message.statements):
        raise SealingError("fewer than min_sites sites are at the end of the run", where=where)
    for statement in message.statements:
        reply, _ = _train_reply(run, manifest.rounds + 1, statement, coordinator)
        if (reply.model, reply.state) != (model_digest(model), state_digest(model)):
            raise SealingError(f"{statement.site} ended with another model than this site", where=where)


def _train_reply(run: SiteRun, round_: int, statement: Statement, coordinator: str) -> tuple[TrainReply, str]:
    """A roster member's signed `train` reply of a round, verified, and the digest that names it."""
    member = run.manifest.member(statement.site)
    if member is None:
        raise SealingError(f"{statement.site[:64]} is not in the roster", where=f"run {run.manifest.run}")
    envelope = statement.envelope()
    signed = verify(envelope, bytes.fromhex(member.public_key), sender=statement.site, with_chunks=False)
    expect(signed, run.address(round_, "train"), sender=statement.site, recipient=coordinator)
    return decode(TrainReply, signed.type, envelope.body), envelope.digest
