"""Events and personal keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0001", None


def upgrade() -> None:
    """Schema version 1."""
    op.create_table(
        "consent_event",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=False),
        sa.Column("event_id", sa.String(200), nullable=False, unique=True),
        sa.Column("pseudonym", sa.LargeBinary(32), nullable=False),
        sa.Column("purpose", sa.String(200), nullable=False),
        sa.Column("type", sa.String(20), nullable=False),
        sa.Column("effective_at", sa.BigInteger(), nullable=False),
        sa.Column("valid_until", sa.BigInteger()),
        sa.Column("notice_digest", sa.String(200), nullable=False),
        sa.Column("lawful_basis", sa.String(200), nullable=False),
        sa.Column("jurisdiction", sa.String(50), nullable=False),
        sa.Column("evidence_ref", sa.String(500), nullable=False),
        sa.Column("max_epsilon", sa.Float(53)),
    )
    op.create_index("consent_event_purpose", "consent_event", ["purpose", "pseudonym", "seq"])
    op.create_table(
        "consent_subject",
        sa.Column("locator", sa.LargeBinary(32), primary_key=True),
        sa.Column("personal_key", sa.LargeBinary(32), nullable=False),
    )
    op.create_table("consent_schema", sa.Column("version", sa.Integer(), primary_key=True))
