"""The coordinator's part in key agreement: it passes on what sites wrap for each other, and holds no key of theirs.

Each secret has its own key epoch. Where not everybody could take one, another maker is asked: one that dies, or wraps
nonsense for some, must not decide who takes part. As sites never return to an earlier secret, the best maker makes a
new one where the last one did worse. A restarted coordinator comes by the same epochs again, each as it ended.
"""

from __future__ import annotations

from collections.abc import Mapping

from confide.errors import SealingError
from confide.protocol import messages as m
from confide.protocol.envelope import Envelope, chunk_digests
from confide.protocol.manifest import Manifest
from confide.protocol.sightings import watchers_of
from confide.server.exchange import Exchange

__all__ = ["distribute_keys"]

#: How many sites are asked in turn to make the run secret.
_MAKERS = 3
_Agreed = dict[str, tuple[Envelope, m.KeysReply]]


def distribute_keys(exchange: Exchange, manifest: Manifest, joined: Mapping[str, Envelope]) -> frozenset[str]:
    """The sites that hold one and the same run secret; the exchange's key epoch is then that secret's.

    Args:
        exchange: The run's messages.
        manifest: The run.
        joined: Every participant's signed `join` reply, with its sightings.

    Raises:
        SealingError: Sites hold different secrets.
    """
    names, agreed, best = sorted(joined), _Agreed(), (0, "")
    for epoch, maker in enumerate(names[:_MAKERS]):
        exchange.key_epoch = epoch
        agreed = _agree(exchange, manifest, joined, maker)
        best = max(best, (len(agreed), maker))
        if len(agreed) == len(names):
            break
    if len(agreed) < best[0]:
        exchange.key_epoch += 1
        agreed = _agree(exchange, manifest, joined, best[1])
    if len({reply.secret for _, reply in agreed.values()}) > 1:
        raise SealingError("the sites hold different run secrets", where="key agreement")
    return frozenset(agreed)


def _agree(exchange: Exchange, manifest: Manifest, joined: Mapping[str, Envelope], maker: str) -> _Agreed:
    """Who holds the secret that `maker` makes in this epoch."""
    names, place = sorted(joined), exchange.address("secret")
    statements = tuple(m.Statement.of(s, joined[s]) for s in names)
    asking = m.SecretRequest(statements=statements)
    made = exchange.ask(place, lambda: {maker: exchange.sign(place, maker, asking)}, m.SecretReply)
    exchange.journal.close(place)
    if maker not in made or len(made[maker][0].chunks) != len(names):
        return {}
    envelope, handing = made[maker][0], exchange.address("keys")
    body = m.KeysRequest(
        statements=statements, made=m.Statement.of(maker, envelope), wraps=chunk_digests(envelope.chunks)
    )

    def requests() -> dict[str, Envelope]:
        found = {}
        for site, wrap in zip(names, envelope.chunks, strict=True):
            seen = (c for w in watchers_of(manifest, site) if w in joined for c in joined[w].chunks)
            found[site] = exchange.sign(handing, site, body, (wrap, *seen))
        return found

    agreed = exchange.ask(handing, requests, m.KeysReply)
    exchange.journal.close(handing)  # sites never return to an earlier secret: whoever comes late is not in this one
    return agreed
