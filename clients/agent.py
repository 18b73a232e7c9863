"""A site's agent: keeps Flower's SuperNode and one long-lived executor alive, and connects outwards only.

Invariants:
1. Two processes, so that what talks to the network holds neither data nor keys of a run, and what holds them talks to
   nobody but the loopback interface.
2. Either one that dies is started again, after a wait that grows. A SuperNode alone: the executor keeps the run's keys
   in memory. An executor takes its SuperNode with it: what that had handed over is lost, and starting anew tells the
   coordinator's link so.
3. Whatever way the agent ends, its processes end: by their ids on a signal, by the closed pipe otherwise.
4. Their logs lie in the agent's folder and hold nothing computed from data. They come through the agent, which sets a
   full file aside (`confide.logfiles`): a process cannot do that with the file that its standard output is.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from confide.clients.executor import GIVE_UP
from confide.errors import ConfigError, StorageError
from confide.logfiles import PrivateLog, drain
from confide.privacy.files import write_private

__all__ = ["AgentConfig", "free_port", "run_agent"]

_log = logging.getLogger(__name__)
_LOOPBACK = "127.0.0.1"
_WATCH_SECONDS = 0.2
#: Seconds before a process is started again: doubles up to the second, starts over after a life of the third.
_FIRST_WAIT, _LONGEST_WAIT, _LONG_LIFE = 0.5, 30.0, 60.0
#: Seconds that processes get to end by themselves: a site finishes the request at hand, a node says goodbye.
_SITE_GRACE, _NODE_GRACE = 30.0, 5.0
_LAST_WORDS = 5.0
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """One site's agent.

    Args:
        folder: Its own: logs, Flower's home, the secret between its processes. Nobody else may read it.
        superlink: The coordinator's link, `host:port`.
        ca: PEM file of the certificates that may vouch for it.
        node_key: This node's private key in OpenSSH form (NIST curve): its file or, where that is encrypted, its
            content, which then travels through a pipe and lies on no disk.
        factory: `package.module:function` that opens the site; it runs in the executor.
        arguments: Its keyword arguments, as JSON knows them. They travel through a pipe: a vault's passphrase may be
            among them.
        proxy: The HTTP proxy (`http://host:port`) through which the link is reached; None: what the environment says
            (`HTTPS_PROXY`, `NO_PROXY`).
    """

    folder: Path
    superlink: str
    ca: Path
    node_key: Path | bytes
    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    proxy: str | None = None


def run_agent(config: AgentConfig, stop: threading.Event | None = None) -> None:
    """Run until `stop` is set, or until SIGTERM or SIGINT where this is the main thread.

    Raises:
        ConfigError: A file is missing, the factory is none, or the site refused to start.
        StorageError: The agent's folder cannot be written.
    """
    ended = stop or threading.Event()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ended.set())
    try:
        agent = _Agent(config)
        try:
            agent.watch()
            while not ended.wait(_WATCH_SECONDS):
                agent.watch()
        finally:
            agent.close()
    except OSError as error:
        raise StorageError(f"cannot be used: {error.strerror}", where=str(error.filename or config.folder),
                           hint="free space, then start again: what was durable is kept") from None  # fmt: skip


class _Process:
    """One supervised process."""

    def __init__(self, role: str, folder: Path, proxy: str | None = None) -> None:
        self.role, self._folder = role, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._wait, self._started_at, self._not_before = _FIRST_WAIT, 0.0, 0.0
        self._proxy = proxy
        self._log, self._said = PrivateLog(folder / f"{role}.log"), list[threading.Thread]()

    @property
    def alive(self) -> bool:
        """Is it running?"""
        return self._process is not None and self._process.poll() is None

    @property
    def code(self) -> int | None:
        """How it ended; None while it runs or never ran."""
        return None if self._process is None else self._process.poll()

    @property
    def due(self) -> bool:
        """May it be started?"""
        return not self.alive and time.monotonic() >= self._not_before

    def start(self, order: Mapping[str, Any]) -> None:
        """Start it with its order; ready to be started again later than the last time if it dies soon.

        Raises:
            OSError: Its log cannot be made, or the system takes no more processes.
        """
        now = time.monotonic()
        if self._process is not None:
            soon = now - self._started_at < _LONG_LIFE
            self._wait = min(2 * self._wait, _LONGEST_WAIT) if soon else _FIRST_WAIT
        self._process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
            [sys.executable, "-m", "confide.clients.executor", self.role],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=self._environment(),
            start_new_session=True,
        )  # fmt: skip
        if self._process.stdout is not None:
            self._said = [*(thread for thread in self._said if thread.is_alive()),
                          drain(self._process.stdout, self._log)]  # fmt: skip
        self._started_at, self._not_before = now, now + self._wait
        self.tell(order)
        place = self._folder / f"{self.role}.pid"
        try:
            write_private(place, str(self._process.pid).encode())
        except OSError as error:  # for the operator's eyes only: a full disk ends no process that could do without
            place.unlink(missing_ok=True)
            _log.warning("%s cannot be written: %s", place, error.strerror)

    def tell(self, line: Mapping[str, Any]) -> None:
        """Write a line to its standard input; nothing where it is gone."""
        pipe: IO[bytes] | None = None if self._process is None else self._process.stdin
        if pipe is not None:
            with suppress(OSError):
                pipe.write(json.dumps(line).encode() + b"\n")
                pipe.flush()

    def end(self, grace: float) -> None:
        """Stop it: politely first."""
        if self._process is None:
            self._log.close()
            return
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=grace)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        for thread in self._said:  # its last words
            thread.join(timeout=_LAST_WORDS)
        self._log.close()

    def _environment(self) -> dict[str, str]:
        """The agent's own, but for Flower's home; and what goes to the loopback interface goes through no proxy."""
        exempt = ",".join(filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), _LOOPBACK)))
        own = {"FLWR_HOME": str(self._folder / "flower"), "NO_PROXY": exempt, "no_proxy": exempt}
        if self._proxy is None:
            return {**os.environ, **own}
        inherited = {name: value for name, value in os.environ.items() if name not in _PROXIES}
        return {**inherited, **own, "HTTPS_PROXY": self._proxy, "NO_PROXY": _LOOPBACK, "no_proxy": _LOOPBACK}


class _Agent:
    """Both processes of a site."""

    def __init__(self, config: AgentConfig) -> None:
        for path in (config.ca, config.node_key):
            if isinstance(path, Path) and not path.is_file():
                raise ConfigError("is not there", where=str(path), hint="see the kit that the coordinator sent")
        config.folder.mkdir(parents=True, exist_ok=True)
        config.folder.chmod(0o700)
        self._config = config
        self._secret = secrets.token_bytes(32)
        self._secret_file = config.folder / "tasks.secret"
        write_private(self._secret_file, self._secret)
        self._node, self._site = _Process("node", config.folder, config.proxy), _Process("site", config.folder)

    def watch(self) -> None:
        """Start what is not running.

        Raises:
            ConfigError: The site says that starting it again would not help.
        """
        if self._site.code == GIVE_UP:
            raise ConfigError("cannot start", where="site",
                              hint=f"the reason stands in {self._config.folder / 'site.log'}; confide site check "
                              "says more")  # fmt: skip
        if not self._site.alive and self._node.alive:
            self._node.end(0.0)  # whatever it handed over is lost: its next start tells the link so
        if self._site.due:
            self._note(self._site)
            self._site.start({
                "factory": self._config.factory, "arguments": dict(self._config.arguments),
                "secret": self._secret.hex(),
            })  # fmt: skip
        if self._site.alive and self._node.due:
            self._note(self._node)
            port = free_port()
            self._site.tell({"address": f"{_LOOPBACK}:{port}"})
            self._node.start({
                "superlink": self._config.superlink, "ca": str(self._config.ca), "secret_file": str(self._secret_file),
                **self._node_key(), "port": port,
            })  # fmt: skip

    def _node_key(self) -> dict[str, str]:
        key = self._config.node_key
        return {"node_key": str(key)} if isinstance(key, Path) else {"node_key_text": key.decode("ascii")}

    def close(self) -> None:
        """Stop both: the site first, so that its last answer still goes out."""
        self._site.end(_SITE_GRACE)
        self._node.end(_NODE_GRACE)
        self._secret_file.unlink(missing_ok=True)

    def _note(self, process: _Process) -> None:
        if process.code is not None:
            _log.warning("the %s process ended with code %d and is started again", process.role, process.code)


def free_port() -> int:
    """A loopback port that nobody listens on. Whoever takes it in between only costs another start."""
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return int(probe.getsockname()[1])
