"""What a site that is open and does nothing costs: a simulation has hundreds of them."""

from __future__ import annotations

import os
import secrets
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from confide.clients.store import ModelState, SiteStore
from confide.privacy.database import open_durable
from confide.privacy.flushing import GroupCommit

SITES, MANIFEST = 30, 2_000_000


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def joined(folder: Path, number: int) -> SiteStore:
    store = SiteStore(folder / f"{number}.db")
    model = ModelState(round=0, weights=np.zeros(10, np.float32), state=(), metrics=None)
    store.add_run("run", secrets.token_bytes(MANIFEST), model, bytes(32))
    return store


def test_a_site_that_has_joined_does_not_keep_the_manifest_twice(tmp_path: Path) -> None:
    with closing(joined(tmp_path, SITES)):  # what the first one loads is no site's
        before = resident()
        stores = [joined(tmp_path, number) for number in range(SITES)]
        grown = resident() - before
        for store in stores:
            assert len(store.manifest("run") or b"") == MANIFEST
            store.close()
    assert grown < SITES * MANIFEST // 2


def test_the_control_a_connection_that_keeps_its_statements_does(tmp_path: Path) -> None:
    connections = [open_durable(tmp_path / f"{n}.db", "CREATE TABLE IF NOT EXISTS t (a)") for n in range(SITES)]
    before = resident()
    for db in connections:
        db.execute("INSERT INTO t VALUES (?)", (secrets.token_bytes(MANIFEST),))
        db.execute("PRAGMA shrink_memory")
    grown = resident() - before
    for db in connections:
        db.close()
    assert grown > SITES * MANIFEST // 2


@pytest.mark.parametrize("grouped", [False, True])
def test_bulk_has_larger_pages_in_a_new_file_only(tmp_path: Path, *, grouped: bool) -> None:
    path, schema = tmp_path / "a.db", "CREATE TABLE IF NOT EXISTS t (a)"

    def page_of(*, bulk: bool) -> int:
        with closing(open_durable(path, schema, bulk=bulk)) as db:
            return int(db.execute("PRAGMA page_size").fetchone()[0])

    if grouped:
        with GroupCommit():
            assert page_of(bulk=True) == 16384
    assert page_of(bulk=True) == 16384
    assert page_of(bulk=False) == 16384
    path.unlink()
    assert page_of(bulk=False) == 4096
    assert page_of(bulk=True) == 4096
