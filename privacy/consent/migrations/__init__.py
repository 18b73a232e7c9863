"""How a registry's schema came to be what it is: Alembic revisions, applied when a registry is opened."""
