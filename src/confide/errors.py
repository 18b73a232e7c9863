"""The errors a user can meet: one root, an exit code per kind, and what to do next.

Invariant: a message never holds anything computed from people's data, except where the class says it stays
inside the site (`shareable = False`): such a text is shown to the operator and never sent.
"""

from __future__ import annotations

__all__ = [
    "AuditError",
    "BudgetError",
    "ConfideError",
    "ConfigError",
    "ConsentError",
    "DataError",
    "LeftError",
    "PeerError",
    "PolicyError",
    "SealingError",
    "StorageError",
]


class ConfideError(Exception):
    """Something the user can act on.

    Args:
        what: What is wrong, in one sentence.
        where: File, key, row or peer it was found at.
        hint: What to do next.
    """

    exit_code = 1
    kind = "bug"
    #: May the text leave the site? Only texts made of public parameters may.
    shareable = False

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.hint = what, where, hint

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  → {self.hint}" if self.hint else head


class ConfigError(ConfideError):
    """The command line or the experiment file asks for something that does not exist or cannot be."""

    exit_code, kind = 2, "configuration"


class DataError(ConfideError):
    """The data are missing, unreadable, or not what the schema declares. Never leaves the site."""

    exit_code, kind = 3, "data"


class ConsentError(ConfideError):
    """The consent registry cannot be read, or an import is not unambiguous. Never leaves the site."""

    exit_code, kind = 4, "consent"


class BudgetError(ConfideError):
    """The privacy budget does not suffice. The text is made of the public schedule only."""

    exit_code, kind, shareable = 5, "budget", True


class SealingError(ConfideError):
    """A sum, an envelope or a digest is not authentic, or not what was agreed."""

    exit_code, kind, shareable = 6, "sealing", True


class LeftError(SealingError):
    """A site has left a run for good: its keys are gone."""

    kind = "left"


class AuditError(ConfideError):
    """The evidence does not hold together."""

    exit_code, kind = 7, "audit"


class PeerError(ConfideError):
    """Too few peers answered, or one cannot be reached."""

    exit_code, kind, shareable = 8, "peer", True


class PolicyError(ConfideError):
    """A site's policy does not allow what the run asks. The text names the line of policy."""

    exit_code, kind, shareable = 9, "policy", True


class StorageError(ConfideError):
    """A disk does not take what must be durable before anything leaves."""

    exit_code, kind = 10, "storage"
