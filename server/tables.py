"""The tables of the coordinator's run store. What they hold was signed by others or is public; no key is among them."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, Integer, LargeBinary, MetaData, String, Table, Text

__all__ = [
    "SCHEMA_VERSION", "applied", "blob", "closed", "message", "metadata", "outcome", "refusal", "run", "schema",
    "storable", "total",
]  # fmt: skip

SCHEMA_VERSION = 2
metadata = MetaData()


def _run() -> Column[str]:
    return Column("run", String(128), primary_key=True)


def _place() -> list[Column[int] | Column[str]]:
    """Where in a run something belongs."""
    return [
        _run(),
        Column("epoch", Integer, primary_key=True),
        Column("round", Integer, primary_key=True),
        Column("step", String(16), primary_key=True),
        Column("attempt", Integer, primary_key=True),
    ]


schema = Table("coordinator_schema", metadata, Column("version", Integer, primary_key=True))
#: One row a run. `initial` names the first weights among the blobs; `position` is the state of the coordinator's log at
#: the latest change; `members` (JSON) are the sites that agreed on keys, once they have; `next` is the round under way;
#: `submitted` is when it was put here (microseconds since 1970): the order in which runs are taken.
run = Table(
    "coordinator_run",
    metadata,
    _run(),
    Column("owner", String(32), nullable=False),
    Column("status", String(16), nullable=False),
    Column("position", String(96), nullable=False),
    Column("manifest", LargeBinary, nullable=False),
    Column("initial", String(64), nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("members", Text),
    Column("next", Integer, nullable=False),
    Column("model", String(64), nullable=False),
    Column("submitted", BigInteger, nullable=False),
)
#: A signed message: the request to a site, or its reply. `chunks` (JSON) names its bulk among the blobs.
message = Table(
    "coordinator_message",
    metadata,
    *_place(),
    Column("site", String(128), primary_key=True),
    Column("kind", String(8), primary_key=True),
    Column("header", LargeBinary, nullable=False),
    Column("signature", LargeBinary, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("chunks", Text, nullable=False),
)
#: Steps at which nobody is waited for any more.
closed = Table("coordinator_closed", metadata, *_place())
#: Bulk, each once, however many messages carry it.
blob = Table(
    "coordinator_blob",
    metadata,
    _run(),
    Column("digest", String(64), primary_key=True),
    Column("data", LargeBinary, nullable=False),
)
#: Sums as they go out to the sites. `reference` is a `SumReference`, `sealed` (JSON) the signed `seal` replies.
total = Table(
    "coordinator_sum",
    metadata,
    _run(),
    Column("round", Integer, primary_key=True),
    Column("reference", Text, nullable=False),
    Column("chunks", Text, nullable=False),
    Column("sealed", Text, nullable=False),
    Column("uplink", BigInteger, nullable=False),
)
#: The latest sum that a member has applied, and whether it has left the run for good.
applied = Table(
    "coordinator_applied",
    metadata,
    _run(),
    Column("site", String(128), primary_key=True),
    Column("round", Integer, nullable=False),
    Column("gone", Integer, nullable=False),
)
#: How each round ended.
outcome = Table(
    "coordinator_outcome",
    metadata,
    _run(),
    Column("round", Integer, primary_key=True),
    Column("cohort", Text, nullable=False),
    Column("abandoned", Integer, nullable=False),
    Column("uplink", BigInteger, nullable=False),
    Column("update_bytes", Float),
    Column("metrics_round", Integer),
    Column("metrics", LargeBinary),
)
#: Each site's latest refusal.
refusal = Table(
    "coordinator_refusal",
    metadata,
    _run(),
    Column("site", String(128), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("reason", String(500), nullable=False),
)


def storable(text: str) -> str:
    """Somebody else's words as every database takes them: a NUL, which PostgreSQL refuses, must not end a run."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
