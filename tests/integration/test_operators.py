"""A federation as its operators run it: commands, processes over TLS, and a coordinator that is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.deployment_demo import database, run_demo
from confide.errors import AuditError
from tests.cli.command import confide


@pytest.mark.long  # test_nothing_is_lost has the commands die, too, on a smaller run
def test_five_sealed_rounds_over_tls_survive_a_killed_coordinator(tmp_path: Path) -> None:
    with database(tmp_path) as url:
        shown = run_demo(tmp_path, url, people=150)
    assert (shown["rounds"], shown["sites"], shown["resumed"], shown["verified"]) == (5, 3, True, True)
    assert shown["refused"] == 3, "nobody takes part in a run for a purpose that no policy names"
    assert 0.0 < shown["epsilon"] <= 4.0
    assert shown["auc"] is not None
    model = Path(shown["report"]).with_name("model.safetensors")
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    assert confide("audit", "verify", model.parent).code == AuditError.exit_code, "a model that no run released"
    page = Path(shown["report"]).read_text()
    assert "demo-" in page
