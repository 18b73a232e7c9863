"""Evidence: append-only signed logs, offline verification, reports."""
