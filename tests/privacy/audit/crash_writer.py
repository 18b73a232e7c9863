"""Run as a program by `test_log`: children that append to one log are killed at random moments, and what they left is
exported, and opened again. Prints one JSON line a child: what was told to be durable, what the log holds then."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from confide.privacy.audit.log import Log, export_log, parse_line
from confide.privacy.audit.records import Charged, Opened

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)


def open_log(path: Path) -> Log:
    """The log under test."""
    public = KEY.public_key().public_bytes_raw()
    return Log(path, origin="confide/test/ash/federated", name="ash", public_key=public, sign=KEY.sign)


def child(path: Path, told: int, first: int) -> None:
    """Append two entries at once for ever, telling after each append that it is done."""
    log, number = open_log(path), first
    while True:
        log.append(
            Charged(run="r", round=number, charge=f"r/{number}", event="e" * (number * 37 % 5000)),
            Opened(run="r", round=number, transcript="t", model="m", saturated="0"),
        )
        number += 1
        os.write(told, b".")


def main(path: Path, children: int) -> None:
    """Kill and look, over and over."""
    rng, done = random.Random(os.urandom(8)), 0  # noqa: S311  # moments to kill at, no secret
    open_log(path).close()
    for _ in range(children):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            child(path, writer, done)
        os.close(writer)
        time.sleep(rng.uniform(0.0, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        acknowledged = 0
        while part := os.read(reader, 65536):
            acknowledged += len(part)
        os.close(reader)
        left = _exported(path)
        log = open_log(path)
        rounds = [e.round for e in log.entries() if isinstance(e, Charged)]
        sys.stdout.write(
            json.dumps({"acknowledged": done + acknowledged, "held": log.size / 2,
                        "in_order": rounds == list(range(len(rounds))),
                        "left": left == [log.entry(n) for n in range(log.size)]}) + "\n"
        )  # fmt: skip
        log.close()
        done = len(rounds)


def _exported(path: Path) -> list[tuple[bytes, bytes]]:
    """(salt, entry) of what can be exported of the dead process's log, before anybody with its key opens it."""
    export_log(path, path.with_suffix(".log"))
    lines = path.with_suffix(".log").read_bytes().splitlines()
    assert all(parse_line(line) for line in lines)
    return [(bytes.fromhex(salt.decode()), data) for salt, _, data in (line.partition(b" ") for line in lines)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
