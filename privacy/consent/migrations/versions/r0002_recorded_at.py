"""When an event was put on record. Of events older than this nobody knows: 0."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0002", "0001"


def upgrade() -> None:
    """Schema version 2."""
    op.add_column("consent_event", sa.Column("recorded_at", sa.BigInteger(), nullable=False, server_default="0"))
