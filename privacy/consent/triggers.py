"""What the database itself refuses, whoever asks: changes of what is on record.

Erasure alone may delete, and only a personal key whose locator has a tombstone; with the tombstone the same locator is
not enrolled again. Row by row the same rules in SQLite and PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from sqlalchemy import Connection, text

from confide.privacy.consent.bulk import driver

__all__ = ["install", "missing"]

_APPEND_ONLY = {
    "consent_event": "consent events are append-only",
    "consent_notice": "notices are append-only",
    "consent_tombstone": "an erasure is final",
}
#: REPLACE removes the row in its way without asking a DELETE trigger; BEFORE INSERT still sees it.
_IN_THE_WAY = {
    "consent_event": "seq = NEW.seq OR event_id = NEW.event_id",
    "consent_notice": "seq = NEW.seq OR digest = NEW.digest",
    "consent_tombstone": "locator = NEW.locator",
    "consent_subject": "locator = NEW.locator",
    "consent_clock": "one = NEW.one",
}
_KEYS = "personal keys stay until their person is erased"
_ERASED = "this person was erased"
_CLOCK = "the clock only goes forward"


def _sqlite() -> Iterator[tuple[str, str, str]]:
    """(name, table, statement after `CREATE TRIGGER name`)."""

    def refuse(table: str, verb: str, reason: str, when: str = "", name: str = "") -> tuple[str, str, str]:
        body = f"BEFORE {verb} ON {table} {when}{' ' if when else ''}BEGIN SELECT RAISE(ABORT, '{reason}'); END"
        return f"{table}_no_{name or verb.lower()}", table, body

    for table, reason in _APPEND_ONLY.items():
        yield refuse(table, "UPDATE", reason)
        yield refuse(table, "DELETE", reason)
    for table, clash in _IN_THE_WAY.items():
        reason = _APPEND_ONLY.get(table, _KEYS if table == "consent_subject" else _CLOCK)
        yield refuse(table, "INSERT", reason, f"WHEN EXISTS (SELECT 1 FROM {table} WHERE {clash})", "replace")  # noqa: S608  # names of ours
    buried = "SELECT 1 FROM consent_tombstone WHERE locator"
    yield refuse("consent_subject", "UPDATE", _KEYS)
    yield refuse("consent_subject", "DELETE", _KEYS, f"WHEN NOT EXISTS ({buried} = OLD.locator)")
    yield refuse("consent_subject", "INSERT", _ERASED, f"WHEN EXISTS ({buried} = NEW.locator)", "return")
    yield refuse("consent_clock", "UPDATE", _CLOCK, "WHEN NEW.one <> OLD.one OR NEW.latest < OLD.latest", "update")
    yield refuse("consent_clock", "DELETE", _CLOCK)


@cache
def _sqlite_wanted() -> tuple[tuple[tuple[str, str, str], str], ...]:
    return tuple((trigger, _statement(trigger)) for trigger in _sqlite())


def _postgresql() -> Iterator[tuple[str, str, str]]:
    def refuse(table: str, verbs: str, reason: str, when: str = "", name: str = "") -> tuple[str, str, str]:
        each = "ROW" if when else "STATEMENT"
        body = f"BEFORE {verbs} ON {table} FOR EACH {each} {when} EXECUTE FUNCTION consent_refuse('{reason}')"
        return f"{table}_no_{name or 'change'}", table, body

    for table, reason in _APPEND_ONLY.items():
        yield refuse(table, "UPDATE OR DELETE OR TRUNCATE", reason)
    yield refuse("consent_subject", "UPDATE OR TRUNCATE", _KEYS)
    yield refuse("consent_clock", "DELETE OR TRUNCATE", _CLOCK)
    when = "WHEN (NEW.one <> OLD.one OR NEW.latest < OLD.latest)"
    yield refuse("consent_clock", "UPDATE", _CLOCK, when, "update")
    # A condition of a trigger cannot look into another table, a function can.
    for name, verb in (("delete", "DELETE"), ("return", "INSERT")):
        body = f"BEFORE {verb} ON consent_subject FOR EACH ROW EXECUTE FUNCTION consent_subject_{name}()"
        yield f"consent_subject_no_{name}", "consent_subject", body


def _function(name: str, body: str) -> str:
    return f"CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$"


_FUNCTIONS = (
    _function("consent_refuse", "RAISE EXCEPTION '%', TG_ARGV[0] USING ERRCODE = 'integrity_constraint_violation';"),
    _function(
        "consent_subject_delete",
        "IF NOT EXISTS (SELECT 1 FROM consent_tombstone WHERE locator = OLD.locator) THEN "  # noqa: S608
        f"RAISE EXCEPTION '{_KEYS}' USING ERRCODE = 'integrity_constraint_violation'; END IF; RETURN OLD;",
    ),
    _function(
        "consent_subject_return",
        "IF EXISTS (SELECT 1 FROM consent_tombstone WHERE locator = NEW.locator) THEN "  # noqa: S608
        f"RAISE EXCEPTION '{_ERASED}' USING ERRCODE = 'integrity_constraint_violation'; END IF; RETURN NEW;",
    ),
)
_IN_SQLITE = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND name LIKE 'consent\\_%' ESCAPE '\\'"
_IN_POSTGRESQL = (
    "SELECT t.tgname, '' FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid "
    "JOIN pg_namespace n ON n.oid = c.relnamespace "
    "WHERE NOT t.tgisinternal AND t.tgenabled IN ('O', 'A') AND n.nspname = current_schema()"
)


def missing(connection: Connection) -> list[tuple[str, str, str]]:
    """The triggers that are not there, or not as they should be."""
    if (lite := driver(connection)) is not None:
        there = dict(lite.execute(_IN_SQLITE))
        return [trigger for trigger, statement in _sqlite_wanted() if there.get(trigger[0]) != statement]
    names = {name for name, _ in connection.execute(text(_IN_POSTGRESQL))}
    return [t for t in _postgresql() if t[0] not in names]


def install(connection: Connection) -> None:
    """Create what is missing, in the connection's transaction."""
    wanted = missing(connection)
    if wanted and connection.dialect.name == "postgresql":
        for function in _FUNCTIONS:
            connection.exec_driver_sql(function.replace("%", "%%"))
    for trigger in wanted:
        name, table, _ = trigger
        on = f" ON {table}" if connection.dialect.name == "postgresql" else ""
        connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS {name}{on}")
        connection.exec_driver_sql(_statement(trigger))


def _statement(trigger: tuple[str, str, str]) -> str:
    name, _, body = trigger
    return f"CREATE TRIGGER {name} {body}"
