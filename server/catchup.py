"""Requests that bring each site up to date: with the sums that it has not applied yet or, where rounds are drawn and it
has missed more than the sums that are kept, with the model, which a whole cohort has signed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from confide.protocol import messages as m
from confide.protocol.envelope import Address, Envelope
from confide.protocol.manifest import Manifest
from confide.server.exchange import Exchange
from confide.server.journal import Journal
from confide.strategies import make_strategy

__all__ = ["CatchUp"]


class CatchUp:
    """Of one run.

    Args:
        exchange: The run's messages.
        journal: Where its sums and replies lie.
        manifest: The run.
    """

    def __init__(self, exchange: Exchange, journal: Journal, manifest: Manifest) -> None:
        self._exchange, self._journal, self._manifest = exchange, journal, manifest
        #: Are rounds for some of the sites only? Those then join when they are drawn for the first time.
        self.drawn = manifest.sites_per_round is not None

    def requests(
        self, place: Address, kind: Callable[..., m.TrainRequest | m.ReleaseRequest], **fields: Any
    ) -> dict[str, Envelope]:
        """A request to every member that is there, with the sums that it has not applied yet."""
        applied = {s: round_ for s, round_ in self._journal.applied().items() if s in self._exchange.nodes}
        if self.drawn:
            return self._with_handover(place, kind, applied, **fields)
        totals = self._journal.totals(min(applied.values(), default=0) + 1, place.round - 1)
        requests = {}
        for site in sorted(applied):
            missing = [s for s in totals if s.round > applied[site]]
            body = kind(sums=tuple(s.reference for s in missing), **fields)
            requests[site] = self._exchange.sign(place, site, body, tuple(c for s in missing for c in s.chunks))
        return requests

    def _with_handover(
        self,
        place: Address,
        kind: Callable[..., m.TrainRequest | m.ReleaseRequest],
        applied: Mapping[str, int],
        **fields: Any,
    ) -> dict[str, Envelope]:
        """The same where rounds are drawn: to those that this one is for; who has missed more than the sums that are
        kept is handed the model. The release is for those who were at the end."""
        drawn = self._manifest.drawn(min(place.round, self._manifest.rounds + 1))
        handover, model = self._handover(place.round) if place.step == "train" else (None, ())
        since = 0 if handover is None else handover.applied
        totals, requests = self._journal.totals(1, place.round - 1), dict[str, Envelope]()
        made = {o.round for o in self._journal.outcomes() if not o.abandoned}
        for site in sorted(set(drawn) & applied.keys()):
            late = handover is not None and applied[site] < since
            behind = since if late else applied[site]
            missing = [s for s in totals if s.round > behind]
            if not {r for r in made if r > behind} <= {s.round for s in missing}:
                continue  # nobody can bring it up to date
            sums, chunks = tuple(s.reference for s in missing), tuple(c for s in missing for c in s.chunks)
            if late and handover is not None:
                body: m.Message = m.LateTrainRequest(handover=handover, sums=sums)
                requests[site] = self._exchange.sign(place, site, body, (*model, *chunks))
            else:
                requests[site] = self._exchange.sign(place, site, kind(sums=sums, **fields), chunks)
        return requests

    def _handover(self, before: int) -> tuple[m.Handover | None, tuple[bytes, ...]]:
        """The model that the latest cohort began its round with, which all of it has signed, and its chunks."""
        round_, replies = self._journal.vouched(before)
        for site, envelope in sorted(replies.items()):
            if model := envelope.chunks[len(self.metrics(site, envelope, round_)) :]:
                statements = tuple(m.Statement.of(s, e) for s, e in sorted(replies.items()))
                applied = max((o.round for o in self._journal.outcomes() if o.round < round_ and not o.abandoned),
                              default=0)  # fmt: skip
                handover = m.Handover(
                    round=round_, applied=applied, trained=applied, statements=statements, chunks=len(model)
                )  # the round that only evaluates is the last: every sum before it was trained
                return handover, model
        return None, ()

    def metrics(self, site: str, envelope: Envelope, round_: int) -> tuple[bytes, ...]:
        """The chunks of a `train` reply without the model that the first ones of a drawn round add."""
        if not self.drawn or site not in self._manifest.drawn(round_)[: m.HANDING_OVER]:
            return envelope.chunks
        parts = 1 + len(make_strategy(self._manifest.strategy).initial_state(self._manifest.layout.size))
        return envelope.chunks[: max(0, len(envelope.chunks) - parts)]
