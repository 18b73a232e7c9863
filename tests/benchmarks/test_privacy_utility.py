"""The frontier's benchmark: its keys, its pool, and the figure drawn from its numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.privacy_utility import CELLS, main, measure, parse_cells, people_of, pool
from confide.simulations.sweeps.frontier import WATERMARK

TINY = ("run.rounds=1", "run.report_metrics_every=1", "training.local_steps=2")


def test_a_cell_is_measured_three_ways_and_can_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = measure([("rand", "4")], [1], TINY)
    assert list(found["rand"]) == ["4"]
    assert list(found["rand"]["4"]) == ["site", "central", "none"]
    assert all(0.3 < auc < 0.9 for auc in found["rand"]["4"].values())
    assert found["per_seed"]["rand"]["4"]["site"] == {"1": found["rand"]["4"]["site"]}
    assert (found["seeds"], found["watermark"]) == ([1], WATERMARK)
    (tmp_path / "results.json").write_text(json.dumps(found))
    arguments = ["privacy_utility", "--from", str(tmp_path / "results.json"), "--figure", str(tmp_path / "f.svg")]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    assert capsys.readouterr().out == ""
    figure = (tmp_path / "f.svg").read_text()
    assert WATERMARK in figure
    assert "ε per person (δ = 1e-5)" in figure


def test_the_pool_holds_every_sites_persons_with_their_own_records() -> None:
    records = people_of(("sealing.profile=open", *TINY)).sources.records
    pooled = pool(records)
    assert pooled.persons == [p for site in records.values() for p in site.persons]
    offset = 0
    for site in records.values():
        some = np.array([0, len(site.persons) - 1])
        mine, theirs = site.gather(some), pooled.gather(some + offset)
        assert mine.x.equal(theirs.x)
        assert mine.y.equal(theirs.y)
        assert mine.records_of.equal(theirs.records_of)
        offset += len(site.persons)


def test_cells_are_named_by_data_or_by_data_and_epsilon() -> None:
    assert parse_cells("") == list(CELLS)
    assert parse_cells("rand:0.5, rand30:4") == [("rand", "0.5"), ("rand30", "4")]
    assert len(parse_cells("rand30")) == 5
    with pytest.raises(ValueError, match="is no cell"):
        parse_cells("rand:0.7")
