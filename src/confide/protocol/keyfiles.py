"""Private keys on a disk: readable for their owner only and, where the operator gives a passphrase, encrypted.

Encrypted, a file is a vault file (Argon2id, AES-256-GCM; `confide.privacy.sealing.vault`), bound to its name. In the
clear it is what other programs read: PEM, or OpenSSH's form for the node key, which Flower wants.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from confide.errors import ConfigError, StorageError
from confide.privacy.consent import SiteKey
from confide.privacy.files import write_private
from confide.privacy.sealing.vault import MAGIC, close_vault_file, open_vault_file

__all__ = [
    "PASSPHRASE",
    "PASSPHRASE_FILE",
    "SiteKeyBox",
    "check_passphrase",
    "encrypt_key",
    "is_encrypted",
    "passphrase_from",
    "read_key",
    "site_key",
    "write_key",
]

#: The environment variable that may hold it.
PASSPHRASE = "CONFIDE_PASSPHRASE"  # noqa: S105  # a variable's name
#: Or the one that names a file with it.
PASSPHRASE_FILE = "CONFIDE_PASSPHRASE_FILE"  # noqa: S105  # a variable's name
_SITE_KEY = "site.key"
_FEWEST_CHARACTERS = 8
_OTHERS = 0o077


def passphrase_from(file: Path | None) -> str | None:
    """The passphrase that the operator gave: in a file, in the environment, or in a file that the environment names;
    None where there is none.

    Raises:
        ConfigError: The file cannot be read, or the passphrase is too short.
    """
    if file is None and PASSPHRASE not in os.environ and (named := os.environ.get(PASSPHRASE_FILE)):
        file = Path(named)
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
                          hint=f"give --passphrase-file, or set {PASSPHRASE} or {PASSPHRASE_FILE}")  # fmt: skip
    return open_vault_file(data, passphrase, path.name)


def is_encrypted(path: Path) -> bool:
    """Does a key lie there under a passphrase?

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None


def encrypt_key(path: Path, passphrase: str, name: str = "") -> bool:
    """Put a key that lies in the clear under a passphrase; False where it is encrypted already.

    Args:
        path: Its file.
        passphrase: Of the site's keys.
        name: What the encrypted file is bound to; default: the file's name.

    Raises:
        ConfigError: It cannot be read.
        StorageError: It cannot be written; it is as before.
    """
    try:
        data = path.read_bytes()
        if data.startswith(MAGIC):
            return False
        write_private(path, close_vault_file(data, passphrase, name or path.name))
    except OSError as error:
        raise StorageError(f"cannot be encrypted: {error.strerror}", where=str(path)) from None
    return True


@dataclass(frozen=True, slots=True, repr=False)
class SiteKeyBox:
    """The site-lifetime key under the operator's passphrase, as the other keys are; None: in the clear. Wherever the
    file lies and however it is called, it is bound to being a site key."""

    passphrase: str | None

    def close(self, secret: bytes) -> bytes:
        """What is written."""
        return secret if self.passphrase is None else close_vault_file(secret, self.passphrase, _SITE_KEY)

    def open(self, data: bytes) -> bytes:
        """The key; a file in the clear is one, too.

        Raises:
            ConfigError: It is encrypted, and there is no passphrase.
            SealingError: A wrong passphrase, or a changed file.
        """
        if not data.startswith(MAGIC):
            return data
        if self.passphrase is None:
            raise ConfigError("is encrypted", where=_SITE_KEY,
                              hint=f"give --passphrase-file, or set {PASSPHRASE} or {PASSPHRASE_FILE}")  # fmt: skip
        return open_vault_file(data, self.passphrase, _SITE_KEY)


def site_key(path: Path, passphrase: str | None = None) -> SiteKey:
    """The site-lifetime key in a file; without a passphrase here, under the one in the environment.

    Raises:
        ConsentError: The file is not a key.
        ConfigError: It is encrypted, and there is no passphrase.
        SealingError: A wrong passphrase, or a changed file.
    """
    return SiteKey.load_or_create(path, box=SiteKeyBox(passphrase or passphrase_from(None)))
