"""Two processes with one ledger that began as a copy: no flush of the one lets the other overlook it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from confide.errors import BudgetError
from confide.privacy import flushing
from confide.privacy.dp import Ledger, PrivacyEvent, RenyiBudget, Role
from confide.privacy.flushing import GroupCommit, flush_commits

BUDGET = RenyiBudget.for_limit(2.0, 1e-5)
OTHER = """
import sys
from pathlib import Path
from tests.privacy.test_flushing_processes import charge_all, opened

with opened(Path(sys.argv[1])) as ledger:
    print(charge_all(ledger, "other") if sys.argv[2] == "charge" else 0)
"""


def event() -> PrivacyEvent:
    return PrivacyEvent(
        role=Role.TRAIN, noise_multiplier=2.0, sample_rate=0.05, steps=100, unit="subject", max_grad_norm=1.0
    )


def opened(path: Path) -> closing[Ledger]:
    return closing(Ledger(path, BUDGET))


def charge_all(ledger: Ledger, name: str) -> int:
    """Charge until the budget holds no more; how many were admitted."""
    for number in range(100):
        try:
            ledger.reserve(f"{name}/{number}/train", event())
        except BudgetError:
            return number
    raise AssertionError("the budget has no end")


def other(path: Path, does: str) -> int:
    """A process of its own opens the ledger, does something, and closes it."""
    command = [sys.executable, "-c", OTHER, str(path), does]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture
def holds(tmp_path: Path) -> int:
    """How many such charges a budget holds."""
    with opened(tmp_path / "alone.db") as ledger:
        return charge_all(ledger, "alone")


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger that began as a copy and was flushed while it is open."""
    with GroupCommit() as group, opened(tmp_path / "ledger.db") as ledger:
        assert group._copied, "it is a copy"
        flush_commits()
        yield ledger


def test_what_one_process_charges_after_a_flush_the_other_one_sees(begun: Ledger, holds: int) -> None:
    assert holds > 0
    assert other(begun.path, "look") == 0, "it opens and closes the ledger, and takes no log away with it"
    assert charge_all(begun, "mine") == holds
    flush_commits()
    assert other(begun.path, "charge") == 0, "nothing is left for it"


def test_to_flush_the_open_file_itself_would_lose_charges(begun: Ledger, holds: int) -> None:
    """The control: SQLite's locks go with any descriptor of the file that is closed (fcntl)."""
    flushing._sync(begun.path)
    other(begun.path, "look")
    charge_all(begun, "mine")
    assert other(begun.path, "charge") == holds, "the other process took the log away, and charges once more"


def test_whoever_flushes_flushes_what_others_have_put_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database may be another process's copy, which it has not flushed yet: charges in its log rest on it."""
    seen = list[int]()
    real = flushing._SYNCFS
    assert real is not None
    with opened(tmp_path / "ledger.db"):
        pass
    monkeypatch.setattr(flushing, "_SYNCFS", lambda handle: (seen.append(handle), real(handle))[1])
    with GroupCommit() as group, opened(tmp_path / "ledger.db") as ledger:
        assert not group._copied
        charge_all(ledger, "mine")
        flush_commits()
        assert len(seen) == 1


def test_a_file_system_that_does_not_take_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with GroupCommit(), opened(tmp_path / "ledger.db"), monkeypatch.context() as patch:
        patch.setattr(flushing, "_SYNCFS", lambda _: -1)
        with pytest.raises(OSError, match=str(tmp_path)):
            flush_commits()


def test_without_such_a_flush_no_database_begins_as_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flushing, "_SYNCFS", None)
    with GroupCommit() as group, opened(tmp_path / "ledger.db") as ledger:
        assert not group._copied
        assert charge_all(ledger, "mine") > 0
