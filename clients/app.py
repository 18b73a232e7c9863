"""The Flower ClientApp: eight message types, each answered by the site that lives on this node."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from confide.clients.cutoff import ReplyTime, released_at_deadline
from confide.clients.policy import SitePolicy
from confide.errors import SealingError
from confide.protocol.envelope import Envelope
from confide.protocol.flower import from_records, to_records

__all__ = ["Answering", "make_client_app"]

_log = logging.getLogger(__name__)
_NOT_AUTHENTIC, _FAULT = 200, 201


class Answering(Protocol):
    """What answers for a site: a `Site`, or what stands before one."""

    @property
    def policy(self) -> SitePolicy:
        """The site's."""

    def handle(self, step: str, request: Envelope) -> Envelope:
        """As `Site.handle`."""

    def note_reply(self, reply: ReplyTime) -> None:
        """As `Site.note_reply`."""


def make_client_app(find_site: Callable[[Context], Answering]) -> ClientApp:
    """The app that an agent runs.

    Args:
        find_site: The site of a Flower context; a deployed agent has one only.
    """
    app = ClientApp()

    def answer(step: str, message: Message, context: Context) -> Message:
        try:
            site = find_site(context)
            # Training alone asks for consent; how long it took may hang on one person.
            every = site.policy.reply_seconds if step == "train" else 0.0
            with released_at_deadline(every, lambda reply: site.note_reply(reply)):
                return Message(to_records(site.handle(step, from_records(message.content))), reply_to=message)
        except SealingError as error:
            _log.warning("an unauthentic %s request was dropped: %s", step, error.what)
            return Message(Error(code=_NOT_AUTHENTIC, reason="not authentic"), reply_to=message)
        except Exception as error:
            # An exception's text may hold data: it stays in the operator's log, by type only, and never travels.
            _log.error(
                "a %s request failed with %s",
                step,
                type(error).__name__,
                exc_info=_log.isEnabledFor(logging.DEBUG),
            )
            return Message(Error(code=_FAULT, reason="fault at the site"), reply_to=message)

    @app.query("join")
    def join(message: Message, context: Context) -> Message:
        return answer("join", message, context)

    @app.query("secret")
    def secret(message: Message, context: Context) -> Message:
        return answer("secret", message, context)

    @app.query("keys")
    def keys(message: Message, context: Context) -> Message:
        return answer("keys", message, context)

    @app.train("train")
    def train(message: Message, context: Context) -> Message:
        return answer("train", message, context)

    @app.train("seal")
    def seal(message: Message, context: Context) -> Message:
        return answer("seal", message, context)

    @app.train("unlock")
    def unlock(message: Message, context: Context) -> Message:
        return answer("unlock", message, context)

    @app.query("release")
    def release(message: Message, context: Context) -> Message:
        return answer("release", message, context)

    @app.query("end")
    def end(message: Message, context: Context) -> Message:
        return answer("end", message, context)

    return app
