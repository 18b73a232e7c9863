"""The vault: keys touch a disk only under a passphrase; no file makes a site spend what an honest one would not."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from hypothesis import given, settings
from hypothesis import strategies as st

from confide.errors import ConfigError, SealingError
from confide.privacy.sealing import vault
from confide.privacy.sealing.vault import Vault, close_vault_file, open_vault_file

PASSPHRASE = "correct horse battery"
NAME = "run-7"
#: Read before any test runs, and so before `cheap_passphrases` in the tests' own `conftest.py` has changed it.
REAL = {name: getattr(vault, name) for name in ("_MEMORY", "_ITERATIONS", "_LANES")}


@pytest.fixture(autouse=True)
def what_it_costs_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a test asks for less."""
    for name, value in REAL.items():
        monkeypatch.setattr(vault, name, value)


@pytest.fixture
def cheap(what_it_costs_an_operator: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least that Argon2id takes: these tests are about everything else."""
    monkeypatch.setattr(vault, "_MEMORY", 16)
    monkeypatch.setattr(vault, "_ITERATIONS", 1)
    monkeypatch.setattr(vault, "_LANES", 2)


class Watched:
    """Argon2id, counted."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self, **cost: Any) -> Argon2id:
        self.asked.append(cost)
        return Argon2id(**cost)


@pytest.fixture
def derivations(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What every derivation was asked to cost."""
    watched = Watched()
    monkeypatch.setattr(vault, "Argon2id", watched)
    return watched.asked


def head(
    magic: bytes = b"confide1", memory: int = 16, iterations: int = 1, lanes: int = 2, salt: bytes = bytes(16)
) -> bytes:
    """A file's first 36 bytes, from the description of the format."""
    return magic + memory.to_bytes(4, "big") + iterations.to_bytes(4, "big") + lanes.to_bytes(4, "big") + salt


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cheap")
def test_what_was_saved_is_loaded_by_a_later_process_with_the_passphrase(tmp_path: Path) -> None:
    Vault(tmp_path, PASSPHRASE).save(NAME, b"first")
    Vault(tmp_path, PASSPHRASE).save("other", b"another entry")
    later = Vault(tmp_path, PASSPHRASE)
    assert later.load(NAME) == b"first"
    later.save(NAME, b"second")
    assert Vault(tmp_path, PASSPHRASE).load(NAME) == b"second"
    assert later.load("other") == b"another entry"
    assert later.load("never saved") is None


@pytest.mark.usefixtures("cheap")
@given(data=st.binary(max_size=2000), passphrase=st.text(min_size=8, max_size=40), name=st.text(max_size=30))
@settings(max_examples=40, deadline=None)
def test_any_content_under_any_passphrase_comes_back(data: bytes, passphrase: str, name: str) -> None:
    try:
        passphrase.encode()
        name.encode()
    except UnicodeEncodeError:
        return
    content = close_vault_file(data, passphrase, name)
    assert open_vault_file(content, passphrase, name) == data
    assert len(content) == 36 + 28 + len(data)


def test_the_format_is_the_one_that_is_described(derivations: list[dict[str, Any]]) -> None:
    content = close_vault_file(b"keys", PASSPHRASE, NAME)
    assert content[:8] == b"confide1"
    salt = content[20:36]
    assert content[:36] == head(memory=64 * 1024, iterations=3, lanes=4, salt=salt)
    assert derivations == [{"salt": salt, "length": 32, "iterations": 3, "lanes": 4, "memory_cost": 64 * 1024}]
    key = Argon2id(salt=salt, length=32, iterations=3, lanes=4, memory_cost=64 * 1024).derive(PASSPHRASE.encode())
    assert AESGCM(key).decrypt(content[36:48], content[48:], content[:36] + NAME.encode()) == b"keys"
    assert open_vault_file(content, PASSPHRASE, NAME) == b"keys", "at its real cost"


@pytest.mark.usefixtures("cheap")
def test_two_files_of_the_same_content_have_nothing_in_common_but_the_cost() -> None:
    one, other = (close_vault_file(b"the same keys", PASSPHRASE, NAME) for _ in range(2))
    assert one[:20] == other[:20]
    assert one[20:36] != other[20:36]
    assert one[36:48] != other[36:48]
    assert b"the same" not in one


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("wrong", ["correct horse batterY", "correct horse battery ", "correct horse", "", "12345678"])
def test_a_wrong_passphrase_is_refused(wrong: str) -> None:
    content = close_vault_file(b"keys", PASSPHRASE, NAME)
    assert open_vault_file(content, PASSPHRASE, NAME) == b"keys"
    with pytest.raises(SealingError, match="wrong passphrase") as caught:
        open_vault_file(content, wrong, NAME)
    assert wrong == "" or wrong not in str(caught.value)


@pytest.mark.usefixtures("cheap")
def test_every_single_flipped_bit_is_refused(derivations: list[dict[str, Any]]) -> None:
    content = close_vault_file(b"keys", PASSPHRASE, NAME)
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SealingError):
            open_vault_file(bytes(changed), PASSPHRASE, NAME)
    assert open_vault_file(content, PASSPHRASE, NAME) == b"keys"
    assert max(cost["memory_cost"] for cost in derivations) <= 256 * 1024
    assert max(cost["iterations"] for cost in derivations) <= 10
    assert max(cost["lanes"] for cost in derivations) <= 16


@pytest.mark.usefixtures("cheap")
def test_every_truncated_file_and_every_longer_one_is_refused() -> None:
    content = close_vault_file(b"keys", PASSPHRASE, NAME)
    for length in range(len(content)):
        with pytest.raises(SealingError):
            open_vault_file(content[:length], PASSPHRASE, NAME)
    with pytest.raises(SealingError):
        open_vault_file(content + b"\0", PASSPHRASE, NAME)


ABSURD = {
    "a gigabyte": head(memory=2**20),
    "all memory": head(memory=2**32 - 1),
    "one KiB more than allowed": head(memory=256 * 1024 + 1),
    "too little memory for its lanes": head(memory=15, lanes=2),
    "no memory": head(memory=0),
    "eleven passes": head(iterations=11),
    "passes for ever": head(iterations=2**32 - 1),
    "no pass": head(iterations=0),
    "seventeen lanes": head(memory=1024, lanes=17),
    "lanes without end": head(memory=256 * 1024, lanes=2**32 - 1),
    "no lane": head(lanes=0),
    "another magic": head(magic=b"confide2"),
    "no magic": head(magic=bytes(8)),
    "nothing": b"",
    "half a head": head()[:35],
    "more than a megabyte": head() + bytes(2**20),
}


@pytest.mark.parametrize("what", ABSURD)
def test_an_absurd_file_is_refused_before_anything_is_derived(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vault, "Argon2id", lambda **cost: pytest.fail(f"asked to derive at {cost}"))
    content = ABSURD[what]
    with pytest.raises(SealingError):
        open_vault_file(content + bytes(40) if len(content) == 36 else content, PASSPHRASE, NAME)


def test_the_dearest_cost_that_is_allowed_is_looked_at(derivations: list[dict[str, Any]]) -> None:
    """The control of the refusals above: it is the bound that refuses."""
    for allowed in (head(memory=8, lanes=1), head(memory=16, iterations=10, lanes=2), head(memory=128, lanes=16)):
        with pytest.raises(SealingError, match="wrong passphrase"):
            open_vault_file(allowed + bytes(40), PASSPHRASE, NAME)
    assert len(derivations) == 3


@pytest.mark.usefixtures("cheap")
def test_an_entry_that_was_given_anothers_name_is_refused(tmp_path: Path) -> None:
    kept = Vault(tmp_path, PASSPHRASE)
    kept.save(NAME, b"keys")
    (tmp_path / f"{NAME}.vault").rename(tmp_path / "run-8.vault")
    with pytest.raises(SealingError, match="changed file"):
        kept.load("run-8")
    assert kept.load(NAME) is None
    (tmp_path / "run-8.vault").rename(tmp_path / f"{NAME}.vault")
    assert kept.load(NAME) == b"keys"


@pytest.mark.usefixtures("cheap")
def test_a_file_that_is_far_too_large_is_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Vault(tmp_path, PASSPHRASE)
    with (tmp_path / f"{NAME}.vault").open("wb") as stream:
        stream.truncate(2**40)  # a terabyte of nothing takes no room
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"read {path}"))
    with pytest.raises(SealingError, match="larger than any honest"):
        kept.load(NAME)


