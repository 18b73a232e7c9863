"""A disk that takes no more is told from a file that is damaged: the one needs space, the other a backup."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from confide.clients.executor import _for_want_of_space
from confide.errors import BudgetError, ConfideError, ConsentError, StorageError
from confide.privacy.consent import Registry, SiteKey
from confide.privacy.dp import Ledger, RenyiBudget
from confide.privacy.dp.personal import PersonalLosses


@contextmanager
def no_space() -> Iterator[None]:
    """Of this process no file grows, as long as the block lasts (EFBIG; Python ignores the signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


OPENED: dict[str, tuple[Callable[[Path], Any], type[ConfideError]]] = {
    "ledger": (lambda path: Ledger(path, RenyiBudget.for_limit(4.0, 1e-5)), BudgetError),
    "personal losses": (PersonalLosses, BudgetError),
    "consent": (lambda path: Registry(path, SiteKey(b"k" * 32)), ConsentError),
}


@pytest.mark.parametrize("kind", OPENED)
def test_what_does_not_open_for_a_full_disk_says_so_and_opens_when_there_is_space(tmp_path: Path, kind: str) -> None:
    opened, damaged = OPENED[kind]
    path = tmp_path / "kept.db"
    opened(path).close()
    with no_space(), pytest.raises(StorageError, match="free space") as told:
        opened(path)
    assert str(path) in told.value.where
    opened(path).close()
    path.write_bytes(b"this is no database" * 400)
    with pytest.raises(damaged) as other:  # the control
        opened(path)
    assert not isinstance(other.value, StorageError)


def test_an_executor_tries_again_after_what_only_wants_space(tmp_path: Path) -> None:
    """A ledger that opens, and then cannot take what a start writes to it, says so as a ledger does."""
    path = tmp_path / "ledger.db"
    with closing(Ledger(path, RenyiBudget.for_limit(4.0, 1e-5))) as ledger:
        with no_space(), pytest.raises(BudgetError, match="cannot be written") as told:
            ledger.bind("a key")
        assert _for_want_of_space(told.value)
        ledger.bind("a key")
    path.write_bytes(b"this is no database" * 400)
    with pytest.raises(BudgetError) as damaged:
        Ledger(path, RenyiBudget.for_limit(4.0, 1e-5))
    assert not _for_want_of_space(damaged.value), "the control"
