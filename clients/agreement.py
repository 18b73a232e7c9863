"""What a site checks before it seals: that everybody in the cohort, itself included, agrees on the same things.

A site seals only for a sorted cohort of at least `min_sites` of the roster, each with its own signed `train` reply of
this round, all holding the same model, strategy state and run secret as itself, and all cosigning the same state of the
coordinator's log: a coordinator cannot keep two histories for two sites of one sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from confide.clients.run import SiteRun
from confide.clients.store import ModelState
from confide.errors import SealingError
from confide.privacy.sealing import Agreement
from confide.privacy.sealing.transcript import transcript
from confide.protocol.messages import (
    Handover,
    ReleaseRequest,
    SealReply,
    SealRequest,
    Statement,
    TrainReply,
    UnlockRequest,
)
from confide.protocol.statements import Replies, signed_replies

__all__ = ["agree", "agree_to_release", "agree_to_take_over", "agree_to_unlock"]


def agree(
    run: SiteRun,
    round_: int,
    message: SealRequest,
    *,
    model: ModelState,
    own_reply: str | None,
    min_sites: int,
    coordinator: str,
    attempt: int = 0,
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
        attempt: Which attempt to seal the round this is.

    Raises:
        SealingError: The cohort is too small, not this site's, or its members disagree.
    """
    manifest, cohort = run.manifest, message.cohort
    where = f"run {manifest.run}, round {round_}"
    if list(cohort) != sorted(set(cohort)) or len(message.statements) != len(cohort):
        raise SealingError("the cohort is not a sorted list of different sites, each with its reply", where=where)
    if len(cohort) < max(manifest.min_sites, min_sites):
        raise SealingError(f"a cohort below min_sites = {max(manifest.min_sites, min_sites)}", where=where)
    held = (run.model_tag(model), run.state_tag(model), run.keys.session.secret_digest)
    for site, statement in zip(cohort, message.statements, strict=True):
        if statement.site != site:
            raise SealingError(f"the reply of {site} is somebody else's", where=where)
    replies = _train_replies(run, round_, message.statements, coordinator)
    for site, reply, _ in replies:
        if (reply.model, reply.state, reply.secret) != held:
            raise SealingError(f"{site} holds another model or run secret than this site", where=where)
    digests = dict(zip(cohort, replies.names, strict=True))
    if len({reply.coordinator for reply in replies.messages}) > 1:
        raise SealingError("the cohort's members were shown different states of the coordinator's log", where=where)
    if own_reply is None or digests.get(run.site) != own_reply:
        raise SealingError("the cohort does not hold this site's own reply", where=where)
    return transcript(manifest.digest, manifest.roster_version, run.keys.epoch, round_, digests, attempt)


def agree_to_release(
    run: SiteRun, message: ReleaseRequest, *, model: ModelState, tag: str, min_sites: int, coordinator: str
) -> None:
    """Have enough sites reached the evaluation round with the model that this site is asked for, which has this tag?

    Raises:
        SealingError: They have not: this would be a model on the way, which `sealed` promises to keep.
    """
    manifest, where = run.manifest, f"run {run.manifest.run}, release"
    held = tag, run.state_tag(model)
    sites = {statement.site for statement in message.statements}
    if len(sites) < max(manifest.min_sites, min_sites) or len(sites) != len(message.statements):
        raise SealingError("fewer than min_sites sites are at the end of the run", where=where)
    for site, reply, _ in _train_replies(run, manifest.rounds + 1, message.statements, coordinator):
        if (reply.model, reply.state) != held:
            raise SealingError(f"{site} ended with another model than this site", where=where)


def agree_to_take_over(
    run: SiteRun, message: Handover, chunks: Sequence[bytes], *, model: ModelState, coordinator: str
) -> tuple[ModelState, str]:
    """The model that all of a round's cohort began it with, for a site that has missed what led there, and its tag.

    Args:
        run: The run at this site.
        message: Which round's.
        chunks: Weights and strategy state.
        model: What this site holds.
        coordinator: Whom the cohort's replies were addressed to.

    Raises:
        SealingError: Rounds are not drawn in this run, it is not newer than what is held, or not what min_sites sites
            that the round was drawn for have signed, all of them the same.
    """
    manifest, where = run.manifest, f"run {run.manifest.run}, handover of round {message.round}"
    if manifest.sites_per_round is None or message.applied <= model.round or message.applied >= message.round:
        raise SealingError("a model that is not asked for", where=where)
    sizes = [4 * len(model.weights), *(8 * len(part) for part in model.state)]
    if [len(chunk) for chunk in chunks] != sizes:
        raise SealingError("a model of another size", where=where)
    weights = np.frombuffer(chunks[0], dtype="<f4").astype(np.float32)
    state = tuple(np.frombuffer(chunk, dtype="<f8").astype(np.float64) for chunk in chunks[1:])
    found = ModelState(message.applied, weights, state, None, trained=message.trained)
    held = run.model_tag(found), run.state_tag(found)
    sites = {statement.site for statement in message.statements}
    if len(sites) < manifest.min_sites or len(sites) != len(message.statements):
        raise SealingError("fewer than min_sites sites have begun a round with it", where=where)
    if not sites <= set(manifest.drawn(message.round)):
        raise SealingError("shown by sites that the round was not drawn for", where=where)
    for site, reply, _ in _train_replies(run, message.round, message.statements, coordinator):
        if (reply.model, reply.state) != held:
            raise SealingError(f"{site} began with another model", where=where)
    return found, held[0]


def agree_to_unlock(
    run: SiteRun, round_: int, attempt: int, message: UnlockRequest, *, sealed: Agreement | None, coordinator: str
) -> None:
    """Has every member of this attempt's cohort sealed it, under the transcript that this site sealed it under?

    Raises:
        SealingError: No: this site's own mask stays.
    """
    where = f"run {run.manifest.run}, round {round_}"
    cohort = tuple(statement.site for statement in message.statements)
    if sealed is None or cohort != sealed.cohort:
        raise SealingError("there is no attempt of this cohort to unlock", where=where)
    place = run.address(round_, "seal", attempt=attempt)
    for site, reply, _ in signed_replies(run.manifest, message.statements, place, coordinator, SealReply):
        if reply.transcript != sealed.transcript:
            raise SealingError(f"{site} sealed something else than this site", where=where)


def _train_replies(
    run: SiteRun, round_: int, statements: tuple[Statement, ...], coordinator: str
) -> Replies[TrainReply]:
    """Roster members' signed `train` replies of a round, verified."""
    return signed_replies(run.manifest, statements, run.address(round_, "train"), coordinator, TrainReply)
