"""A run that begins where an earlier one of this federation began, or goes on from the model that one released.

The coordinator does not know who has left, and must not: that a run begins anew, and after which run, is decided by a
schedule that was declared beforehand. What it can go back to are models that it holds: each run's first one, and those
that were released. The models of single rounds lie at the sites, under run keys that are destroyed with the run.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from confide.errors import ConfigError
from confide.privacy.digest import digest
from confide.protocol.manifest import Manifest
from confide.server.runs import RunStore

__all__ = ["earlier_run", "first_model", "require_same"]

#: What has to be the same for a model, and what it is for, to be the same.
_SAME = ("purpose", "label", "schema_", "model", "layout")


def earlier_run(store: RunStore, run: str, where: str) -> tuple[Manifest, bytes]:
    """A finished run, and the bytes of its first weights; none, where an earlier version of confide ended it.

    Args:
        store: The coordinator's.
        run: The run's name.
        where: For the error.

    Raises:
        ConfigError: There is no such run, or it has released no model.
    """
    held = store.load(run)
    if held is None:
        raise ConfigError("there is no such run", where=where, hint="confide run status lists them")
    if (status := store.status(run)) != "finished":
        raise ConfigError(f"has released no model: {status}", where=where, hint="name a run that has ended with one")
    return Manifest.from_bytes(held[0]), held[1]


def first_model(manifest: Manifest, data: bytes, where: str) -> NDArray[np.float32]:
    """The weights that a run began with.

    Raises:
        ConfigError: These bytes are not.
    """
    if digest("model", data).hex() != manifest.initial_model:
        raise ConfigError("its first model is not in the store any more", where=where,
                          hint="it ended under an earlier version of confide; name a later run")  # fmt: skip
    return np.frombuffer(data, dtype="<f4").astype(np.float32)


def require_same(before: Manifest, asked: Manifest, where: str) -> None:
    """Is it the same model, for the same purpose?

    Raises:
        ConfigError: It is not; says what differs.
    """
    for name in _SAME:
        if getattr(before, name) != getattr(asked, name):
            raise ConfigError(f"{name.rstrip('_')} is not the earlier run's", where=where,
                              hint="it would be another training: start it without this option")  # fmt: skip
