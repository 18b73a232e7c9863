"""Private keys on a disk: readable for their owner only and, where the operator gives a passphrase, encrypted.

Encrypted, a file is a vault file (Argon2id, AES-256-GCM; `confide.privacy.sealing.vault`), bound to its name. In the
clear it is what other programs read: PEM, or OpenSSH's form for the node key, which Flower wants.
"""

from __future__ import annotations

import os
from pathlib import Path

from confide.errors import ConfigError, StorageError
from confide.privacy.files import write_private
from confide.privacy.sealing.vault import MAGIC, close_vault_file, open_vault_file

__all__ = ["PASSPHRASE", "check_passphrase", "passphrase_from", "read_key", "write_key"]

#: The environment variable that may hold it.
PASSPHRASE = "CONFIDE_PASSPHRASE"  # noqa: S105  # a variable's name
_FEWEST_CHARACTERS = 8
_OTHERS = 0o077


def passphrase_from(file: Path | None) -> str | None:
    """The passphrase that the operator gave, in a file or in the environment; None where there is none.

    Raises:
        ConfigError: The file cannot be read, or the passphrase is too short.
    """
    try:
        text = file.read_text(encoding="utf-8").rstrip("\r\n") if file is not None else os.environ.get(PASSPHRASE)
    except (OSError, UnicodeDecodeError):
        raise ConfigError("cannot be read", where=f"passphrase file {file}",
                          hint="give a text file with one line") from None  # fmt: skip
    check_passphrase(text)
    return text


def check_passphrase(passphrase: str | None) -> None:
    """None is allowed: keys then lie in the clear, and the disk must protect them.

    Raises:
        ConfigError: It is too short.
    """
    if passphrase is not None and len(passphrase) < _FEWEST_CHARACTERS:
        raise ConfigError(f"needs at least {_FEWEST_CHARACTERS} characters", where="passphrase",
                          hint="a few random words are easy to keep")  # fmt: skip


def write_key(path: Path, data: bytes, passphrase: str | None) -> None:
    """Write a private key, mode 0600, whole or not at all.

    Raises:
        StorageError: There is a file already, or it cannot be written.
    """
    if path.exists():
        raise StorageError("is there already, and keys are never written over", where=str(path))
    try:
        write_private(path, data if passphrase is None else close_vault_file(data, passphrase, path.name))
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(path)) from None


def read_key(path: Path, passphrase: str | None) -> bytes:
    """Read one back.

    Raises:
        ConfigError: There is none, others may read it, or it needs a passphrase.
        SealingError: A wrong passphrase, or a changed file.
    """
    try:
        mode, data = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path),
                          hint="restore it from the backup of this folder") from None  # fmt: skip
    if mode & _OTHERS:
        raise ConfigError("may be read by others than its owner", where=str(path), hint=f"chmod 600 {path}")
    if not data.startswith(MAGIC):
        return data
    if passphrase is None:
        raise ConfigError("is encrypted", where=str(path),
                          hint=f"give --passphrase-file, or set {PASSPHRASE}")  # fmt: skip
    return open_vault_file(data, passphrase, path.name)
