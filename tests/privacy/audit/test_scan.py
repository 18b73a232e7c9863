"""Everything that logs hold, of every kind of run, read as text: is anything in it computed from data and not noised,
salted or committed?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import confide as product
from confide.privacy.audit import records as r
from confide.privacy.audit.log import parse_line
from tests.privacy.audit.logbook import COORDINATOR
from tests.support import experiment_tree, people_table

#: The table, and the folders of exported logs.
Found = tuple[pd.DataFrame, list[Path]]
PEOPLE = 211
#: What a field of a federated record may hold. *public*: fixed before the run, or known to everybody who takes part.
#: *opaque*: digests, signatures, names under keys. *noised*: opened sums, charged for. *share*: of a whole cohort's
#: noised coordinates. *reason*: texts of the program's own, checked word by word below.
ORIGIN = {
    "public": {"run", "round", "steps", "cohort_size", "attempt", "epoch", "key_epoch", "manifest", "software", "maker",
               "charge", "event", "cohort", "step", "party", "sites", "status"},
    "opaque": {"coordinator", "secret", "commitment", "model", "state", "transcript", "statements", "checkpoints",
               "key", "roster"},
    "noised": {"values"},
    "share": {"saturated"},
    "reason": {"reason"},
    # Of an attack: about persons that an auditor has invented, and no real one (tests/simulations/test_attack.py).
    "invented": {"attack", "site", "canaries", "guesses", "correct", "confidence", "shown", "claimed", "delta"},
}  # fmt: skip
OPAQUE = re.compile(r"(\d+:)?[0-9a-f]{64}")
KINDS = {
    "a plain run": {},
    "a run whose bounds are learned": {"schema": {"bounds": "learn"}, "privacy": {"epsilon": 4.0}},
    "a run of several classes": {"data": {"label": {"column": "ward", "classes": ["north", "east", "south"]}}},
    "a run that may retry": {"sealing": {"retry": True}},
    "a masked run": {"sealing": {"profile": "masked"}},
}


def _table() -> pd.DataFrame:
    """People whose numbers are like nobody else's: seven digits each."""
    table, rng = people_table(people=PEOPLE), np.random.default_rng(5)
    table["age"] = np.round(table["age"] * 0.9 + rng.uniform(1, 2, len(table)), 5)
    table["person"] = "patient-" + table["person"]
    return table


@pytest.fixture(scope="module", params=sorted(KINDS))
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The table, and the folders of exported logs."""
    base, table = tmp_path_factory.mktemp("scan"), _table()
    table.to_csv(base / "people.csv", index=False)
    tree = experiment_tree(str(base / "people.csv"), sites={"population": {"default": 250}}, run={"rounds": 2},
                           sealing={"profile": "sealed"}, data={"public": False})  # fmt: skip
    for section, values in KINDS[request.param].items():
        tree[section] = {**tree[section], **values}  # type: ignore[dict-item]
    if tree["schema"].get("bounds") == "learn":
        tree["schema"]["features"] = {"age": {"kind": "number"}, "smoker": {"kind": "category", "values": [0, 1]}}
    product.simulate(tree, out=base / "out")
    found = [base / "out" / "logs", base / "out" / "statistics" / "logs"]
    return table, [folder for folder in found if folder.is_dir()]


def entries(folders: list[Path]) -> Iterator[tuple[str, r.Record]]:
    for folder in folders:
        for path in sorted(folder.glob("*.log")):
            for line in path.read_bytes().splitlines():
                yield path.stem, parse_line(line)[1]


def test_every_field_has_an_origin_and_keeps_to_it(finished: Found) -> None:
    origin = {name: kind for kind, names in ORIGIN.items() for name in names}
    seen: set[str] = set()
    for party, record in entries(finished[1]):
        for field in fields(record):
            value, kind = getattr(record, field.name), origin[field.name]
            parts = value if isinstance(value, list) else [value]
            seen.add(kind)
            if kind == "opaque":
                # A run's secret of a readable profile is named by nothing; a manifest is named by its digest.
                assert all(OPAQUE.fullmatch(str(part)) for part in parts), (record.KIND, field.name)
            if kind == "noised":
                assert (party, record.KIND) == (COORDINATOR, "metrics_released")
            if kind == "share":
                assert re.fullmatch(r"[01]\.\d{6}", value)
    assert {"public", "opaque", "noised"} <= seen


def test_nothing_of_the_table_stands_in_any_log(finished: Found) -> None:
    """Neither a value, nor an identity, nor an exact count, minimum, maximum or mean of any column at a site."""
    table, folders = finished
    text = "\n".join(path.read_text() for folder in folders for path in sorted(folder.glob("*.log")))
    told = set(re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])", text))
    exact: set[str] = {str(value) for value in table["age"]}
    for site, part in table.groupby("clinic"):
        assert not re.search(rf"patient-{site}", text)
        persons = part.drop_duplicates("person")
        exact |= {str(len(part)), str(len(persons))}
        for column in ("age", "smoker", "sick", "cost"):
            values = part[column].astype(float)
            for figure in (values.sum(), values.mean(), values.std(), values.quantile(0.25), values.quantile(0.75)):
                exact |= {f"{figure:.{digits}f}" for digits in range(3, 8)} | {repr(float(figure))}
    exact |= {f"{v:.{d}f}" for v in (table["age"].min(), table["age"].max()) for d in range(2, 6)}
    exact = {number for number in exact if len(number.replace(".", "").strip("0")) > 2}
    assert len(exact) > 500
    # The control: numbers of this kind are found where they do stand.
    assert exact & set(re.findall(r"\d+(?:\.\d+)?", table.to_csv()))
    assert told & exact == set()


def test_reasons_are_the_programs_own_words(finished: Found) -> None:
    for _, record in entries(finished[1]):
        reason = getattr(record, "reason", "")
        assert not re.search(r"\d{3,}|patient", reason)


def test_what_is_noised_is_not_what_the_data_say(finished: Found) -> None:
    released = [record for _, record in entries(finished[1]) if isinstance(record, r.MetricsReleased)]
    assert released
    values = [float(value) for record in released for value in record.values]
    # Sums of counts would be whole numbers; noise is not.
    assert sum(value == int(value) for value in values) <= len(values) // 20
    assert json.loads(json.dumps(values)) == values


def test_all_fields_of_all_federated_records_have_an_origin() -> None:
    """A new field has to be thought about here."""
    local = {"LocalSnapshot", "LocalRefusal", "LocalReply", "LocalFault", "ConsentRead"}
    kinds: list[Any] = [kind for kind in r.Record.__subclasses__() if kind.__name__ not in local]
    assert {f.name for kind in kinds for f in fields(kind)} == set().union(*ORIGIN.values())
