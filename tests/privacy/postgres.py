"""A PostgreSQL server of the tests' own: in a temporary folder, on a socket file, gone when they end."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

_INSTALL = "PostgreSQL is not installed: apt-get install postgresql"


def binaries() -> Path | None:
    """Where the newest server's programs lie."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3]))
    on_path = shutil.which("postgres")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def _as_whom(folder: Path) -> list[str]:
    """A server refuses to run as root: then somebody who may do little gets the folder."""
    if os.geteuid() != 0:
        return []
    for name in ("postgres", "nobody"):
        try:
            user = pwd.getpwnam(name)
        except KeyError:
            continue
        os.chown(folder, user.pw_uid, user.pw_gid)
        return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    raise RuntimeError("there is no user that a server could run as")


@contextmanager
def server() -> Iterator[str]:
    """The folder in which a running server has its socket. Locally a missing server skips what needs it; in CI it
    fails."""
    programs = binaries()
    if programs is None:
        if os.environ.get("CONFIDE_CI"):
            pytest.fail(_INSTALL)
        pytest.skip(_INSTALL)
    folder = Path(tempfile.mkdtemp(prefix="confide-pg-"))  # short: a socket's path has at most 107 bytes
    as_somebody, data = _as_whom(folder), folder / "data"
    quiet = {"stdout": subprocess.DEVNULL, "cwd": str(folder)}
    initdb = [str(programs / "initdb"), "-D", str(data), "-U", "confide", "-A", "trust", "-E", "UTF8", "--no-sync"]
    subprocess.run([*as_somebody, *initdb, "--locale=C"], check=True, **quiet)  # type: ignore[call-overload]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*as_somebody, str(programs / "postgres"), "-D", str(data), "-k", str(folder), "-c", "listen_addresses=",
             "-c", "fsync=off"],
            stdout=log, stderr=log, cwd=folder,
        )  # fmt: skip
    try:
        _wait(folder, process)
        yield str(folder)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(folder: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(host=str(folder), user="confide", dbname="postgres").close()
            return
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "server.log").read_text()) from None
            time.sleep(0.05)


def new_database(folder: str, name: str) -> str:
    """Make an empty database on the server in `folder`; its URL."""
    with psycopg.connect(host=folder, user="confide", dbname="postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return f"postgresql://confide@/{name}?host={folder}"
