"""Alembic's entry: brings the connection it was handed to the newest revision, in that connection's transaction."""

from __future__ import annotations

from alembic import context

context.configure(connection=context.config.attributes["connection"], version_table="consent_revision")
context.run_migrations()
