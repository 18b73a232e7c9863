"""Run as a program by `test_log`: children that append to one log are killed at random moments, and the log is opened
again after each. Prints one JSON line a child: what was told to be durable, what the log holds then."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from confide.privacy.audit.log import Log, parse_line
from confide.privacy.audit.records import Charged, Opened

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)


def open_log(path: Path) -> Log:
    """The log under test."""
    public = KEY.public_key().public_bytes_raw()
    return Log(path, origin="confide/test/ash/federated", name="ash", public_key=public, sign=KEY.sign)


def child(path: Path, told: int, first: int) -> None:
    """Append for ever, telling after each append that it is done."""
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
    for _ in range(children):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            child(path, writer, done)
        os.close(writer)
        time.sleep(rng.uniform(0.0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        acknowledged = 0
        while part := os.read(reader, 65536):
            acknowledged += len(part)
        os.close(reader)
        log = open_log(path)
        entries = [parse_line(line)[1] for line in path.read_bytes().splitlines()]
        size = log.checkpoint().size
        log.close()
        rounds = [e.round for e in entries if isinstance(e, Charged)]
        sys.stdout.write(
            json.dumps({"acknowledged": done + acknowledged, "held": len(entries) / 2, "size": size / 2,
                        "in_order": rounds == list(range(len(rounds)))}) + "\n"
        )  # fmt: skip
        # A whole append that nobody was told of may be there; half of one as well: start after what is there.
        if len(entries) % 2:
            log = open_log(path)
            log.append(Opened(run="r", round=len(rounds) - 1, transcript="t", model="m"))
            log.close()
        done = len(rounds)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