@pytest.mark.parametrize("passphrase", ["", "seven77", "1234567"])
def test_a_short_passphrase_is_a_configuration_error_that_says_how_long(passphrase: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 8") as caught:
        Vault(tmp_path / "vault", passphrase)
    assert caught.value.hint
    assert not passphrase or passphrase not in str(caught.value)
    assert not (tmp_path / "vault").exists()
    assert Vault(tmp_path / "vault", "8 chars.")


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_folder_and_files_are_the_owners_alone_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        kept = Vault(tmp_path / "a" / "vault", PASSPHRASE)
        kept.save(NAME, b"keys")
        kept.save(NAME, b"newer keys")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "vault").stat().st_mode) == 0o700
    (file,) = (tmp_path / "a" / "vault").iterdir()
    assert file.name == f"{NAME}.vault"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.usefixtures("cheap")
def test_nothing_of_the_content_or_the_passphrase_is_on_the_disk(tmp_path: Path) -> None:
    secret = bytes(range(200))
    Vault(tmp_path, PASSPHRASE).save(NAME, secret)
    for file in tmp_path.rglob("*"):
        data = file.read_bytes()
        assert PASSPHRASE.encode() not in data
        assert not any(secret[i : i + 8] in data for i in range(0, 192, 8))


@pytest.mark.usefixtures("cheap")
def test_a_write_that_is_interrupted_leaves_the_old_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Vault(tmp_path, PASSPHRASE)
    kept.save(NAME, b"old")

    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        kept.save(NAME, b"new")
    assert kept.load(NAME) == b"old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.usefixtures("cheap")
def test_a_destroyed_entry_is_overwritten_and_gone_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Vault(tmp_path, PASSPHRASE)
    kept.save(NAME, b"keys")
    kept.save("other", b"other keys")
    before = (tmp_path / f"{NAME}.vault").read_bytes()
    left: list[bytes] = []
    unlink = Path.unlink

    def watched(path: Path, missing_ok: bool = False) -> None:
        left.append(path.read_bytes())
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    kept.destroy(NAME)
    assert len(left) == 1
    assert len(left[0]) == len(before)
    assert sum(a == b for a, b in zip(left[0], before, strict=True)) < 10, "not a byte of it is left but by chance"
    assert kept.load(NAME) is None
    assert [file.name for file in tmp_path.iterdir()] == ["other.vault"]
    assert kept.load("other") == b"other keys"
    kept.destroy(NAME)  # there is nothing to do
    assert kept.load("other") == b"other keys"


def test_threads_that_derive_keys_at_once_do_not_wait_for_each_other_for_ever() -> None:
    """Without their taking turns, OpenSSL's Argon2id never returned here."""
    content, opened = close_vault_file(b"kept", "a passphrase", "entry"), list[bytes]()

    def derive() -> None:
        for _ in range(3):
            opened.append(open_vault_file(content, "a passphrase", "entry"))

    threads = [threading.Thread(target=derive, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert opened == [b"kept"] * 9
