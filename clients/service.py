"""What a site's agent is started with, from its folder; and that there is one agent a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from confide.clients.agent import AgentConfig
from confide.clients.assembly import SiteFolder
from confide.clients.enrolment import AUTHORITY, CONFIG, site_keys
from confide.clients.membership import KEYS, MEMBERSHIP, Membership
from confide.clients.policy import SitePolicy
from confide.errors import ConfigError, PolicyError
from confide.protocol.keyfiles import read_key

__all__ = ["agent_config", "alone"]

_NODE_KEY = "node.key"


def agent_config(folder: Path, passphrase: str | None) -> AgentConfig:
    """Everything that can be wrong in a folder is found here, where the operator reads it.

    Raises:
        ConfideError: The site is not ready.
    """
    place = SiteFolder.read(folder)
    SitePolicy.of(place.config)
    if Membership(folder / MEMBERSHIP).standing.roster is None:
        raise PolicyError("has accepted no roster yet", where=str(folder), hint="confide site confirm FOLDER KIT")
    if place.config.endpoint is None:
        raise ConfigError("names no endpoint", where=str(folder / CONFIG), hint="it stands in the coordinator's kit")
    site_keys(folder, passphrase)
    return AgentConfig(
        folder=place.agent, superlink=place.config.endpoint, ca=folder / AUTHORITY,
        node_key=read_key(folder / KEYS / _NODE_KEY, passphrase), factory="confide.clients.assembly:open_site",
        arguments={"folder": str(folder.absolute()), "passphrase": passphrase},
        proxy=place.config.proxy,
    )  # fmt: skip


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One agent a folder.

    Raises:
        ConfigError: Another one works in it.
    """
    descriptor = os.open(folder / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it ends
        except BlockingIOError:
            raise ConfigError("another agent works in this folder", where=str(folder), hint="end it first") from None
        yield
    finally:
        os.close(descriptor)
