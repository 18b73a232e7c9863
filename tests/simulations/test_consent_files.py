"""An experiment's consent file may have any format that an import reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from confide.config import load_experiment
from confide.errors import ConfigError, ConsentError
from confide.privacy.consent import ImportedEvent
from confide.privacy.consent.imports import Options
from confide.simulations.sources import load_sources
from tests.privacy.consent.imports.reading import read
from tests.privacy.consent.imports.samples import FILES
from tests.support import experiment_tree, people_table

MAPPING_FILE = """
[format]
delimiter = ";"
time_zone = "+01:00"
time_format = "%d.%m.%Y %H:%M"
ignore = ["ip"]

[columns]
subject = "who"
type = "what"
effective_at = "when"
valid_until = "until"
max_epsilon = "most"

[constants]
purpose = "research"

[values.type]
"opt in" = "given"
"opt out" = "withdrawn"
"""


def consent_of(folder: Path, **said: str) -> list[ImportedEvent] | None:
    people_table().to_csv(folder / "people.csv", index=False)
    return load_sources(load_experiment(experiment_tree("people.csv") | {"consent": said}), folder).consent


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("form", sorted(set(FILES) - {"mapped"}))
def test_every_format_is_read_as_an_import_reads_it(tmp_path: Path, form: str, named: bool) -> None:
    (tmp_path / "consent").write_bytes(FILES[form])
    found = consent_of(tmp_path, file="consent", **({"format": form} if named else {}))
    assert found == read(form, FILES[form], Options())[0]
    assert found


def test_columns_of_another_name_are_read_with_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "consent").write_bytes(b"who;what;when;until;most\nann;opt in;31.01.2026 09:00;;2.5\n")
    (tmp_path / "map.toml").write_text(MAPPING_FILE.replace('ignore = ["ip"]\n', ""))
    (event,) = consent_of(tmp_path, file="consent", mapping="map.toml") or []
    assert (event.subject, event.type, event.purpose, event.max_epsilon) == ("ann", "given", "research", 2.5)
    with pytest.raises(ConsentError, match="unknown column"):
        consent_of(tmp_path, file="consent", format="csv", mapping="map.toml")


@pytest.mark.parametrize(
    ("said", "words"),
    [({"file": "consent", "format": "cvs"}, "format"), ({"simulate": {"fraction": 0.5}, "format": "csv"}, "belong to"),
     ({"file": "consent", "format": "mapped"}, "mapping"), ({"file": "consent", "mapping": "absent.toml"}, "no such")],
)  # fmt: skip
def test_a_format_that_there_is_not_or_that_nothing_needs_is_refused(
    tmp_path: Path, said: dict[str, str], words: str
) -> None:
    (tmp_path / "consent").write_bytes(FILES["csv"])
    with pytest.raises(ConfigError, match=words):
        consent_of(tmp_path, **said)
