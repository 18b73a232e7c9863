"""Run keys on a disk, only ever encrypted: Argon2id (RFC 9106) for the passphrase, AES-256-GCM for the content.

File: magic (8 bytes), Argon2id's memory in KiB, iterations and lanes (4 bytes each, big endian), salt (16), box. The
cost is read from the file, so it is bounded *before* anything is derived: a file cannot make a site spend a gigabyte.
Magic, cost, salt and the file's name are associated data of the box.
"""

from __future__ import annotations

import os
import secrets
import struct
import threading
from pathlib import Path

from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from confide.errors import ConfigError, SealingError
from confide.privacy.atrest import close_box, open_box
from confide.privacy.files import write_private

__all__ = ["MAGIC", "Vault", "close_vault_file", "open_vault_file"]

#: How every such file begins.
MAGIC = b"confide1"
_HEAD = struct.Struct(">8sIII16s")
#: Two derivations that begin at once in two threads may wait for each other for ever, in OpenSSL.
_ONE_AT_A_TIME = threading.Lock()
#: RFC 9106's second recommended choice: 64 MiB, 3 passes, 4 lanes.
_MEMORY, _ITERATIONS, _LANES = 64 * 1024, 3, 4
_MOST_MEMORY, _MOST_ITERATIONS, _MOST_LANES = 256 * 1024, 10, 16
_MOST_BYTES = 2**20
_FEWEST_CHARACTERS = 8
#: Characters of a passphrase that nobody can guess: 32 random bytes in hexadecimal. To stretch it only costs time.
_RANDOM = 64
_NO_STRETCHING = (8, 1, 1)


class Vault:
    """A folder of encrypted files under one passphrase.

    Args:
        folder: Made readable for its owner only.
        passphrase: The operator's; at least 8 characters.
        random: It is a machine's, of 32 random bytes, and need not be stretched.

    Raises:
        ConfigError: The passphrase is too short.
    """

    def __init__(self, folder: Path, passphrase: str, *, random: bool = False) -> None:
        self._cost = _NO_STRETCHING if random else None
        fewest = _RANDOM if random else _FEWEST_CHARACTERS
        if len(passphrase) < fewest:
            raise ConfigError(f"needs at least {fewest} characters", where="passphrase of the vault",
                              hint="a few random words are easy to keep")  # fmt: skip
        self._folder, self._passphrase = folder, passphrase
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)

    def save(self, name: str, data: bytes) -> None:
        """Write or replace an entry."""
        write_private(self._path(name), close_vault_file(data, self._passphrase, name, self._cost))

    def load(self, name: str) -> bytes | None:
        """An entry, or None where there is none.

        Raises:
            SealingError: A wrong passphrase, a changed bit, or a cost that no honest file asks for.
        """
        path = self._path(name)
        if not path.is_file():
            return None
        if path.stat().st_size > _MOST_BYTES:
            raise SealingError("is larger than any honest vault file", where=str(path))
        return open_vault_file(path.read_bytes(), self._passphrase, name)

    def destroy(self, name: str) -> None:
        """Overwrite and remove an entry. A file system that keeps old blocks still holds only ciphertext."""
        path = self._path(name)
        if path.is_file():
            with path.open("r+b") as stream:
                stream.write(secrets.token_bytes(path.stat().st_size))
                stream.flush()
                os.fsync(stream.fileno())
            path.unlink()

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.vault"


def close_vault_file(data: bytes, passphrase: str, name: str, cost: tuple[int, int, int] | None = None) -> bytes:
    """A file's content; `cost` is (KiB, passes, lanes), None what a passphrase of an operator needs."""
    head = _HEAD.pack(MAGIC, *(cost or (_MEMORY, _ITERATIONS, _LANES)), secrets.token_bytes(16))
    return head + close_box(_derive(head, passphrase), head + name.encode(), data)


def open_vault_file(content: bytes, passphrase: str, name: str) -> bytes:
    """Inverse of `close_vault_file`.

    Raises:
        SealingError: A wrong passphrase, a changed bit, or a cost that no honest file asks for.
    """
    if len(content) > _MOST_BYTES or len(content) < _HEAD.size:
        raise SealingError("has a size that no honest vault file has", where=f"vault file {name}")
    magic, memory, iterations, lanes, _ = _HEAD.unpack(content[: _HEAD.size])
    within = 8 * lanes <= memory <= _MOST_MEMORY and 1 <= iterations <= _MOST_ITERATIONS and 1 <= lanes <= _MOST_LANES
    if magic != MAGIC or not within:
        raise SealingError("is no vault file, or asks for an absurd cost", where=f"vault file {name}")
    head = content[: _HEAD.size]
    try:
        return open_box(_derive(head, passphrase), head + name.encode(), content[_HEAD.size :])
    except SealingError:
        raise SealingError("cannot be opened: a wrong passphrase, or a changed file", where=f"vault file {name}",
                           hint="check the passphrase; a damaged file means leaving the run") from None  # fmt: skip


def _derive(head: bytes, passphrase: str) -> bytes:
    _, memory, iterations, lanes, salt = _HEAD.unpack(head)
    kdf = Argon2id(salt=salt, length=32, iterations=iterations, lanes=lanes, memory_cost=memory)
    with _ONE_AT_A_TIME:
        return kdf.derive(passphrase.encode())
