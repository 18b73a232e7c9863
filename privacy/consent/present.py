"""The present of one registry, kept in memory between two snapshots: a view for each purpose, and all notices."""

from __future__ import annotations

from sqlalchemy import Connection

from confide.errors import ConsentError
from confide.privacy.consent.notices import Notice
from confide.privacy.consent.queries import Heads, heads, notices_at
from confide.privacy.consent.view import Snapshot, View, participants_of_events

__all__ = ["Present"]


class Present:
    """See the module. What is kept is brought up to the database's state whenever it is asked.

    Args:
        where: The registry, as errors name it.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._views: dict[str, View] = {}
        self._noticed: tuple[int, dict[str, Notice]] = (0, {})

    def snapshot(self, connection: Connection, purpose: str, as_of: int, sequence: int | None) -> Snapshot:
        """Who may participate; see `Registry.snapshot`. One at a time.

        Raises:
            ConsentError: What is kept for speed is damaged.
        """
        latest = heads(connection)
        head = latest.sequence if sequence is None else sequence
        if head < latest.sequence or not latest.projected:
            found = participants_of_events(connection, purpose, as_of, head, notices_at(connection, head))
        else:
            found = self._participants(connection, purpose, as_of, latest)
        return Snapshot(purpose, as_of, head, found)

    def notices(self, connection: Connection, latest: Heads) -> dict[str, Notice]:
        """All notices; they never change, so they are read again only where there are new ones."""
        read_to, notices = self._noticed
        if read_to != latest.notice:
            notices = notices_at(connection)
            self._noticed = latest.notice, notices
        return notices

    def check(self, latest: Heads) -> None:
        """Refuse to answer from what is kept for speed where it is known to be damaged.

        Raises:
            ConsentError: It is.
        """
        if latest.damaged:
            raise ConsentError(
                "what is kept for speed does not agree with the events", where=self._where,
                hint="find out who wrote to the database, then: confide consent check --rebuild",
            )  # fmt: skip

    def forget(self) -> None:
        """What views were made from is made anew."""
        self._views.clear()

    def _participants(self, connection: Connection, purpose: str, at: int, latest: Heads) -> dict[bytes, float | None]:
        self.check(latest)
        view, notices = self._views.get(purpose), self.notices(connection, latest)
        if view is not None and view.sequence <= latest.sequence and view.notices == notices:
            if at < view.at:
                return participants_of_events(connection, purpose, at, latest.sequence, notices)
            try:
                view.move_on(connection, at, latest.sequence)
            except BaseException:
                del self._views[purpose]  # half moved, it would answer wrongly
                raise
        else:
            self._views.pop(purpose, None)
            view = self._views[purpose] = View(connection, purpose, at, latest.sequence, notices)
        return dict(view.participants)
