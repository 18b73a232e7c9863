"""Ledgers are copied as they are, also while somebody charges them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from confide.errors import BudgetError
from confide.privacy.dp import Ledger
from confide.simulations import folders
from confide.simulations.folders import copy_ledgers
from tests.privacy.test_flushing_processes import BUDGET, charge_all, opened, other


def in_use(folder: Path) -> Path:
    (folder / "ash").mkdir(parents=True)
    (folder / "ash" / "site.key").write_bytes(b"key")
    (folder / "ash" / ".site.key.0123").write_bytes(b"half")
    return folder / "ash" / "ledger.db"


def test_a_copy_holds_what_was_charged_and_disturbs_nobody(tmp_path: Path) -> None:
    path = in_use(tmp_path / "ledgers")
    with opened(path) as ledger:
        assert charge_all(ledger, "mine") > 0
        copy_ledgers(tmp_path / "ledgers", tmp_path / "copy")
        assert other(path, "look") == 0
        assert Path(f"{path}-wal").exists(), "another process that closes it is not the last one"
    with opened(tmp_path / "copy" / "ash" / "ledger.db") as copy:
        assert charge_all(copy, "more") == 0
    assert sorted(p.name for p in (tmp_path / "copy" / "ash").iterdir()) == ["ledger.db", "site.key"]


def test_a_copy_whose_log_cannot_be_read_in_place_holds_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_source: Path, target: Path) -> None:
        target.touch()
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(folders, "copy_database", refuse)
    with opened(in_use(tmp_path / "ledgers")) as ledger:
        charge_all(ledger, "mine")
        copy_ledgers(tmp_path / "ledgers", tmp_path / "copy")
    with opened(tmp_path / "copy" / "ash" / "ledger.db") as copy:
        assert charge_all(copy, "more") == 0


def test_what_is_no_database_is_copied_for_whoever_opens_it(tmp_path: Path) -> None:
    in_use(tmp_path / "ledgers").write_bytes(b"no database at all" * 100)
    copy_ledgers(tmp_path / "ledgers", tmp_path / "copy")
    with pytest.raises(BudgetError, match="not a readable privacy ledger"):
        Ledger(tmp_path / "copy" / "ash" / "ledger.db", BUDGET)
