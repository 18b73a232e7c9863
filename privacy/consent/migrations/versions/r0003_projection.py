"""Notices, tombstones, the clock, and what follows from the events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0003", "0002"


def upgrade() -> None:
    """Schema version 3. The projection itself is built when the registry is opened: `seq` is behind any event."""
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "consent_notice",
        sa.Column("seq", number, primary_key=True, autoincrement=False),
        sa.Column("digest", sa.String(200), nullable=False, unique=True),
        sa.Column("purposes", sa.Text(), nullable=False),
        sa.Column("covers_beneath", sa.Boolean(), nullable=False),
        sa.Column("registered_at", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "consent_tombstone",
        sa.Column("locator", sa.LargeBinary(32), primary_key=True),
        sa.Column("ground", sa.String(200), nullable=False),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "consent_clock",
        sa.Column("one", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("latest", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "consent_current",
        sa.Column("purpose", sa.String(200), primary_key=True),
        sa.Column("pseudonym", sa.LargeBinary(32), primary_key=True),
        sa.Column("settled_at", sa.BigInteger(), nullable=False),
        sa.Column("denied_at", sa.BigInteger()),
        sa.Column("granted_at", sa.BigInteger()),
        sa.Column("valid_until", sa.BigInteger()),
        sa.Column("max_epsilon", sa.Float(53)),
        sa.Column("notice", sa.String(200), nullable=False),
        sa.Column("more_notices", sa.Text()),
        sa.Column("flagged_at", sa.BigInteger()),
        sa.Column("restricted", sa.Boolean(), nullable=False),
        sa.Column("erased_at", sa.BigInteger()),
        sqlite_with_rowid=False,
    )
    projection = op.create_table(
        "consent_projection",
        sa.Column("one", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("damaged", sa.Boolean(), nullable=False),
    )
    op.drop_index("consent_event_purpose", "consent_event")
    op.create_index("consent_event_person", "consent_event", ["pseudonym", "seq"])
    # Until now no clock was kept, and events' own times may have gone back with a machine's.
    latest = sa.text("INSERT INTO consent_clock SELECT 1, COALESCE(MAX(recorded_at), 0) FROM consent_event")
    op.execute(latest)
    op.bulk_insert(projection, [{"one": 1, "seq": -1, "damaged": False}])
